"""Making the index of a stopped store anew, from its segments alone.

The new index grows beside the old one, which goes only when the new one is durable. Crash: in between the index is
missing, and the store says so; run it again.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from forebay_core.errors import ForebayError
from forebay_store.engine.replay import replay, segment_names
from forebay_store.engine.volumes import write_store
from forebay_store.format.rows import Table
from forebay_store.format.segment import decode_header
from forebay_store.service.dir_backend import DirBackend
from forebay_store.service.folder import NEW_INDEX_NAME, StoreFolder, open_folder, sync_folder
from forebay_store.service.lmdb_index import LmdbIndex


class Summary(NamedTuple):
    """What a rebuild found."""

    segments: int
    volumes: int
    head_entries: int

    def __str__(self) -> str:
        """One line for people."""
        return f"index made from {self.segments} segments: {self.volumes} volumes, {self.head_entries} extents"


def rebuild_index(data: Path) -> Summary:
    """Make the index of a data folder anew; a missing identity file comes back from the segments as well.

    Raises:
        ForebayError: in use, no store, no segment, or a segment is damaged or missing (named); the old index is left as
            it was.
    """
    folder = open_folder(data)
    try:
        backend = DirBackend(folder.segments)
        try:
            backend.recover()
            if folder.has_identity and not segment_names(backend):
                raise ForebayError(
                    f"{folder.segments} holds no segment, so the index would be that of an empty store; put "
                    "the segments back, or begin a new store in another folder"
                )
            if not folder.has_identity:
                folder.write_identity(_find_store(backend, folder))
            return make_index(backend, folder)
        finally:
            backend.close()
    finally:
        folder.close()


def make_index(backend: DirBackend, folder: StoreFolder) -> Summary:
    """Make an index from the segments, or from none, beside its place; it goes there when it is whole and durable."""
    summary = _build(backend, folder)
    if folder.index.is_dir():
        shutil.rmtree(folder.index)
    else:
        folder.index.unlink(missing_ok=True)
    (folder.path / NEW_INDEX_NAME).rename(folder.index)
    sync_folder(folder.path)
    return summary


def _build(backend: DirBackend, folder: StoreFolder) -> Summary:
    path = folder.path / NEW_INDEX_NAME
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    index = LmdbIndex(path)
    try:
        index.update(lambda writer: write_store(writer, folder.store))
        replay(backend, index, store=folder.store)
        segments = len(segment_names(backend))
        index.sync()
        sync_folder(path)
        with index.view() as reader:
            volumes = sum(1 for _ in reader.scan(Table.VOLUMES, b""))
            head_entries = sum(1 for _ in reader.scan(Table.HEAD, b""))
    finally:
        index.close()
    return Summary(segments, volumes, head_entries)


def _find_store(backend: DirBackend, folder: StoreFolder) -> bytes:
    names = segment_names(backend)
    if not names:
        raise ForebayError(f"{folder.path} holds neither an identity file nor a segment; there is nothing to rebuild")
    first = names[0].text
    return decode_header(backend.read(first), place=f"segment {first}").store

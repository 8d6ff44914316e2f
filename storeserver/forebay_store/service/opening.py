"""Opening a store: lock, identity, index brought up to the segments, incarnation claimed.

After it the index shows every segment, and no other start of this store can have written the segments that follow.
"""

import os
import shutil
import uuid
from pathlib import Path

from forebay_core.errors import CorruptionError, ForebayError
from forebay_store.engine.apply import LogRecord, LogSegment, apply_segments
from forebay_store.engine.cleaner import delete_leaving
from forebay_store.engine.ports import BackendError, SegmentMissingError
from forebay_store.engine.replay import next_incarnation, replay, segment_names
from forebay_store.engine.space import DiskRoom
from forebay_store.engine.volumes import read_store
from forebay_store.format.layout import build_segment
from forebay_store.format.records import StoreClaimed
from forebay_store.format.segment import NO_SEGMENT, SegmentHeader, SegmentName
from forebay_store.service.condemned import condemn, why_condemned
from forebay_store.service.damage_file import DamageFile
from forebay_store.service.dir_backend import DirBackend
from forebay_store.service.folder import NEW_INDEX_NAME, StoreFolder, make_folder
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.rebuild import make_index
from forebay_store.service.report_file import ReportFile
from forebay_store.service.unproved import STARTS_UNPROVED_MAX, look_apart, note_proved, note_start


class OpenStore:
    """What a running store works with."""

    def __init__(self, folder: StoreFolder, backend: DirBackend, index: LmdbIndex) -> None:
        self.folder = folder
        self.backend = backend
        self.index = index
        self.reports = ReportFile(folder.path, folder.store)
        self.damage = DamageFile(folder.path, folder.store)
        self.newest = NO_SEGMENT

    def room(self) -> DiskRoom:
        """Return how much the disk has left.

        Raises:
            BackendError: nobody knows.
        """
        try:
            disk = os.statvfs(self.folder.path)
        except OSError as error:
            raise BackendError(f"how much room {self.folder.path} has is unknown: {error.strerror}") from error
        return DiskRoom(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)

    def shrink(self) -> None:
        """Give room back to the disk that the index no longer needs. Raises what LmdbIndex.shrink does."""
        self.index.shrink(self.folder.path / NEW_INDEX_NAME)

    def condemn(self, text: str) -> None:
        """Note that the index is damaged: no start reads from it any more. Raises OSError."""
        condemn(self.folder.index, text)

    def note_proved(self) -> None:
        """An audit found the index whole."""
        note_proved(self.folder.index)

    def close(self) -> None:
        """Close everything; the lock goes last."""
        self.index.close()
        self.backend.close()
        self.folder.close()


def open_store(path: Path, *, now_ns: int) -> OpenStore:
    """Open the store of a data folder, or make one.

    Raises:
        ForebayError: in use, damaged, foreign, or without an index; the text says what to do.
    """
    folder = make_folder(path)
    backend: DirBackend | None = None
    try:
        backend = DirBackend(folder.segments)
        backend.recover()
        index = _open_index(folder, backend)
    except BaseException:
        if backend is not None:
            backend.close()
        folder.close()
        raise
    store = OpenStore(folder, backend, index)
    try:
        _bring_up(folder, backend, index)
        delete_leaving(backend, index)
        store.newest = claim(backend, index, store=folder.store, now_ns=now_ns)
    except BaseException:
        store.close()
        raise
    return store


def _bring_up(folder: StoreFolder, backend: DirBackend, index: LmdbIndex) -> None:
    """Replay what the index does not show, and say what to do where that can't be."""
    try:
        replay(backend, index, store=folder.store)
    except SegmentMissingError as error:
        text = "put back what is missing; if the index is a copy from another time, or it is lost for good, run"
        raise ForebayError(f"{error}; {text}: forebay store rebuild-index --data {folder.path}") from error
    except CorruptionError as error:
        raise ForebayError(f"{error}; what else is wrong tells: forebay store fsck --data {folder.path}") from error


def claim(backend: DirBackend, index: LmdbIndex, *, store: bytes, now_ns: int) -> SegmentName:
    """Write the first segment of a new incarnation and show it; return its name."""
    names = segment_names(backend)
    name = SegmentName(next_incarnation(names), 0)
    record = StoreClaimed(now_ns)
    built = build_segment(SegmentHeader(store, name, names[-1] if names else NO_SEGMENT), [(record, ())])
    backend.create(name.text, built.buffers)
    segment = LogSegment(name, [LogRecord(record, built.placed[0].payload_offset, 0, b"")], built.size)
    index.update(lambda writer: apply_segments(writer, [segment]))
    return name


def _open_index(folder: StoreFolder, backend: DirBackend) -> LmdbIndex:
    hint = f"run: forebay store rebuild-index --data {folder.path}"
    if not (folder.index / "data.mdb").exists():
        if backend.list():
            raise ForebayError(f"the index {folder.index} is {'empty' if folder.index.is_dir() else 'missing'}; {hint}")
        make_index(backend, folder)
    shutil.rmtree(folder.path / NEW_INDEX_NAME, ignore_errors=True)
    why = why_condemned(folder.index)
    if not why and note_start(folder.index) >= STARTS_UNPROVED_MAX:
        why = look_apart(folder.index)
        if why:
            condemn(folder.index, why)
    if why:
        raise ForebayError(f"the index {folder.index} is damaged ({why}); {hint}")
    index = LmdbIndex(folder.index)
    try:
        with index.view() as reader:
            found = read_store(reader)
        if found != folder.store:
            owner = "nobody" if found is None else f"store {uuid.UUID(bytes=found)}"
            raise ForebayError(f"the index {folder.index} is that of {owner}, not of this store; {hint}")
    except BaseException:
        index.close()
        raise
    return index

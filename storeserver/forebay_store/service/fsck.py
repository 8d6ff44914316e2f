"""Checking all of a stopped store's folder; nothing is changed unless it is asked to free what nothing needs.

Every segment's structure, every frame's stored and plain bytes, that no segment is missing, and that the index is
what replay of the segments gives. Codes of findings are stable:

    identity-bad        store.toml is missing or damaged
    unknown-file        nobody knows what it is
    leftover-file       what a crash left; the next start or rebuild removes it
    segment-missing     a segment names one before it that is not there, or the index shows one that is not
    segment-leaked      nothing knows it and nothing needs it: it only takes space; `--repair` deletes it
    segment-structure   header, footer or a record of a segment is damaged
    frame-header        a frame's header or tables are damaged
    frame-stored        a frame's stored bytes are damaged
    block-plain         a frame opens to other blocks than were put in
    checkpoint-chunk    rows of a checkpoint are damaged
    index-missing       there is no index
    index-bad           the index can't be read, is another store's, or a store found it damaged
    index-differs       a row of the index is not what the segments give
    index-unchecked     the segments are too damaged to say what the index should hold
    more                there is more of the same than is listed
"""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from forebay_core.errors import CorruptionError, ForebayError, InUseError, NoSpaceError, WrongUsageError
from forebay_core.frame import FrameHeader, check_stored, decode_header, open_frame
from forebay_store.engine.moving import leaving_segments, segment_name
from forebay_store.engine.ports import IndexReader, SegmentMissingError
from forebay_store.engine.replay import LoadedSegment, check_previous, load_segment, replay, segment_names
from forebay_store.engine.scrubbing import check_chunk
from forebay_store.engine.volumes import read_applied, read_store, write_store
from forebay_store.format import segment as segment_format
from forebay_store.format.layout import PlacedRecord, payload_of
from forebay_store.format.records import FRAME_RECORDS
from forebay_store.format.rows import Table
from forebay_store.format.segment import NO_SEGMENT, SegmentName, parse_name
from forebay_store.format.space_records import CheckpointComplete, IndexChunk
from forebay_store.service.condemned import CONDEMNED_NAME, why_condemned
from forebay_store.service.dir_backend import DirBackend, is_temporary
from forebay_store.service.folder import (
    FOREIGN_ALLOWED,
    IDENTITY_NAME,
    LEFTOVER_NAMES,
    OWN_NAMES,
    StoreFolder,
    open_folder,
    sync_folder,
)
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.unproved import UNPROVED_NAME, kills_readers

FINDINGS_MAX: Final = 1000
REPAIRABLE: Final = frozenset(("leftover-file", "segment-leaked"))
INDEX_NAMES: Final = frozenset(("data.mdb", "lock.mdb", CONDEMNED_NAME, UNPROVED_NAME))


class CheckError(ForebayError):
    """The check itself could not be done: no word about the store."""


class Finding(NamedTuple):
    """Something that is not as it should be."""

    code: str
    place: str
    text: str
    repaired: bool = False


class Findings:
    """What was found so far, up to a bound."""

    def __init__(self) -> None:
        self.rows: list[Finding] = []

    def add(self, code: str, place: str, text: str) -> None:
        """Note a finding."""
        if len(self.rows) < FINDINGS_MAX:
            self.rows.append(Finding(code, place, text))
        elif len(self.rows) == FINDINGS_MAX:
            self.rows.append(Finding("more", place, f"more than {FINDINGS_MAX} findings; the rest is not listed"))

    @contextmanager
    def noting(self, code: str) -> Iterator[None]:
        """Note what the checks inside raise, and go on behind them."""
        try:
            yield
        except CheckError:
            raise
        except SegmentMissingError as error:
            self.add("segment-missing", error.place, str(error))
        except CorruptionError as error:
            self.add(code, error.place, str(error))
        except ForebayError as error:
            self.add(code, "", str(error))


def fsck(data: Path, *, repair: bool = False) -> list[Finding]:
    """Return what is wrong with a stopped store's folder; an empty list if nothing is.

    With `repair` what a crash left and segments that nothing needs are deleted, if nothing else is wrong: only then it
    is certain that they are not needed.

    Raises:
        InUseError: a store runs in it.
        WrongUsageError: there is no store in it.
        CheckError: the check could not be done.
    """
    findings = Findings()
    try:
        folder = open_folder(data)
    except (InUseError, WrongUsageError):
        raise
    except ForebayError as error:
        return [Finding("identity-bad", str(data / IDENTITY_NAME), str(error))]
    try:
        backend = DirBackend(folder.segments)
        try:
            _check_names(folder, findings)
            store = _find_store(folder, backend, findings)
            if store is not None:
                _check_segments(backend, store, findings)
                _check_index(folder, backend, store, findings)
            if repair and all(one.code in REPAIRABLE for one in findings.rows):
                return [_repair(one) for one in findings.rows]
        finally:
            backend.close()
    finally:
        folder.close()
    return findings.rows


def _repair(finding: Finding) -> Finding:
    path = Path(finding.place)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    sync_folder(path.parent)
    return finding._replace(repaired=True)


def _check_names(folder: StoreFolder, findings: Findings) -> None:
    for path in sorted(folder.path.iterdir()):
        if path.name in LEFTOVER_NAMES:
            findings.add("leftover-file", str(path), "left by a crash")
        elif path.name not in OWN_NAMES | FOREIGN_ALLOWED:
            findings.add("unknown-file", str(path), "no part of a store")
    for path in sorted(folder.segments.iterdir()):
        if is_temporary(path.name):
            findings.add("leftover-file", str(path), "left by a crash; it was never acknowledged")
        elif parse_name(path.name) is None or not path.is_file():
            findings.add("unknown-file", str(path), "no segment's name, or no file")
    if folder.index.is_dir():
        for path in sorted(folder.index.iterdir()):
            if path.name not in INDEX_NAMES:
                findings.add("unknown-file", str(path), "no part of an index")


def _find_store(folder: StoreFolder, backend: DirBackend, findings: Findings) -> bytes | None:
    """Return the store's UUID, from the first readable segment if the folder does not say."""
    if folder.has_identity:
        return folder.store
    findings.add("identity-bad", str(folder.path / IDENTITY_NAME), "missing; rebuild-index makes it from the segments")
    for name in segment_names(backend):
        place = f"segment {name.text}"
        try:
            return segment_format.decode_header(backend.read(name.text), place=place).store
        except ForebayError:
            continue  # Reported with its segment, as soon as any tells the store.
    return None


def _check_segments(backend: DirBackend, store: bytes, findings: Findings) -> None:
    """Check each segment, and that none is missing but such as a checkpoint covers; `_check_files` knows of those."""
    previous = covered = NO_SEGMENT
    gaps: list[tuple[LoadedSegment, SegmentName]] = []
    for name in segment_names(backend):
        loaded: LoadedSegment | None = None
        with findings.noting("segment-structure"):
            loaded = load_segment(backend.read(name.text), name, store=store)
        if loaded is not None:
            gaps.append((loaded, previous))
            for placed in loaded.decoded.placed:
                if isinstance(placed.record, CheckpointComplete):
                    covered = max(covered, placed.record.shows)
                _check_payload(loaded, placed, findings)
        previous = name
    for loaded, before in gaps:
        if not before < loaded.decoded.header.previous <= covered:
            with findings.noting("segment-missing"):
                check_previous(loaded, before)


def _check_payload(segment: LoadedSegment, placed: PlacedRecord, findings: Findings) -> None:
    if isinstance(placed.record, FRAME_RECORDS):
        _check_frames(segment, placed, findings)
    elif isinstance(placed.record, IndexChunk):
        payload = payload_of(segment.buffer, placed)
        for place in check_chunk(segment.name, placed.record, payload, placed.payload_offset):
            findings.add("checkpoint-chunk", f"{segment.place} offset {place.offset}", place.text)


def _check_frames(segment: LoadedSegment, placed: PlacedRecord, findings: Findings) -> None:
    payload = payload_of(segment.buffer, placed)
    offset = 0
    while offset < payload.nbytes:
        place = f"{segment.place} offset {placed.payload_offset + offset}"
        header: FrameHeader | None = None
        with findings.noting("frame-header"):
            header = decode_header(payload, offset, place=place)
        if header is None:
            return  # Where the next frame begins is no longer known.
        _check_frame(header, payload[offset : offset + header.size], place, findings)
        offset += header.size


def _check_frame(header: FrameHeader, frame: memoryview, place: str, findings: Findings) -> None:
    stored: memoryview | None = None
    with findings.noting("frame-stored"):
        stored = check_stored(header, frame, place=place)
    if stored is not None and header.cipher == 0:  # Without its key nobody can look into an encrypted frame.
        with findings.noting("block-plain"):
            open_frame(header, stored, place=place)


def _check_index(folder: StoreFolder, backend: DirBackend, store: bytes, findings: Findings) -> None:
    if not (folder.index / "data.mdb").exists():
        findings.add("index-missing", str(folder.index), f"run: forebay store rebuild-index --data {folder.path}")
        return
    why = why_condemned(folder.index)
    if why:
        text = f"found damaged by the store: {why}; run: forebay store rebuild-index --data {folder.path}"
        findings.add("index-bad", str(folder.index), text)
    death = kills_readers(folder.index)
    if death:
        findings.add("index-bad", str(folder.index), f"{death}; run: forebay store rebuild-index --data {folder.path}")
        return
    with findings.noting("index-bad"):
        index = LmdbIndex(folder.index, read_only=True)
        try:
            _compare_with_replay(folder, index, backend, store, findings)
        finally:
            index.close()


def _compare_with_replay(
    folder: StoreFolder, index: LmdbIndex, backend: DirBackend, store: bytes, findings: Findings
) -> None:
    with index.view() as reader:
        applied, owner = read_applied(reader), read_store(reader)
    if owner != store:
        found = "none" if owner is None else str(uuid.UUID(bytes=owner))
        findings.add("index-bad", "index meta", f"store UUID: expected {uuid.UUID(bytes=store)}, found {found}")
        return
    if applied != NO_SEGMENT and applied not in segment_names(backend):
        findings.add("segment-missing", f"segment {applied.text}", "the newest that the index shows is not there")
        return
    with _scratch_index() as expected:
        try:
            expected.update(lambda writer: write_store(writer, store))
            replay(backend, expected, store=store, until=applied)
            with index.view() as is_there, expected.view() as should_be:
                _compare(is_there, should_be, findings)
            replay(backend, expected, store=store)
        except CorruptionError as error:
            findings.add("index-unchecked", error.place, str(error))
            return
        with expected.view() as newest:
            _check_files(folder, newest, backend, findings)


def _check_files(folder: StoreFolder, reader: IndexReader, backend: DirBackend, findings: Findings) -> None:
    """Compare the segments that there are with those that the newest state of the index knows."""
    files = set(segment_names(backend))
    known = {segment_name(key) for key, _ in reader.scan(Table.SEGMENTS, b"")}
    leaving = set(leaving_segments(reader))
    for name in sorted(known - files):
        findings.add("segment-missing", f"segment {name.text}", "the index knows it, but it is not there")
    for name in sorted(files - known):
        path = str(folder.segments / name.text)
        if name in leaving:
            findings.add(
                "leftover-file", path, "left by a crash: nothing needs this segment, the next start deletes it"
            )
        else:
            findings.add("segment-leaked", path, "nothing knows this segment; fsck --repair deletes it")


@contextmanager
def _scratch_index() -> Iterator[LmdbIndex]:
    """Lend an empty index in a temporary folder; want of room there says nothing of the store.

    Raises:
        CheckError: there is no such folder, or no room in it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="forebay-fsck-") as scratch:
            index = LmdbIndex(Path(scratch), lasting=False)
            try:
                yield index
            finally:
                index.close()
    except (OSError, NoSpaceError) as error:
        raise CheckError(
            f"no room for the index that the check compares with: {error}; make room, or set TMPDIR"
        ) from error


def _compare(found: IndexReader, expected: IndexReader, findings: Findings) -> None:
    for table in Table:
        for key, is_there, should_be in _join(found.scan(table, b""), expected.scan(table, b"")):
            if is_there != should_be:
                text = f"the index has {_show(is_there)}, the segments give {_show(should_be)}"
                findings.add("index-differs", f"index {table.value} {key.hex()}", text)


def _join(
    left: Iterator[tuple[bytes, bytes]], right: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Yield each key of either side with the values of both."""
    one, other = next(left, None), next(right, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one[0] < other[0]):
            assert one is not None
            yield one[0], one[1], None
            one = next(left, None)
        elif one is None or other[0] < one[0]:
            yield other[0], None, other[1]
            other = next(right, None)
        else:
            yield one[0], one[1], other[1]
            one, other = next(left, None), next(right, None)


def _show(value: bytes | None) -> str:
    return "nothing" if value is None else value[:48].hex()

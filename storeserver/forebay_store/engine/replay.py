"""Replay: bringing the index up to the segments, at start from where it stands and in a rebuild from nothing.

An empty index begins with the newest checkpoint in the log, if there is one. Segments are applied in the order of their
names. Each names the one before it, so a missing one is an error, not a gap; of those that a checkpoint covers only
the ones are needed that hold something live.
Crash: each transaction sets the mark of the newest applied segment; replay goes on from there.
"""

from collections.abc import Iterator, Sequence

from forebay_core.errors import CorruptionError, ForebayError
from forebay_core.units import Buffer
from forebay_store.engine.apply import LogRecord, LogSegment, apply_segments
from forebay_store.engine.checkpoint import load_checkpoint, newest_checkpoint
from forebay_store.engine.ports import Index, SegmentBackend, SegmentMissingError
from forebay_store.engine.volumes import read_applied
from forebay_store.format.layout import DecodedSegment, decode_segment, payload_of
from forebay_store.format.part import parse_part
from forebay_store.format.records import PART_RECORDS
from forebay_store.format.segment import NO_SEGMENT, SegmentName, parse_name
from forebay_store.limits import INCARNATION_MAX


def segment_names(backend: SegmentBackend) -> list[SegmentName]:
    """Return the segments in the order in which they were written."""
    return sorted(name for name in map(parse_name, backend.list()) if name is not None)


def replay(backend: SegmentBackend, index: Index, *, store: bytes, until: SegmentName | None = None) -> int:
    """Apply the segments that the index does not show yet (up to `until`); return how many.

    Raises:
        SegmentMissingError: one that must be there is not.
        CorruptionError: a segment's structure is damaged, or it belongs to another store.
        NoSpaceError: the index has no space.
    """
    names = segment_names(backend)
    with index.view() as reader:
        applied = read_applied(reader)
    if applied == NO_SEGMENT:
        applied = _begin(backend, index, names, until)
    elif applied not in names:
        raise SegmentMissingError(
            place=f"segment {applied.text}", what="segment", expected="the newest that the index shows", found="nothing"
        )
    newer = [name for name in names if name > applied and (until is None or name <= until)]
    previous = applied
    for name in newer:
        segment = load_segment(backend.read(name.text), name, store=store)
        check_previous(segment, previous)
        batch = [segment.log_segment()]
        index.update(lambda writer, batch=batch: apply_segments(writer, batch))  # type: ignore[misc]
        previous = name
    return len(newer)


def _begin(
    backend: SegmentBackend, index: Index, names: Sequence[SegmentName], until: SegmentName | None
) -> SegmentName:
    """Load the newest checkpoint into an empty index; return the newest segment that it shows."""
    found = newest_checkpoint(backend, names, until=until)
    if found is None:
        return NO_SEGMENT
    load_checkpoint(backend, index, names, found)
    return found.record.shows


class LoadedSegment:
    """A segment's bytes and what is in them."""

    def __init__(self, name: SegmentName, buffer: Buffer, decoded: DecodedSegment) -> None:
        self.name = name
        self.buffer = buffer
        self.decoded = decoded

    @property
    def place(self) -> str:
        """What errors call it."""
        return f"segment {self.name.text}"

    def log_segment(self) -> LogSegment:
        """Return it as the log had it; raises as `segment_records` does."""
        return LogSegment(self.name, list(segment_records(self)), memoryview(self.buffer).nbytes)


def load_segment(buffer: Buffer, name: SegmentName, *, store: bytes) -> LoadedSegment:
    """Return the checked segment of some bytes.

    Raises:
        CorruptionError: its structure is damaged, it is another segment, or another store's.
    """
    place = f"segment {name.text}"
    decoded = decode_segment(buffer, place=place)
    if decoded.header.store != store:
        raise CorruptionError(
            place=place, what="store of a segment", expected=store.hex(), found=decoded.header.store.hex()
        )
    if decoded.header.name != name:
        raise CorruptionError(place=place, what="name in a segment", expected=name.text, found=decoded.header.name.text)
    return LoadedSegment(name, buffer, decoded)


def check_previous(segment: LoadedSegment, previous: SegmentName) -> None:
    """Check that a segment follows another.

    Raises:
        SegmentMissingError: it follows a third one, which is not there.
    """
    named = segment.decoded.header.previous
    if named != previous:
        raise SegmentMissingError(
            place=segment.place, what="segment before it", expected=named.text, found=previous.text
        )


def segment_records(segment: LoadedSegment) -> Iterator[LogRecord]:
    """Yield the records as the log had them; the frames' headers are checked, their stored bytes are not.

    Raises:
        CorruptionError: a frame header is damaged.
    """
    for placed in segment.decoded.placed:
        entries = b""
        if isinstance(placed.record, PART_RECORDS):  # The moves of a cleaned part say where its frames lie.
            place = f"{segment.place} payload at {placed.payload_offset}"
            entries = parse_part(payload_of(segment.buffer, placed), place=place, stored=False).entries
        yield LogRecord(placed.record, placed.payload_offset, placed.payload_size, entries)


def next_incarnation(names: Sequence[SegmentName]) -> int:
    """Return the number of the store's next start.

    Raises:
        ForebayError: there were as many as a store may have.
    """
    incarnation = names[-1].incarnation + 1 if names else 1
    if incarnation > INCARNATION_MAX:
        raise ForebayError(f"this store was started {INCARNATION_MAX} times, which is all it can; copy it to a new one")
    return incarnation

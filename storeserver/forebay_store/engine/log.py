"""The end of the log: records that wait for a segment, and the one segment that is being written.

Group commit: while a segment is being written, records of all volumes gather, and the next segment takes them
together, in their order. What the cleaner copies gets segments of its own.

Invariants:
    at most one segment is being written; its name follows that of the newest durable one.
    serials rise by one with each record; those of a segment lie together.
Crash: what waits was never acknowledged; the segment being written is whole or absent.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from forebay_core.units import Buffer
from forebay_store.engine.apply import LogRecord, LogSegment
from forebay_store.format.layout import BuiltSegment, build_segment
from forebay_store.format.records import RECORD_HEADER, CutPart, Record
from forebay_store.format.segment import SEGMENT_FOOTER, SEGMENT_HEADER, SegmentHeader, SegmentName
from forebay_store.format.space_records import CheckpointComplete, CleanedPart, IndexChunk, SegmentsDeleted
from forebay_store.limits import (
    PENDING_BYTES_MAX,
    PENDING_RECORDS_MAX,
    SEGMENT_RECORDS_MAX,
    SEGMENT_SIZE_MAX,
)

_RECORD_OVERHEAD = RECORD_HEADER.size + 256
"""Bytes that a record without holes and payload takes at most."""


TOGETHER_MAX = SEGMENT_SIZE_MAX - SEGMENT_HEADER.size - SEGMENT_FOOTER.size
"""Bytes of records that surely get into one segment."""


def record_size_max(record: Record, payload_size: int) -> int:
    """Return the bytes that a record takes in a segment at most."""
    match record:
        case CutPart():
            listed = len(record.holes)
        case CleanedPart():
            listed = len(record.olds) + len(record.moves)
        case SegmentsDeleted():
            listed = len(record.names)
        case _:
            listed = 0
    return _RECORD_OVERHEAD + listed + payload_size


class Entry(NamedTuple):
    """A record that waits; `entries` is the packed table of a part's frames."""

    serial: int
    record: Record
    payload: Sequence[Buffer]
    payload_size: int
    entries: bytes

    @property
    def size_max(self) -> int:
        """Bytes in a segment, at most."""
        return record_size_max(self.record, self.payload_size)

    @property
    def is_cleaning(self) -> bool:
        """Whether it lies apart from what clients wrote, because it will live longer."""
        return isinstance(self.record, CleanedPart | IndexChunk | CheckpointComplete | SegmentsDeleted)


class Written(NamedTuple):
    """A segment that is durable now, and the serials of its records."""

    segment: LogSegment
    first_serial: int
    last_serial: int


class Log:
    """Takes records, gives segments."""

    def __init__(self, store: bytes, newest: SegmentName) -> None:
        self._store = store
        self._newest = newest
        self._pending: deque[Entry] = deque()
        self._pending_bytes = 0
        self._writing: tuple[SegmentName, list[Entry], BuiltSegment] | None = None
        self._last_serial = 0

    @property
    def last_serial(self) -> int:
        """Serial of the newest record; 0 before the first."""
        return self._last_serial

    @property
    def newest(self) -> SegmentName:
        """The newest durable segment."""
        return self._newest

    @property
    def writing(self) -> bool:
        """Whether a segment is being written."""
        return self._writing is not None

    @property
    def pending(self) -> bool:
        """Whether records wait."""
        return bool(self._pending)

    @property
    def first_serial(self) -> int:
        """Serial of the oldest record that is not durable; the next one's if there is none."""
        if self._writing is not None:
            return self._writing[1][0].serial
        return self._pending[0].serial if self._pending else self._last_serial + 1

    def has_room(self, payload_size: int) -> bool:
        """Tell whether a request with this payload may be added."""
        return (
            self._pending_bytes + payload_size + SEGMENT_SIZE_MAX // 2 <= PENDING_BYTES_MAX
            and len(self._pending) < PENDING_RECORDS_MAX
        )

    def append(self, record: Record, payload: Sequence[Buffer] = (), entries: bytes = b"") -> int:
        """Add a record; return its serial."""
        self._last_serial += 1
        payload_size = sum(memoryview(buffer).nbytes for buffer in payload)
        entry = Entry(self._last_serial, record, payload, payload_size, entries)
        assert entry.size_max + SEGMENT_HEADER.size + SEGMENT_FOOTER.size <= SEGMENT_SIZE_MAX
        self._pending.append(entry)
        self._pending_bytes += entry.size_max
        return entry.serial

    def start(self) -> tuple[SegmentName, BuiltSegment]:
        """Make a segment of what waits, up to the largest size; it counts as being written from now on."""
        assert self._writing is None
        assert self._pending
        name = SegmentName(self._newest.incarnation, self._newest.number + 1)
        taken: list[Entry] = []
        size = SEGMENT_HEADER.size + SEGMENT_FOOTER.size
        while self._pending and len(taken) < SEGMENT_RECORDS_MAX:
            if size + self._pending[0].size_max > SEGMENT_SIZE_MAX:
                break
            if taken and taken[0].is_cleaning != self._pending[0].is_cleaning:
                break
            size += self._pending[0].size_max
            taken.append(self._pending.popleft())
        built = build_segment(
            SegmentHeader(self._store, name, self._newest), [(entry.record, entry.payload) for entry in taken]
        )
        assert built.size <= size
        self._writing = (name, taken, built)
        return name, built

    def written(self) -> Written:
        """The segment is durable."""
        assert self._writing is not None
        name, taken, built = self._writing
        records = [
            LogRecord(placed.record, placed.payload_offset, placed.payload_size, entry.entries)
            for entry, placed in zip(taken, built.placed, strict=True)
        ]
        self._end_writing(taken)
        self._newest = name
        return Written(LogSegment(name, records, built.size), taken[0].serial, taken[-1].serial)

    def refused(self) -> list[int]:
        """Nothing of the segment remains: return the serials of its records; the next one takes its name."""
        assert self._writing is not None
        taken = self._writing[1]
        self._end_writing(taken)
        return [entry.serial for entry in taken]

    def drop_pending(self) -> list[int]:
        """Forget what waits; return the serials."""
        serials = [entry.serial for entry in self._pending]
        self._pending_bytes -= sum(entry.size_max for entry in self._pending)
        self._pending.clear()
        return serials

    def _end_writing(self, taken: Sequence[Entry]) -> None:
        self._pending_bytes -= sum(entry.size_max for entry in taken)
        self._writing = None
        assert self._pending_bytes >= 0

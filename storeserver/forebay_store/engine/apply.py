"""Applying records to the index: what live running, replay at start and a rebuild have in common.

Invariant: the index is a function of the segments' records in their order, and of nothing else. Records are facts,
checked before they were written; one that can't be means a damaged or foreign log, and is an error that names it.
Crash: a transaction that was lost is applied again, from the mark of the newest applied segment on.
"""

from collections.abc import Sequence
from typing import NamedTuple

from forebay_core.errors import CorruptionError
from forebay_core.extents import EXTENT_COUNT_MAX, Extent, split, unpack
from forebay_core.units import BLOCK_SIZE, make_version, sequence_of
from forebay_store.engine.flatten import FIRST_VERSION, put_origin
from forebay_store.engine.head import replace
from forebay_store.engine.head_batch import replace_rows
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.live import LiveBytes, note_segment
from forebay_store.engine.moving import apply_cleaned, apply_complete, apply_deleted, inherit_age
from forebay_store.engine.ports import IndexWriter
from forebay_store.engine.purge import purge
from forebay_store.engine.snapshots import count_clone, delete_snapshot, find_snapshot_id, take_snapshot
from forebay_store.engine.sweeping import Trimming, begin_rollback, finish, sweep
from forebay_store.engine.sweeps import forget_sweeps
from forebay_store.engine.volumes import (
    attempts_of,
    count_volume,
    delete_volume,
    find_attempt,
    find_name,
    find_volume,
    forget_attempt,
    put_staged,
    put_volume,
    staged_parts,
    write_applied,
)
from forebay_store.format.entries import DATA, HeadEntry
from forebay_store.format.head_rows import pack_rows
from forebay_store.format.part import unpack_entries
from forebay_store.format.records import (
    NO_ORIGIN,
    AttemptForgotten,
    CutCommitted,
    CutPart,
    Record,
    StoreClaimed,
    VolumeCreated,
    VolumeDeleted,
    VolumeResized,
    WriterReleased,
    WriterTaken,
)
from forebay_store.format.rows import StagedPart, Table, VolumeState
from forebay_store.format.segment import SegmentName
from forebay_store.format.snapshot_records import (
    CloneCreated,
    FlattenBegun,
    Flattened,
    OriginPart,
    Purged,
    RolledBack,
    SnapshotDeleted,
    SnapshotRecord,
    SnapshotTaken,
    Swept,
)
from forebay_store.format.snapshot_rows import SnapshotState
from forebay_store.format.space_records import CheckpointComplete, CleanedPart, IndexChunk, SegmentsDeleted
from forebay_wire.limits import HOLES_PER_PART_MAX


class LogRecord(NamedTuple):
    """A durable record: for a part also where its frames lie and their packed table."""

    record: Record
    payload_offset: int
    payload_size: int
    entries: bytes


class LogSegment(NamedTuple):
    """A durable segment's records, and its bytes."""

    name: SegmentName
    records: Sequence[LogRecord]
    size: int


def apply_segments(writer: IndexWriter, segments: Sequence[LogSegment]) -> None:
    """Apply segments in their order and set the mark of the newest.

    Raises:
        CorruptionError: a record does not follow from those before it.
    """
    live = LiveBytes()
    for segment in segments:
        note_segment(writer, segment.name, segment.size)
        for one in segment.records:
            _Applying(writer, live, segment.name).apply(one)
        inherit_age(
            writer, segment.name, [one.record for one in segment.records if isinstance(one.record, CleanedPart)]
        )
    live.write(writer)
    write_applied(writer, segments[-1].name)


class _Applying:
    """Applies records of one segment within one transaction."""

    def __init__(self, writer: IndexWriter, live: LiveBytes, segment: SegmentName) -> None:
        self._writer = writer
        self._live = live
        self._segment = segment

    def apply(self, one: LogRecord) -> None:
        """Apply one record."""
        writer, record = self._writer, one.record
        match record:
            case StoreClaimed():
                pass
            case VolumeCreated():
                self._create(record.volume, record.name, record.size, record.created_ns, origin=b"", version=0)
            case VolumeResized():
                self._resize(record)
            case VolumeDeleted():
                self._delete(record)
            case WriterTaken():
                row = self._expect(record)
                put_volume(writer, row._replace(epoch=record.epoch, writer=record.device))
                self._forget_all(record.volume)
            case WriterReleased():
                put_volume(writer, self._expect(record)._replace(writer=b""))
                self._forget_all(record.volume)
            case CutPart():
                self._stage(one, record)
            case CutCommitted():
                self._commit(record)
            case AttemptForgotten():
                forget_attempt(writer, self._live, record.volume, record.epoch, record.attempt)
            case IndexChunk():
                pass
            case CheckpointComplete():
                apply_complete(writer, self._segment, record)
            case CleanedPart():
                apply_cleaned(writer, self._live, self._segment, one.payload_offset, record)
            case SegmentsDeleted():
                self._live.write(writer)
                apply_deleted(writer, self._segment, record)
            case _:
                self._apply_more(one, record)

    def _apply_more(self, one: LogRecord, record: SnapshotRecord) -> None:
        match record:
            case SnapshotTaken():
                self._take_snapshot(record)
            case SnapshotDeleted():
                row, state = self._expect_snapshot(record)
                put_volume(self._writer, delete_snapshot(self._writer, self._finish(row), state))
            case RolledBack():
                self._roll_back(record)
            case CloneCreated():
                self._clone(record)
            case FlattenBegun():
                put_volume(self._writer, self._expect(record)._replace(flattening=True))
                self._writer.put(Table.FLATTENING, record.volume, b"")
            case OriginPart():
                self._put_origin(one, record)
            case Flattened():
                self._flattened(record)
            case Purged():
                purge(self._writer, self._live, record.number, record.version, record.entries)
            case Swept():
                self._sweep(record)

    # Volumes.

    def _create(self, volume: bytes, name: str, size: int, created_ns: int, *, origin: bytes, version: int) -> None:
        writer = self._writer
        if find_name(writer, name) is not None or find_volume(writer, volume) is not None:
            raise self._wrong("record of a new volume", "a new name and id", name)
        row = VolumeState(
            volume,
            name,
            size,
            epoch=0,
            version=version,
            committed_ns=0,
            created_ns=created_ns,
            stored_size=0,
            data_blocks=0,
            floor=0,
            in_sync_version=0,
            writer=b"",
            origin=origin,
            number=count_volume(writer),
        )
        put_volume(writer, row)

    def _resize(self, record: VolumeResized) -> None:
        row = self._finish(self._expect(record))
        if record.size < row.size:
            change = HeadChange(self._writer, self._live, row, row.version + 1)
            trimming = Trimming(change)
            trimming.trim(_tail(record.size, row.size))
            row = change.end()._replace(version=row.version + 1, sweeping=trimming.deferred)
        put_volume(self._writer, row._replace(size=record.size))

    def _delete(self, record: VolumeDeleted) -> None:
        row = self._expect(record)
        if row.snapshots:
            raise self._wrong("volume-deleted record", "a volume without snapshots", row.name)
        self._forget_all(record.volume)
        if row.origin:
            count_clone(self._writer, row.origin, row.id, -1)
        self._writer.delete(Table.FLATTENING, row.id)
        forget_sweeps(self._writer, row.id)
        delete_volume(self._writer, row)

    # Cuts.

    def _stage(self, one: LogRecord, record: CutPart) -> None:
        """A part that was overtaken by a new epoch or a deletion can't be committed any more: it is not staged."""
        row = find_volume(self._writer, record.volume)
        if row is None or row.epoch != record.epoch or not row.writer:
            return
        part = StagedPart(self._segment, one.payload_offset, one.payload_size, record.holes, one.entries)
        put_staged(self._writer, self._live, record.volume, record.epoch, record.attempt, record.part_index, part)

    def _commit(self, record: CutCommitted) -> None:
        row = self._finish(self._expect(record))
        if record.epoch != row.epoch or record.first != sequence_of(row.version) + 1 or record.last < record.first:
            expected = (row.epoch, sequence_of(row.version) + 1)
            raise self._wrong("cut-committed record", expected, (record.epoch, record.first, record.last))
        version = make_version(record.epoch, record.last)
        change = HeadChange(self._writer, self._live, row, version)
        trimming = Trimming(change)
        part_count = 0
        for part_index, part in staged_parts(self._writer, record.volume, record.epoch, record.attempt):
            if part_index != part_count or part_count == record.part_count:
                break
            part_count += 1
            _apply_part(change, trimming, part)
        if part_count != record.part_count:
            raise self._wrong("parts of a committed cut", record.part_count, part_count)
        if 0 < record.size < row.size:
            trimming.trim(_tail(record.size, row.size), own_too=True)
        self._forget_until(record)
        row = change.end()._replace(
            version=version,
            committed_ns=record.committed_ns,
            in_sync_version=record.in_sync_version,
            sweeping=trimming.deferred,
        )
        put_volume(self._writer, self._close(row, record, version))

    def _close(self, row: VolumeState, record: CutCommitted, version: int) -> VolumeState:
        """Apply the change that closes the cut, if there is one."""
        if record.size:
            row = row._replace(size=record.size)
        if record.snapshot == NO_ORIGIN:
            return row
        return take_snapshot(
            self._writer,
            row,
            snapshot=record.snapshot,
            name=record.snapshot_name,
            created_ns=record.snapshot_ns,
            version=version,
        )

    def _forget_until(self, record: CutCommitted) -> None:
        """A commit ends its own attempt and those that began before it; the next cut may be staged already."""
        committed = find_attempt(self._writer, record.volume, record.epoch, record.attempt)
        if committed is None:
            return
        for attempt in attempts_of(self._writer, record.volume):
            if attempt <= committed:
                forget_attempt(self._writer, self._live, record.volume, attempt.epoch, attempt.attempt)

    def _forget_all(self, volume: bytes) -> None:
        for attempt in attempts_of(self._writer, volume):
            forget_attempt(self._writer, self._live, volume, attempt.epoch, attempt.attempt)

    # Snapshots and clones.

    def _take_snapshot(self, record: SnapshotTaken) -> None:
        row = self._finish(self._expect(record))
        row = take_snapshot(
            self._writer,
            row,
            snapshot=record.snapshot,
            name=record.name,
            created_ns=record.created_ns,
            version=row.version + 1,
        )
        put_volume(self._writer, row)

    def _roll_back(self, record: RolledBack) -> None:
        row, state = self._expect_snapshot(record)
        row = self._finish(row)
        change = HeadChange(self._writer, self._live, row, row.version + 1)
        begin_rollback(change, state.version)
        if state.origin != row.origin:
            for origin, count in ((row.origin, -1), (state.origin, 1)):
                if origin:
                    count_clone(self._writer, origin, row.id, count)
        put_volume(
            self._writer, row._replace(version=row.version + 1, size=state.size, origin=state.origin, sweeping=True)
        )

    def _sweep(self, record: Swept) -> None:
        """A step that was logged when there was nothing to do any more does nothing."""
        found = find_volume(self._writer, record.volume)
        if found is not None and found.sweeping:
            put_volume(self._writer, sweep(self._writer, self._live, found, record.entries))

    def _finish(self, row: VolumeState) -> VolumeState:
        """The head is to change again: what the change before it hid must be gone."""
        return finish(self._writer, self._live, row)

    def _clone(self, record: CloneCreated) -> None:
        found = find_snapshot_id(self._writer, record.origin)
        if found is None:
            raise self._wrong("clone-created record", "a known snapshot", record.origin.hex())
        self._create(
            record.volume,
            record.name,
            found[1].size,
            record.created_ns,
            origin=record.origin,
            version=FIRST_VERSION,
        )
        count_clone(self._writer, record.origin, record.volume, 1)

    def _put_origin(self, one: LogRecord, record: OriginPart) -> None:
        """Blocks for a clone that was deleted meanwhile are dead from the start."""
        row = find_volume(self._writer, record.volume)
        if row is None or not row.flattening:
            return
        change = HeadChange(self._writer, self._live, row, FIRST_VERSION)
        part = StagedPart(self._segment, one.payload_offset, one.payload_size, b"", one.entries)
        put_origin(change, _entries_of(part, FIRST_VERSION))
        put_volume(self._writer, change.end())

    def _flattened(self, record: Flattened) -> None:
        row = find_volume(self._writer, record.volume)
        if row is None or not row.flattening:
            return
        count_clone(self._writer, row.origin, row.id, -1)
        self._writer.delete(Table.FLATTENING, row.id)
        put_volume(self._writer, row._replace(origin=b"", flattening=False))

    # Checks.

    def _expect(
        self,
        record: VolumeResized
        | VolumeDeleted
        | WriterTaken
        | WriterReleased
        | CutCommitted
        | SnapshotTaken
        | SnapshotDeleted
        | RolledBack
        | FlattenBegun,
    ) -> VolumeState:
        row = find_volume(self._writer, record.volume)
        if row is None:
            raise self._wrong(f"{type(record).__name__} record", "a known volume", record.volume.hex())
        return row

    def _expect_snapshot(self, record: SnapshotDeleted | RolledBack) -> tuple[VolumeState, SnapshotState]:
        row = self._expect(record)
        found = find_snapshot_id(self._writer, record.snapshot)
        if found is None or found[0].id != row.id:
            raise self._wrong(f"{type(record).__name__} record", "a snapshot of it", record.snapshot.hex())
        return found

    def _wrong(self, what: str, expected: object, found: object) -> CorruptionError:
        return CorruptionError(place=f"segment {self._segment.text}", what=what, expected=expected, found=found)


def _tail(size: int, old_size: int) -> list[Extent]:
    """Return the blocks that a volume loses."""
    return split(Extent(size // BLOCK_SIZE, (old_size - size) // BLOCK_SIZE), EXTENT_COUNT_MAX)


def _apply_part(change: HeadChange, trimming: Trimming, part: StagedPart) -> None:
    trimming.trim(unpack(part.holes, count_max=HOLES_PER_PART_MAX))
    rows = pack_rows(change.number, part, change.version)
    if rows is not None:
        replace_rows(change, rows, part.segment)
    else:
        replace(change, _entries_of(part, change.version))


def _entries_of(part: StagedPart, version: int) -> list[HeadEntry]:
    return [
        HeadEntry(
            entry.start,
            entry.length,
            DATA,
            version,
            part.segment,
            part.payload_offset + entry.frame_offset,
            entry.frame_size,
            entry.frame_blocks,
            entry.block,
        )
        for entry in unpack_entries(part.entries)
    ]

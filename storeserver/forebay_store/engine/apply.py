"""Applying records to the index: what live running, replay at start and a rebuild have in common.

Invariant: the index is a function of the segments' records in their order, and of nothing else. Records are facts,
checked before they were written; one that can't be means a damaged or foreign log, and is an error that names it.
Crash: a transaction that was lost is applied again, from the mark of the newest applied segment on.
"""

from collections.abc import Sequence
from typing import NamedTuple, assert_never

from forebay_core.errors import CorruptionError
from forebay_core.extents import unpack
from forebay_core.units import make_version, sequence_of
from forebay_store.engine.head import Delta, make_hole, replace
from forebay_store.engine.head_batch import replace_rows
from forebay_store.engine.ports import IndexWriter
from forebay_store.engine.volumes import (
    attempts_of,
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
from forebay_store.format.head_rows import pack_rows
from forebay_store.format.part import unpack_entries
from forebay_store.format.records import (
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
from forebay_store.format.rows import HeadEntry, StagedPart, VolumeState
from forebay_store.format.segment import SegmentName
from forebay_wire.limits import HOLES_PER_PART_MAX


class LogRecord(NamedTuple):
    """A durable record: for a part also where its frames lie and their packed table."""

    record: Record
    payload_offset: int
    payload_size: int
    entries: bytes


class LogSegment(NamedTuple):
    """A durable segment's records."""

    name: SegmentName
    records: Sequence[LogRecord]


def apply_segments(writer: IndexWriter, segments: Sequence[LogSegment]) -> None:
    """Apply segments in their order and set the mark of the newest.

    Raises:
        CorruptionError: a record does not follow from those before it.
    """
    for segment in segments:
        for one in segment.records:
            _apply(writer, segment.name, one)
    write_applied(writer, segments[-1].name)


def _apply(writer: IndexWriter, segment: SegmentName, one: LogRecord) -> None:
    record = one.record
    match record:
        case StoreClaimed():
            pass
        case VolumeCreated():
            _create(writer, segment, record)
        case VolumeResized():
            put_volume(writer, _expect(writer, segment, record)._replace(size=record.size))
        case VolumeDeleted():
            _delete(writer, segment, record)
        case WriterTaken():
            row = _expect(writer, segment, record)
            put_volume(writer, row._replace(epoch=record.epoch, writer=record.device))
            _forget_all(writer, record.volume)
        case WriterReleased():
            put_volume(writer, _expect(writer, segment, record)._replace(writer=b""))
            _forget_all(writer, record.volume)
        case CutPart():
            _stage(writer, segment, one, record)
        case CutCommitted():
            _commit(writer, segment, record)
        case AttemptForgotten():
            forget_attempt(writer, record.volume, record.epoch, record.attempt)
        case _:
            assert_never(record)


def _create(writer: IndexWriter, segment: SegmentName, record: VolumeCreated) -> None:
    if find_name(writer, record.name) is not None or find_volume(writer, record.volume) is not None:
        raise _wrong(segment, "volume-created record", "a new name and id", record.name)
    row = VolumeState(
        record.volume,
        record.name,
        record.size,
        epoch=0,
        version=0,
        committed_ns=0,
        created_ns=record.created_ns,
        stored_size=0,
        data_blocks=0,
        floor=0,
        in_sync_version=0,
        writer=b"",
        origin=b"",
    )
    put_volume(writer, row)


def _delete(writer: IndexWriter, segment: SegmentName, record: VolumeDeleted) -> None:
    row = _expect(writer, segment, record)
    _forget_all(writer, record.volume)
    delete_volume(writer, row)


def _stage(writer: IndexWriter, segment: SegmentName, one: LogRecord, record: CutPart) -> None:
    """A part that was overtaken by a new epoch or a deletion can't be committed any more: it is not staged."""
    row = find_volume(writer, record.volume)
    if row is None or row.epoch != record.epoch or not row.writer:
        return
    part = StagedPart(segment, one.payload_offset, one.payload_size, record.holes, one.entries)
    put_staged(writer, record.volume, record.epoch, record.attempt, record.part_index, part)


def _commit(writer: IndexWriter, segment: SegmentName, record: CutCommitted) -> None:
    row = _expect(writer, segment, record)
    if record.epoch != row.epoch or record.first != sequence_of(row.version) + 1 or record.last < record.first:
        expected = (row.epoch, sequence_of(row.version) + 1)
        raise _wrong(segment, "cut-committed record", expected, (record.epoch, record.first, record.last))
    version = make_version(record.epoch, record.last)
    part_count = stored_size = data_blocks = 0
    for part_index, part in staged_parts(writer, record.volume, record.epoch, record.attempt):
        if part_index != part_count or part_count == record.part_count:
            break
        part_count += 1
        delta = _apply_part(writer, record.volume, part, version)
        stored_size += delta.stored_size
        data_blocks += delta.data_blocks
    if part_count != record.part_count:
        raise _wrong(segment, "parts of a committed cut", record.part_count, part_count)
    _forget_until(writer, record)
    put_volume(
        writer,
        row._replace(
            version=version,
            committed_ns=record.committed_ns,
            stored_size=row.stored_size + stored_size,
            data_blocks=row.data_blocks + data_blocks,
            in_sync_version=record.in_sync_version,
        ),
    )


def _apply_part(writer: IndexWriter, volume: bytes, part: StagedPart, version: int) -> Delta:
    holes = [
        make_hole(extent.start, extent.count, version) for extent in unpack(part.holes, count_max=HOLES_PER_PART_MAX)
    ]
    emptied = replace(writer, volume, holes)
    rows = pack_rows(volume, part, version)
    if rows is not None:
        filled = replace_rows(writer, volume, rows)
    else:
        filled = replace(writer, volume, _entries_of(part, version))
    return Delta(emptied.stored_size + filled.stored_size, emptied.data_blocks + filled.data_blocks)


def _entries_of(part: StagedPart, version: int) -> list[HeadEntry]:
    return [
        HeadEntry(
            entry.start,
            entry.length,
            True,
            version,
            part.segment,
            part.payload_offset + entry.frame_offset,
            entry.frame_size,
            entry.frame_blocks,
            entry.block,
        )
        for entry in unpack_entries(part.entries)
    ]


def _forget_until(writer: IndexWriter, record: CutCommitted) -> None:
    """A commit ends its own attempt and those that began before it; the next cut may be staged already."""
    committed = find_attempt(writer, record.volume, record.epoch, record.attempt)
    if committed is None:
        return
    for attempt in attempts_of(writer, record.volume):
        if attempt <= committed:
            forget_attempt(writer, record.volume, attempt.epoch, attempt.attempt)


def _forget_all(writer: IndexWriter, volume: bytes) -> None:
    for attempt in attempts_of(writer, volume):
        forget_attempt(writer, volume, attempt.epoch, attempt.attempt)


def _expect(
    writer: IndexWriter,
    segment: SegmentName,
    record: VolumeResized | VolumeDeleted | WriterTaken | WriterReleased | CutCommitted,
) -> VolumeState:
    row = find_volume(writer, record.volume)
    if row is None:
        raise _wrong(segment, f"{type(record).__name__} record", "a known volume", record.volume.hex())
    return row


def _wrong(segment: SegmentName, what: str, expected: object, found: object) -> CorruptionError:
    return CorruptionError(place=f"segment {segment.text}", what=what, expected=expected, found=found)

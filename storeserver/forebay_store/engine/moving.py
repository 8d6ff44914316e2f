"""Applying what the cleaner and the checkpoints logged: entries get new places, segments lose their rows.

Invariants:
    an entry is moved only if it still names the old place; so whatever was written, trimmed, rolled back or deleted
    since the blocks were copied stays as it is, and a copy that nobody needs is dead from the start.
    the content of no volume and no snapshot changes.
    a segment loses its row only if nothing refers to it.
Crash: as for all records; the index is a function of them.
"""

from collections.abc import Sequence

from forebay_core.errors import CorruptionError
from forebay_store.engine.head import overlapping
from forebay_store.engine.live import LiveBytes, find_segment, put_segment
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.engine.volumes import find_volume, put_volume
from forebay_store.format.entries import (
    HISTORY_KEY,
    HeadEntry,
    decode_history,
    encode_entry,
    encode_history,
    history_key,
    stored_share,
)
from forebay_store.format.rows import SEGMENT_KEY, Table, segment_key
from forebay_store.format.segment import SegmentName
from forebay_store.format.space_records import (
    CheckpointComplete,
    CleanedPart,
    Move,
    SegmentsDeleted,
    unpack_moves,
    unpack_names,
)
from forebay_store.format.space_rows import CHECKPOINT_KEY, CheckpointMark, decode_mark, encode_mark


def apply_cleaned(
    writer: IndexWriter, live: LiveBytes, segment: SegmentName, payload_offset: int, record: CleanedPart
) -> None:
    """Let the entries that still show the old places show the new ones."""
    row = find_volume(writer, record.volume)
    if row is None:
        return
    olds = unpack_names(record.olds)
    with_history = has_history(writer, row.number)
    stored_size = 0
    for move in unpack_moves(record.moves):
        old = olds[move.old_index]
        for entry in list(overlapping(writer, row.number, move.start, move.end)):
            if is_at(entry, old, move):
                moved = _moved(entry, move, segment, payload_offset)
                writer.put(Table.HEAD, *encode_entry(row.number, moved))
                stored_size += _count(live, entry, moved)
        for entry, last in _history(writer, row.number, move) if with_history else ():
            if is_at(entry, old, move):
                moved = _moved(entry, move, segment, payload_offset)
                writer.put(Table.HISTORY, *encode_history(row.number, 0, moved, last))
                _count(live, entry, moved)
    if stored_size:
        put_volume(writer, row._replace(stored_size=row.stored_size + stored_size))


def has_history(reader: IndexReader, number: int) -> bool:
    """Tell whether a volume has any data in the history."""
    row = next(iter(reader.scan(Table.HISTORY, history_key(number, 0, 0, 0))), None)
    return row is not None and row[0] < history_key(number, 1, 0, 0)


def inherit_age(writer: IndexWriter, segment: SegmentName, parts: Sequence[CleanedPart]) -> None:
    """What was copied is as old as it was; of several parts in a segment the youngest counts."""
    row = find_segment(writer, segment)
    if parts and row is not None:
        put_segment(writer, segment, row._replace(written=max(part.written for part in parts)))


def is_at(entry: HeadEntry, old: SegmentName, move: Move) -> bool:
    """Tell whether an entry, or what is left of it, shows what was copied."""
    return (
        entry.is_data
        and entry.segment == old
        and entry.frame_offset == move.old_offset
        and move.start <= entry.start
        and entry.end <= move.end
        and entry.block - move.old_block == entry.start - move.start
    )


def apply_complete(writer: IndexWriter, segment: SegmentName, record: CheckpointComplete) -> None:
    """Note the newest complete checkpoint."""
    mark = CheckpointMark(record.shows, segment, record.stored_size, record.row_count)
    writer.put(Table.META, CHECKPOINT_KEY, encode_mark(mark))


def read_checkpoint(reader: IndexReader) -> CheckpointMark | None:
    """Return the newest complete checkpoint."""
    value = reader.get(Table.META, CHECKPOINT_KEY)
    return None if value is None else decode_mark(value)


def apply_deleted(writer: IndexWriter, segment: SegmentName, record: SegmentsDeleted) -> None:
    """Take the rows of segments away; their files may be there until the next record of this kind.

    Raises:
        CorruptionError: something refers to one of them, or no checkpoint covers it.
    """
    for key, _ in list(writer.scan(Table.LEAVING, b"")):
        writer.delete(Table.LEAVING, key)
    mark = read_checkpoint(writer)
    for name in unpack_names(record.names):
        row = find_segment(writer, name)
        if row is None or row.live or mark is None or name > mark.shows:
            raise CorruptionError(
                place=f"segment {segment.text}",
                what="deleted segment",
                expected="one that nothing needs",
                found=name.text,
            )
        writer.delete(Table.SEGMENTS, segment_key(name))
        writer.put(Table.LEAVING, segment_key(name), b"")


def leaving_segments(reader: IndexReader) -> list[SegmentName]:
    """Return the segments whose rows went with the newest record that deleted some; their files may still be there."""
    return [segment_name(key) for key, _ in reader.scan(Table.LEAVING, b"")]


def segment_name(key: bytes) -> SegmentName:
    """Return the segment of a key of `segments` or `leaving`."""
    return SegmentName(*SEGMENT_KEY.unpack(key))


def _history(writer: IndexWriter, number: int, move: Move) -> list[tuple[HeadEntry, int]]:
    """Return the pieces of an entry that are in the history: `last` of each is not below its version."""
    found: list[tuple[HeadEntry, int]] = []
    at = move.start
    while at < move.end:
        row = next(iter(writer.scan(Table.HISTORY, history_key(number, 0, at, move.version))), None)
        if row is None or row[0] >= history_key(number, 0, move.end, 0):
            break
        start = HISTORY_KEY.unpack(row[0])[1]
        if start == at:
            entry, last = decode_history(*row)
            if entry.version == move.version:
                found.append((entry, last))
            start += 1
        at = start
    return found


def _moved(entry: HeadEntry, move: Move, segment: SegmentName, payload_offset: int) -> HeadEntry:
    return entry._replace(
        segment=segment,
        frame_offset=payload_offset + move.frame_offset,
        frame_size=move.frame_size,
        frame_blocks=move.frame_blocks,
        block=move.block + entry.start - move.start,
    )


def _count(live: LiveBytes, entry: HeadEntry, moved: HeadEntry) -> int:
    """Count live bytes over from one segment to another; return by how much they grow."""
    before, after = stored_share(entry), stored_share(moved)
    live.add(entry.segment, -before)
    live.add(moved.segment, after)
    return after - before

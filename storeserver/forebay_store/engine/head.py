"""The head of a volume in the index: entries that never overlap, and how a cut replaces them.

Invariants:
    no two entries of a volume overlap; a missing one is a hole that was never written (version 0).
    adjacent holes of one version are one entry, up to the largest count.
    the deltas that `replace` returns add up to the volume's stored_size and data_blocks.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from forebay_core.extents import EXTENT_COUNT_MAX
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.format.rows import HeadEntry, Table, decode_entry, encode_entry, head_key
from forebay_store.format.segment import NO_SEGMENT


class Delta(NamedTuple):
    """What a change adds to a volume's counters."""

    stored_size: int
    data_blocks: int


def make_hole(start: int, length: int, version: int) -> HeadEntry:
    """Return a tombstone."""
    return HeadEntry(start, length, False, version, NO_SEGMENT, 0, 0, 0, 0)


def stored_share(entry: HeadEntry) -> int:
    """Return the bytes that an entry counts for: per block its frame's bytes by its frame's blocks, rounded down."""
    return entry.length * (entry.frame_size // entry.frame_blocks) if entry.is_data else 0


def narrow(entry: HeadEntry, start: int, end: int) -> HeadEntry:
    """Return the part of an entry between two blocks that it holds."""
    assert entry.start <= start < end <= entry.end
    block = entry.block + start - entry.start if entry.is_data else 0
    return entry._replace(start=start, length=end - start, block=block)


def overlapping(reader: IndexReader, volume: bytes, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield the entries that share a block with [start, end), in order, whole."""
    assert start < end
    first, last = head_key(volume, start), head_key(volume, end)
    rows = reader.scan(Table.HEAD, first)
    row = next(rows, None)
    if row is None or row[0] != first:  # One that begins exactly here tells that none reaches in from before.
        reaching = _before(reader, volume, start)
        if reaching is not None and reaching.end > start:
            yield reaching
    while row is not None and row[0] < last:
        yield decode_entry(*row)
        row = next(rows, None)


def replace(writer: IndexWriter, volume: bytes, entries: Sequence[HeadEntry]) -> Delta:
    """Put entries in place of whatever lies under them; of entries that overlap each other the later one wins."""
    stored_size = data_blocks = 0
    for run in _runs(entries):
        old, rests = _make_room(writer, volume, run[0].start, run[-1].end)
        for entry in run:
            _put(writer, volume, entry)
        for entry in (*rests, *run):
            if entry.is_data:
                stored_size += stored_share(entry)
                data_blocks += entry.length
        for entry in old:
            if entry.is_data:
                stored_size -= stored_share(entry)
                data_blocks -= entry.length
    return Delta(stored_size, data_blocks)


def _make_room(writer: IndexWriter, volume: bytes, start: int, end: int) -> tuple[list[HeadEntry], list[HeadEntry]]:
    """Remove what lies in [start, end); return the entries that did, and what is left of them outside."""
    old = list(overlapping(writer, volume, start, end))
    rests: list[HeadEntry] = []
    for entry in old:
        writer.delete(Table.HEAD, head_key(volume, entry.start))
        if entry.start < start:
            rests.append(narrow(entry, entry.start, start))
        if entry.end > end:
            rests.append(narrow(entry, end, entry.end))
    for entry in rests:
        writer.put(Table.HEAD, *encode_entry(volume, entry))
    return old, rests


def _runs(entries: Sequence[HeadEntry]) -> Iterator[Sequence[HeadEntry]]:
    """Group entries that follow each other without a gap, so that each group needs one look at what is there."""
    begin = 0
    for index in range(1, len(entries) + 1):
        if index == len(entries) or entries[index].start != entries[index - 1].end:
            yield entries[begin:index]
            begin = index


def _put(writer: IndexWriter, volume: bytes, entry: HeadEntry) -> None:
    writer.put(Table.HEAD, *encode_entry(volume, entry if entry.is_data else _merge_hole(writer, volume, entry)))


def _merge_hole(writer: IndexWriter, volume: bytes, hole: HeadEntry) -> HeadEntry:
    """Return the hole joined with neighbours of its version, which are removed."""
    left = _before(writer, volume, hole.start)
    if left is not None and _joins(left, hole):
        writer.delete(Table.HEAD, head_key(volume, left.start))
        hole = make_hole(left.start, left.length + hole.length, hole.version)
    value = writer.get(Table.HEAD, head_key(volume, hole.end))
    if value is not None:
        right = decode_entry(head_key(volume, hole.end), value)
        if _joins(hole, right):
            writer.delete(Table.HEAD, head_key(volume, right.start))
            hole = make_hole(hole.start, hole.length + right.length, hole.version)
    return hole


def _joins(left: HeadEntry, right: HeadEntry) -> bool:
    return (
        not left.is_data
        and not right.is_data
        and left.end == right.start
        and left.version == right.version
        and left.length + right.length <= EXTENT_COUNT_MAX
    )


def _before(reader: IndexReader, volume: bytes, start: int) -> HeadEntry | None:
    found = reader.before(Table.HEAD, head_key(volume, start))
    if found is None or not found[0].startswith(volume):
        return None
    return decode_entry(*found)

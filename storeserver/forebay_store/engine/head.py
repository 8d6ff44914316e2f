"""The head of a volume in the index: entries that never overlap, and how a change replaces them.

LMDB has no checksums of its pages. A row whose key lost a bit stands where the search for its old place ends, as one
of the neighbours, for it did not move. So those are checked too before anybody is told that nothing is there.

Invariants:
    no two entries of a volume overlap; what has none was never written: zeros, or of a clone the origin.
    a hole over a hole keeps the older one, and what was never written gets one in a clone only: nothing else changes.
    of a cut that trims a block and writes it the data counts, in whatever order it names them; only a volume's end that
    is cut off is cut off last.
    adjacent holes that one cut made are one entry, up to the largest count.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from forebay_core.extents import EXTENT_COUNT_MAX
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.engine.trim_batch import Turned, turn
from forebay_store.format.entries import (
    HOLE,
    HeadEntry,
    check_neighbours,
    decode_entry,
    encode_entry,
    head_key,
    make_hole,
    narrow,
    number_of,
)
from forebay_store.format.rows import Table

_ENTRIES_PER_STEP: Final = 4096
"""Entries that a trim takes into memory at a time."""


def overlapping(reader: IndexReader, number: int, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield the entries that share a block with [start, end), in order, whole.

    Raises:
        CorruptionError: one of them is damaged, or those around them are.
    """
    assert start < end
    key, last = head_key(number, start), head_key(number, end)
    rows = reader.scan(Table.HEAD, key)
    row = next(rows, None)
    if row is None or row[0] != key:  # One that begins exactly here tells that none reaches in from before.
        reaching = _before(reader, number, start)
        if reaching is not None and reaching.end > start:
            yield reaching
    while row is not None:
        check_neighbours("head", None, key, row[0])
        entry = decode_entry(*row)
        if row[0] >= last:
            return
        yield entry
        key = head_key(number, entry.end)
        row = next(rows, None)


def replace(change: HeadChange, entries: Sequence[HeadEntry]) -> None:
    """Put entries in place of whatever lies under them; of entries that overlap each other the later one wins."""
    for run in _runs(entries):
        _make_room(change, run[0].start, run[-1].end)
        for entry in run:
            change.add(entry)
            if entry.kind == HOLE:
                _put_hole(change, entry)
            else:
                change.writer.put(Table.HEAD, *encode_entry(change.number, entry))


def trim(change: HeadChange, start: int, end: int, *, entries_max: int, own_too: bool = False) -> tuple[int, int]:
    """Make blocks read as zeros up to about so many entries; return where the rest begins, and how many may follow.

    What the change itself wrote stays, unless `own_too`.
    """
    at = start
    while at < end and entries_max > 0:
        count = min(entries_max, _ENTRIES_PER_STEP)
        reaching = _before(change.writer, change.number, at)
        turned = None
        if reaching is None or reaching.end <= at:
            turned = turn(change, at, end, count=count, own_too=own_too)
        if turned is not None:
            found_count, stop = len(turned), turned.end if len(turned) == count else end
            _put_turned(change, turned, at, stop)
        else:
            found = list(islice(overlapping(change.writer, change.number, at, end), count))
            found_count, stop = len(found), end if len(found) < count else min(found[-1].end, end)
            _trim_found(change, found, at, stop, own_too=own_too)
        entries_max -= found_count
        at = stop
    return at, entries_max


def _put_turned(change: HeadChange, turned: Turned, start: int, end: int) -> None:
    holes = turned.outermost()
    around: list[int] = []
    _join_around(change, holes, around, start, end)
    rows = [encode_entry(change.number, hole) for hole in holes]
    first, last = rows[0], rows[-1]
    removed = {*turned.removed_keys(), *(head_key(change.number, one) for one in around)}
    turned.displace()
    for key in sorted((removed | {turned.first_key}) - {first[0], last[0]}):
        change.writer.delete(Table.HEAD, key)
    change.writer.put_many(Table.HEAD, [first, *turned.inner_rows(), *rows[1:]])


def _trim_found(change: HeadChange, found: Sequence[HeadEntry], start: int, end: int, *, own_too: bool) -> None:
    """Make [start, end) read as zeros, where `found` is what there is of it.

    The rows are written at once, mostly over those that they replace: entry by entry it was 10 us for each, not 6.
    """
    holes: list[HeadEntry] = []
    rests: list[HeadEntry] = []
    removed: list[int] = []
    at = start
    for entry in found:
        if at < entry.start and change.is_clone:
            _add_hole(holes, make_hole(at, entry.start - at, change.version))
        at, stop = max(entry.start, at), min(entry.end, end)
        if entry.kind == HOLE or entry.version >= change.version + own_too:
            if entry.kind == HOLE and entry.version == change.version:
                removed.append(entry.start)
                _add_hole(holes, entry)
        else:
            removed.append(entry.start)
            rests += [narrow(entry, *rest) for rest in ((entry.start, at), (stop, entry.end)) if rest[0] < rest[1]]
            change.displace(narrow(entry, at, stop))
            _add_hole(holes, make_hole(at, stop - at, change.version))
        at = stop
    if at < end and change.is_clone:
        _add_hole(holes, make_hole(at, end - at, change.version))
    _join_around(change, holes, removed, start, end)
    _exchange(change, removed, holes + rests)


def _add_hole(holes: list[HeadEntry], hole: HeadEntry) -> None:
    if holes and _joins(holes[-1], hole):
        holes[-1] = make_hole(holes[-1].start, holes[-1].length + hole.length, hole.version)
    else:
        holes.append(hole)


def _join_around(change: HeadChange, holes: list[HeadEntry], removed: list[int], start: int, end: int) -> None:
    """Join the outermost of some holes with neighbours of their version outside [start, end)."""
    if holes and holes[0].start <= start:
        left = _before(change.writer, change.number, holes[0].start)
        if left is not None and _joins(left, holes[0]):
            removed.append(left.start)
            holes[0] = make_hole(left.start, left.length + holes[0].length, left.version)
    if holes and holes[-1].end >= end:
        right = _at(change.writer, change.number, holes[-1].end)
        if right is not None and _joins(holes[-1], right):
            removed.append(right.start)
            _add_hole(holes, right)


def _exchange(change: HeadChange, removed: Sequence[int], entries: Sequence[HeadEntry]) -> None:
    """Put entries in the place of those that begin at some blocks."""
    rows = [encode_entry(change.number, entry) for entry in entries]
    rows.sort()
    for start in sorted(set(removed).difference([entry.start for entry in entries])):
        change.writer.delete(Table.HEAD, head_key(change.number, start))
    change.writer.put_many(Table.HEAD, rows)


def _cut_out(change: HeadChange, entry: HeadEntry, start: int, end: int) -> None:
    """Take [start, end) out of an entry that holds it."""
    change.writer.delete(Table.HEAD, head_key(change.number, entry.start))
    if entry.start < start:
        change.writer.put(Table.HEAD, *encode_entry(change.number, narrow(entry, entry.start, start)))
    if entry.end > end:
        change.writer.put(Table.HEAD, *encode_entry(change.number, narrow(entry, end, entry.end)))
    change.displace(narrow(entry, start, end))


def _make_room(change: HeadChange, start: int, end: int) -> None:
    """Remove what lies in [start, end)."""
    for entry in list(overlapping(change.writer, change.number, start, end)):
        _cut_out(change, entry, max(entry.start, start), min(entry.end, end))


def _runs(entries: Sequence[HeadEntry]) -> Iterator[Sequence[HeadEntry]]:
    """Group entries that follow each other without a gap, so that each group needs one look at what is there."""
    begin = 0
    for index in range(1, len(entries) + 1):
        if index == len(entries) or entries[index].start != entries[index - 1].end:
            yield entries[begin:index]
            begin = index


def _put_hole(change: HeadChange, hole: HeadEntry) -> None:
    """Put a hole, joined with neighbours of its version."""
    writer, number = change.writer, change.number
    left = _before(writer, number, hole.start)
    if left is not None and _joins(left, hole):
        writer.delete(Table.HEAD, head_key(number, left.start))
        hole = make_hole(left.start, left.length + hole.length, hole.version)
    right = _at(writer, number, hole.end)
    if right is not None and _joins(hole, right):
        writer.delete(Table.HEAD, head_key(number, right.start))
        hole = make_hole(hole.start, hole.length + right.length, hole.version)
    writer.put(Table.HEAD, *encode_entry(number, hole))


def _joins(left: HeadEntry, right: HeadEntry) -> bool:
    return (
        left.kind == HOLE
        and right.kind == HOLE
        and left.end == right.start
        and left.version == right.version
        and left.length + right.length <= EXTENT_COUNT_MAX
    )


def _before(reader: IndexReader, number: int, start: int) -> HeadEntry | None:
    key = head_key(number, start)
    found = reader.before(Table.HEAD, key)
    if found is None:
        return None
    check_neighbours("head", found[0], key, None)
    entry = decode_entry(*found)
    return entry if number_of(found[0]) == number else None


def _at(writer: IndexWriter, number: int, start: int) -> HeadEntry | None:
    key = head_key(number, start)
    value = writer.get(Table.HEAD, key)
    return decode_entry(key, value) if value is not None and number_of(key) == number else None

"""What can be read: the head of a volume, or one of its snapshots, and what shows there, block by block.

Invariants:
    spans cover what was asked for exactly and in order; a None between them is one entry looked at that does not show,
    so that who takes the spans can bound the work.
    looking does not cost more with more snapshots: the history is sought for each start, never gone through.
    what a trim or a rollback hid shows no more, whether it left the head already or not.
"""

from collections.abc import Iterator, Sequence
from heapq import merge
from typing import NamedTuple

from forebay_core.errors import RefusedError
from forebay_core.frame import FRAME_BLOCKS_MAX
from forebay_core.units import BLOCK_SIZE, ID_SIZE
from forebay_store.engine.head import overlapping
from forebay_store.engine.ports import IndexCursor, IndexReader
from forebay_store.engine.snapshots import find_snapshot, find_snapshot_id
from forebay_store.engine.sweeps import sweeps_in
from forebay_store.engine.volumes import find_volume
from forebay_store.format.entries import (
    DATA,
    HISTORY_KEY,
    HOLE,
    LEVEL_BITS,
    ORIGIN,
    HeadEntry,
    check_neighbours,
    decode_history,
    history_key,
    make_hole,
    make_origin,
    narrow,
)
from forebay_store.format.rows import Table, VolumeState
from forebay_store.format.snapshot_rows import SnapshotState
from forebay_store.format.sweep_rows import Sweep
from forebay_wire import messages


class View(NamedTuple):
    """The head of a volume (`snapshot` is None) or one of its snapshots."""

    row: VolumeState
    snapshot: SnapshotState | None

    @property
    def name(self) -> str:
        """What people call it."""
        return self.row.name if self.snapshot is None else f"{self.row.name}@{self.snapshot.name}"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.row.size if self.snapshot is None else self.snapshot.size

    @property
    def blocks(self) -> int:
        """Blocks."""
        return self.size // BLOCK_SIZE

    @property
    def origin(self) -> bytes:
        """The snapshot that it reads through to; empty: none."""
        return self.row.origin if self.snapshot is None else self.snapshot.origin

    @property
    def version(self) -> int:
        """What it is as of."""
        return self.row.version if self.snapshot is None else self.snapshot.version


def find_view(reader: IndexReader, id_: bytes) -> View | None:
    """Return the volume or snapshot of an id."""
    if len(id_) != ID_SIZE:
        return None
    row = find_volume(reader, id_)
    if row is not None:
        return View(row, None)
    found = find_snapshot_id(reader, id_)
    return None if found is None else View(*found)


def expect_view(reader: IndexReader, id_: bytes) -> View:
    """Return the volume or snapshot of an id.

    Raises:
        RefusedError: there is none.
    """
    view = find_view(reader, id_)
    if view is None:
        raise RefusedError(messages.NO_SUCH_VOLUME, f"no volume or snapshot of id {id_[:ID_SIZE].hex()} in this store")
    return view


def walk(reader: IndexReader, view: View, start: int, end: int, *, through: bool = False) -> Iterator[HeadEntry | None]:
    """Yield what shows in [start, end), see above. What was never written has version 0: a hole, or of a clone an
    origin entry; with `through` what shows there in its origin, with version 0."""
    at = start
    for entry in _entries(reader, view, start, end):
        if at < entry.start:
            yield from _below(reader, view, at, entry.start, 0, through=through)
            at = entry.start
        if entry.version > view.version:
            yield None
            continue
        if entry.kind == ORIGIN:
            yield from _below(reader, view, entry.start, entry.end, entry.version, through=through)
        else:
            yield entry
        at = entry.end
    if at < end:
        yield from _below(reader, view, at, end, 0, through=through)


def shown(reader: IndexReader, view: View, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield the entries of the view itself in [start, end), narrowed, in order; gaps were never written."""
    return (entry for entry in _entries(reader, view, start, end) if entry.version <= view.version)


def _below(
    reader: IndexReader, view: View, start: int, end: int, version: int, *, through: bool
) -> Iterator[HeadEntry | None]:
    """Yield what shows where the view has nothing of its own."""
    if not view.origin:
        yield make_hole(start, end - start, version)
    elif not through:
        yield make_origin(start, end - start, version)
    else:
        origin = expect_view(reader, view.origin)
        stop = max(start, min(end, origin.blocks))
        if start < stop:
            for entry in walk(reader, origin, start, stop, through=True):
                yield entry if entry is None else entry._replace(version=0)
        if stop < end:
            yield make_hole(stop, end - stop, 0)


def _entries(reader: IndexReader, view: View, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield narrowed entries in the order of their starts; those that show never overlap each other."""
    head = (_swept_head if view.row.sweeping else _head)(reader, view, start, end)
    if view.snapshot is None:
        return head
    number, version = view.row.number, view.snapshot.version
    levels = [history_at(reader, number, level, version, start, end) for level in range(len(LEVEL_BITS))]
    return merge(head, *levels, key=_start)


def _head(reader: IndexReader, view: View, start: int, end: int) -> Iterator[HeadEntry]:
    return (
        narrow(entry, max(entry.start, start), min(entry.end, end))
        for entry in overlapping(reader, view.row.number, start, end)
    )


def _swept_head(reader: IndexReader, view: View, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield the head as it will be when the sweeps that the view sees are through."""
    at = start
    for sweep in sweeps_in(reader, view.row.id, start, end):
        if sweep.version > view.version:
            break  # All are of one change.
        begin, stop = max(at, sweep.start), min(end, sweep.end)
        if at < begin:
            yield from _head(reader, view, at, begin)
        yield from (_rolled_back if sweep.shown else _trimmed)(reader, view, sweep, begin, stop)
        at = stop
    if at < end:
        yield from _head(reader, view, at, end)


def _trimmed(reader: IndexReader, view: View, sweep: Sweep, start: int, end: int) -> Iterator[HeadEntry]:
    at = start
    for entry in _head(reader, view, start, end):
        if at < entry.start and sweep.is_clone:
            yield make_hole(at, entry.start - at, sweep.version)
        hidden = sweep.hides(entry.version) and entry.kind != HOLE
        yield make_hole(entry.start, entry.length, sweep.version) if hidden else entry
        at = entry.end
    if at < end and sweep.is_clone:
        yield make_hole(at, end - at, sweep.version)


def _rolled_back(reader: IndexReader, view: View, sweep: Sweep, start: int, end: int) -> Iterator[HeadEntry]:
    state = find_snapshot(reader, view.row.number, sweep.shown)
    assert state is not None  # It is deleted only after the sweep.
    shows = View(view.row, state)
    for entry in _head(reader, view, start, end):
        if not sweep.hides(entry.version):
            yield entry
            continue
        old = list(shown(reader, shows, entry.start, entry.end))
        for piece in as_shown(shows, entry, old, 0, sweep.version):
            alike = piece.kind == entry.kind and piece.kind != DATA
            yield narrow(entry, piece.start, piece.end) if alike else piece


def as_shown(view: View, entry: HeadEntry, old: Sequence[HeadEntry], index: int, version: int) -> Iterator[HeadEntry]:
    """Yield what a view shows in the extent of an entry, as of a version: `old` from `index` on, and gaps."""
    gap = make_origin if view.origin else make_hole
    at = entry.start
    while index < len(old) and old[index].start < entry.end:
        one = old[index]
        index += 1
        start, end = max(one.start, entry.start), min(one.end, entry.end)
        if at < start:
            yield gap(at, start - at, version)
        yield narrow(one, start, end)._replace(version=version)
        at = end
    if at < entry.end:
        yield gap(at, entry.end - at, version)


def _start(entry: HeadEntry) -> int:
    return entry.start


def history_at(reader: IndexReader, number: int, level: int, version: int, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield narrowed entries of one level, for each start the one that was current at a version, if any.

    Those that begin at a block have disjoint lives: the first that ends at or after the version is it, or none is.
    """
    bits = LEVEL_BITS[level]
    first = start >> bits << bits if level else max(0, start - FRAME_BLOCKS_MAX + 1)
    cursor = reader.cursor(Table.HISTORY)
    prefix = number << 8 | level
    row = _seek(cursor, history_key(number, level, first, version))
    while row is not None:
        found_prefix, at, last = HISTORY_KEY.unpack(row[0])
        if found_prefix != prefix or at >= end:
            return
        if last < version:
            row = _seek(cursor, history_key(number, level, at, version))
            continue
        entry, _ = decode_history(*row)
        if entry.end > start:
            yield narrow(entry, max(at, start), min(entry.end, end))
        row = _seek(cursor, history_key(number, level, at + 1, version))


def _seek(cursor: IndexCursor, key: bytes) -> tuple[bytes, bytes] | None:
    """Go to the first row at or after a key, and check the one before as well, as `overlapping` does."""
    row = cursor.seek(key)
    if row is not None and row[0] == key:
        return row
    before = cursor.before()
    check_neighbours("history", before and before[0], key, row and row[0])
    for neighbour in (before, row):
        if neighbour is not None:
            decode_history(*neighbour)
    return row


def origin_depth(reader: IndexReader, view: View) -> int:
    """Return through how many snapshots a view reads."""
    depth = 0
    while view.origin:
        depth += 1
        view = expect_view(reader, view.origin)
    return depth

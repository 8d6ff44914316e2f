"""Rolling back: the head of a volume becomes what one of its snapshots shows, as a change of its own.

Only entries that are younger than the snapshot can differ from it, for nothing leaves the head without another entry
in its place. What differs gets new entries with the version of the rollback, so `changed` lists what it reverted; a
hole where the snapshot shows one as well, or the origin where it does, stays as it is.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Final

from forebay_core.extents import EXTENT_COUNT_MAX
from forebay_core.units import LBA_MAX
from forebay_store.engine.head import overlapping
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.views import View, as_shown, shown
from forebay_store.format.entries import DATA, HOLE, HeadEntry, encode_entry, head_key, make_hole, narrow
from forebay_store.format.rows import Table

_ENTRIES_PER_STEP: Final = 4096

_LOOKS_PER_CHANGE: Final = 16
"""How many entries may be looked at in the time that changing one takes."""


def roll_back(change: HeadChange, view: View, start: int, *, entries_max: int) -> tuple[int, int]:
    """Make the head what a snapshot of it shows, from a block on and for about so many entries; return where the rest
    begins, and how many may follow."""
    at = start
    looks_max = entries_max * _LOOKS_PER_CHANGE
    while at <= LBA_MAX and entries_max > 0 and looks_max > 0:
        count = min(entries_max, _ENTRIES_PER_STEP)
        found = list(islice(overlapping(change.writer, change.number, at, LBA_MAX + 1), count))
        younger = [entry for entry in found if view.version < entry.version < change.version]
        if younger:
            _roll_back(change, view, younger)
        entries_max -= len(younger)
        looks_max -= len(found)
        at = found[-1].end if len(found) == count else LBA_MAX + 1
    return at, min(entries_max, looks_max // _LOOKS_PER_CHANGE)


def _roll_back(change: HeadChange, view: View, younger: Sequence[HeadEntry]) -> None:
    """Put what the view shows in the place of entries, which are in order."""
    old = list(shown(change.writer, view, younger[0].start, younger[-1].end))
    fresh: list[HeadEntry] = []
    index = 0
    for entry in younger:
        while index < len(old) and old[index].end <= entry.start:
            index += 1
        for piece in as_shown(view, entry, old, index, change.version):
            _replace_piece(change, entry, piece, fresh)
    change.writer.put_many(Table.HEAD, [encode_entry(change.number, piece) for piece in fresh])


def _replace_piece(change: HeadChange, entry: HeadEntry, piece: HeadEntry, fresh: list[HeadEntry]) -> None:
    """Add what takes the place of a piece of an entry: another, joined with the hole before it, or the same."""
    if piece.kind == entry.kind and piece.kind != DATA:
        fresh.append(narrow(entry, piece.start, piece.end))
        return
    change.displace(narrow(entry, piece.start, piece.end))
    change.add(piece)
    last = fresh[-1] if fresh else None
    if last is not None and _joins(last, piece):
        fresh[-1] = make_hole(last.start, last.length + piece.length, piece.version)
        if piece.start == entry.start:
            change.writer.delete(Table.HEAD, head_key(change.number, entry.start))
    else:
        fresh.append(piece)


def _joins(left: HeadEntry, right: HeadEntry) -> bool:
    return (
        left.kind == right.kind == HOLE
        and left.end == right.start
        and left.version == right.version
        and left.length + right.length <= EXTENT_COUNT_MAX
    )

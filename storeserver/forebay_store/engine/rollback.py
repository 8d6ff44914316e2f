"""Rolling back: the head of a volume becomes what one of its snapshots shows, as a change of its own.

Only entries that are younger than the snapshot can differ from it, for nothing leaves the head without another entry
in its place. What differs gets new entries with the version of the rollback, so `changed` lists what it reverted.
"""

from itertools import islice
from typing import Final

from forebay_core.units import LBA_MAX
from forebay_store.engine.head import overlapping, replace
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.views import View, shown
from forebay_store.format.entries import HOLE, ORIGIN, HeadEntry, make_hole, make_origin

_ENTRIES_PER_STEP: Final = 1024


def roll_back(change: HeadChange, view: View) -> None:
    """Make the head what a snapshot of it shows."""
    at = 0
    while at <= LBA_MAX:
        found = list(islice(overlapping(change.writer, change.number, at, LBA_MAX + 1), _ENTRIES_PER_STEP))
        fresh = [entry for one in found if one.version > view.version for entry in _as_shown(change, view, one)]
        replace(change, fresh)
        if len(found) < _ENTRIES_PER_STEP:
            return
        at = found[-1].end


def _as_shown(change: HeadChange, view: View, entry: HeadEntry) -> list[HeadEntry]:
    """Return what takes the place of an entry, but for pieces that read alike."""
    fresh: list[HeadEntry] = []
    at = entry.start
    for old in shown(change.writer, view, entry.start, entry.end):
        fresh += _gap(change, view, at, old.start)
        fresh.append(old._replace(version=change.version))
        at = old.end
    fresh += _gap(change, view, at, entry.end)
    return [one for one in fresh if one.kind != entry.kind or one.kind not in (HOLE, ORIGIN)]


def _gap(change: HeadChange, view: View, start: int, end: int) -> list[HeadEntry]:
    if start >= end:
        return []
    return [(make_origin if view.origin else make_hole)(start, end - start, change.version)]

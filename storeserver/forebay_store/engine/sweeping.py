"""Trims and rollbacks of many entries: they show at once, and what they hide leaves the head in steps.

A trim does a bounded part at once, which is all of it nearly always; the rest and each rollback is noted as a sweep
(`forebay_store.engine.sweeps`). Each step is a record of the log, so between two of them the changes of other volumes
have their turn. The volume's own next change waits for the last step; should a record of it come before, as in a log
that an older store wrote, it finishes the sweep first.

Crash: the index is a function of the records; the next start goes on with the steps.
"""

from forebay_core.extents import EXTENT_COUNT_MAX, Extent
from forebay_core.units import LBA_MAX
from forebay_store.engine.head import trim
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.live import LiveBytes
from forebay_store.engine.ports import IndexWriter
from forebay_store.engine.rollback import roll_back
from forebay_store.engine.snapshots import find_snapshot
from forebay_store.engine.sweeps import first_sweep, put_sweep, shorten
from forebay_store.engine.views import View
from forebay_store.format.rows import Table, VolumeState, lost_row
from forebay_store.format.snapshot_rows import snapshot_key
from forebay_store.format.sweep_rows import Sweep
from forebay_store.limits import TRIM_ENTRIES_MAX

_ALL_ENTRIES = 1 << 62


class Trimming:
    """The trims of one change; `deferred` tells whether something of them is still to be swept."""

    def __init__(self, change: HeadChange) -> None:
        self._change = change
        self._left = TRIM_ENTRIES_MAX
        self.deferred = False

    def trim(self, extents: list[Extent], *, own_too: bool = False) -> None:
        """Make blocks read as zeros, but for those that the change itself writes unless `own_too`."""
        for extent in extents:
            at, self._left = trim(self._change, extent.start, extent.end, entries_max=self._left, own_too=own_too)
            if at < extent.end:
                self.deferred = True
                put_sweep(self._change.writer, _sweep_of(self._change, at, extent.end, hides_own=own_too))


def begin_rollback(change: HeadChange, version: int) -> None:
    """Make the head what the snapshot of a version shows."""
    put_sweep(change.writer, _sweep_of(change, 0, LBA_MAX + 1)._replace(shown=version))


def sweep(writer: IndexWriter, live: LiveBytes, row: VolumeState, entries_max: int) -> VolumeState:
    """Do one step; return the volume's row, which is to be set."""
    found = first_sweep(writer, row.id)
    while found is not None and entries_max > 0:
        made_in = row._replace(newest_snapshot=found.newest_snapshot, origin=row.id if found.is_clone else b"")
        change = HeadChange(writer, live, made_in, found.version)
        if found.shown:
            at, entries_max = _roll_back(change, row, found, entries_max)
        else:
            end = min(found.end, found.start + EXTENT_COUNT_MAX)
            at, entries_max = trim(change, found.start, end, entries_max=entries_max, own_too=found.hides_own)
        shorten(writer, found, at)
        swept = change.end()
        row = row._replace(stored_size=swept.stored_size, data_blocks=swept.data_blocks)
        found = first_sweep(writer, row.id)
    return row._replace(sweeping=found is not None)


def finish(writer: IndexWriter, live: LiveBytes, row: VolumeState) -> VolumeState:
    """Do all steps; return the volume's row, which is to be set."""
    return sweep(writer, live, row, _ALL_ENTRIES) if row.sweeping else row


def _roll_back(change: HeadChange, row: VolumeState, found: Sweep, entries_max: int) -> tuple[int, int]:
    state = find_snapshot(change.writer, row.number, found.shown)
    if state is None:  # It is deleted only after the sweep.
        raise lost_row(Table.SNAPSHOTS, snapshot_key(row.number, found.shown))
    return roll_back(change, View(row, state), found.start, entries_max=entries_max)


def _sweep_of(change: HeadChange, start: int, end: int, *, hides_own: bool = False) -> Sweep:
    return Sweep(
        change.volume,
        start,
        end,
        version=change.version,
        newest_snapshot=change.newest_snapshot,
        shown=0,
        is_clone=change.is_clone,
        hides_own=hides_own,
    )

"""Trims of many entries that no snapshot shows: their rows are turned into holes by column, not one by one.

A trim of ten million scattered extents is that many rows; through objects each cost 6 us, and the volume's next cut
waits for the last. What is not as simple as most are is left to `forebay_store.engine.head`, and the rows are the same.
"""

from itertools import islice
from typing import Final

import numpy as np

from forebay_store.engine.head_change import HeadChange
from forebay_store.format.entries import DATA, HeadEntry, head_key, make_hole
from forebay_store.format.entry_columns import Columns, pack_holes, totals_of
from forebay_store.format.rows import Table

ROWS_MIN: Final = 64
"""Fewer are done faster one by one."""


class Turned:
    """Rows that a trim turns into holes: those of the change before they are joined with what lies around."""

    def __init__(self, change: HeadChange, rows: list[tuple[bytes, bytes]], columns: Columns) -> None:
        self._change = change
        self._rows = rows
        self._columns = columns
        breaks = np.flatnonzero(columns.starts[1:] != columns.ends[:-1]) + 1
        self._firsts = np.concatenate(([0], breaks))
        starts = columns.starts[self._firsts]
        self._starts = starts
        self._lengths = columns.ends[np.concatenate((breaks, [len(rows)])) - 1] - starts
        self.end = int(columns.ends[-1])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first_key(self) -> bytes:
        """Key of the first row."""
        return self._rows[0][0]

    def outermost(self) -> list[HeadEntry]:
        """Return the first and the last hole, which is one if there is only one."""
        at = (0, len(self._starts) - 1) if len(self._starts) > 1 else (0,)
        version = self._change.version
        return [make_hole(int(self._starts[index]), int(self._lengths[index]), version) for index in at]

    def inner_rows(self) -> list[tuple[bytes, bytes]]:
        """Return the rows of the holes between them."""
        change = self._change
        return pack_holes(change.number, self._starts[1:-1], self._lengths[1:-1], change.version)

    def removed_keys(self) -> list[bytes]:
        """Return the keys of rows that are joined with the one before them."""
        gone = np.ones(len(self._rows), bool)
        gone[self._firsts] = False
        return [self._rows[index][0] for index in np.flatnonzero(gone).tolist()]

    def displace(self) -> None:
        """Tell the change that what the rows showed dies."""
        self._change.displace_dead(totals_of(self._columns))


def turn(change: HeadChange, start: int, end: int, *, count: int, own_too: bool) -> Turned | None:
    """Return what becomes of the next `count` rows from `start` on; None if they are few, or not all of the kind.

    Nothing may reach into `start` from before.

    Raises:
        CorruptionError: a row is damaged.
    """
    if change.is_clone or count < ROWS_MIN:
        return None
    rows = list(islice(change.writer.scan(Table.HEAD, head_key(change.number, start)), count))
    last = head_key(change.number, end)
    while rows and rows[-1][0] >= last:
        rows.pop()
    if len(rows) < ROWS_MIN:
        return None
    columns = Columns("head", rows)
    simple = (
        (columns.kinds == DATA).all()
        and (columns.versions < change.version + own_too).all()
        and (columns.versions > change.newest_snapshot).all()
        and (columns.starts[1:] >= columns.ends[:-1]).all()
        and columns.starts[0] >= start
        and columns.ends[-1] <= end
    )
    return Turned(change, rows, columns) if simple else None

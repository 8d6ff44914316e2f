"""Many data entries put into the head at once: one walk along the index, then one sorted write.

Looking and writing entry by entry cost 6 to 8 us for each, and a cut of a million scattered blocks kept the commits
of all other volumes waiting. Here what is known of the neighbourhood is used for all entries that lie in it: a gap
is looked up once, and neighbours are found by stepping on.

Invariants, while the walk goes on:
    the head is unchanged, writes come last; `_last` is what the walk made of the entry before `_next_start`.
    no entry begins between the end of what was walked and `_next_start`.
"""

from typing import Final

from forebay_store.engine.head_change import HeadChange
from forebay_store.format.entries import (
    HeadEntry,
    check_neighbours,
    decode_entry,
    encode_entry,
    head_key,
    narrow,
    number_of,
    start_of,
)
from forebay_store.format.head_rows import HeadRows, Run
from forebay_store.format.rows import Table
from forebay_store.format.segment import SegmentName

_NOWHERE: Final = 1 << 64  # behind every block


def replace_rows(change: HeadChange, fresh: HeadRows, segment: SegmentName) -> None:
    """Put the rows of a part in place of whatever lies under them; the same as `replace` with their entries."""
    walk = _Walk(change)
    for run in fresh.runs:
        walk.clear(run)
    walk.end()
    rows = sorted(walk.rests + fresh.rows) if walk.rests else fresh.rows
    if walk.removed:
        for key in sorted(walk.removed.difference(key for key, _ in rows)):
            change.writer.delete(Table.HEAD, key)
    change.writer.put_many(Table.HEAD, rows)
    change.add_rows(fresh, segment)


class _Walk:
    """Goes along the head of a volume and clears one run of blocks after the other, in their order."""

    def __init__(self, change: HeadChange) -> None:
        self._displace = change.displace
        self._number = change.number
        self._cursor = change.writer.cursor(Table.HEAD)
        self._next: tuple[bytes, bytes] = (b"", b"")
        self._next_start = -1  # nothing is known yet
        self._last: HeadEntry | None = None
        self._last_is_rest = False  # not in the index as it is
        self.rests: list[tuple[bytes, bytes]] = []
        self.removed: set[bytes] = set()

    def clear(self, run: Run) -> None:
        """Remove what lies in a run; what is left of it outside becomes rests."""
        start, end, key = run
        if start > self._next_start:
            self._seek(start, key)
        last = self._last
        if last is not None and last.end > start:
            self._cut(last, start, end)
        while self._next_start < end:
            entry = decode_entry(*self._next)
            self._keep_last(None)
            self.removed.add(self._next[0])
            if entry.end > end:
                self._displace(narrow(entry, entry.start, end))
                self._keep_last(narrow(entry, end, entry.end), is_rest=True)
            else:
                self._displace(entry)
            self._show(self._cursor.step())

    def end(self) -> None:
        """Note the last rest."""
        self._keep_last(None)

    def _seek(self, start: int, key: bytes) -> None:
        """Look around a block that lies behind all that is known."""
        self._keep_last(None)
        self._show(self._cursor.seek(key))
        if self._next_start != start:  # One that begins exactly here tells that none reaches in from before.
            before = self._cursor.before()
            check_neighbours("head", before and before[0], key, self._next[0] or None)
            if before is not None:
                entry = decode_entry(*before)
                if number_of(before[0]) == self._number:
                    self._keep_last(entry)

    def _show(self, row: tuple[bytes, bytes] | None) -> None:
        if row is not None and number_of(row[0]) == self._number:
            self._next = row
            self._next_start = start_of(row[0])
            return
        if row is not None:
            decode_entry(*row)  # A key with a flipped bit looks like another volume's.
        self._next = (b"", b"")
        self._next_start = _NOWHERE

    def _cut(self, last: HeadEntry, start: int, end: int) -> None:
        """Take [start, end) out of the entry that reaches into it from before."""
        if not self._last_is_rest:
            self.removed.add(head_key(self._number, last.start))
        self._displace(narrow(last, max(last.start, start), min(last.end, end)))
        self._last = None
        if last.start < start:
            self._keep_last(narrow(last, last.start, start), is_rest=True)
        if last.end > end:
            self._keep_last(narrow(last, end, last.end), is_rest=True)

    def _keep_last(self, entry: HeadEntry | None, *, is_rest: bool = False) -> None:
        """Go on to another last entry; the one before is final, and to be written if it is a rest."""
        if self._last is not None and self._last_is_rest:
            self.rests.append(encode_entry(self._number, self._last))
        self._last, self._last_is_rest = entry, is_rest

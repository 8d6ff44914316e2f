"""Which fdatasync covers which writes: one at a time, one for all who ask meanwhile, and begun ahead where that pays.

A guest that flushes after every write sends the flush when it has the answer to the write. If the last writes were each
followed by a sync, the next sync begins with the write: the disk works while answer and flush are on their way.
Measured 2026-11, 2 cores, depth 1: a flushed write takes 70 us less of 330.

Invariants:
    A sync covers the writes that were completed when it began, no others.
    At most one is under way. Whoever asks is told when one that covers all before the asking is over.
    After one has failed, asked for or not, none begins any more: a second one would prove nothing about the first.
"""

from collections.abc import Callable
from typing import Final

AHEAD_AFTER: Final = 4
"""Writes in a row, each followed by a sync, before syncs begin ahead. One write without a sync ends it."""

Told = Callable[[bool], None]
Start = Callable[[Callable[[OSError | None], None]], None]
Failed = Callable[[OSError], None]


class SyncOrder:
    """`start` begins an fdatasync and calls back when it is over, never inside the call.

    `failed` hears of a sync that failed; whoever waits is not told before `give_up`.
    """

    def __init__(self, start: Start, failed: Failed) -> None:
        self._start = start
        self._failed = failed
        self._completed = 0  # writes
        self._covered = -1  # of them; -1: what was written before we came is not
        self._under_way: list[Told] | None = None  # who is told of the sync under way
        self._covering = 0  # writes that it covers
        self._next: list[Told] = []  # who waits for one that has not begun
        self._unasked = 0  # writes since a sync was asked for
        self._in_step = 0  # syncs that were asked for after exactly one write

    @property
    def waiting(self) -> int:
        """How many wait to be told."""
        return len(self._next) + len(self._under_way or ())

    def is_under_way(self) -> bool:
        """Tell whether one is under way."""
        return self._under_way is not None

    @property
    def begins_ahead(self) -> bool:
        """Whether a sync is going to begin with the next write that is completed."""
        return self._in_step >= AHEAD_AFTER and not self._unasked and self._under_way is None

    def written(self) -> None:
        """A write was completed."""
        begins_ahead = self._in_step >= AHEAD_AFTER and self.begins_ahead
        self._completed += 1
        if self._unasked:
            self._in_step = 0
        self._unasked += 1
        if begins_ahead:
            self._begin()

    def ask(self, told: Told) -> bool:
        """Have `told` called with True when all completed writes are durable; return True if they are, uncalled."""
        if self._unasked == 1:
            self._in_step += 1
        self._unasked = 0
        if self._covered == self._completed:
            return True
        if self._under_way is not None and self._covering == self._completed:
            self._under_way.append(told)
        else:
            self._next.append(told)
            if self._under_way is None:
                self._begin()
        return False

    def give_up(self) -> None:
        """Tell all who wait that their writes are not durable."""
        waiting, self._next = [*(self._under_way or ()), *self._next], []
        self._under_way = []
        for one in waiting:
            one(False)

    def _begin(self) -> None:
        self._under_way, self._next = self._next, []
        self._covering = self._completed
        self._start(self._over)

    def _over(self, error: OSError | None) -> None:
        told = self._under_way
        assert told is not None
        if error is not None:
            self._covering = -1  # it stays under way for ever, and covers nothing
            self._failed(error)
            return
        self._covered = self._covering
        self._under_way = None
        if self._next:
            self._begin()
        for one in told:
            one(True)

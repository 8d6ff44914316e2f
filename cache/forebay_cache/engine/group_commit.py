"""Group commit: when what was gathered waits for the sync under way, and the next sync begins by itself.

Several writers who flush after each write would each have a record of their own, which the next sync covers anyway.
So while a sync is under way their writes are gathered; when it is over they are one record, and a sync that covers it
begins at once, while the answers and the flushes that follow are on their way. Measured 2026-11, 2 cores, 16 writers:
a record and a sync for 6.5 flushed writes, instead of a record for 3.9 of them and a sync for 8.

Whoever writes without flushing would wait for nothing. So writes are counted against flushes, and where more than a
few writes are left over nobody waits.

Invariants:
    What is gathered waits only while a sync is under way, whose end must have it written.
    One sync that nobody waited for, or one writer alone, ends it.
"""

from typing import Final

WRITERS_MAX: Final = 32
"""Writes that no flush followed up to which all writers are taken to flush: each may have one."""

UNFLUSHED_MAX: Final = 2 * WRITERS_MAX
"""No more of them are counted."""

FORGET_SYNCS: Final = 8
"""One of them is forgotten each so many syncs. So who writes more often than that without flushing is noticed, though
each of his writes waits for a sync."""

TOLD_MIN: Final = 2
"""A sync that so many waited for served a group."""


class GroupCommit:
    """Counts for one log; `active`: what is gathered waits for the sync under way, and syncs begin by themselves."""

    def __init__(self) -> None:
        self.active = False
        self._unflushed = 0
        self._syncs = 0

    def written(self, count: int) -> None:
        """So many changes were made that nobody asked to be durable yet."""
        self._unflushed = min(UNFLUSHED_MAX, self._unflushed + count)

    def flushed(self) -> None:
        """A guest asked for a flush."""
        if self._unflushed:
            self._unflushed -= 1

    def synced(self, told: int) -> None:
        """A sync is over that so many had waited for."""
        self.active = told >= TOLD_MIN and self._unflushed <= WRITERS_MAX
        self._syncs += 1
        if self._syncs % FORGET_SYNCS == 0:
            self._unflushed = max(0, self._unflushed - 1)

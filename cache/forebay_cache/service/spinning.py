"""A selector that looks again for a moment before it lets the thread sleep.

With one request at a time most of a request's time is waking up: the loop when the next request or a completion comes.
While events follow one another closely, waiting awake for the next one costs the CPU no more than going to sleep and
waking up; when they don't, nothing is spent. Measured 2026-11, 2 cores, cached 4 KiB reads at depth 1: 23,300 instead
of 13,300 a second at 42 instead of 45 us of CPU each; a flush with nothing to do 17 instead of 36 us.

A wait for a sync is judged by itself. It is longer, so what it took must not send the loop to sleep before the next
request, and the bound is larger.

Others may need this very processor, so the loop gives way before each look. The disk's interrupt wakes a kernel thread
on it, which waited up to 140 us until the loop fell asleep; and so, for 50 us, did a client that an answer woke, which
the kernel likes to put where the answer came from (both traced 2026-11). With 16 clients that flush each write they
got 8 % more done, 1 client 2 % more (14 to 16 pairs of runs); reads did not change.

Invariants:
    It waits awake only if the last wait of the kind was over within its bound, and then no longer than that: `ready`
    or `select`, whichever comes first. So a disk that takes longer than SYNC_SPIN_NS, a busy machine whose others take
    over, and an idle daemon cost nothing.
"""

import os
import select
import selectors
import time
from collections.abc import Callable
from typing import Final

SPIN_NS: Final = 50_000
"""How long a wait for anything may be awake."""

SYNC_SPIN_NS: Final = 200_000
"""How long it may while a sync is under way: an SSD's takes 50 to 150 us."""

PEEKED_MAX: Final = 64
"""Descriptors that one look of a turn finds. Epoll goes round, so the next looks find the others."""

Events = list[tuple[selectors.SelectorKey, int]]


class SpinningSelector(selectors.EpollSelector):
    """An epoll selector for one event loop. `clock` in nanoseconds.

    `syncing` tells whether a sync is under way; whoever has a device sets it.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__()
        self._epoll = select.epoll.fromfd(os.dup(self.fileno()))  # the same one, without the keys of `selectors`
        self._clock = clock
        self._was_short = {False: False, True: False}  # by whether a sync was under way
        self.syncing: Callable[[], bool] = lambda: False

    def select(self, timeout: float | None = None) -> Events:
        """See BaseSelector."""
        events = self.look(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        syncing = self.syncing()
        bound_ns = _bound_ns(syncing)
        began_ns = self._clock()
        if self._was_short[syncing] and self._look_awake(began_ns + bound_ns):
            events = self.look(0)
        if not events:
            events = self.look(timeout)
            self._was_short[syncing] = self._clock() - began_ns < bound_ns
        return events

    def ready(self, until_ns: int) -> list[tuple[int, int]]:
        """Return the descriptors with events, as epoll does; for these it waits awake if `select` would, but not beyond
        `until_ns`."""
        syncing = self.syncing()
        if not self._was_short[syncing]:
            return []
        ready = self.peek()
        if not ready:
            end_ns = self._clock() + _bound_ns(syncing)
            ready = self._look_awake(min(end_ns, until_ns))
            self._was_short[syncing] = bool(ready) or end_ns > until_ns
        return ready

    def close(self) -> None:
        """See BaseSelector."""
        self._epoll.close()
        super().close()

    def _look_awake(self, until_ns: int) -> list[tuple[int, int]]:
        ready: list[tuple[int, int]] = []
        while not ready and self._clock() < until_ns:
            self.give_way()
            ready = self.peek()
        return ready

    def peek(self) -> list[tuple[int, int]]:
        """Return some of the descriptors that are ready, and for what, without waiting."""
        return self._epoll.poll(0, PEEKED_MAX)

    def look(self, timeout: float | None) -> Events:
        """Return what is ready, waiting asleep for so many seconds; None: until something is."""
        return super().select(timeout)

    def give_way(self) -> None:
        """Let others run who wait for this processor."""
        os.sched_yield()


def _bound_ns(syncing: bool) -> int:
    return SYNC_SPIN_NS if syncing else SPIN_NS

"""A selector that looks again for a moment before it lets the thread sleep.

With one request at a time most of a request's time is waking up: the loop when the next request or a completion comes.
While events follow one another closely, waiting awake for the next one costs the CPU no more than going to sleep and
waking up; when they don't, nothing is spent. Measured 2026-11, 2 cores, cached 4 KiB reads at depth 1: 23,300 instead
of 13,300 a second at 42 instead of 45 us of CPU each; a flush with nothing to do 17 instead of 36 us.

Invariant: it waits awake only if the last wait was over within SPIN_NS, and then no longer than that.
"""

import selectors
import time
from collections.abc import Callable
from typing import Final

SPIN_NS: Final = 50_000
"""How long a wait may be awake."""

Events = list[tuple[selectors.SelectorKey, int]]


class SpinningSelector(selectors.EpollSelector):
    """An epoll selector for one event loop. `clock` in nanoseconds."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__()
        self._clock = clock
        self._was_short = False

    def select(self, timeout: float | None = None) -> Events:
        """See BaseSelector."""
        events = self.look(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        began_ns = self._clock()
        while self._was_short and self._clock() - began_ns < SPIN_NS:
            events = self.look(0)
            if events:
                return events
        events = self.look(timeout)
        self._was_short = self._clock() - began_ns < SPIN_NS
        return events

    def look(self, timeout: float | None) -> Events:
        """Return what is ready, waiting asleep for so many seconds; None: until something is."""
        return super().select(timeout)

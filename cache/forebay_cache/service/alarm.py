"""One call at a time of the monotonic clock that changes often: mostly to a later one, or to now.

A timer of asyncio that is cancelled stays in its heap until its time comes, and all others are compared with it. So one
that is early enough is kept, and looks again when it fires; what is due already needs none.

Invariants:
    The call is made once for each `set`, or for several, and never before the time that was set last.
    While a time is set, a timer that is not later, or a call without one, is with the loop.
Crash: nothing of this survives.
"""

import asyncio
import time
from collections.abc import Callable

from forebay_cache.engine.rates import NEVER


class Alarm:
    """For one event loop. `act` is called with the time; `clock` in nanoseconds, the loop's."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, act: Callable[[int], None], clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._loop = loop
        self._act = act
        self._clock = clock
        self._due_ns = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._fires_ns = NEVER
        self._soon: asyncio.Handle | None = None

    def set(self, due_ns: int) -> None:
        """Act at this time, or soon if it is past, instead of the time that was set before."""
        self._due_ns = due_ns
        now_ns = self._clock()
        if due_ns <= now_ns:
            if self._soon is None:
                self._soon = self._loop.call_soon(self._begin)
        elif due_ns < self._fires_ns:
            if self._timer is not None:
                self._timer.cancel()
            self._fires_ns = due_ns
            self._timer = self._loop.call_later((due_ns - now_ns) / 1e9, self._fire)

    def cancel(self) -> None:
        """Act no more; for the end."""
        self._due_ns = NEVER
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()

    def _fire(self) -> None:
        self._timer = None
        self._fires_ns = NEVER
        self._look()

    def _begin(self) -> None:
        self._soon = None
        self._look()

    def _look(self) -> None:
        now_ns = self._clock()
        if self._due_ns <= now_ns:
            self._due_ns = NEVER
            self._act(now_ns)
        elif self._due_ns < NEVER:
            self.set(self._due_ns)

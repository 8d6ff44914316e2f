"""Completions of worker threads, handed to the event loop's thread: a lock-free deque and one wake-up for many.

`asyncio.run_in_executor` costs two locks, a future and a write to a pipe per call; here a burst of completions costs
one write to an eventfd.

Invariant: after `post` returned, either a wake-up is under way or the loop has yet to drain the deque.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable

from forebay_cache.service.turns import Turns, clear_event


class Completions:
    """Has what threads post told in turns of the loop's thread, in the order of `post`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        turns.add_reader(self._fd, self._wake)

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` called soon; from any thread."""
        self._posted.append(call)
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._fd, 1)

    def run(self) -> None:
        """Call the rest now, what was posted to the turns first."""
        self._turns.tell_posted()
        while self._posted:
            self._posted.popleft()()
            self._turns.tell_posted()

    def close(self) -> None:
        """Call the rest and stop; no thread may post any more, calls may."""
        self.run()
        self._turns.remove_reader(self._fd)
        os.close(self._fd)

    def _wake(self) -> None:
        # First the flag, then the deque: what is posted from here on wakes the loop again.
        clear_event(self._fd)
        self._woken = False
        posted = self._posted
        for _ in range(len(posted)):
            self._turns.post(posted.popleft())


async def outcome(start: Callable[[Callable[[bool], None]], None]) -> bool:
    """Start something in the engine and wait for its completion, which may come inside the call."""
    future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def done(ok: bool) -> None:
        if not future.done():  # whoever waited may have been cancelled
            future.set_result(ok)

    start(done)
    return await future

"""Completions of worker threads, handed to the event loop's thread: a lock-free deque and one wake-up for many.

`asyncio.run_in_executor` costs two locks, a future and a write to a pipe per call; here a burst of completions costs
one write to an eventfd.

Invariant: after `post` returned, either a wake-up is under way or the loop has yet to drain the deque.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable


class Completions:
    """Runs what threads post on the loop's thread, in the order of `post`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.add_reader(self._fd, self._wake)

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` called soon; from any thread."""
        self._posted.append(call)
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._fd, 1)

    def post_here(self, call: Callable[[], None]) -> None:
        """Have `call` called soon; from the loop's thread, which needs no eventfd to be woken."""
        self._posted.append(call)
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._run)

    def run(self) -> None:
        """Call the rest now."""
        while self._posted:
            self._posted.popleft()()

    def close(self) -> None:
        """Call the rest and stop; no thread may post any more, calls may."""
        self.run()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _wake(self) -> None:
        os.eventfd_read(self._fd)
        self._run()

    def _run(self) -> None:
        # First the flag, then the deque: what is posted from here on wakes the loop again.
        self._woken = False
        posted = self._posted
        for _ in range(len(posted)):
            posted.popleft()()


async def outcome(start: Callable[[Callable[[bool], None]], None]) -> bool:
    """Start something in the engine and wait for its completion, which may come inside the call."""
    future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def done(ok: bool) -> None:
        if not future.done():  # whoever waited may have been cancelled
            future.set_result(ok)

    start(done)
    return await future

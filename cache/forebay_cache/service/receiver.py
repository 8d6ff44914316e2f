"""Receives the rest of large writes on a thread of its own, while the loop's thread has other work to do.

To receive 1 MiB takes as long as to write it, 0.15 to 0.25 ms, much of that waiting for the sender to fill the socket
again. The thread is native and never takes the GIL: one of Python's would wait for it, and be waited for. It receives
for any number of connections at once, so a slow client keeps no other one waiting.

Invariants:
    Every receive that was begun is completed once, on the loop's thread, never inside the call: when enough is
    there, at the end of the stream, at an error, or, unfinished, by `close`.
    Until then the memory stays referenced and the socket must stay open; who does not want it any more shuts the socket
    down.
Crash: nothing of this survives.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from forebay_cache.service.turns import Turns, clear_event

try:
    from forebay_cache import _receiver
except ImportError:  # no compiler when it was installed
    _receiver = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from forebay_cache._receiver import Receive

Done = Callable[[int], None]


class Receiver:
    """For one event loop. The thread starts with the first receive."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._thread: _receiver.Receiver | None = None
        self._begun: dict[Receive, Done] = {}
        self._available = _receiver is not None

    def receive(self, fd: int, memory: memoryview, least: int, done: Done) -> "Receive | None":
        """Receive from a socket until at least so many bytes are there; `done` hears how many came.

        There are more if the memory has room for them and they came with the last ones.

        Returns what tells how many there are so far; None: it is not possible here, or not now.
        """
        if not self._available:
            return None
        try:
            thread = self._thread or self._start()
            receive = thread.receive(fd, memory, least)
        except OSError:
            return None
        self._begun[receive] = done
        return receive

    def close(self) -> None:
        """End the thread and complete the rest, unfinished; nothing is received from here on."""
        self._available = False
        if self._thread is not None:
            self._turns.remove_reader(self._thread.event_fd)
            self._thread.close()
            for receive in list(self._begun):
                self._tell(receive)
            self._thread = None

    def _start(self) -> "_receiver.Receiver":
        self._thread = thread = _receiver.Receiver()
        self._turns.add_reader(thread.event_fd, self._wake)
        return thread

    def _wake(self) -> None:
        assert self._thread is not None
        clear_event(self._thread.event_fd)
        for receive in self._thread.completions():
            self._turns.post(partial(self._tell, receive))

    def _tell(self, receive: "Receive") -> None:
        if receive in self._begun:  # else `close` has told
            self._begun.pop(receive)(receive.count)

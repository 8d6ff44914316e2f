"""The sockets of the NBD front: every one that is readable gets its share of a turn.

One reader of the event loop stands for the sockets of all connections, so the event loop's own work is done once for
all of them.

Invariant: a look ends after LOOK_NS, or with its turn, even if sockets are left: they are first in the next one.
Crash: nothing of this survives.
"""

import select
import time
from collections import deque
from typing import Final, Protocol

from forebay_cache.service.turns import TURN_NS, Turns

LOOK_NS: Final = 200_000
"""After so long others get their turn. The last connection's own share of it is bounded by BATCH_MAX."""

EVENTS_MAX: Final = 64
"""Sockets that one look finds."""

_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
assert LOOK_NS < TURN_NS


class Polled(Protocol):
    """Whom a socket belongs to."""

    def on_readable(self) -> None:
        """Bytes, the end or an error is there to be received."""

    def on_writable(self) -> None:
        """The socket takes bytes again."""


class _Nobody:
    """Whom a socket belongs to that is not watched any more."""

    def on_readable(self) -> None:
        """Not asked for."""

    def on_writable(self) -> None:
        """Not asked for."""


_NOBODY: Final[tuple[Polled, int]] = _Nobody(), 0


class Sockets:
    """Watches the sockets of one server's connections, until `close`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Polled, int]] = {}  # by descriptor: whose, and what for
        self._events: deque[tuple[int, int]] = deque()  # that the last look left
        turns.add_reader(self._epoll.fileno(), self._look)

    def watch(self, fd: int, owner: Polled, *, reading: bool, writing: bool) -> None:
        """Tell `owner` of these events of its socket from now on, of no others."""
        wanted = (_READ if reading else 0) | (_WRITE if writing else 0)
        if fd not in self._watched:
            if wanted:
                self._epoll.register(fd, wanted)
                self._watched[fd] = owner, wanted
        elif wanted:
            self._epoll.modify(fd, wanted)
            self._watched[fd] = owner, wanted
        else:  # an error would be told of whatever is asked for, and again and again
            del self._watched[fd]
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Watch no more; may be repeated."""
        if not self._epoll.closed:
            self._turns.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _look(self) -> None:
        events = self._events
        if not events:
            events += self._epoll.poll(0, EVENTS_MAX)
        until_ns = min(time.monotonic_ns() + LOOK_NS, self._turns.until_ns)
        while events:
            fd, event = events.popleft()
            owner, wanted = self._watched.get(fd, _NOBODY)
            # An error, or the end of the connection, is found by whichever is asked for.
            if event & ~_READ and wanted & _WRITE:
                owner.on_writable()
            if event & ~_WRITE and wanted & _READ:
                owner.on_readable()
            if time.monotonic_ns() > until_ns:
                break

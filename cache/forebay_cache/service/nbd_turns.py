"""Turns of the NBD front: every socket that is readable gets its turn, and what all of them brought goes on together.

One reader of the event loop stands for the sockets of all connections. So the writes of sixteen clients become one
record instead of sixteen, and the event loop's own work is done once for all of them.

Invariants:
    A volume that was given requests in a turn is kicked at the end of that turn, once.
    `_take_due` is with the loop at most once, and is so whenever somebody is due.
    A turn ends after TURN_NS even if sockets are left: they are first in the next one, before any other.
Crash: nothing of this survives.
"""

import asyncio
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from forebay_cache.engine.front import FrontVolume

TURN_NS: Final = 200_000
"""After so long others get their turn. The last connection's own share of it is bounded by BATCH_MAX."""

EVENTS_MAX: Final = 64
"""Sockets that one look finds."""

_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT


class Polled(Protocol):
    """Whom a socket belongs to."""

    def on_readable(self) -> None:
        """Bytes, the end or an error is there to be received."""

    def on_writable(self) -> None:
        """The socket takes bytes again."""


class Turns:
    """Watches the sockets of one server's connections. For one event loop, until `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Polled, int]] = {}  # by descriptor: whose, and what for
        self._events: deque[tuple[int, int]] = deque()  # that the last turn left
        self._due: deque[Callable[[], None]] = deque()
        self._due_asked = False
        self._kicks: dict[FrontVolume, None] = {}
        self._in_turn = False
        loop.add_reader(self._epoll.fileno(), self._take_turn)

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

    def soon(self, call: Callable[[], None]) -> None:
        """Call in a turn of its own, together with all others who ask until then."""
        self._due.append(call)
        self._ask_for_due()

    def kick(self, volume: FrontVolume) -> None:
        """Kick the volume when the turn is over; outside of one, now."""
        if self._in_turn:
            self._kicks[volume] = None
        else:
            volume.kick()

    def close(self) -> None:
        """Watch no more; may be repeated."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _take_turn(self) -> None:
        events = self._events
        if not events:
            events += self._epoll.poll(0, EVENTS_MAX)
        until_ns = self._begin_turn()
        try:
            while events:
                fd, event = events.popleft()
                watched = self._watched.get(fd)
                if watched is not None:
                    _tell(watched, event)
                if time.monotonic_ns() > until_ns:
                    break
        finally:
            self._end_turn()

    def _take_due(self) -> None:
        self._due_asked = False
        due, until_ns = self._due, self._begin_turn()
        try:
            for _ in range(len(due)):
                due.popleft()()
                if time.monotonic_ns() > until_ns:
                    break
        finally:
            self._ask_for_due()
            self._end_turn()

    def _ask_for_due(self) -> None:
        if self._due and not self._due_asked:
            self._due_asked = True
            self._loop.call_soon(self._take_due)

    def _begin_turn(self) -> int:
        self._in_turn = True
        return time.monotonic_ns() + TURN_NS

    def _end_turn(self) -> None:
        self._in_turn = False
        if self._kicks:
            kicks, self._kicks = self._kicks, {}
            for volume in kicks:
                volume.kick()


def _tell(watched: tuple[Polled, int], event: int) -> None:
    """Tell of an event; an error or the end of the connection is found by whichever is asked for."""
    owner, wanted = watched
    if event & ~_READ and wanted & _WRITE:
        owner.on_writable()
    if event & ~_WRITE and wanted & _READ:
        owner.on_readable()

"""Turns of the event loop's thread: what a turn sets going is finished in it, as far as its time allows.

A request that was received makes its volume write, the end of the write has it answered, and the answer wakes the
connection that sends it. Each such step would cost 15 to 25 us of Python as a callback of the event loop; as rounds of
one turn they cost next to nothing. And the writes of sixteen clients become one record instead of sixteen.

A turn begins with one call: sockets are readable, a sync is over. Then, round by round, the volumes that were given
requests are kicked, completions are told and whoever asked for it is called, until nobody is left or time is over.
With time left it looks for what became readable meanwhile, or does in a moment, and goes on with that: so a client that
answers at once does not cost another iteration of asyncio, 10 to 15 us.

Invariants:
    A volume that was given requests in a turn is kicked behind the round that brought them, once.
    Completions are told in the order of `post`, calls are made in the order of `soon`; none inside of the
    call that asks.
    After TURN_NS no round begins, and one that is under way makes one more call of each kind at most. A turn for what
    is left makes one of each kind at least.
    Whenever something is left outside of a turn, one more turn is with the loop, and only one.
    A turn ends as soon as a descriptor is readable that is not its own: that is for the event loop.
Crash: nothing of this survives.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from forebay_cache.engine.front import FrontVolume

TURN_NS: Final = 350_000
"""After so long what is left waits for the next turn; what others want of the loop comes before it."""

Call = Callable[[], None]


class Turns:
    """For one event loop, and used on its thread only.

    `ready` waits for descriptors of the loop, until the given time of `time.monotonic_ns` at most, and returns those
    that are readable, each with what for, as epoll does; none if waiting isn't worth it. Without it a turn
    never goes on with what it was not begun with.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, ready: Callable[[int], list[tuple[int, int]]] | None = None
    ) -> None:
        self.loop = loop
        self._ready = ready
        self._begins: dict[int, Call] = {}  # by descriptor
        self._posted: deque[Call] = deque()
        self._due: deque[Call] = deque()
        self._later: deque[Call] = deque()
        self._kicks: dict[FrontVolume, None] = {}
        self._in_turn = False
        self._asked = False
        self.until_ns = 0  # of `time.monotonic_ns`: when this turn is to be over

    def post(self, call: Call) -> None:
        """Tell of a completion: before any call that waits, behind the completions that were posted before."""
        self._posted.append(call)
        if not (self._in_turn or self._asked):
            self._ask()

    def soon(self, call: Call) -> None:
        """Call in this turn, if one is being taken, together with all others who ask until then; else in one more."""
        self._due.append(call)
        if not (self._in_turn or self._asked):
            self._ask()

    def later(self, call: Call) -> None:
        """Call in the turn after this one: others have theirs first."""
        self._later.append(call)
        if not (self._in_turn or self._asked):
            self._ask()

    def kick(self, volume: FrontVolume) -> None:
        """Kick the volume when the round is over; outside of a turn, now."""
        if self._in_turn:
            self._kicks[volume] = None
        else:
            volume.kick()

    def add_reader(self, fd: int, begin: Call) -> None:
        """Have a turn begin with this call, or go on with it, whenever the descriptor is readable.

        It may be called with nothing there: the turn before went on with it, behind the loop's look at the descriptors.
        """
        self._begins[fd] = begin
        self.loop.add_reader(fd, partial(self.take, begin))

    def remove_reader(self, fd: int) -> None:
        """Undo `add_reader`."""
        del self._begins[fd]
        self.loop.remove_reader(fd)

    def take(self, begin: Call | None = None) -> None:
        """Take a turn that begins with this call, or one for what is left; what the event loop calls."""
        assert not self._in_turn
        self._in_turn = True
        self.until_ns = until_ns = time.monotonic_ns() + TURN_NS
        if self._later:
            self._due += self._later
            self._later.clear()
        try:
            if begin is not None:
                begin()
            if self._kicks:
                self._kick_all()
            goes_on = self._go_on(until_ns, in_time=begin is None or time.monotonic_ns() < until_ns)
            while goes_on and not self._later and self._begin_ready(until_ns):
                goes_on = self._go_on(until_ns, in_time=time.monotonic_ns() < until_ns)
        finally:
            self._in_turn = False
            if (self._posted or self._due or self._later or self._kicks) and not self._asked:
                self._ask()

    def _begin_ready(self, until_ns: int) -> bool:
        """Begin with what is readable by then; return whether that was anything."""
        ready = self._ready(until_ns) if self._ready is not None else ()
        begins = self._begins
        for fd, _ in ready:
            if fd not in begins:
                return False  # for the event loop, which finds all of them again
        for fd, _ in ready:
            begin = begins.get(fd)
            if begin is not None:  # else it was removed meanwhile
                begin()
        if self._kicks:
            self._kick_all()
        return bool(ready)

    def tell_posted(self) -> None:
        """Tell of all completions now; for the end, when no turn comes any more."""
        while self._posted:
            self._posted.popleft()()

    def _go_on(self, until_ns: int, *, in_time: bool) -> bool:
        """While it is in time go on, round by round, until nobody is left; return whether it still is."""
        clock = time.monotonic_ns
        queues = self._posted, self._due
        while in_time and (self._posted or self._due):
            for queue in queues:
                for _ in range(len(queue)):
                    queue.popleft()()
                    if clock() > until_ns:
                        in_time = False
                        break
            if self._kicks:
                self._kick_all()
                in_time = in_time and clock() < until_ns
        return in_time

    def _kick_all(self) -> None:
        while self._kicks:
            kicks, self._kicks = self._kicks, {}
            for volume in kicks:
                volume.kick()

    def _ask(self) -> None:
        self._asked = True
        self.loop.call_soon(self._take_rest)

    def _take_rest(self) -> None:
        self._asked = False
        self.take()


def clear_event(fd: int) -> None:
    """Take what an eventfd tells of, if there is anything."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:  # not `suppress`, which is three calls
        return

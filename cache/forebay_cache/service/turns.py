"""Turns of the event loop's thread: what a turn sets going is finished in it, as far as its time allows.

A request that was received makes its volume write, the end of the write has it answered, and the answer wakes the
connection that sends it. Each such step would cost 15 to 25 us of Python as a callback of the event loop; as rounds of
one turn they cost next to nothing. And the writes of sixteen clients become one record instead of sixteen.

A turn begins with one call: sockets are readable, a sync is over. Then, round by round, the volumes that were given
requests are kicked, completions are told and whoever asked for it is called, until nobody is left or time is over.

Invariants:
    A volume that was given requests in a turn is kicked behind the round that brought them, once.
    Completions are told in the order of `post`, calls are made in the order of `soon`; none inside of the
    call that asks.
    After TURN_NS no round begins, and one that is under way makes one more call of each kind at most. A turn for what
    is left makes one of each kind at least.
    Whenever something is left outside of a turn, one more turn is with the loop, and only one.
Crash: nothing of this survives.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from forebay_cache.engine.front import FrontVolume

TURN_NS: Final = 350_000
"""After so long what is left waits for the next turn; what others want of the loop comes before it."""

Call = Callable[[], None]


class Turns:
    """For one event loop, and used on its thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[Call] = deque()
        self._due: deque[Call] = deque()
        self._later: deque[Call] = deque()
        self._kicks: dict[FrontVolume, None] = {}
        self._in_turn = False
        self._asked = False

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

    def take(self, begin: Call | None = None) -> None:
        """Take a turn that begins with this call, or one for what is left; what the event loop calls."""
        assert not self._in_turn
        self._in_turn = True
        until_ns = time.monotonic_ns() + TURN_NS
        if self._later:
            self._due += self._later
            self._later.clear()
        try:
            if begin is not None:
                begin()
            self._kick_all()
            if begin is None or time.monotonic_ns() < until_ns:
                self._go_on(until_ns)
        finally:
            self._in_turn = False
            if (self._posted or self._due or self._later or self._kicks) and not self._asked:
                self._ask()

    def tell_posted(self) -> None:
        """Tell of all completions now; for the end, when no turn comes any more."""
        while self._posted:
            self._posted.popleft()()

    def _go_on(self, until_ns: int) -> None:
        queues = self._posted, self._due
        while self._posted or self._due:
            for queue in queues:
                for _ in range(len(queue)):
                    queue.popleft()()
                    if time.monotonic_ns() > until_ns:
                        break
            self._kick_all()
            if time.monotonic_ns() > until_ns:
                break

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

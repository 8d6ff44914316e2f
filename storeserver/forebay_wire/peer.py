"""One client of a server: its requests in work, and the bounds on them.

Invariants:
    requests == number of requests whose answer is not queued yet.
    size == bytes of those requests, of a large one being received, of room reserved for answers and of unsent answers,
    as of the last count.
    The link is read only while both are below their limits, so a client that asks much or does not read its answers
    slows itself and nobody else.
    A large request begins only below the limits, and is read to its end from then on, or those that wait for each
    other's room would wait for ever. One that does not get on ends the connection.
    A large answer is made only when there is room for it: `reserve` waits until its size fits the bounds of this
    connection and of the server, or no other answer of this connection is made or unsent. Room is given in order.
    Requests start in the order in which they arrived (they may end in any).
A client that vanishes does not stop its requests: they end as they would, and their answers are dropped.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

from forebay_core.errors import (
    CorruptionError,
    ForebayError,
    NoSpaceError,
    ProtocolError,
    RefusedError,
    StoreUnreachableError,
    WrongUsageError,
)
from forebay_core.units import Buffer
from forebay_wire.connection import Connection, Event, MessageReceived, Ready
from forebay_wire.greeting import Greeting
from forebay_wire.limits import BYTES_IN_FLIGHT_MAX, FAILED_TEXT_MAX, PROGRESS_SIZE_MIN, REQUESTS_IN_FLIGHT_MAX
from forebay_wire.link import Link
from forebay_wire.messages import BAD_REQUEST, CORRUPT, FAILED, NO_SPACE, AnyMessage, Done, Failed, Ping

_LOG: Final = logging.getLogger("forebay.wire")
_GONE: Final = "the client is gone"

Reply: TypeAlias = tuple[AnyMessage, Sequence[Buffer]]
Answerer: TypeAlias = "Callable[[Peer, AnyMessage, memoryview], Awaitable[Reply]]"


class PeerOwner(Protocol):
    """The server, as a peer sees it."""

    @property
    def accepting(self) -> bool:
        """Whether requests are taken at all."""

    def may_start(self, peer: "Peer") -> bool:
        """Tell whether the server has room for another request of this peer; if not, it resumes the peer later."""

    def has_room(self, peer: "Peer", size: int) -> bool:
        """Tell whether the server has room for so many bytes more; if not, it resumes the peer later."""

    def on_size(self, change: int) -> None:
        """Count bytes that came in flight or went."""

    def on_ready(self, peer: "Peer") -> None:
        """The peer is authenticated."""

    def on_lost(self, peer: "Peer", error: ForebayError) -> None:
        """The peer is gone; requests of it may still be in work."""

    def on_idle(self, peer: "Peer") -> None:
        """A lost peer's last request ended."""


class _Waiting(NamedTuple):
    """A request whose answer waits for room."""

    size: int
    task: asyncio.Task[None]
    future: asyncio.Future[None]


class Peer:
    """One connection of a client, as the answering side knows it."""

    def __init__(self, number: int, address: str, connection: Connection, answer: Answerer, owner: PeerOwner) -> None:
        self.id = number
        self.address = address
        self.requests = 0
        self.size = 0
        self._connection = connection
        self._answer = answer
        self._owner = owner
        self._link: Link | None = None
        self._greeting: Greeting | None = None
        self._request_bytes = 0
        self._reserved_bytes = 0
        self._progress: int | None = None  # bytes received when a large request was seen under way
        self._reserved: dict[asyncio.Task[None], int] = {}
        self._waiting: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def node(self) -> bytes:
        """The client's 16-byte UUID; as proven as the key is secret."""
        assert self._greeting is not None
        return self._greeting.node

    @property
    def greeting(self) -> Greeting | None:
        """What the client said of itself; None before it is authenticated."""
        return self._greeting

    @property
    def closed(self) -> bool:
        """Whether the connection is gone; answers to it are dropped."""
        return self._link is None or self._link.closed

    @property
    def tasks(self) -> frozenset[asyncio.Task[None]]:
        """Requests in work."""
        return frozenset(self._tasks)

    def disconnect(self, why: str) -> None:
        """Close the connection now. Idempotent."""
        if self._link is not None:
            self._link.lose(StoreUnreachableError(why))

    def attach(self, link: Link) -> None:
        """Take the link over which the client is reached, and start it."""
        self._link = link
        link.start()

    def resume(self) -> None:
        """Take requests again as far as there is room, or stop; called when the server's room changed."""
        self._give_room()
        if self._link is not None and not self._link.closed:
            self._link.resume()

    def may_receive(self) -> bool:
        """Tell whether another request, or more of one that has begun, may be taken."""
        if self._connection.held_size:
            return self._owner.accepting
        if self.requests >= REQUESTS_IN_FLIGHT_MAX or self.size >= BYTES_IN_FLIGHT_MAX:
            return False
        return self._owner.may_start(self)

    def check_progress(self) -> None:
        """Disconnect a client whose large request did not get on since the last call."""
        link = self._link
        assert link is not None
        before, self._progress = self._progress, None
        if self._connection.held_size:
            self._progress = link.received_bytes
            if before is not None and link.received_bytes < before + PROGRESS_SIZE_MIN:
                self.disconnect("a message that it began did not get on")

    async def reserve(self, size: int) -> None:
        """Wait until there is room for an answer of `size` bytes to the request that the calling task works on.

        Raises:
            StoreUnreachableError: the client is gone.
        """
        task = asyncio.current_task()
        assert task in self._tasks
        if self.closed:
            raise StoreUnreachableError(_GONE)
        if self._waiting or not self._fits(size):
            waiting = _Waiting(size, task, self._loop.create_future())
            self._waiting.append(waiting)
            await waiting.future
        else:
            self._take_room(size, task)

    def on_event(self, event: Event) -> None:
        """Take an event from the link."""
        if isinstance(event, MessageReceived):
            self._start(event)
        elif isinstance(event, Ready):
            self._greeting = event.peer
            self._owner.on_ready(self)

    def on_received(self) -> None:
        """Count a large request that began."""
        self._count()

    def on_sent(self) -> None:
        """Count what was sent, and take more requests."""
        self._settle()

    def on_lost(self, error: ForebayError) -> None:
        """Tell the server, and whoever waits for room."""
        for waiting in self._waiting:
            if not waiting.future.done():
                waiting.future.set_exception(StoreUnreachableError(_GONE))
        self._waiting.clear()
        self._settle()
        self._owner.on_lost(self, error)
        if not self._tasks:
            self._owner.on_idle(self)

    def _start(self, request: MessageReceived) -> None:
        self.requests += 1
        self._request_bytes += request.size
        self._count()
        task = self._loop.create_task(self._work(request))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _work(self, request: MessageReceived) -> None:
        reply: AnyMessage
        payload: Sequence[Buffer] = ()
        try:
            if isinstance(request.message, Ping):
                reply = Done()
            else:
                reply, payload = await self._answer(self, request.message, request.payload)
            self._send(request.request_id, reply, payload)
        except ForebayError as error:
            self._send(request.request_id, _failed(error), ())
        except Exception as error:
            name = type(request.message).__name__
            _LOG.exception("%s from %s failed", name, self.address)
            text = f"{name} failed inside the server ({type(error).__name__}: {error}); its log says where"
            self._send(request.request_id, Failed(FAILED, _one_line(text)), ())
        finally:
            self.requests -= 1
            self._request_bytes -= request.size
            self._return_room()
            self._settle()

    def _send(self, request_id: int, reply: AnyMessage, payload: Sequence[Buffer]) -> None:
        link = self._link
        assert link is not None
        if not link.closed:
            link.send(self._connection.send(request_id, reply, payload), now=self.requests == 1)

    def _count(self) -> None:
        """Bring `size` up to date."""
        assert self._link is not None
        size = self._request_bytes + self._connection.held_size + self._reserved_bytes + self._link.unsent_bytes
        if size != self.size:
            change, self.size = size - self.size, size
            self._owner.on_size(change)

    def _settle(self) -> None:
        """Count, give room, and receive again if there is some. Not from within an event: the link is at it already."""
        self._count()
        self._give_room()
        link = self._link
        assert link is not None
        if not (link.receiving or link.closed) and self.may_receive():
            link.resume()

    def _fits(self, size: int) -> bool:
        """Tell whether an answer may be made; one at a time always may, lest nobody gets on."""
        assert self._link is not None
        answers = self._reserved_bytes + self._link.unsent_bytes
        if answers == 0:
            return True
        return answers + size <= BYTES_IN_FLIGHT_MAX and self._owner.has_room(self, size)

    def _take_room(self, size: int, task: "asyncio.Task[None]") -> None:
        self._reserved[task] = self._reserved.get(task, 0) + size
        self._reserved_bytes += size
        self._count()

    def _return_room(self) -> None:
        """The request of this task is answered: what it made counts as unsent now."""
        task = asyncio.current_task()
        if task is not None:
            self._reserved_bytes -= self._reserved.pop(task, 0)

    def _give_room(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            if not first.future.done():
                if not self._fits(first.size):
                    return
                self._take_room(first.size, first.task)
                first.future.set_result(None)
            self._waiting.popleft()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.closed and not self._tasks:
            self._owner.on_idle(self)


def _failed(error: ForebayError) -> Failed:
    return Failed(_code(error), _one_line(str(error)))


def _code(error: ForebayError) -> str:
    match error:
        case RefusedError():
            return error.code
        case CorruptionError():
            return CORRUPT
        case NoSpaceError():
            return NO_SPACE
        case ProtocolError() | WrongUsageError():
            return BAD_REQUEST
        case _:
            return FAILED


def _one_line(text: str) -> str:
    return " ".join(text.split())[:FAILED_TEXT_MAX]

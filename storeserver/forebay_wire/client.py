"""The asking end: many requests in flight over one connection, answered in any order.

Invariants:
    A request id in _pending was sent and is not answered; ids are never used twice on a connection.
    At most REQUESTS_IN_FLIGHT_MAX requests and about BYTES_IN_FLIGHT_MAX bytes of payload are in flight; further ones
    wait in order. These are the server's bounds, so it never has to stop reading us.
    A request that was given up (cancelled, timed out) keeps its place until its answer comes, which is then dropped.
When the connection is lost every request fails with StoreUnreachableError: whether the server did it is then unknown.
A lost client stays lost; connect a new one.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias, TypeVar

from forebay_core.errors import (
    AuthenticationError,
    ForebayError,
    ProtocolError,
    RefusedError,
    StoreUnreachableError,
)
from forebay_core.units import Buffer
from forebay_wire.address import Address, UnixPath
from forebay_wire.connection import Connection, Event, MessageReceived, Ready
from forebay_wire.greeting import NONCE_SIZE, Greeting, Role
from forebay_wire.limits import BYTES_IN_FLIGHT_MAX, FAILED_TEXT_MAX, REQUESTS_IN_FLIGHT_MAX
from forebay_wire.link import Link
from forebay_wire.messages import AnyMessage, Failed
from forebay_wire.sockets import connect

T = TypeVar("T")
Answer: TypeAlias = tuple[AnyMessage, memoryview]

_REQUEST_ID_FIRST: Final = 1


class _Pending(NamedTuple):
    """A request that is waiting for its turn or for its answer."""

    future: asyncio.Future[Answer]
    message: AnyMessage
    payload: Sequence[Buffer]
    size: int


class WireClient:
    """A connection to a store or cache daemon; made by `connect`."""

    def __init__(self, name: str, connection: Connection) -> None:
        self._name = name
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Greeting] = self._loop.create_future()
        self._lost: asyncio.Future[ForebayError] = self._loop.create_future()
        self._link: Link | None = None
        self._pending: dict[int, _Pending] = {}
        self._waiting: deque[_Pending] = deque()
        self._bytes_in_flight = 0
        self._next_id = _REQUEST_ID_FIRST

    @classmethod
    async def connect(
        cls, address: Address | UnixPath, *, key: bytes | None, node: bytes, timeout_s: float
    ) -> "WireClient":
        """Return a client that is connected and authenticated; `node` is our 16-byte UUID.

        Raises:
            StoreUnreachableError: nobody answers there within the time, or it is too busy.
            AuthenticationError: the keys differ, or only one side has one.
            ProtocolError: the peer is something else, or of an incompatible version.
        """
        name = str(address) if isinstance(address, Address) else f"unix:{address}"
        connection = Connection(Role.CLIENT, key=key, node=node, nonce=secrets.token_bytes(NONCE_SIZE))
        client = cls(name, connection)
        try:
            async with asyncio.timeout(timeout_s):
                sock = await connect(address)
                client._link = Link(sock, connection, client)
                client._link.start()
                await client._ready
        except TimeoutError as error:
            raise StoreUnreachableError(f"{name}: no answer within {timeout_s:g} s") from error
        finally:
            if not client._is_ready():
                client._abandon("given up while connecting")
        return client

    @property
    def peer(self) -> Greeting:
        """What the authenticated peer said of itself: node UUID, versions, features."""
        return self._ready.result()

    @property
    def closed(self) -> bool:
        """Whether the connection is lost or closed."""
        return self._lost.done()

    async def wait_closed(self) -> ForebayError:
        """Wait until the connection is lost or closed, and return why."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Close the connection; requests in flight fail with StoreUnreachableError. Idempotent."""
        self._abandon("closed by this side")

    async def request(
        self, message: AnyMessage, payload: Sequence[Buffer] = (), *, timeout_s: float | None = None
    ) -> Answer:
        """Send a request and return the answer and its payload; waits first if too much is in flight.

        The payload's buffers must not change until the answer is there, and not at all after a cancellation.

        Raises:
            RefusedError: the peer answered Failed; code and text are its own.
            StoreUnreachableError: the connection is lost, or no answer came within `timeout_s` seconds.
        """
        if self._lost.done():
            raise self._lost_error(self._lost.result())
        size = sum([part.nbytes if isinstance(part, memoryview) else len(part) for part in payload]) if payload else 0
        pending = _Pending(self._loop.create_future(), message, payload, size)
        if self._waiting or not self._has_room(size):
            self._waiting.append(pending)
        else:
            self._start(pending)
        if timeout_s is None:
            return await pending.future
        timer = self._loop.call_later(timeout_s, self._expire, pending.future, timeout_s)
        try:
            return await pending.future
        finally:
            timer.cancel()

    async def ask(
        self, message: AnyMessage, expect: type[T], payload: Sequence[Buffer] = (), *, timeout_s: float | None = None
    ) -> tuple[T, memoryview]:
        """Do as `request`, and make sure that the answer has the expected type.

        Raises:
            ProtocolError: it has another; the connection is closed.
            RefusedError, StoreUnreachableError: as `request`.
        """
        answer, answer_payload = await self.request(message, payload, timeout_s=timeout_s)
        if isinstance(answer, expect):
            return answer, answer_payload
        error = ProtocolError(
            f"{self._name}: {type(message).__name__} was answered by {type(answer).__name__}, not {expect.__name__}"
        )
        self._lose(error)
        raise error

    def may_receive(self) -> bool:
        """Answers are always taken: their number is bounded by what we asked."""
        return True

    def on_event(self, event: Event) -> None:
        """Take an event from the link."""
        if isinstance(event, MessageReceived):
            self._on_answer(event)
        elif isinstance(event, Ready) and not self._ready.done():
            self._ready.set_result(event.peer)

    def on_received(self) -> None:
        """Nothing is counted: answers are bounded by what we asked."""

    def on_sent(self) -> None:
        """Nothing waits for this: a request is over when it is answered."""

    def on_lost(self, error: ForebayError) -> None:
        """Fail everything that waits."""
        if not self._ready.done():
            self._ready.set_exception(_named(self._name, error))
            self._ready.exception()  # nobody may be waiting for it: the socket itself did not connect
        self._lost.set_result(error)
        waiting = [*self._pending.values(), *self._waiting]
        self._pending.clear()
        self._waiting.clear()
        for pending in waiting:
            if not pending.future.done():
                pending.future.set_exception(self._lost_error(error))

    def _has_room(self, size: int) -> bool:
        if len(self._pending) >= REQUESTS_IN_FLIGHT_MAX:
            return False
        return self._bytes_in_flight == 0 or self._bytes_in_flight + size <= BYTES_IN_FLIGHT_MAX

    def _start(self, pending: _Pending) -> None:
        link = self._link
        assert link is not None
        request_id = self._next_id
        buffers = self._connection.send(request_id, pending.message, pending.payload)
        self._next_id = request_id + 1
        self._pending[request_id] = pending
        self._bytes_in_flight += pending.size
        link.send(buffers, now=len(self._pending) == 1)

    def _on_answer(self, answer: MessageReceived) -> None:
        pending = self._pending.pop(answer.request_id, None)
        if pending is None:
            raise ProtocolError(f"answer to request {answer.request_id}, which is not in flight")
        self._bytes_in_flight -= pending.size
        future = pending.future
        if not future.done():
            if isinstance(answer.message, Failed):
                future.set_exception(RefusedError(answer.message.code, _printable(answer.message.text)))
            else:
                future.set_result((answer.message, answer.payload))
        while self._waiting and (self._waiting[0].future.done() or self._has_room(self._waiting[0].size)):
            waiting = self._waiting.popleft()
            if not waiting.future.done():
                self._start_waiting(waiting)

    def _start_waiting(self, pending: _Pending) -> None:
        try:
            self._start(pending)
        except AssertionError as error:  # the caller's bug, so it goes to the caller and not to whoever was answered
            pending.future.set_exception(error)

    def _expire(self, future: asyncio.Future[Answer], timeout_s: float) -> None:
        if not future.done():
            future.set_exception(StoreUnreachableError(f"{self._name}: no answer within {timeout_s:g} s"))

    def _is_ready(self) -> bool:
        return self._ready.done() and not self._ready.cancelled() and self._ready.exception() is None

    def _abandon(self, why: str) -> None:
        self._lose(StoreUnreachableError(why))

    def _lose(self, error: ForebayError) -> None:
        if self._link is not None:
            self._link.lose(error)
        elif not self._lost.done():
            self.on_lost(error)

    def _lost_error(self, cause: ForebayError) -> StoreUnreachableError:
        error = StoreUnreachableError(f"{self._name}: {cause}")
        error.__cause__ = cause
        return error


def _named(name: str, error: ForebayError) -> ForebayError:
    """Return the same kind of error with the peer's address in front."""
    for kind in (AuthenticationError, ProtocolError):
        if isinstance(error, kind):
            return kind(f"{name}: {error}")
    return StoreUnreachableError(f"{name}: {error}")


def _printable(text: str) -> str:
    """Return a peer's text as one line without control characters, so that it can't play with a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:FAILED_TEXT_MAX])

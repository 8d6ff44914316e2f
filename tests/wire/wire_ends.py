"""Servers and raw peers for the tests that use real sockets."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from forebay_core.units import Buffer
from forebay_wire.address import Address
from forebay_wire.client import WireClient
from forebay_wire.connection import Connection, Event, Ready
from forebay_wire.greeting import Role
from forebay_wire.messages import AnyMessage, Blocks, Done, Read
from forebay_wire.peer import Answerer, Peer
from forebay_wire.server import WireServer

KEY = b"the key of both sides"
CLIENT_NODE = b"client device id"
SERVER_NODE = b"the store's uuid"
LOOPBACK = Address("127.0.0.1", 0)
TEST_TIMEOUT_S = 30.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an async test; a hang fails it, and so does anything it leaves running."""

    complaints: list[object] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(TEST_TIMEOUT_S):
            await test()
        # Connections that the other side of this loop just closed may have a step left.
        for _ in range(3):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(bounded())
    gc.collect()  # futures whose exception nobody took complain now
    assert not complaints, complaints


async def echo(peer: Peer, message: AnyMessage, payload: memoryview) -> tuple[AnyMessage, Sequence[Buffer]]:
    """Answer a Read with its own payload, anything else with Done."""
    if isinstance(message, Read):
        return Blocks(message.extents), (payload,)
    return Done(), ()


@contextlib.asynccontextmanager
async def serving(answer: Answerer = echo, key: bytes | None = KEY, **settings: object) -> AsyncIterator["Serving"]:
    """A server on a port of its own."""
    gone: list[Peer] = []
    server = WireServer(answer, key=key, node=SERVER_NODE, on_disconnect=gone.append, **settings)  # type: ignore[arg-type]
    address = await server.listen_tcp(LOOPBACK)
    try:
        yield Serving(server, address, gone)
    finally:
        await server.close(grace_s=1.0)
        assert not server.peers


class Serving:
    """A running server, where it listens, and the peers that left it."""

    def __init__(self, server: WireServer, address: Address, gone: list[Peer]) -> None:
        self.server = server
        self.address = address
        self.gone = gone

    async def client(self, key: bytes | None = KEY) -> WireClient:
        return await WireClient.connect(self.address, key=key, node=CLIENT_NODE, timeout_s=10)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that other callbacks of this loop make true; the test's own timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


class RawPeer:
    """A client or accepted server made of a plain socket, for misbehaving."""

    def __init__(self, sock: socket.socket, role: Role = Role.CLIENT, key: bytes | None = KEY) -> None:
        self.sock = sock
        node = CLIENT_NODE if role is Role.CLIENT else SERVER_NODE
        self.connection = Connection(role, key=key, node=node, nonce=bytes(31) + bytes([role]))
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, address: Address, key: bytes | None = KEY) -> "RawPeer":
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, tuple(address))
        return cls(sock, key=key)

    async def send(self, packed: bytes) -> None:
        await self._loop.sock_sendall(self.sock, packed)

    async def receive(self, size: int = 65536) -> bytes:
        """Return some bytes; none at the end of the stream, however it came."""
        try:
            return await self._loop.sock_recv(self.sock, size)
        except ConnectionError:
            return b""

    async def handshake(self) -> None:
        """Go on until the connection is ready."""
        while True:
            await self.send(b"".join(self.connection.take_outgoing()))
            if any(isinstance(event, Ready) for event in self.connection.feed(await self._some())):
                await self.send(b"".join(self.connection.take_outgoing()))
                return

    async def events(self) -> list[Event]:
        """Receive until there is at least one event."""
        while True:
            events = self.connection.feed(await self._some())
            if events:
                return events

    async def ended(self) -> bytes:
        """Receive until the stream ends; return what came."""
        received = b""
        while some := await self.receive():
            received += some
        return received

    def close(self) -> None:
        self.sock.close()

    async def _some(self) -> bytes:
        some = await self.receive(self.connection.receive_buffer().nbytes)
        if not some:
            raise EOFError
        return some

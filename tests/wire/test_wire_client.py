"""The client over real sockets: lost connections, servers of every bad kind, bounds, cancellation."""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from wire_ends import CLIENT_NODE, KEY, SERVER_NODE, RawPeer, run, serving, until

from forebay_core.errors import ForebayError, ProtocolError, RefusedError, StoreUnreachableError
from forebay_core.units import MIB, Buffer
from forebay_wire.address import Address, UnixPath
from forebay_wire.client import WireClient
from forebay_wire.connection import LocalProtocolError, MessageReceived
from forebay_wire.framing import REPLY, encode_message
from forebay_wire.greeting import Role
from forebay_wire.limits import BYTES_IN_FLIGHT_MAX, PAYLOAD_SIZE_MAX, PEER_DEAD_AFTER_MS, REQUESTS_IN_FLIGHT_MAX
from forebay_wire.messages import (
    AnyMessage,
    DeleteVolume,
    Done,
    Failed,
    GetVolume,
    ListVolumes,
    Ping,
    Read,
    StagePart,
    Volumes,
)
from forebay_wire.peer import Peer

Reply = tuple[AnyMessage, Sequence[Buffer]]


class BadServer:
    """Accepts one client by hand and is then as bad as the test likes."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._listener.setblocking(False)
        self.address = Address(*self._listener.getsockname())

    async def accept(self) -> RawPeer:
        sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return RawPeer(sock, Role.SERVER)

    async def ready(self) -> tuple[WireClient, RawPeer]:
        connecting = asyncio.create_task(self.connect())
        peer = await self.accept()
        await peer.handshake()
        return await connecting, peer

    async def connect(self, timeout_s: float = 10) -> WireClient:
        return await WireClient.connect(self.address, key=KEY, node=CLIENT_NODE, timeout_s=timeout_s)

    def close(self) -> None:
        self._listener.close()


def request_ids(events: Sequence[object]) -> list[int]:
    return [event.request_id for event in events if isinstance(event, MessageReceived)]


def test_the_peer_is_known_after_connecting() -> None:
    async def test() -> None:
        async with serving() as serve:
            client = await serve.client()
            assert client.peer.node == SERVER_NODE
            assert client.peer.role is Role.SERVER
            assert not client.closed
            await client.close()
            await client.close()
            assert client.closed
            assert "closed by this side" in str(await client.wait_closed())
            with pytest.raises(StoreUnreachableError, match="closed by this side"):
                await client.request(Ping())

    run(test)


def test_nobody_there_is_unreachable_with_address_and_reason(tmp_path: Path) -> None:
    async def test() -> None:
        bad = BadServer()
        bad.close()
        places: list[Address | UnixPath] = [
            bad.address,
            Address("no.such.host.invalid", 1),
            Address("a" * 80 + ".b", 1),
        ]
        places += [UnixPath(str(tmp_path / "none")), UnixPath("/" + "x" * 200)]
        for place in places:
            with pytest.raises(StoreUnreachableError) as caught:
                await WireClient.connect(place, key=None, node=CLIENT_NODE, timeout_s=5)
            assert str(place) in str(caught.value)
            assert place is not bad.address or str(caught.value) == f"{place}: Connection refused"

    run(test)


def test_a_server_that_says_nothing_is_given_up_in_time() -> None:
    async def test() -> None:
        bad = BadServer()
        with pytest.raises(StoreUnreachableError, match=r"no answer within 0\.05 s"):
            await bad.connect(timeout_s=0.05)
        peer = await bad.accept()
        await peer.ended()  # the client closed its socket
        peer.close()
        bad.close()

    run(test)


def test_cancelling_a_connect_closes_the_socket() -> None:
    async def test() -> None:
        bad = BadServer()
        connecting = asyncio.create_task(bad.connect())
        peer = await bad.accept()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await peer.ended()
        peer.close()
        bad.close()

    run(test)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (b"", StoreUnreachableError, "closed the connection"),
        (b"FOREBAY\n\x01", StoreUnreachableError, "closed the connection"),
        (
            b"220 mail.example.org ESMTP Postfix (Debian/GNU), welcome to all of you here and there\r\n",
            ProtocolError,
            "mail",
        ),
    ],
)
def test_a_server_of_another_kind_is_named(said: bytes, kind: type[ForebayError], words: str) -> None:
    async def test() -> None:
        bad = BadServer()
        connecting = asyncio.create_task(bad.connect())
        peer = await bad.accept()
        await peer.receive()
        await peer.send(said)
        peer.close()
        with pytest.raises(kind, match=words) as caught:
            await connecting
        assert str(bad.address) in str(caught.value)
        bad.close()

    run(test)


def test_a_lost_connection_fails_every_request_in_flight() -> None:
    async def test() -> None:
        bad = BadServer()
        client, peer = await bad.ready()
        asking = [asyncio.create_task(client.request(GetVolume("a"))) for _ in range(REQUESTS_IN_FLIGHT_MAX + 9)]
        seen = 0
        while seen < REQUESTS_IN_FLIGHT_MAX:
            seen += len(await peer.events())
        peer.close()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreUnreachableError}
        assert client.closed
        await client.wait_closed()
        bad.close()

    run(test)


@pytest.mark.parametrize("reply", [Failed("no-such-volume", "no volume\x1b[31m a"), Done()])
def test_failed_is_raised_and_its_text_can_not_play_with_a_terminal(reply: AnyMessage) -> None:
    async def test() -> None:
        bad = BadServer()
        client, peer = await bad.ready()
        asking = asyncio.create_task(client.ask(GetVolume("a"), Done))
        [request_id] = request_ids(await peer.events())
        await peer.send(b"".join(peer.connection.send(request_id, reply)))
        if isinstance(reply, Failed):
            with pytest.raises(RefusedError) as caught:
                await asking
            assert (caught.value.code, str(caught.value)) == ("no-such-volume", "no volume [31m a")
        else:
            assert await asking == (Done(), b"")
        await client.close()
        peer.close()
        bad.close()

    run(test)


@pytest.mark.parametrize("twice", [False, True])
def test_an_answer_nobody_asked_for_ends_the_connection(twice: bool) -> None:
    async def test() -> None:
        bad = BadServer()
        client, peer = await bad.ready()
        asking = asyncio.create_task(client.request(GetVolume("a")))
        [request_id] = request_ids(await peer.events())
        if twice:
            await peer.send(b"".join(peer.connection.send(request_id, Done())) * 2)
            assert await asking == (Done(), b"")
        else:
            await peer.send(b"".join(peer.connection.send(request_id + 1, Done())))
            with pytest.raises(StoreUnreachableError, match="not in flight"):
                await asking
        assert isinstance(await client.wait_closed(), ProtocolError)
        peer.close()
        bad.close()

    run(test)


@pytest.mark.parametrize("bit", [0, 70, 200, 8 * 41, 8 * 90])
def test_a_flipped_bit_in_an_answer_is_never_an_answer(bit: int) -> None:
    async def test() -> None:
        bad = BadServer()
        client, peer = await bad.ready()
        asking = asyncio.create_task(client.request(Read(b"v" * 16, b"")))
        [request_id] = request_ids(await peer.events())
        packed = bytearray(b"".join(encode_message(REPLY, request_id, Done(), (bytes(100),))))
        packed[bit // 8] ^= 1 << bit % 8
        await peer.send(bytes(packed))
        with pytest.raises(StoreUnreachableError):
            await asking
        assert isinstance(await client.wait_closed(), ProtocolError)
        peer.close()
        bad.close()

    run(test)


def test_an_answer_of_another_type_is_a_protocol_error_and_closes() -> None:
    async def test() -> None:
        async with serving() as serve:
            client = await serve.client()
            with pytest.raises(ProtocolError, match="ListVolumes was answered by Done, not Volumes"):
                await client.ask(ListVolumes(), Volumes)
            assert client.closed

    run(test)


def test_a_request_that_timed_out_or_was_cancelled_harms_no_other() -> None:
    async def test() -> None:
        bad = BadServer()
        client, peer = await bad.ready()
        with pytest.raises(StoreUnreachableError, match=r"no answer within 0\.02 s"):
            await client.request(GetVolume("slow"), timeout_s=0.02)
        cancelled = asyncio.create_task(client.request(GetVolume("given up")))
        await asyncio.sleep(0)
        cancelled.cancel()
        asking = asyncio.create_task(client.request(GetVolume("a"), timeout_s=10))
        ids: list[int] = []
        while len(ids) < 3:
            ids += request_ids(await peer.events())
        for request_id in ids:
            await peer.send(b"".join(peer.connection.send(request_id, Failed("code", str(request_id)))))
        with pytest.raises(RefusedError, match=f"^{ids[2]}$"):
            await asking
        assert cancelled.cancelled()
        assert not client.closed
        await client.close()
        peer.close()
        bad.close()

    run(test)


def test_the_client_keeps_within_the_servers_bounds() -> None:
    async def test() -> None:
        bad = BadServer()
        client, peer = await bad.ready()
        total = REQUESTS_IN_FLIGHT_MAX + 10
        asking = [asyncio.create_task(client.request(DeleteVolume(str(number)))) for number in range(total)]
        gave_up = asyncio.create_task(client.request(DeleteVolume("given up"), timeout_s=0.01))
        ids: list[int] = []
        while len(ids) < REQUESTS_IN_FLIGHT_MAX:
            ids += request_ids(await peer.events())
        with pytest.raises(StoreUnreachableError):
            await gave_up
        peer.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.sock.recv(1)
        answered = 0
        while answered < total:
            for request_id in ids:
                await peer.send(b"".join(peer.connection.send(request_id, Done())))
            answered += len(ids)
            ids = request_ids(await peer.events()) if answered < total else []
        await asyncio.gather(*asking)
        await client.close()
        peer.close()
        bad.close()

    run(test)


def test_large_payloads_wait_for_their_turn() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        most = 0

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            nonlocal most
            most = max(most, peer.size)
            await gate.wait()
            return Done(), ()

        part = bytes(PAYLOAD_SIZE_MAX)
        async with serving(answer) as serve:
            client = await serve.client()
            asking = [
                asyncio.create_task(client.request(StagePart(b"v" * 16, 1, 1, 1, number), (part,)))
                for number in range(7)
            ]
            await until(lambda: most >= BYTES_IN_FLIGHT_MAX)
            gate.set()
            await asyncio.gather(*asking)
            assert most < BYTES_IN_FLIGHT_MAX + 1 * MIB
            await client.close()

    run(test)


def test_a_message_that_is_too_large_is_the_callers_bug_and_harms_nobody() -> None:
    async def test() -> None:
        async with serving() as serve:
            client = await serve.client()
            with pytest.raises(LocalProtocolError):
                await client.request(Read(b"", b""), (bytes(PAYLOAD_SIZE_MAX + 1),))
            await client.ask(Ping(), Done)
            assert not client.closed
            await client.close()

    run(test)


def test_a_dead_peer_is_noticed_within_fifteen_seconds() -> None:
    async def test() -> None:
        async with serving() as serve:
            client = await serve.client()
            assert client._link is not None
            sock = client._link._sock
            keepalive = [
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ]
            assert keepalive[0] + keepalive[1] * keepalive[2] <= 15
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == PEER_DEAD_AFTER_MS <= 15_000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            await client.close()

    run(test)

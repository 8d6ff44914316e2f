"""The server over real sockets: answers, order, bounds, and clients of every bad kind."""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from wire_ends import CLIENT_NODE, KEY, RawPeer, echo, run, serving, until

from forebay_core.errors import (
    AuthenticationError,
    CorruptionError,
    ForebayError,
    InUseError,
    NoSpaceError,
    ProtocolError,
    RefusedError,
    StoreUnreachableError,
    WrongUsageError,
)
from forebay_core.units import MIB, Buffer
from forebay_wire import messages
from forebay_wire.address import Address, UnixPath
from forebay_wire.client import WireClient
from forebay_wire.connection import MessageReceived
from forebay_wire.framing import MESSAGE_HEADER
from forebay_wire.greeting import GREETING, VERDICT, Reason, decode_verdict
from forebay_wire.limits import (
    BYTES_IN_FLIGHT_MAX,
    CONNECTIONS_MIN,
    PAYLOAD_SIZE_MAX,
    REQUESTS_IN_FLIGHT_MAX,
)
from forebay_wire.messages import AnyMessage, Blocks, DeleteVolume, Done, GetVolume, Ping, Read, StagePart
from forebay_wire.peer import Peer
from forebay_wire.server import ServerLimits, WireServer, limits_within

Reply = tuple[AnyMessage, Sequence[Buffer]]


def test_ping_is_answered_by_the_server_itself() -> None:
    async def test() -> None:
        async with serving() as serve:
            client = await serve.client()
            assert await client.ask(Ping(), Done) == (Done(), b"")
            await client.close()

    run(test)


@pytest.mark.parametrize("size", [0, 1, 4096, 131_071, 131_072, 1 * MIB, PAYLOAD_SIZE_MAX])
def test_payloads_come_back_as_they_went(size: int) -> None:
    async def test() -> None:
        payload = os.urandom(size)
        async with serving() as serve:
            client = await serve.client()
            half = size // 2
            _, answer = await client.ask(Read(b"", b"x"), Blocks, (payload[:half], memoryview(payload)[half:]))
            assert answer == payload
            await client.close()

    run(test)


def test_requests_start_in_order_and_end_in_any() -> None:
    async def test() -> None:
        started: list[str] = []
        ended: list[str] = []
        gates: dict[str, asyncio.Event] = {str(number): asyncio.Event() for number in range(20)}

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            assert isinstance(message, DeleteVolume)
            started.append(message.name)
            await gates[message.name].wait()
            return Done(), ()

        async def ask(client: WireClient, name: str) -> None:
            await client.ask(DeleteVolume(name), Done)
            ended.append(name)

        async with serving(answer) as serve:
            client = await serve.client()
            asking = [asyncio.create_task(ask(client, name)) for name in gates]
            await until(lambda: len(started) == len(gates))
            assert started == list(gates)
            for name in reversed(gates):
                gates[name].set()
                await until(lambda last=name: ended[-1:] == [last])
            await asyncio.gather(*asking)
            await client.close()

    run(test)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError(messages.NO_SUCH_VOLUME, "there is no volume a"), messages.NO_SUCH_VOLUME),
        (NoSpaceError("the disk is full"), messages.NO_SPACE),
        (CorruptionError(place="segment 1", what="frame", expected=1, found=2), messages.CORRUPT),
        (ProtocolError("bad extents"), messages.BAD_REQUEST),
        (WrongUsageError("a bad name"), messages.BAD_REQUEST),
        (ForebayError("something else\nin two lines"), messages.FAILED),
    ],
)
def test_errors_of_the_answer_are_refusals_with_a_code(error: ForebayError, code: str) -> None:
    async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
        raise error

    async def test() -> None:
        async with serving(answer) as serve:
            client = await serve.client()
            for _ in range(2):
                with pytest.raises(RefusedError) as caught:
                    await client.request(GetVolume("a"))
                assert (caught.value.code, str(caught.value)) == (code, str(error).replace("\n", " "))
            await client.close()

    run(test)


def test_a_bug_is_logged_answered_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
        match message:
            case GetVolume("too large"):
                return Done(), (bytes(PAYLOAD_SIZE_MAX + 1),)
            case GetVolume():
                raise ZeroDivisionError("one\ntwo")
            case _:
                return Done(), ()

    async def test() -> None:
        async with serving(answer) as serve:
            client = await serve.client()
            for name in ("a", "too large"):
                with pytest.raises(RefusedError, match=r"^GetVolume failed inside the server .*log") as caught:
                    await client.request(GetVolume(name))
                assert caught.value.code == messages.FAILED
            await client.ask(DeleteVolume("a"), Done)
            await client.close()

    run(test)
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True, True]
    assert "ZeroDivisionError" in caplog.text


def test_a_peer_knows_who_and_whence() -> None:
    async def test() -> None:
        seen: list[Peer] = []

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            seen.append(peer)
            return Done(), ()

        async with serving(answer) as serve:
            clients = [await serve.client(), await serve.client()]
            for client in clients:
                await client.request(DeleteVolume("a"))
            first, second = seen
            assert first.id != second.id
            assert first.node == CLIENT_NODE
            assert first.address.startswith("127.0.0.1:")
            assert not first.closed
            await clients[0].close()
            await until(lambda: serve.gone == [first])
            assert first.closed
            second.disconnect("its session is over")
            await clients[1].wait_closed()
            assert serve.gone == [first, second]

    run(test)


@pytest.mark.parametrize(
    ("server_key", "client_key", "at_client", "at_server"),
    [
        (KEY, b"another key than that", "the peer's key differs", "the peer's key differs"),
        (KEY, None, "the peer has a key and we have none", "we have a key and the peer has none"),
        (None, KEY, "we have a key and the peer has none", "the peer has a key and we have none"),
    ],
)
def test_both_sides_say_what_is_wrong_with_the_keys(
    server_key: bytes | None,
    client_key: bytes | None,
    at_client: str,
    at_server: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with serving(key=server_key) as serve:
            with pytest.raises(AuthenticationError) as caught:
                await serve.client(key=client_key)
            assert str(caught.value).startswith(f"{serve.address}: {at_client}")
            await until(lambda: at_server in caplog.text)

    run(test)


def test_a_silent_client_is_dropped_in_time() -> None:
    async def test() -> None:
        async with serving(limits=ServerLimits(handshake_timeout_s=0.1)) as serve:
            silent = await RawPeer.connect(serve.address)
            half = await RawPeer.connect(serve.address)
            await half.send(b"".join(half.connection.take_outgoing()))
            assert len(await silent.ended()) == GREETING.size
            assert len(await half.ended()) == GREETING.size
            silent.close()
            half.close()
            client = await serve.client()
            await asyncio.sleep(0.2)
            await client.ask(Ping(), Done)
            await client.close()
            assert len(serve.gone) <= 1

    run(test)


def test_many_silent_clients_do_not_keep_others_out() -> None:
    async def test() -> None:
        async with serving(limits=ServerLimits(handshakes=8)) as serve:
            silent = [await RawPeer.connect(serve.address) for _ in range(20)]
            client = await serve.client()
            await client.ask(Ping(), Done)
            assert len(await silent[0].ended()) == GREETING.size
            await client.close()
            for peer in silent:
                peer.close()

    run(test)


def test_one_connection_too_many_is_told_so() -> None:
    async def test() -> None:
        async with serving(limits=ServerLimits(connections=2)) as serve:
            clients = [await serve.client() for _ in range(2)]
            with pytest.raises(StoreUnreachableError, match="too many connections"):
                await serve.client()
            await clients[0].close()
            await until(lambda: len(serve.gone) == 1)
            clients.append(await serve.client())
            for client in clients:
                await client.close()

    run(test)


def test_connections_are_as_many_as_there_are_files_for() -> None:
    assert limits_within(10**6) == ServerLimits()
    few = limits_within(100)
    assert few.connections + few.handshakes == 100
    with pytest.raises(ForebayError, match="18 open files are left"):
        limits_within(18)
    assert limits_within(20).connections == CONNECTIONS_MIN


@pytest.mark.parametrize("garbage", [b"\x00" * 200, b"GET / HTTP/1.1\r\n\r\n" * 10, os.urandom(5000)])
@pytest.mark.parametrize("authenticated", [False, True])
def test_garbage_ends_only_its_own_connection(garbage: bytes, authenticated: bool) -> None:
    async def test() -> None:
        async with serving() as serve:
            client = await serve.client()
            bad = await RawPeer.connect(serve.address)
            if authenticated:
                await bad.handshake()
            await bad.send(garbage)
            await bad.ended()
            bad.close()
            await client.ask(Ping(), Done)
            await client.close()

    run(test)


def test_a_flipped_bit_on_the_way_ends_the_connection_before_anything_is_done() -> None:
    async def test() -> None:
        asked: list[AnyMessage] = []

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            asked.append(message)
            return Done(), ()

        async with serving(answer) as serve:
            for bit in (5, 100, 300, 8 * 45, 8 * 5000):
                bad = await RawPeer.connect(serve.address)
                await bad.handshake()
                packed = bytearray(b"".join(bad.connection.send(1, StagePart(b"v" * 16, 1, 1, 1, 0), (bytes(10_000),))))
                packed[bit // 8] ^= 1 << bit % 8
                await bad.send(bytes(packed))
                assert await bad.ended() == b""
                bad.close()
            assert asked == []

    run(test)


def test_half_a_message_is_never_answered() -> None:
    async def test() -> None:
        asked: list[AnyMessage] = []

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            asked.append(message)
            return Done(), ()

        async with serving(answer) as serve:
            for cut in (1, MESSAGE_HEADER.size, 200_000, 299_999):
                half = await RawPeer.connect(serve.address)
                await half.handshake()
                packed = b"".join(half.connection.send(1, StagePart(b"v" * 16, 1, 1, 1, 0), (bytes(300_000),)))
                await half.send(packed[:cut])
                half.close()
            await until(lambda: len(serve.gone) == 4)
            assert asked == []

    run(test)


def test_no_more_requests_are_taken_than_the_bound() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        working = 0
        most = 0

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            nonlocal working, most
            working += 1
            most = max(most, working)
            await gate.wait()
            working -= 1
            return Done(), ()

        async with serving(answer) as serve:
            bad = await RawPeer.connect(serve.address)
            await bad.handshake()
            count = 5 * REQUESTS_IN_FLIGHT_MAX
            await bad.send(b"".join(b"".join(bad.connection.send(n, DeleteVolume("a"))) for n in range(count)))
            await until(lambda: working == REQUESTS_IN_FLIGHT_MAX)
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert most == REQUESTS_IN_FLIGHT_MAX
            gate.set()
            answered: list[int] = []
            while len(answered) < count:
                answered += [event.request_id for event in await bad.events() if isinstance(event, MessageReceived)]
            assert sorted(answered) == list(range(count))
            assert most == REQUESTS_IN_FLIGHT_MAX
            bad.close()

    run(test)


def test_a_client_that_does_not_read_is_not_read_from() -> None:
    async def test() -> None:
        answered = 0
        big = bytes(4 * MIB)

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            nonlocal answered
            await asyncio.sleep(0)
            answered += 1
            return Blocks(b""), (big,)

        async with serving(answer) as serve:
            slow = await RawPeer.connect(serve.address)
            await slow.handshake()
            request = b"".join(slow.connection.send(1, Read(b"", b"")))
            for _ in range(40):
                await slow.send(request)
                await asyncio.sleep(0.002)
            await until(lambda: serve.server.peers[0].size >= BYTES_IN_FLIGHT_MAX)
            for _ in range(20):
                await asyncio.sleep(0.001)
            # What was in work when the bound was reached may overshoot it, and the kernel took some.
            assert answered < 40
            assert serve.server.peers[0].size < BYTES_IN_FLIGHT_MAX + 16 * len(big)
            other = await serve.client()
            await other.ask(Ping(), Done)
            await other.close()
            received = 0
            while received < 40:
                received += len(await slow.events())
            assert answered == 40
            slow.close()

    run(test)


def test_a_full_server_still_serves_who_has_nothing_in_flight() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        working = 0

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            nonlocal working
            if isinstance(message, StagePart):
                working += 1
                await gate.wait()
            return Done(), ()

        async with serving(answer, limits=ServerLimits(bytes_in_flight=4 * MIB)) as serve:
            greedy, other = await serve.client(), await serve.client()
            asking = [
                asyncio.create_task(greedy.request(StagePart(b"v" * 16, 1, 1, 1, 0), (bytes(1 * MIB),)))
                for _ in range(12)
            ]
            await until(lambda: working == 4)
            for number in range(3):
                await other.ask(DeleteVolume(str(number)), Done)
            assert working == 4
            gate.set()
            await asyncio.gather(*asking)
            await greedy.close()
            await other.close()

    run(test)


def test_a_client_that_vanishes_leaves_its_requests_to_end() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        started, ended = [], []

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            started.append(peer)
            await gate.wait()
            ended.append(peer.closed)
            return Blocks(b""), (bytes(5000),)

        async with serving(answer) as serve:
            client = await serve.client()
            asking = [asyncio.create_task(client.request(GetVolume("a"))) for _ in range(10)]
            await until(lambda: len(started) == 10)
            await client.close()
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {StoreUnreachableError}
            await until(lambda: len(serve.gone) == 1)
            assert len(serve.server.peers) == 1  # counted until its work is done
            gate.set()
            await until(lambda: not serve.server.peers)
            assert ended == [True] * 10

    run(test)


def test_closing_lets_requests_end_and_sends_their_answers() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        payload = os.urandom(6 * MIB)

        async def answer(peer: Peer, message: AnyMessage, _: memoryview) -> Reply:
            await gate.wait()
            return Blocks(b""), (payload,)

        async with serving(answer) as serve:
            client = await serve.client()
            asking = [asyncio.create_task(client.request(GetVolume("a"))) for _ in range(3)]
            await until(lambda: bool(serve.server.peers) and len(serve.server.peers[0].tasks) == 3)
            closing = asyncio.create_task(serve.server.close())
            await asyncio.sleep(0)
            with pytest.raises(StoreUnreachableError):
                await serve.client()
            gate.set()
            for _, answer_payload in await asyncio.gather(*asking):
                assert answer_payload == payload
            await closing
            await client.wait_closed()

    run(test)


def test_closing_gives_up_on_what_does_not_end() -> None:
    async def test() -> None:
        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async with serving(answer) as serve:
            client = await serve.client()
            asking = asyncio.create_task(client.request(GetVolume("a")))
            await until(lambda: bool(serve.server.peers) and len(serve.server.peers[0].tasks) == 1)
            await serve.server.close(grace_s=0.05)
            with pytest.raises(StoreUnreachableError):
                await asking

    run(test)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
def test_without_key_only_loopback_is_listened_on(host: str) -> None:
    async def test() -> None:
        server = WireServer(echo, key=None, node=bytes(16))
        with pytest.raises(WrongUsageError, match="key file"):
            await server.listen_tcp(Address(host, 0))
        address = await server.listen_tcp(Address("localhost", 0))
        client = await WireClient.connect(address, key=None, node=bytes(16), timeout_s=5)
        await client.close()
        await server.close()

    run(test)


def test_with_a_key_every_address_may_be_listened_on() -> None:
    async def test() -> None:
        server = WireServer(echo, key=KEY, node=bytes(16))
        address = await server.listen_tcp(Address("", 0))
        client = await WireClient.connect(Address("127.0.0.1", address.port), key=KEY, node=bytes(16), timeout_s=5)
        await client.close()
        await server.close()

    run(test)


def test_a_port_in_use_is_told_in_one_line() -> None:
    async def test() -> None:
        async with serving() as serve:
            other = WireServer(echo, key=KEY, node=bytes(16))
            with pytest.raises(InUseError, match="another process listens there"):
                await other.listen_tcp(serve.address)
            with pytest.raises(WrongUsageError, match=r"listen on 192\.0\.2\.1:7"):
                await other.listen_tcp(Address("192.0.2.1", 7))
            with pytest.raises(WrongUsageError, match=r"no\.such\.host\.invalid"):
                await other.listen_tcp(Address("no.such.host.invalid", 7))

    run(test)


def test_a_unix_socket_is_private_replaces_a_dead_one_and_goes_away(tmp_path: Path) -> None:
    async def test() -> None:
        path = UnixPath(str(tmp_path / "control.sock"))
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        server = WireServer(echo, key=None, node=bytes(16))
        await server.listen_unix(path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        client = await WireClient.connect(path, key=None, node=bytes(16), timeout_s=5)
        payload = os.urandom(3 * MIB)
        assert (await client.request(Read(b"", b""), (payload,)))[1] == payload
        assert [peer.address for peer in server.peers] == [f"process {os.getpid()}"]
        other = WireServer(echo, key=None, node=bytes(16))
        with pytest.raises(InUseError):
            await other.listen_unix(path)
        await client.close()
        await server.close()
        assert not os.path.exists(path)

    run(test)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    async def test() -> None:
        server = WireServer(echo, key=None, node=bytes(16))
        (tmp_path / "file").write_text("precious")
        for name in ("file", "no/folder", "x" * 200):
            with pytest.raises(WrongUsageError):
                await server.listen_unix(UnixPath(str(tmp_path / name)))
        assert (tmp_path / "file").read_text() == "precious"

    run(test)


def test_the_reason_of_a_refusal_reaches_a_raw_client() -> None:
    async def test() -> None:
        async with serving() as serve:
            peer = await RawPeer.connect(serve.address, key=b"a wrong key of good size")
            with pytest.raises(AuthenticationError, match="key differs"):
                await peer.handshake()
            peer.close()
            keyless = await RawPeer.connect(serve.address, key=None)
            await keyless.send(b"".join(keyless.connection.take_outgoing()))
            received = await keyless.ended()
            assert decode_verdict(received[-VERDICT.size :]).reason is Reason.RECEIVER_HAS_NO_KEY
            keyless.close()

    run(test)

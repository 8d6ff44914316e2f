"""What is received on the receiver's thread arrives whole, ends with its connection, and keeps nobody else waiting."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from nbd_client import TIMEOUT_S, Client, ServerThread
from ram_volume import LateVolume

from forebay_cache.engine.nbd_limits import BUDGET_SIZE, CONNECTION_BYTES_MAX
from forebay_cache.format import nbd
from forebay_cache.service import receiver
from forebay_cache.service.nbd_connection import NbdConnection
from forebay_cache.service.nbd_server import NbdSettings
from forebay_cache.service.receiver import Receiver
from forebay_cache.service.turns import Turns
from forebay_core.units import MIB

SIZE = 64 * MIB
needs_native = pytest.mark.skipif(receiver._receiver is None, reason="there is no compiler here")


def pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return an end to receive from, and one whose sends wait."""
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    ours.setblocking(False)
    return ours, theirs


def play(act: Callable[[Receiver, ExitStack], Awaitable[None]]) -> None:
    """Act with a receiver in a loop of its own."""

    async def played() -> None:
        with ExitStack() as stack:
            one = Receiver(Turns(asyncio.get_running_loop()))
            stack.callback(one.close)
            async with asyncio.timeout(TIMEOUT_S):
                await act(one, stack)

    asyncio.run(played())


def begin(one: Receiver, ours: socket.socket, memory: bytearray) -> asyncio.Future[int]:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    assert one.receive(ours.fileno(), memoryview(memory), told.set_result) is not None
    return told


@needs_native
def test_memory_is_filled_and_what_follows_stays_in_the_socket() -> None:
    async def act(one: Receiver, stack: ExitStack) -> None:
        ours, theirs = pair(stack)
        memory = bytearray(3 * MIB)
        told = begin(one, ours, memory)
        sent = bytes(range(256)) * (12 * 1024)
        await asyncio.to_thread(theirs.sendall, sent + b"next")
        assert await told == len(memory)
        assert memory == sent
        assert ours.recv(100) == b"next"

    play(act)


@needs_native
def test_a_silent_sender_keeps_no_other_one_waiting_and_is_told_at_the_close() -> None:
    async def act(one: Receiver, stack: ExitStack) -> None:
        (silent, first), (busy, second) = pair(stack), pair(stack)
        memory, other = bytearray(8), bytearray(8)
        slow, fast = begin(one, silent, memory), begin(one, busy, other)
        await asyncio.to_thread(first.sendall, b"abc")
        await asyncio.to_thread(second.sendall, b"12345678")
        assert await fast == 8
        assert not slow.done()
        one.close()
        assert (await slow, memory[:3]) == (3, b"abc")
        assert one.receive(busy.fileno(), memoryview(other), lambda _: None) is None

    play(act)


@needs_native
@pytest.mark.parametrize("end", ["closed", "shut down here"])
def test_a_receive_ends_with_its_connection(end: str) -> None:
    async def act(one: Receiver, stack: ExitStack) -> None:
        ours, theirs = pair(stack)
        memory = bytearray(100)
        told = begin(one, ours, memory)
        await asyncio.to_thread(theirs.sendall, b"abc")
        if end == "closed":
            theirs.close()
        else:
            ours.shutdown(socket.SHUT_RDWR)
        assert await told == 3
        assert memory[:3] == b"abc"

    play(act)


# --- connections


def receiving(server: ServerThread) -> list[NbdConnection]:
    return [one for one in server.server._connections if one._receiving is not None]


def write_one_and_a_half(server: ServerThread, client: Client) -> bytes:
    """Have one large write in the volume, and half of another one received elsewhere; return the other half."""
    parked = len(server.exports.volumes["vol"].parked)
    raw = client.request(nbd.CMD_WRITE, 8 * MIB, MIB, payload=b"\2" * MIB)
    client.send(client.request(nbd.CMD_WRITE, 0, MIB, payload=b"\1" * MIB) + raw[: MIB // 2])
    server.until(lambda: len(server.exports.volumes["vol"].parked) > parked and len(receiving(server)) > 0)
    return raw[MIB // 2 :]


@needs_native
def test_a_large_write_is_received_while_the_volume_has_another_one(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        rest = write_one_and_a_half(server, client)
        client.send(rest)
        server.until(lambda: len(volume.parked) == 2)
        server.call(volume.release)
        assert [client.answer().error for _ in range(2)] == [0, 0]
        assert volume.memory[: 9 * MIB] == b"\1" * MIB + bytes(7 * MIB) + b"\2" * MIB
        assert receiving(server) == []


@needs_native
@pytest.mark.parametrize("answered", ["before", "behind"])
def test_a_client_that_vanishes_within_a_large_write_leaves_nothing_behind(tmp_path: Path, answered: str) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server:
        client = server.client().go("vol")
        write_one_and_a_half(server, client)
        if answered == "before":
            server.call(volume.release)
        client.close()
        server.until(lambda: receiving(server) == [])
        server.call(volume.release)
        server.until(lambda: not server.server._connections)
        assert volume.clients == 0
        assert server.server._budget.free == BUDGET_SIZE


@needs_native
def test_a_stop_within_a_large_write_closes_the_connection(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        write_one_and_a_half(server, client)
        server.run(lambda: server.server.close(0.05))
        assert client.answer().error == 108
        assert client.at_end()
        server.call(volume.release)
        server.until(lambda: not server.server._connections)


@needs_native
def test_who_falls_silent_within_a_large_write_is_dropped_for_those_who_wait(tmp_path: Path) -> None:
    settings = NbdSettings(stall_timeout_s=0.3, budget_bytes=CONNECTION_BYTES_MAX + MIB)
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume, settings=settings) as server:
        hog, large = server.client().go("vol"), server.client().go("vol")
        hog.send(hog.request(nbd.CMD_WRITE, 0, MIB, payload=bytes(MIB)))
        hog.send(hog.request(nbd.CMD_WRITE, 0, 32 << 20, payload=bytes(32 << 20))[: 1 << 20])
        server.until(lambda: len(receiving(server)) == 1)
        raw = large.request(nbd.CMD_WRITE, 0, 32 << 20, payload=bytes(32 << 20))
        large.send(raw[:300_000])
        server.until(lambda: receiving(server) == [])
        server.call(volume.release)
        large.send(raw[300_000:])
        server.until(lambda: len(volume.parked) == 1)
        server.call(volume.release)
        assert large.answer().error == 0
        hog.close()
        large.close()

"""What is received on the receiver's thread arrives whole, ends with its connection, and keeps nobody else waiting."""

import asyncio
import random
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


def begin(one: Receiver, ours: socket.socket, memory: bytearray, least: int = 0) -> asyncio.Future[int]:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    assert one.receive(ours.fileno(), memoryview(memory), least or len(memory), told.set_result) is not None
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
def test_what_came_with_the_last_wanted_bytes_is_received_and_nothing_else_waited_for() -> None:
    async def act(one: Receiver, stack: ExitStack) -> None:
        ours, theirs = pair(stack)
        memory = bytearray(100)
        told = begin(one, ours, memory, least=5)
        theirs.send(b"abc")
        theirs.send(b"dewith")
        assert await told == 9
        assert memory[:9] == b"abcdewith"

    play(act)


@needs_native
@pytest.mark.parametrize("least", [-1, 0, 101])
def test_what_the_memory_can_not_hold_is_no_receive(least: int) -> None:
    async def act(one: Receiver, stack: ExitStack) -> None:
        ours, _theirs = pair(stack)
        with pytest.raises(ValueError):
            one.receive(ours.fileno(), memoryview(bytearray(100)), least, lambda _: None)

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
        assert one.receive(busy.fileno(), memoryview(other), 8, lambda _: None) is None

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


SIZES = (512, 4096, 100_000, 200 * 1024, 300_000, MIB // 2, MIB - 28, MIB, MIB + 4096, 3 * MIB)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_behind_large_writes_arrives_whole(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    volume = LateVolume("vol", SIZE, delay_s=0.002, seed=seed)
    expected = bytearray(SIZE)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        for _ in range(8):
            raw = b""
            count = chance.randrange(1, 12)
            at = 0
            for _ in range(count):
                size = chance.choice(SIZES) if chance.random() < 0.8 else 0
                if size and at + size <= SIZE:
                    payload = bytes([chance.randrange(1, 256)]) * size
                    raw += client.request(nbd.CMD_WRITE, at, size, payload=payload)
                    expected[at : at + size] = payload
                    at += size
                else:
                    raw += client.request(nbd.CMD_FLUSH)
            cut = chance.randrange(len(raw))
            for part in (raw[:cut], raw[cut:]):
                client.send(part)
            assert [client.answer().error for _ in range(count)] == [0] * count
        assert volume.memory[:] == expected
        assert not receiving(server)
        server.until(lambda: all(one._account.held == 0 for one in server.server._connections))


@needs_native
def test_who_waits_for_the_budget_keeps_nothing_of_a_large_write_that_is_done(tmp_path: Path) -> None:
    """The begin of the next one came with its last bytes."""
    settings = NbdSettings(budget_bytes=CONNECTION_BYTES_MAX + MIB)
    volume, other = LateVolume("vol", SIZE, delay_s=None), LateVolume("other", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume, other, settings=settings) as server:
        hog, client = server.client().go("other"), server.client().go("vol")
        rest = write_one_and_a_half(server, client)
        for count in (1, 2):
            hog.send(hog.request(nbd.CMD_WRITE, 0, 32 << 20, payload=bytes(32 << 20)))
            server.until(lambda count=count: len(other.parked) == count)
        client.send(rest + client.request(nbd.CMD_WRITE, 0, 32 << 20, payload=bytes(100)))
        server.until(lambda: len(volume.parked) == 2)
        account = next(one._account for one in server.server._connections if one._session.volume is volume)
        server.until(lambda: account.need > 0)
        server.call(volume.release)
        server.until(lambda: account.held == 0)
        assert account.need > 32 << 20
        hog.close()
        client.close()

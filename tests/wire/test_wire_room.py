"""Room in a server: large answers that nobody takes and large requests that do not end hold a bounded part of it."""

import asyncio
from collections.abc import Sequence

from wire_ends import RawPeer, run, serving, until

from forebay_core.units import MIB, Buffer
from forebay_wire.greeting import GREETING, VERDICT
from forebay_wire.limits import BYTES_IN_FLIGHT_MAX, READ_BUFFER_SIZE, REQUESTS_IN_FLIGHT_MAX
from forebay_wire.messages import AnyMessage, Blocks, DeleteVolume, Done, Ping, Read, StagePart
from forebay_wire.peer import Peer
from forebay_wire.server import ServerLimits

Reply = tuple[AnyMessage, Sequence[Buffer]]


class Maker:
    """Makes answers of one size, and counts those that were made, with the most bytes that a peer had in flight."""

    def __init__(self, size: int) -> None:
        self.payload = bytes(size)
        self.made: dict[int, int] = {}
        self.most = 0

    async def answer(self, peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
        await peer.reserve(len(self.payload))
        self.made[peer.id] = self.made.get(peer.id, 0) + 1
        self.most = max(self.most, peer.size)
        await asyncio.sleep(0)
        return Blocks(b""), (self.payload,)


async def steps() -> None:
    """Let everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0.001)


def test_large_answers_are_made_only_when_there_is_room_for_them() -> None:
    async def test() -> None:
        maker = Maker(16 * MIB - 4096)
        async with serving(maker.answer) as serve:
            slow = await RawPeer.connect(serve.address)
            await slow.handshake()
            await slow.send(b"".join(slow.connection.send(1, Read(b"", b""))) * REQUESTS_IN_FLIGHT_MAX)
            await until(lambda: len(maker.made) == 1)
            await steps()
            bound = BYTES_IN_FLIGHT_MAX // len(maker.payload)
            assert bound <= maker.made[1] <= bound + 1  # the kernel may have taken one
            assert maker.most <= BYTES_IN_FLIGHT_MAX + MIB
            received = 0
            while received < REQUESTS_IN_FLIGHT_MAX:
                received += len(await slow.events())
            assert maker.most <= BYTES_IN_FLIGHT_MAX + MIB
            await until(lambda: serve.server.peers[0].size == 0)
            slow.close()

    run(test)


def test_who_reads_its_answers_gets_them_however_many_others_do_not() -> None:
    async def test() -> None:
        maker = Maker(8 * MIB)
        async with serving(maker.answer, limits=ServerLimits(bytes_in_flight=20 * MIB)) as serve:
            slow = [await RawPeer.connect(serve.address) for _ in range(3)]
            for peer in slow:
                await peer.handshake()
                await peer.send(b"".join(peer.connection.send(1, Read(b"", b""))) * 8)
            await until(lambda: len(maker.made) == 3)
            await steps()
            assert sum(maker.made.values()) <= 5
            other = await serve.client()
            for _ in range(4):
                await other.ask(Read(b"", b""), Blocks)
            await other.close()
            for peer in slow:
                received = 0
                while received < 8:
                    received += len(await peer.events())
                peer.close()

    run(test)


def test_requests_that_wait_for_room_end_with_their_client() -> None:
    async def test() -> None:
        maker = Maker(16 * MIB - 4096)
        async with serving(maker.answer) as serve:
            slow = await RawPeer.connect(serve.address)
            await slow.handshake()
            await slow.send(b"".join(slow.connection.send(1, Read(b"", b""))) * 20)
            await until(lambda: bool(serve.server.peers) and serve.server.peers[0].requests > 10)
            slow.close()
            await until(lambda: not serve.server.peers)
            assert maker.made[1] < 20

    run(test)


def received(peer: Peer) -> int:
    """Return the bytes that came from a client."""
    assert peer._link is not None
    return peer._link.received_bytes


def half_message(peer: RawPeer, size: int) -> bytes:
    """Return a large message without its last byte."""
    return b"".join(peer.connection.send(1, StagePart(b"v" * 16, 1, 1, 1, 0), (bytes(size),)))[:-1]


def test_a_large_message_counts_from_its_header_on() -> None:
    async def test() -> None:
        async with serving() as serve:
            half = await RawPeer.connect(serve.address)
            await half.handshake()
            await half.send(half_message(half, 8 * MIB)[: 2 * READ_BUFFER_SIZE])
            await until(lambda: bool(serve.server.peers) and serve.server.peers[0].size > 8 * MIB)
            half.close()
            await until(lambda: not serve.server.peers)
            other = await serve.client()
            await other.ask(Ping(), Done)
            assert serve.server.peers[0].size == 0
            await other.close()

    run(test)


def test_a_large_message_waits_in_a_crowded_server_unless_its_client_has_nothing_else() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
            await gate.wait()
            return Done(), ()

        async with serving(answer, limits=ServerLimits(bytes_in_flight=4 * MIB)) as serve:
            first, busy = await RawPeer.connect(serve.address), await RawPeer.connect(serve.address)
            await first.handshake()
            await first.send(half_message(first, 5 * MIB)[: 2 * READ_BUFFER_SIZE])
            await until(lambda: bool(serve.server.peers) and serve.server.peers[0].size > 5 * MIB)
            await busy.handshake()
            await busy.send(b"".join(busy.connection.send(1, DeleteVolume("a"))))
            await busy.send(half_message(busy, 2 * MIB)[: 4 * READ_BUFFER_SIZE])
            await until(lambda: len(serve.server.peers) == 2 and serve.server.peers[1].size > 0)
            await steps()
            assert serve.server.peers[1].size < READ_BUFFER_SIZE
            gate.set()  # then it has nothing else in flight
            await until(lambda: serve.server.peers[1].size > 2 * MIB)
            first.close()
            busy.close()

    run(test)


def test_a_large_message_that_does_not_get_on_ends_its_connection() -> None:
    async def test() -> None:
        async with serving(limits=ServerLimits(progress_timeout_s=0.05)) as serve:
            idle = await serve.client()
            half, small = await RawPeer.connect(serve.address), await RawPeer.connect(serve.address)
            for peer, size in ((half, 8 * MIB), (small, 1000)):
                await peer.handshake()
                await peer.send(half_message(peer, size)[: 2 * READ_BUFFER_SIZE])
            assert await half.ended() == b""
            await until(lambda: len(serve.gone) == 1)
            await idle.ask(Ping(), Done)
            await small.send(b"\0")  # a small message holds no memory of its own: it may take its time
            assert len(await small.events()) == 1
            await idle.close()
            for peer in (half, small):
                peer.close()

    run(test)


def test_a_large_message_that_gets_on_is_taken_however_long_it_takes() -> None:
    async def test() -> None:
        async with serving() as serve:
            slow = await RawPeer.connect(serve.address)
            await slow.handshake()
            packed = half_message(slow, 2 * MIB) + b"\0"
            step = READ_BUFFER_SIZE
            for at in range(0, len(packed), step):
                await slow.send(packed[at : at + step])
                sent = GREETING.size + VERDICT.size + min(at + step, len(packed))
                while not serve.server.peers or received(serve.server.peers[0]) < sent:
                    await asyncio.sleep(0)
                serve.server.peers[0].check_progress()
            assert len(await slow.events()) == 1
            slow.close()

    run(test)

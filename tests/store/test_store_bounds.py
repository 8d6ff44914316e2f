"""The daemon's bounds as clients meet them: what one of them uses up, the others still have."""

import asyncio
from pathlib import Path

import pytest
from store_daemon import StoreDaemon, Writer, create, plain, run
from wire_ends import RawPeer

from forebay_core.errors import RefusedError, StoreUnreachableError
from forebay_core.extents import Extent, pack
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE, KIB, MIB
from forebay_store.limits import PART_ENTRIES_MAX
from forebay_store.service.daemon import OWN_FILES_MAX
from forebay_wire import messages
from forebay_wire.limits import BYTES_IN_FLIGHT_MAX, READ_BLOCKS_MAX


def test_idle_connections_never_take_the_files_that_a_write_needs(tmp_path: Path) -> None:
    for_connections = 40

    async def look(daemon: StoreDaemon) -> None:
        assert daemon.address is not None
        async with daemon.client() as client:
            await create(client, "vm", 256)
            writer = await Writer.open(client, "vm")
            silent = [await RawPeer.connect(daemon.address, key=None) for _ in range(for_connections)]
            idle = []
            for _ in range(for_connections):
                try:
                    idle.append(await daemon.connect())
                except StoreUnreachableError:
                    break
            assert len(idle) < for_connections
            await writer.write(1, "with everything in use")
            for other in idle:
                await other.ask(messages.Ping(), messages.Done)
                await other.close()
            for peer in silent:
                peer.close()
            await asyncio.sleep(0)
            await writer.write(2, "afterwards")

    with StoreDaemon(tmp_path / "s", files_max=OWN_FILES_MAX + for_connections) as daemon:
        run(look(daemon))


def memory_peak(pid: int) -> int:
    """Return the most memory that a process ever had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("VmHWM"))


def lone_blocks(count: int) -> list[bytes]:
    """Return frames that hold one of the first blocks each, and 15 further ones of the volume."""
    builder = FrameBuilder()
    return [builder.build([Extent(at, 1), Extent(count + 15 * at, 15)], plain(at, 16)) for at in range(count)]


def test_reads_whose_answers_nobody_takes_are_not_made(tmp_path: Path) -> None:
    async def look(daemon: StoreDaemon) -> None:
        assert daemon.address is not None
        async with daemon.client() as client:
            row = await create(client, "vm", 16 * READ_BLOCKS_MAX)
            writer = await Writer.open(client, "vm")
            await writer.stage(0, lone_blocks(READ_BLOCKS_MAX))
            await writer.commit(1)
            before = memory_peak(daemon.process.pid)
            read = messages.Read(row.id, pack([Extent(0, READ_BLOCKS_MAX)]))
            slow = await RawPeer.connect(daemon.address, key=None)
            await slow.handshake()
            await slow.send(b"".join(b"".join(slow.connection.send(at, read)) for at in range(24)))
            for _ in range(3):
                await client.ask(read, messages.Blocks)
            # 24 answers are 360 MiB.
            assert memory_peak(daemon.process.pid) - before < BYTES_IN_FLIGHT_MAX + 100 * MIB
            slow.close()

    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))


def test_a_part_of_tiny_frames_is_refused_before_it_can_keep_the_index_busy(tmp_path: Path) -> None:
    builder = FrameBuilder()
    frames = [builder.build([Extent(2 * at, 1)], b"x" * BLOCK_SIZE) for at in range(PART_ENTRIES_MAX + 1)]

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", 4 * PART_ENTRIES_MAX)
            writer = await Writer.open(client, "vm")
            with pytest.raises(RefusedError, match="more than 4096 extents") as caught:
                await writer.stage(0, [b"".join(frames)])
            assert caught.value.code == messages.BAD_REQUEST
            await writer.stage(0, [b"".join(frames[:-1])])
            await writer.commit(1)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))


def test_a_store_that_may_open_too_few_files_says_so_and_does_not_start(tmp_path: Path) -> None:
    daemon = StoreDaemon(tmp_path / "s", files_max=OWN_FILES_MAX + 10)
    assert daemon.address is None
    assert "ulimit -n" in daemon.end()

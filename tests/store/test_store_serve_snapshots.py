"""Snapshots and clones of a daemon, over the wire and over kill -9."""

from pathlib import Path

import pytest
from store_daemon import StoreDaemon, Writer, create, frame, plain, run

from forebay_core.errors import RefusedError
from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE, make_version
from forebay_store.service.fsck import fsck
from forebay_store.service.rebuild import rebuild_index
from forebay_wire import messages
from forebay_wire.client import WireClient
from forebay_wire.pieces import plain_pieces

BLOCKS = 4096
ASKS_MAX = 20_000


async def block(client: WireClient, shown: bytes, lba: int) -> bytes | None:
    """Return one block of a volume or snapshot, through its origins."""
    extent = Extent(lba, 1)
    blocks, payload = await client.ask(messages.Read(shown, pack([extent]), through=True), messages.Blocks)
    [piece] = plain_pieces(blocks.pieces, payload, [extent], place="test")
    return None if piece.plain is None else bytes(piece.plain)


async def volume(client: WireClient, name: str) -> messages.VolumeRow:
    """Return the row of a volume."""
    return (await client.ask(messages.GetVolume(name), messages.Volume))[0].row


async def flattened(client: WireClient, name: str) -> messages.VolumeRow:
    """Ask until a volume is no clone any more."""
    for _ in range(ASKS_MAX):
        row = await volume(client, name)
        if not row.origin:
            return row
    raise AssertionError(f"{name} is still being flattened")


async def fill(client: WireClient, name: str) -> bytes:
    """Make a volume of four parts, in which every third block holds data; return its id."""
    row = await create(client, name, BLOCKS)
    writer = await Writer.open(client, name)
    for index in range(4):
        starts = range(index * BLOCKS // 4, (index + 1) * BLOCKS // 4, 3)
        await writer.stage(index, [frame(start, start) for start in starts])
    await writer.commit(4)
    await writer.release()
    return row.id


def test_a_clone_is_flattened_beside_other_work_and_on_after_kill_9(tmp_path: Path) -> None:
    async def begin(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await fill(client, "vm")
            await client.ask(messages.CreateSnapshot(("vm",), "s"), messages.SnapshotTaken)
            await client.ask(messages.CloneVolume("vm", "s", "c"), messages.Volume)
            writer = await Writer.open(client, "c")
            assert writer.last == 1
            await writer.write(3, "own")
            await client.ask(messages.FlattenVolume("c"), messages.Done)
        daemon.kill()

    async def end(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = await flattened(client, "c")
            assert not row.flattening and row.data_blocks == 4 * len(range(0, BLOCKS // 4, 3))
            await client.ask(messages.DeleteSnapshot("vm", "s"), messages.Done)
            await client.ask(messages.DeleteVolume("vm"), messages.Done)
            assert await block(client, row.id, 3) == plain("own")
            assert await block(client, row.id, 4) is None
            assert await block(client, row.id, BLOCKS - 1) == plain(BLOCKS - 1)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(begin(daemon))
    with StoreDaemon(tmp_path / "s") as daemon:
        run(end(daemon))
    assert fsck(tmp_path / "s") == []
    rebuild_index(tmp_path / "s")
    assert fsck(tmp_path / "s") == []


def test_snapshots_outlive_what_replaced_them_and_give_their_space_back(tmp_path: Path) -> None:
    async def take(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            vm = await fill(client, "vm")
            writer = await Writer.open(client, "vm")
            await writer.commit(0, snapshot=b"s" * 16, snapshot_name="monday", snapshot_ns=9)
            await writer.stage(0, [], [Extent(0, BLOCKS)])
            await writer.commit(1)
            with pytest.raises(RefusedError, match="detach it") as caught:
                await client.ask(messages.RollbackVolume("vm", "monday"), messages.Volume)
            assert caught.value.code == messages.VOLUME_IN_USE
            [row] = (await client.ask(messages.ListSnapshots("vm"), messages.Snapshots))[0].rows
            assert (row.name, row.version, row.created_ns) == ("monday", make_version(2, 2), 9)
            assert row.unique_size > BLOCKS // 3 * BLOCK_SIZE
            assert (await volume(client, "vm")).data_blocks == 0
            assert await block(client, vm, 3) is None and await block(client, row.id, 3) == plain(3)
        daemon.kill()

    async def back(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            writer = await Writer.open(client, "vm")
            await writer.release()
            await client.ask(messages.RollbackVolume("vm", "monday"), messages.Volume)
            row = await volume(client, "vm")
            assert await block(client, row.id, 3) == plain(3)
            live = (await client.ask(messages.GetStoreStatus(), messages.StoreStatus))[0].live_bytes
            await client.ask(messages.DeleteSnapshot("vm", "monday"), messages.Done)
            await client.ask(messages.DeleteVolume("vm"), messages.Done)
            for _ in range(ASKS_MAX):
                status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
                if status.live_bytes == 0:
                    break
            assert live > 0 == status.live_bytes

    with StoreDaemon(tmp_path / "s") as daemon:
        run(take(daemon))
    with StoreDaemon(tmp_path / "s") as daemon:
        run(back(daemon))
    assert fsck(tmp_path / "s") == []

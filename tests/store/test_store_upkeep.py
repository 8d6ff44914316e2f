"""Cleaning and scrub of a running store, over the wire: space comes back, damage is found by block, reads go on."""

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_daemon import StoreDaemon, Writer, create, frame, plain, run

from forebay_core.errors import ForebayError, RefusedError
from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE
from forebay_store.format.damage_file import ScrubState
from forebay_store.format.rows import Table
from forebay_store.service.damage_file import DamageFile
from forebay_store.service.folder import open_folder
from forebay_store.service.fsck import fsck
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.opening import open_store
from forebay_store.service.rebuild import rebuild_index
from forebay_wire import messages
from forebay_wire.client import WireClient
from forebay_wire.pieces import plain_pieces

BLOCKS = 240


async def status_when(client: WireClient, reached: Callable[[messages.StoreStatus], bool]) -> messages.StoreStatus:
    """Ask until the store is as it shall be."""
    while True:
        status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
        if reached(status):
            return status


async def clean(client: WireClient) -> messages.StoreStatus:
    """Let the store clean, and wait for the end of the pass."""
    before, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
    await client.ask(messages.CleanStore(), messages.Done)
    return await status_when(client, lambda status: status.clean.passes > before.clean.passes)


async def scrub(client: WireClient) -> messages.StoreStatus:
    """Let the store scrub, and wait for the end of the pass."""
    await client.ask(messages.ScrubStore(1 << 40), messages.Done)
    return await status_when(client, lambda status: not status.scrub.running)


async def damage(client: WireClient) -> list[messages.DamagedExtent]:
    """Return all that is known to be damaged."""
    page, _ = await client.ask(messages.GetDamage(), messages.Damage)
    return list(page.rows)


async def read(client: WireClient, volume: bytes, extent: Extent) -> list[bytes | None]:
    """Return the blocks of an extent; None for one that reads as zeros."""
    blocks, payload = await client.ask(messages.Read(volume, pack([extent])), messages.Blocks)
    found: list[bytes | None] = []
    for piece in plain_pieces(blocks.pieces, payload, [extent], place="test"):
        for at in range(piece.extent.count):
            found.append(None if piece.plain is None else bytes(piece.plain[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]))
    return found


def segment_size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "segments").iterdir())


def test_overwritten_and_deleted_data_gives_its_space_back(tmp_path: Path) -> None:
    expected: dict[int, int] = {}

    async def overwrite(daemon: StoreDaemon) -> None:
        chance = random.Random(1)
        async with daemon.client() as client:
            row = await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            for seed in range(150):
                start = chance.randrange(BLOCKS - 8)
                await writer.write(start, seed, 8)
                expected.update({start + at: seed for at in range(8)})
            status = await clean(client)
            assert status.clean.segments_freed and not status.clean.error
            assert status.segment_bytes == segment_size(tmp_path / "s") <= 1.25 * status.live_bytes
            found = await read(client, row.id, Extent(0, BLOCKS))
            assert [block is not None for block in found] == [lba in expected for lba in range(BLOCKS)]
            await writer.release()
            await client.ask(messages.DeleteVolume("vm"), messages.Done)
            await clean(client)
            assert segment_size(tmp_path / "s") < 4096

    with StoreDaemon(tmp_path / "s") as daemon:
        run(overwrite(daemon))
    assert fsck(tmp_path / "s") == []


def test_a_store_whose_index_folder_was_deleted_goes_on_and_says_what_fails(tmp_path: Path) -> None:
    async def work(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            await writer.write(0, "a")
            shutil.rmtree(tmp_path / "s" / "index")
            for _ in range(2):
                status = await clean(client)
                assert "can't be made smaller" in status.clean.error
                await writer.write(0, "b")

    with StoreDaemon(tmp_path / "s") as daemon:
        run(work(daemon))
        assert daemon.stop() == 0
    rebuild_index(tmp_path / "s")
    assert fsck(tmp_path / "s") == []


def test_a_store_that_is_stopped_while_it_cleans_leaves_nothing_that_nobody_needs(tmp_path: Path) -> None:
    async def work(daemon: StoreDaemon, asked: int) -> None:
        async with daemon.client() as client:
            writer = await Writer.open(client, "vm")
            for seed in range(40):
                await writer.write(seed % 8, seed)
            await client.ask(messages.CleanStore(), messages.Done)
            for _ in range(asked):
                await client.ask(messages.GetStoreStatus(), messages.StoreStatus)

    async def prepare(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", BLOCKS)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(prepare(daemon))
    for asked in range(12):
        with StoreDaemon(tmp_path / "s") as daemon:
            run(work(daemon, asked))
        assert fsck(tmp_path / "s") == []


def test_reads_go_on_while_their_segments_are_cleaned_away(tmp_path: Path) -> None:
    async def work(daemon: StoreDaemon) -> None:
        async with daemon.client() as client, daemon.client() as reader:
            row = await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            await writer.stage(0, [frame(at * 16, ("old", at), 16) for at in range(BLOCKS // 16)])
            await writer.commit(1)
            done = asyncio.Event()

            async def look() -> int:
                count = 0
                while not done.is_set():
                    start = count * 16 % BLOCKS
                    found = await read(reader, row.id, Extent(start, 16))
                    for lba, block in enumerate(found, start):
                        old = plain(("old", lba // 16), 16)[lba % 16 * BLOCK_SIZE :][:BLOCK_SIZE]
                        assert block == old or block == plain(("new", lba))
                    count += 1
                return count

            looking = asyncio.ensure_future(look())
            for lba in range(0, BLOCKS, 2):
                await writer.write(lba, ("new", lba))
                if lba % 32 == 0:
                    await clean(client)
            done.set()
            assert await looking

    with StoreDaemon(tmp_path / "s") as daemon:
        run(work(daemon))
    assert fsck(tmp_path / "s") == []


def test_a_scrub_finds_damage_by_volume_snapshot_and_block_and_keeps_it(tmp_path: Path) -> None:
    async def fill(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            await writer.stage(0, [frame(0, "shown by both", 4), frame(100, "only in the snapshot", 2)])
            await writer.commit(1)
            await writer.release()
            await client.ask(messages.CreateSnapshot(("vm",), "s1"), messages.SnapshotTaken)
            writer = await Writer.open(client, "vm")
            await writer.write(100, "new", 2)
            status = await scrub(client)
            assert status.scrub.damaged == 0 and status.scrub.checked_size == status.scrub.total_size > 0

    async def find(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            status = await scrub(client)
            assert status.scrub.damaged == 2
            rows = await damage(client)
            assert [(row.volume, row.start, row.count) for row in rows] == [("vm", 0, 4), ("vm@s1", 100, 2)]
            assert all(row.segment and row.offset and "checksum" in row.text for row in rows)
            writer = await Writer.open(client, "vm")
            for seed in range(12):
                await writer.write(0, seed, 3)
            await clean(client)
            assert any(row.segment == rows[0].segment for row in await damage(client))

    async def again(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            assert len(await damage(client)) == 2
            await scrub(client)
            assert [(row.volume, row.start, row.count) for row in await damage(client)] == [
                ("vm", 3, 1),
                ("vm@s1", 0, 3),
                ("vm@s1", 100, 2),
            ]

    with StoreDaemon(tmp_path / "s") as daemon:
        run(fill(daemon))
    [segment] = [
        file for file in (tmp_path / "s" / "segments").iterdir() if plain("shown by both", 4)[:64] in file.read_bytes()
    ]
    whole = bytearray(segment.read_bytes())
    for seed, count in (("shown by both", 4), ("only in the snapshot", 2)):
        whole[whole.index(plain(seed, count)[:64]) + 9] ^= 1
    segment.write_bytes(whole)
    with StoreDaemon(tmp_path / "s") as daemon:
        run(find(daemon))
    assert segment.exists()
    with StoreDaemon(tmp_path / "s") as daemon:
        run(again(daemon))


def damage_row(value: bytes) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:]


@pytest.mark.parametrize(("change", "meets"), [("damaged", "audit"), ("gone", "audit"), ("damaged", "read")])
def test_a_store_with_a_damaged_index_answers_nothing_and_says_what_to_do(
    tmp_path: Path, change: str, meets: str
) -> None:
    row_id = b""

    async def fill(daemon: StoreDaemon) -> None:
        nonlocal row_id
        async with daemon.client() as client:
            row_id = (await create(client, "vm", BLOCKS)).id
            writer = await Writer.open(client, "vm")
            for at in range(4):
                await writer.write(at * 10, at)

    def harm() -> None:
        index = LmdbIndex(tmp_path / "s" / "index")
        with index.view() as reader:
            key, value = list(reader.scan(Table.HEAD, b""))[1]
        if change == "gone":
            index.update(lambda writer: writer.delete(Table.HEAD, key))
        else:
            index.update(lambda writer: writer.put(Table.HEAD, key, damage_row(value)))
        index.close()

    async def find(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            if meets == "read":
                with pytest.raises(RefusedError, match="rebuild-index"):
                    await read(client, row_id, Extent(10, 1))
            status = await status_when(client, lambda status: bool(status.error))
            assert f"rebuild-index --data {tmp_path / 's'}" in status.error
            for message in (messages.Read(row_id, pack([Extent(0, 1)])), messages.GetVolume("vm")):
                with pytest.raises(RefusedError, match="rebuild-index") as refused:
                    await client.ask(message, messages.Blocks)
                assert refused.value.code == messages.STOPPING

    with StoreDaemon(tmp_path / "s") as daemon:
        run(fill(daemon))
    harm()
    with StoreDaemon(tmp_path / "s") as daemon:
        run(find(daemon))
    with pytest.raises(ForebayError, match=r"is damaged \(corrupt .*rebuild-index --data"):
        open_store(tmp_path / "s", now_ns=1)
    assert {one.code for one in fsck(tmp_path / "s")} == {"index-bad", "index-differs"}
    rebuild_index(tmp_path / "s")
    assert fsck(tmp_path / "s") == []
    with StoreDaemon(tmp_path / "s") as daemon:
        run(again(daemon, row_id))


async def again(daemon: StoreDaemon, row_id: bytes) -> None:
    async with daemon.client() as client:
        found = await read(client, row_id, Extent(0, 40))
        assert [at for at, block in enumerate(found) if block is not None] == [0, 10, 20, 30]


def test_a_read_that_meets_damage_tells_the_scrub(tmp_path: Path) -> None:
    async def meet(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            await writer.write(7, "seven", 2)
            [segment] = [
                file for file in (tmp_path / "s" / "segments").iterdir() if plain("seven", 2)[:64] in file.read_bytes()
            ]
            whole = bytearray(segment.read_bytes())
            whole[whole.index(plain("seven", 2)[:64])] ^= 1
            segment.write_bytes(whole)
            try:
                await read(client, row.id, Extent(7, 2))
            except ForebayError as error:
                assert segment.name in str(error)
            await status_when(client, lambda status: status.scrub.damaged == 1)
            [found] = await damage(client)
            assert (found.volume, found.start, found.count, found.segment) == ("vm", 7, 2, segment.name)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(meet(daemon))


def test_a_scrub_goes_on_where_a_stopped_store_left_it(tmp_path: Path) -> None:
    async def begin(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            for at in range(6):
                await writer.write(at * 16, at, 16)
            await scrub(client)
            await client.ask(messages.ScrubStore(1 << 16), messages.Done)
            await status_when(client, lambda status: status.scrub.running and status.scrub.checked_size > 0)

    async def go_on(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
            assert status.scrub.running or status.scrub.checked_size
            await client.ask(messages.ScrubStore(1 << 40), messages.Done)
            status = await status_when(client, lambda status: not status.scrub.running)
            assert status.scrub.finished_ns > status.scrub.started_ns

    with StoreDaemon(tmp_path / "s") as daemon:
        run(begin(daemon))
    with StoreDaemon(tmp_path / "s") as daemon:
        run(go_on(daemon))


def test_a_clock_that_was_far_ahead_keeps_no_scrub_from_coming(tmp_path: Path) -> None:
    in_2100_ns = 4102444800 * 10**9

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await status_when(client, lambda status: 0 < status.scrub.finished_ns < in_2100_ns)

    with StoreDaemon(tmp_path / "s") as daemon:
        daemon.stop()
    folder = open_folder(tmp_path / "s")
    DamageFile(folder.path, folder.store).write(ScrubState(finished_ns=in_2100_ns))
    folder.close()
    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))

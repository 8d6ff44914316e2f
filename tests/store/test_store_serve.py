"""The daemon as a process: answers over the wire, kill -9 under load, restart, full disk, refusals at start."""

import asyncio
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_daemon import DEVICE, StoreDaemon, Writer, create, frame, plain, run

from forebay_core.errors import AuthenticationError, ForebayError, RefusedError, StoreUnreachableError
from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE, MIB, make_version, sequence_of
from forebay_store.limits import RESERVE_SHARE
from forebay_store.service.fsck import fsck
from forebay_store.service.rebuild import rebuild_index
from forebay_wire import messages
from forebay_wire.client import WireClient
from forebay_wire.limits import READ_BLOCKS_MAX
from forebay_wire.pieces import plain_pieces

BLOCKS = 256


async def read_plain(client: WireClient, volume: bytes, start: int, count: int) -> dict[int, bytes]:
    """Return the blocks of an extent that hold data."""
    found: dict[int, bytes] = {}
    for at in range(start, start + count, READ_BLOCKS_MAX):
        extent = Extent(at, min(READ_BLOCKS_MAX, start + count - at))
        blocks, payload = await client.ask(messages.Read(volume, pack([extent])), messages.Blocks)
        for piece in plain_pieces(blocks.pieces, payload, [extent], place="test"):
            if piece.plain is not None:
                for index in range(piece.extent.count):
                    lba = piece.extent.start + index
                    found[lba] = bytes(piece.plain[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    return found


def test_a_volume_lives_through_a_restart(tmp_path: Path) -> None:
    async def fill(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            assert (await writer.write(3, "a", 4)).version == make_version(1, 1)
            await writer.stage(0, [frame(4, "b"), frame(100, "c", 16)], [Extent(200, 20)])
            await writer.commit(1, last=9)
            assert await read_plain(client, row.id, 0, BLOCKS) == expected()

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            [row] = (await client.ask(messages.ListVolumes(), messages.Volumes))[0].rows
            assert (row.name, row.version, row.writer) == ("vm", make_version(1, 9), DEVICE)
            assert await read_plain(client, row.id, 0, BLOCKS) == expected()
            status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
            assert (status.volumes, status.incarnation, status.error) == (1, 2, "")
            assert status.segments > 4 and status.free_bytes > 0
            again = await Writer.open(client, "vm", acknowledged=make_version(1, 9))
            assert again.opened.epoch == 1
            await again.write(0, "d")
            await again.release()
            await client.ask(messages.DeleteVolume("vm"), messages.Done)

    def expected() -> dict[int, bytes]:
        return (
            {3 + at: plain("a", 4)[at * BLOCK_SIZE :][:BLOCK_SIZE] for at in (0, 2, 3)}
            | {4: plain("b")}
            | {100 + at: plain("c", 16)[at * BLOCK_SIZE :][:BLOCK_SIZE] for at in range(16)}
        )

    with StoreDaemon(tmp_path / "s") as daemon:
        run(fill(daemon))
        assert daemon.stop() == 0
    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))
        assert daemon.stop() == 0
    assert fsck(tmp_path / "s") == []


class Torture:
    """A client that writes cuts to one volume until the store dies, and knows what must be there afterwards."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.states: list[dict[int, object]] = [{}]  # by sequence
        self.acknowledged = 0

    async def write_until_it_dies(self, daemon: StoreDaemon) -> None:
        client = await daemon.connect()
        try:
            writer = await Writer.open(client, self.name)
            self.adopt(sequence_of(writer.opened.row.version))
            writer.attempt = self.random.getrandbits(60)
            while True:
                await self.write_one(writer)
        except StoreUnreachableError:
            pass
        finally:
            await client.close()

    async def write_one(self, writer: Writer) -> None:
        state = dict(self.states[-1])
        written: set[int] = set()  # whose data counts, whatever the holes of the same cut say
        for index in range(2):
            start, seed = self.random.randrange(BLOCKS - 16), self.random.getrandbits(40)
            hole = self.random.randrange(BLOCKS - 8)
            for lba in set(range(hole, hole + 8)) - written:
                state.pop(lba, None)
            frames = [frame(start + at, (seed, at)) for at in range(4)]
            state |= {start + at: (seed, at) for at in range(4)}
            written.update(range(start, start + 4))
            await writer.stage(index, frames, [Extent(hole, 8)])
        self.states.append(state)
        await writer.commit(2)
        self.acknowledged = len(self.states) - 1

    def adopt(self, sequence: int) -> None:
        """The store stands at this sequence: that of the last acknowledgement, or of the commit behind it."""
        assert self.acknowledged <= sequence <= len(self.states) - 1
        del self.states[sequence + 1 :]
        self.acknowledged = sequence

    async def compare(self, client: WireClient) -> None:
        row = (await client.ask(messages.GetVolume(self.name), messages.Volume))[0].row
        self.adopt(sequence_of(row.version))
        found = await read_plain(client, row.id, 0, BLOCKS)
        assert found == {lba: plain(seed) for lba, seed in self.states[-1].items()}


def test_acknowledged_cuts_survive_kill_9_at_any_moment(tmp_path: Path) -> None:
    writers = [Torture("red", 1), Torture("green", 2)]
    moments = random.Random(7)

    async def prepare(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            for writer in writers:
                await create(client, writer.name, BLOCKS)

    async def torment(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            for writer in writers:
                await writer.compare(client)
        tasks = [asyncio.create_task(writer.write_until_it_dies(daemon)) for writer in writers]
        await asyncio.wait(tasks, timeout=moments.uniform(0.02, 0.5))
        daemon.process.kill()
        await asyncio.gather(*tasks)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(prepare(daemon))
    for _ in range(9):
        with StoreDaemon(tmp_path / "s") as daemon:
            run(torment(daemon))
    assert min(writer.acknowledged for writer in writers) > 10
    assert [one for one in fsck(tmp_path / "s") if one.code != "leftover-file"] == []
    rebuild_index(tmp_path / "s")
    with StoreDaemon(tmp_path / "s") as daemon:

        async def look() -> None:
            async with daemon.client() as client:
                for writer in writers:
                    await writer.compare(client)

        run(look())


def test_a_cache_is_told_which_of_the_volumes_it_reports_it_has_lost(tmp_path: Path) -> None:
    def report(opened: messages.Opened) -> messages.HeldReport:
        return messages.HeldReport(opened.row.id, opened.epoch, opened.row.version, 0, 1)

    async def test(daemon: StoreDaemon) -> None:
        assert daemon.address is not None
        async with daemon.client() as other:
            client = await WireClient.connect(daemon.address, key=None, node=DEVICE, timeout_s=10)
            held = []
            for name in ("kept", "taken", "released"):
                await create(client, name, BLOCKS)
                held.append(await Writer.open(client, name))
            message = messages.ReportHeld((*(report(one.opened) for one in held), report(held[0].opened)))
            assert (await client.ask(message, messages.Reported))[0].lost == ()
            await Writer.open(other, "taken", device=b"another device !", take_over=True)
            await held[2].release()
            lost = tuple(one.opened.row.id for one in held[1:])
            assert (await client.ask(message, messages.Reported))[0].lost == lost
            unknown = messages.HeldReport(b"?", 1, 1, 0, 1)
            assert (await client.ask(messages.ReportHeld((unknown,)), messages.Reported))[0].lost == (b"?",)
            await client.close()

    with StoreDaemon(tmp_path / "s") as daemon:
        run(test(daemon))


def test_reads_under_an_older_session_are_fenced(tmp_path: Path) -> None:
    async def test(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = await create(client, "vm", BLOCKS)
            old = (await Writer.open(client, "vm")).opened
            new = (await Writer.open(client, "vm")).opened
            assert old.epoch == new.epoch
            for opened in (new, old):
                for message in (
                    messages.Read(row.id, pack([Extent(0, 1)]), 0, opened.epoch, opened.session),
                    messages.MapExtents(row.id, 0, 1, opened.epoch, opened.session),
                ):
                    if opened is new:
                        await client.request(message)
                        continue
                    with pytest.raises(RefusedError, match="session") as caught:
                        await client.request(message)
                    assert caught.value.code == messages.FENCED

    with StoreDaemon(tmp_path / "s") as daemon:
        run(test(daemon))


def test_an_open_that_arrives_late_on_an_older_connection_changes_nothing(tmp_path: Path) -> None:
    async def test(daemon: StoreDaemon) -> None:
        lost = await daemon.connect(node=DEVICE)
        client = await daemon.connect(node=DEVICE)
        await create(client, "vm", BLOCKS)
        writer = await Writer.open(client, "vm")
        with pytest.raises(RefusedError, match="too late") as caught:
            await Writer.open(lost, "vm")
        assert caught.value.code == messages.FENCED
        await writer.stage(0, [frame(0, "a")])
        await writer.commit(1)  # the session goes on
        opened = writer.opened
        release = messages.ReleaseVolume(opened.row.id, opened.epoch, opened.session)
        await client.ask(release, messages.Done)
        with pytest.raises(RefusedError, match="too late"):
            await Writer.open(lost, "vm")
        assert not (await client.ask(messages.GetVolume("vm"), messages.Volume))[0].row.writer.strip(b"\0")
        await client.close()
        await lost.close()

    with StoreDaemon(tmp_path / "s") as daemon:
        run(test(daemon))


def test_a_take_over_that_arrives_late_takes_the_volume_from_nobody(tmp_path: Path) -> None:
    """Its device has a newer connection, on which it asked for nothing: it gave the volume up, and another has it."""

    async def test(daemon: StoreDaemon) -> None:
        lost = await daemon.connect(node=DEVICE)
        newer = await daemon.connect(node=DEVICE)
        other = await daemon.connect(node=b"device that came")
        await create(other, "vm", BLOCKS)
        writer = await Writer.open(other, "vm", device=b"device that came")
        with pytest.raises(RefusedError, match="too late"):
            await Writer.open(lost, "vm", take_over=True)
        await writer.commit(0)
        for client in (lost, newer, other):
            await client.close()

    with StoreDaemon(tmp_path / "s") as daemon:
        run(test(daemon))


def test_an_older_connection_opens_again_when_the_newer_one_is_gone(tmp_path: Path) -> None:
    async def test(daemon: StoreDaemon) -> None:
        older = await daemon.connect(node=DEVICE)
        newer = await daemon.connect(node=DEVICE)
        await create(newer, "vm", BLOCKS)
        await Writer.open(newer, "vm")
        await newer.close()
        while True:
            try:
                await Writer.open(older, "vm")
            except RefusedError:  # the store has not seen the end yet
                await asyncio.sleep(0.01)
            else:
                break
        await older.close()

    with StoreDaemon(tmp_path / "s") as daemon:
        run(test(daemon))


def test_devices_do_not_hinder_each_other_whoever_connected_first(tmp_path: Path) -> None:
    async def test(daemon: StoreDaemon) -> None:
        first = await daemon.connect(node=b"device that was1")
        second = await daemon.connect(node=b"device that came")
        await create(second, "vm", BLOCKS)
        await Writer.open(second, "vm", device=b"device that came")
        taken = await Writer.open(first, "vm", device=b"device that was1", take_over=True)
        await taken.commit(0)
        await first.close()
        await second.close()

    with StoreDaemon(tmp_path / "s") as daemon:
        run(test(daemon))


def test_a_rebuilt_index_gives_identical_answers(tmp_path: Path) -> None:
    async def fill(daemon: StoreDaemon) -> None:
        shuffled = random.Random(3)
        async with daemon.client() as client:
            for name in ("a", "b", "gone"):
                await create(client, name, BLOCKS)
                writer = await Writer.open(client, name)
                for turn in range(12):
                    frames = [frame(shuffled.randrange(BLOCKS - 16), (name, turn, at), 8) for at in range(3)]
                    await writer.stage(0, frames, [Extent(shuffled.randrange(BLOCKS - 32), 32)])
                    await writer.commit(1, last=writer.last + 3)
                await writer.stage(0, [frame(0, "unfinished")])
                if name != "b":
                    await writer.release()
            await client.ask(messages.DeleteVolume("gone"), messages.Done)
            await client.ask(messages.ResizeVolume("a", 2 * BLOCKS * BLOCK_SIZE), messages.Volume)

    async def answers(daemon: StoreDaemon) -> list[object]:
        found: list[object] = []
        async with daemon.client() as client:
            rows = (await client.ask(messages.ListVolumes(), messages.Volumes))[0].rows
            found += rows
            for row in rows:
                for at in range(0, BLOCKS, 64):
                    reply, payload = await client.ask(messages.Read(row.id, pack([Extent(at, 64)])), messages.Blocks)
                    found += [reply, bytes(payload)]
                for since in (0, make_version(1, 10), make_version(1, 20)):
                    found.append((await client.ask(messages.Changed(row.id, since), messages.Changes))[0])
                found.append((await client.ask(messages.MapExtents(row.id, 0, BLOCKS), messages.Mapped))[0])
        return found

    kept: list[list[object]] = []

    async def look(daemon: StoreDaemon) -> None:
        kept.append(await answers(daemon))

    with StoreDaemon(tmp_path / "s") as daemon:
        run(fill(daemon))
        run(look(daemon))
    subprocess.run(["rm", "-r", tmp_path / "s" / "index"], check=True)
    refused = StoreDaemon(tmp_path / "s")
    assert refused.address is None and refused.process.wait(30) == 1
    assert f"forebay store rebuild-index --data {tmp_path / 's'}" in refused.end()
    summary = rebuild_index(tmp_path / "s")
    assert summary.volumes == 2 and summary.head_entries > 30
    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))
    assert kept[0] == kept[1]
    assert fsck(tmp_path / "s") == []


def test_a_second_store_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with StoreDaemon(tmp_path / "s"):
        second = StoreDaemon(tmp_path / "s")
        assert second.process.wait(30) == 1
        assert "is in use by another process" in second.end()
        for check in (fsck, rebuild_index):
            with pytest.raises(ForebayError, match="in use"):
                check(tmp_path / "s")


def test_only_the_right_key_is_let_in(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(b"k" * 32)
    key_file.chmod(0o600)

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client(b"k" * 32) as client:
            await client.ask(messages.ListVolumes(), messages.Volumes)
        for key in (b"x" * 32, None):
            with pytest.raises(AuthenticationError):
                await daemon.connect(key)

    with StoreDaemon(tmp_path / "s", key_file=key_file) as daemon:
        run(look(daemon))


def test_a_store_for_everyone_needs_a_key(tmp_path: Path) -> None:
    daemon = StoreDaemon(tmp_path / "s", listen="0.0.0.0:0")
    assert daemon.process.wait(30) == 2
    assert "it needs a key file" in daemon.end()
    assert not (tmp_path / "s").exists()


def test_a_folder_of_other_things_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    daemon = StoreDaemon(tmp_path)
    assert daemon.process.wait(30) == 2
    assert "letter.txt" in daemon.end()


def test_damaged_data_is_an_error_with_its_place_and_nothing_else_suffers(tmp_path: Path) -> None:
    async def fill(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            await writer.write(0, "first", 16)
            await writer.write(50, "second", 16)

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = (await client.ask(messages.GetVolume("vm"), messages.Volume))[0].row
            with pytest.raises(RefusedError, match=r"segment .* offset .*expected 0x.*found 0x") as caught:
                await read_plain(client, row.id, 0, 1)
            assert caught.value.code == messages.CORRUPT
            found = await read_plain(client, row.id, 50, 16)
            assert b"".join(found.values()) == plain("second", 16)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(fill(daemon))
    large = [path for path in sorted((tmp_path / "s" / "segments").iterdir()) if path.stat().st_size > 60000]
    whole = bytearray(large[0].read_bytes())
    whole[len(whole) // 2] ^= 4
    large[0].write_bytes(whole)
    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))
    assert [one.code for one in fsck(tmp_path / "s")] == ["frame-stored"]


def test_what_is_no_frame_or_no_request_to_a_store_is_refused(tmp_path: Path) -> None:
    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            await create(client, "vm", BLOCKS)
            writer = await Writer.open(client, "vm")
            for payload in (b"garbage", frame(0, "a")[:-1], b"\0" * 1_000_000):
                with pytest.raises(RefusedError) as caught:
                    await writer.stage(0, [payload])
                assert caught.value.code == messages.CORRUPT
            with pytest.raises(RefusedError) as caught:
                await client.ask(messages.Detach("vm"), messages.Done)
            assert caught.value.code == messages.BAD_REQUEST
            await writer.write(0, "still works")

    with StoreDaemon(tmp_path / "s") as daemon:
        run(look(daemon))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_refuses_cuts_and_goes_on_when_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "lost+found"  # The only foreign name that a data folder may hold.

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = await create(client, "vm", 4096)
            writer = await Writer.open(client, "vm")
            await writer.write(0, "kept")
            with ballast.open("wb") as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            frames = [frame(at * 16, at, 16) for at in range(64)]
            for _ in range(3):
                with pytest.raises(RefusedError) as caught:
                    await writer.stage(0, frames)
                assert caught.value.code == messages.NO_SPACE
            assert await read_plain(client, row.id, 0, 16) == {0: plain("kept")}
            ballast.unlink()
            await writer.stage(0, frames)
            assert (await writer.commit(1)).version == make_version(1, 2)
            assert len(await read_plain(client, row.id, 0, 1024)) == 1024

    with StoreDaemon(small_disk) as daemon:
        run(look(daemon))
    assert fsck(small_disk) == []


def test_on_a_full_disk_trims_and_cleaning_free_space(small_disk: Path) -> None:
    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            row = await create(client, "vm", 1 << 16)
            writer = await Writer.open(client, "vm")
            await writer.write(0, "kept")
            count = 0
            with pytest.raises(RefusedError) as caught:
                while True:
                    start = 16 + count * 256
                    await writer.stage(0, [frame(start + at * 16, (count, at), 16) for at in range(16)])
                    await writer.commit(1)
                    count += 1
            assert caught.value.code == messages.NO_SPACE and count > 10
            with pytest.raises(RefusedError):
                for lba in range(1000):  # Nothing but what is kept for freeing space is left now.
                    await writer.write((1 << 15) + lba, lba)
            await writer.stage(0, [], [Extent(16 + at * 256 + 8, 240) for at in range(count)])
            await writer.commit(1)
            for _ in range(3):
                await client.ask(messages.CleanStore(), messages.Done)
            while True:
                status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
                if status.clean.passes >= 1 and not status.clean.running:
                    break
            assert status.segment_bytes < 1.3 * status.live_bytes, status
            await writer.write(16, "new", 16)
            assert (await read_plain(client, row.id, 0, 17))[0] == plain("kept")

    with StoreDaemon(small_disk) as daemon:
        run(look(daemon))
    assert fsck(small_disk) == []


def test_many_clients_at_once_do_not_take_what_freeing_space_needs(small_disk: Path) -> None:
    async def fill(daemon: StoreDaemon, number: int) -> None:
        async with daemon.client() as client:
            writer = await Writer.open(client, f"vm{number}", device=bytes([number + 1]) * 16)
            frames = [frame(at * 16, (number, at), 16) for at in range(32)]
            with pytest.raises(RefusedError) as caught:
                while True:
                    await asyncio.gather(*(writer.stage(index, frames) for index in range(4)))
            assert caught.value.code == messages.NO_SPACE
            await writer.release()

    async def look(daemon: StoreDaemon) -> None:
        async with daemon.client() as client:
            for number in range(8):
                await create(client, f"vm{number}", 512)
            await asyncio.gather(*(fill(daemon, number) for number in range(8)))
            status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
            assert status.free_bytes > RESERVE_SHARE * 24 * MIB / 2
            for number in range(8):
                await client.ask(messages.DeleteVolume(f"vm{number}"), messages.Done)

    with StoreDaemon(small_disk) as daemon:
        run(look(daemon))
    assert [one for one in fsck(small_disk) if one.code != "leftover-file"] == []

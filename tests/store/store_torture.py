"""A real store on a small disk under two caches, kill -9, a full disk, cleaning, and a lost or old index; and a model.

A request whose answer was lost, or that a full disk refused, may have happened: the store is asked once it is well
again. Then every volume and every snapshot must read as its copy. Run one seed again:
`Torture(SEED, FOLDER).run(ROUNDS)`.
"""

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from store_daemon import StoreDaemon, frame, plain
from store_daemon import run as run_limited

from forebay_core.errors import RefusedError, StoreUnreachableError
from forebay_core.extents import Extent, merge, pack
from forebay_core.units import BLOCK_SIZE, make_version, sequence_of
from forebay_store.format.rows import Table
from forebay_store.service.fsck import fsck
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.rebuild import rebuild_index
from forebay_wire import messages
from forebay_wire.client import WireClient
from forebay_wire.pieces import plain_pieces

BLOCKS_MAX = 160
VOLUMES_MAX = 6
Content = dict[int, tuple[str, int, int]]  # by block: seed of some blocks, how many they are, which of them


@dataclass
class Snap:
    id: bytes
    blocks: int
    content: Content


@dataclass
class Volume:
    name: str
    id: bytes
    blocks: int
    content: Content
    version: int
    snaps: dict[str, Snap] = field(default_factory=dict)
    opened: messages.Opened | None = None


@dataclass
class State:
    """What the store says of a volume; no row: there is none."""

    row: messages.VolumeRow | None
    snaps: dict[str, messages.SnapshotRow]


@dataclass
class Doubt:
    """A request on its way: whether it happened, and what that means."""

    name: str
    happened: Callable[[State], bool]
    apply: Callable[[State], None]


class Cache:
    """A client with volumes of its own: makes requests until the store dies or its disk is full."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.number = number
        self.device = bytes([number + 1]) * 16
        self.volumes: dict[str, Volume] = {}
        self.client: WireClient | None = None
        self.doubt: Doubt | None = None
        self.made = 0
        self.requests = 0

    async def run(self, daemon: StoreDaemon, stop: asyncio.Event) -> None:
        """Work until told to stop; leave a doubt behind if the store or its disk ended it."""
        while not stop.is_set() and self.doubt is None:
            try:
                async with daemon.client() as self.client:
                    for volume in self.volumes.values():
                        volume.opened = None
                    while not stop.is_set():
                        self.requests += 1
                        await self.step()
            except StoreUnreachableError:
                return
            except RefusedError as error:
                if error.code != messages.NO_SPACE:
                    raise

    async def step(self) -> None:
        if len(self.volumes) < 2:
            await self.create()
            return
        verbs = [self.write] * 9 + [self.take] * 3 + [self.delete_snapshot] * 3 + [self.clone] * 2
        verbs += [self.roll_back, self.flatten, self.resize, self.delete, self.check_some]
        await self.random.choice(verbs)(self.random.choice(list(self.volumes.values())))

    def fresh(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.number}-{self.made}"

    async def ask(self, message: messages.AnyMessage, payload: Sequence[bytes] = ()) -> messages.AnyMessage:
        assert self.client is not None
        answer, _ = await self.client.request(message, payload)
        if isinstance(answer, messages.Failed):
            raise RefusedError(answer.code, answer.text)
        return answer

    async def change(self, message: messages.AnyMessage, doubt: Doubt, *, refusal: str = "") -> None:
        """Make a request that changes something; one refused with `refusal` did not happen."""
        self.doubt = doubt
        try:
            await self.ask(message)
        except RefusedError as error:
            if error.code != refusal:
                raise
            self.doubt = None
            return
        await self.resolve()

    async def resolve(self) -> None:
        """Find out whether what is in doubt happened."""
        if self.doubt is not None:
            state = await self.look(self.doubt.name)
            if self.doubt.happened(state):
                self.doubt.apply(state)
        self.doubt = None

    async def look(self, name: str) -> State:
        try:
            found = await self.ask(messages.GetVolume(name))
        except RefusedError as error:
            assert error.code == messages.NO_SUCH_VOLUME, error
            return State(None, {})
        listed = await self.ask(messages.ListSnapshots(name, count_max=1000))
        assert isinstance(found, messages.Volume) and isinstance(listed, messages.Snapshots)
        return State(found.row, {row.name: row for row in listed.rows})

    # Requests.

    async def create(self) -> None:
        name, blocks = self.fresh("vm"), self.random.randrange(20, BLOCKS_MAX)
        await self.change(messages.CreateVolume(name, blocks * BLOCK_SIZE), self.making(name, blocks, {}, 0))

    async def clone(self, volume: Volume) -> None:
        if volume.snaps and len(self.volumes) < VOLUMES_MAX:
            snap, name = self.random.choice(list(volume.snaps)), self.fresh("vm")
            copy = volume.snaps[snap]
            doubt = self.making(name, copy.blocks, copy.content, 1)
            await self.change(messages.CloneVolume(volume.name, snap, name), doubt)

    def making(self, name: str, blocks: int, content: Content, version: int) -> Doubt:
        def apply(state: State) -> None:
            assert state.row is not None
            self.volumes[name] = Volume(name, state.row.id, blocks, dict(content), version)

        return Doubt(name, lambda state: state.row is not None, apply)

    async def open(self, volume: Volume) -> messages.Opened:
        if volume.opened is None:
            opened = await self.ask(messages.OpenVolume(volume.name, self.device, acknowledged=volume.version))
            assert isinstance(opened, messages.Opened) and opened.row.version == volume.version
            volume.opened = opened
        return volume.opened

    async def release(self, volume: Volume) -> None:
        opened = await self.open(volume)
        volume.opened = None
        await self.ask(messages.ReleaseVolume(volume.id, opened.epoch, opened.session))

    async def write(self, volume: Volume) -> None:
        """One cut, perhaps with a snapshot or another size at its end."""
        opened = await self.open(volume)
        key = (volume.id, opened.epoch, opened.session, self.random.getrandbits(60))
        content, blocks = dict(volume.content), volume.blocks
        parts = self.random.randrange(4)
        written: set[int] = set()  # whose data counts, whatever the holes of the same cut say
        for index in range(parts):
            holes, frames = self.part(volume, content, written)
            await self.ask(messages.StagePart(*key, index, pack(holes)), frames)
        first = sequence_of(volume.version) + 1
        last = first + self.random.randrange(3)
        closing: dict[str, object] = {}
        match self.random.randrange(8):
            case 0 | 1:
                closing = {"snapshot": self.random.randbytes(16), "snapshot_name": self.fresh("s"), "snapshot_ns": 1}
            case 2:
                blocks = self.random.randrange(10, BLOCKS_MAX)
                closing = {"size": blocks * BLOCK_SIZE}
                content = {lba: seed for lba, seed in content.items() if lba < blocks}
        commit = messages.CommitCut(*key, parts, first, last, 1, **closing)  # type: ignore[arg-type]
        await self.change(commit, self.becoming(volume, make_version(opened.epoch, last), blocks, content))

    def part(self, volume: Volume, content: Content, written: set[int]) -> tuple[list[Extent], list[bytes]]:
        holes = merge(self.extent(volume, 30) for _ in range(self.random.randrange(3)))
        for lba in {lba for hole in holes for lba in range(hole.start, hole.end)} - written:
            content.pop(lba, None)
        frames: list[bytes] = []
        for _ in range(self.random.randrange(8)):
            extent, seed = self.extent(volume, 16), self.fresh("data")
            frames.append(frame(extent.start, seed, extent.count))
            content.update({extent.start + at: (seed, extent.count, at) for at in range(extent.count)})
            written.update(range(extent.start, extent.end))
        return holes, frames

    def extent(self, volume: Volume, count_max: int) -> Extent:
        start = self.random.randrange(volume.blocks)
        return Extent(start, min(self.random.randint(1, count_max), volume.blocks - start))

    def becoming(self, volume: Volume, version: int, blocks: int, content: Content) -> Doubt:
        """A change that ends with a version, perhaps with new snapshots as of it."""

        def apply(state: State) -> None:
            volume.version, volume.blocks, volume.content = version, blocks, content
            for name, row in state.snaps.items():
                if row.version == version and name not in volume.snaps:
                    volume.snaps[name] = Snap(row.id, blocks, dict(content))

        return Doubt(volume.name, lambda state: state.row is not None and state.row.version == version, apply)

    async def take(self, volume: Volume) -> None:
        await self.release(volume)
        doubt = self.becoming(volume, volume.version + 1, volume.blocks, volume.content)
        await self.change(messages.CreateSnapshot((volume.name,), self.fresh("s")), doubt)

    async def delete_snapshot(self, volume: Volume) -> None:
        if volume.snaps:
            snap = self.random.choice(list(volume.snaps))
            gone = Doubt(volume.name, lambda state: snap not in state.snaps, lambda _: volume.snaps.pop(snap) and None)
            await self.change(messages.DeleteSnapshot(volume.name, snap), gone, refusal=messages.HAS_CLONES)

    async def roll_back(self, volume: Volume) -> None:
        if volume.snaps:
            await self.release(volume)
            snap = self.random.choice(list(volume.snaps))
            copy = volume.snaps[snap]
            doubt = self.becoming(volume, volume.version + 1, copy.blocks, dict(copy.content))
            await self.change(messages.RollbackVolume(volume.name, snap), doubt, refusal=messages.VOLUME_IN_USE)

    async def flatten(self, volume: Volume) -> None:
        nothing = Doubt(volume.name, lambda _: False, lambda _: None)
        await self.change(messages.FlattenVolume(volume.name), nothing, refusal=messages.BAD_REQUEST)

    async def resize(self, volume: Volume) -> None:
        await self.release(volume)
        blocks = self.random.randrange(10, BLOCKS_MAX)
        content = {lba: seed for lba, seed in volume.content.items() if lba < blocks}
        doubt = self.becoming(volume, volume.version + (blocks < volume.blocks), blocks, content)
        doubt.happened = lambda state: state.row is not None and state.row.size == blocks * BLOCK_SIZE
        await self.change(messages.ResizeVolume(volume.name, blocks * BLOCK_SIZE, True), doubt)

    async def delete(self, volume: Volume) -> None:
        await self.release(volume)
        gone = Doubt(volume.name, lambda state: state.row is None, lambda _: self.volumes.pop(volume.name) and None)
        await self.change(messages.DeleteVolume(volume.name), gone, refusal=messages.HAS_CLONES)

    # What must be.

    async def check_some(self, volume: Volume) -> None:
        await self.compare(volume.name, volume.id, volume.blocks, volume.content)
        for name in self.random.sample(list(volume.snaps), min(1, len(volume.snaps))):
            snap = volume.snaps[name]
            await self.compare(f"{volume.name}@{name}", snap.id, snap.blocks, snap.content)

    async def check_all(self, daemon: StoreDaemon) -> None:
        async with daemon.client() as self.client:
            await self.resolve()
            for volume in self.volumes.values():
                state = await self.look(volume.name)
                assert state.row is not None
                found = (state.row.id, state.row.version, state.row.size)
                assert found == (volume.id, volume.version, volume.blocks * BLOCK_SIZE), volume.name
                assert set(state.snaps) == set(volume.snaps), volume.name
                await self.compare(volume.name, volume.id, volume.blocks, volume.content)
                for name, snap in volume.snaps.items():
                    await self.compare(f"{volume.name}@{name}", snap.id, snap.blocks, snap.content)

    async def compare(self, what: str, shown: bytes, blocks: int, content: Content) -> None:
        assert self.client is not None
        extent = Extent(0, blocks)
        reply, payload = await self.client.ask(messages.Read(shown, pack([extent]), through=True), messages.Blocks)
        for piece in plain_pieces(reply.pieces, payload, [extent], place="test"):
            for at in range(piece.extent.count):
                lba = piece.extent.start + at
                found = None if piece.plain is None else bytes(piece.plain[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
                assert found == block_of(content.get(lba)), f"{what} block {lba}"


def block_of(seed: tuple[str, int, int] | None) -> bytes | None:
    return None if seed is None else plain(*seed[:2])[seed[2] * BLOCK_SIZE : (seed[2] + 1) * BLOCK_SIZE]


class Torture:
    """Rounds of work, harm and comparison."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(f"torture {seed}")
        self.folder = folder
        self.old_index = folder.parent / f"old-index-{seed}"
        self.ballast = folder / "lost+found"  # the only foreign name that a data folder may hold
        self.caches = [Cache(seed, 0), Cache(seed, 1)]

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            with StoreDaemon(self.folder) as daemon:
                run_limited(self.settle(daemon))
                run_limited(self.work(daemon))
                assert "Traceback" not in daemon.end()
            self.ballast.unlink(missing_ok=True)
            assert [one for one in fsck(self.folder) if one.code != "leftover-file"] == []
            self.random.choice([self.lose_index, self.make_anew, self.put_back_old_index, self.keep_index])()
        with StoreDaemon(self.folder) as daemon:
            run_limited(self.settle(daemon))
        shutil.rmtree(self.old_index, ignore_errors=True)

    async def settle(self, daemon: StoreDaemon) -> None:
        """Once a change goes through again the index shows all that is durable; then everything must be as it was."""
        async with daemon.client() as client:
            while True:
                try:
                    await client.ask(messages.CreateVolume("probe", BLOCK_SIZE), messages.Volume)
                except RefusedError as error:
                    assert error.code in (messages.NO_SPACE, messages.VOLUME_EXISTS), error
                    if error.code == messages.NO_SPACE:
                        continue
                await client.ask(messages.DeleteVolume("probe"), messages.Done)
                break
        for cache in self.caches:
            await cache.check_all(daemon)

    async def work(self, daemon: StoreDaemon) -> None:
        stop = asyncio.Event()
        tasks = [asyncio.create_task(cache.run(daemon, stop)) for cache in self.caches]
        tasks.append(asyncio.create_task(self.harm(daemon, stop)))
        await asyncio.wait(tasks, timeout=self.random.uniform(0.2, 2.5), return_when=asyncio.FIRST_EXCEPTION)
        kill = self.random.random() < 0.75
        if kill:
            daemon.process.kill()
        stop.set()
        await asyncio.gather(*tasks)
        if kill:
            daemon.process.wait()
        else:
            assert daemon.stop() == 0, daemon.end()

    async def harm(self, daemon: StoreDaemon, stop: asyncio.Event) -> None:
        """Clean, scrub, and fill the disk."""
        try:
            async with daemon.client() as client:
                while not stop.is_set():
                    await asyncio.sleep(self.random.uniform(0, 0.15))
                    match self.random.randrange(9):
                        case 0 | 1 | 2 | 3:
                            await client.ask(messages.CleanStore(), messages.Done)
                        case 4:
                            await client.ask(messages.ScrubStore(1 << 40), messages.Done)
                        case 5 | 6:
                            self.fill(self.random.choice([0, 0, 4096, 16384, 1 << 17, 1 << 20]))
                        case 7:
                            self.ballast.unlink(missing_ok=True)
                    status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
                    assert not status.error and not status.scrub.damaged, status
        except StoreUnreachableError:
            pass

    def fill(self, free_size: int) -> None:
        """Leave so many bytes on the disk, about."""
        disk = os.statvfs(self.folder)
        with suppress(OSError), self.ballast.open("ab") as file:
            for _ in range((disk.f_bavail * disk.f_frsize - free_size) // 4096):
                file.write(bytes(4096))
                file.flush()

    # Between rounds.

    def lose_index(self) -> None:
        shutil.rmtree(self.folder / "index")
        rebuild_index(self.folder)

    def make_anew(self) -> None:
        """The segments alone give the same rows."""
        with StoreDaemon(self.folder):
            pass  # A start brings the index up, an end does not leave it behind.
        before = self.rows()
        rebuild_index(self.folder)
        assert self.rows() == before

    def keep_index(self) -> None:
        shutil.rmtree(self.old_index, ignore_errors=True)
        shutil.copytree(self.folder / "index", self.old_index)

    def put_back_old_index(self) -> None:
        """It is brought up, or the start says what to do."""
        if not self.old_index.exists():
            return
        shutil.rmtree(self.folder / "index")
        shutil.copytree(self.old_index, self.folder / "index")
        daemon = StoreDaemon(self.folder)
        if daemon.address is None:
            assert "rebuild-index" in daemon.end()
            rebuild_index(self.folder)
        else:
            daemon.stop()
            daemon.end()

    def rows(self) -> dict[Table, dict[bytes, bytes]]:
        index = LmdbIndex(self.folder / "index", read_only=True)
        with index.view() as reader:
            found = {table: dict(reader.scan(table, b"")) for table in Table}
        index.close()
        return found

"""An engine rig with a family: a base image's snapshot, clones of it, and a clone of a clone, in one store."""

from typing import NamedTuple

from engine_rig import STORE_ID, Rig, SimulatedStore, store_content

from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.ports import ChangedPage, FetchedPiece, UpstreamRefusal
from forebay_cache.engine.sources import SnapshotView
from forebay_cache.engine.volume import CacheVolume
from forebay_core.checksums import checksum
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, Epoch, Version, VolumeId, make_version
from forebay_core.units import Sequence as ChangeSequence
from forebay_wire import messages

FROZEN_VERSION = make_version(Epoch(1), ChangeSequence(7))
Blocks = dict[int, tuple[bytes | None, Version]]
BASE = VolumeId(b"base snapshot id")
MIDDLE = VolumeId(b"middle snapshot.")
CLONES = (VolumeId(b"clone number 1.."), VolumeId(b"clone number 2.."), VolumeId(b"clone of a clone"))


class Frozen(NamedTuple):
    """A snapshot."""

    name: str
    blocks: Blocks
    origin: VolumeId
    count: int  # type: ignore[assignment]
    version: Version


class FamilyStore(SimulatedStore):
    """Several heads, each a store of its own for cuts, and snapshots."""

    def __init__(self, rng) -> None:
        super().__init__(rng)
        self.heads: dict[VolumeId, SimulatedStore] = {}
        self.origins: dict[VolumeId, VolumeId] = {}
        self.snapshots: dict[VolumeId, Frozen] = {}
        self.fetched: dict[VolumeId, int] = {}
        self.since: dict[tuple[VolumeId, VolumeId], list[Extent]] = {}

    def add_head(self, volume: VolumeId, origin: VolumeId) -> None:
        head = SimulatedStore(self.rng)
        head.queue, head.daemons = self.queue, self.daemons
        self.heads[volume] = head
        if origin:
            self.origins[volume] = origin

    def flatten(self, volume: VolumeId) -> None:
        """Give a clone all blocks of its origin."""
        head = self.heads[volume]
        origin = self.snapshots[self.origins.pop(volume)]
        version = max(head.version, Version(1))
        for lba in range(origin.count):
            content = self.see(origin.blocks, origin.origin, lba)
            if lba not in head.blocks:
                head.blocks[lba] = (content, version if head.version else Version(0))

    def see(self, blocks: Blocks, origin: VolumeId, lba: int) -> bytes | None:
        if lba in blocks:
            return blocks[lba][0]
        if not origin:
            return None
        below = self.snapshots[origin]
        return self.see(below.blocks, below.origin, lba) if lba < below.count else None

    def content(self, volume: VolumeId, count: int) -> bytes:
        head, origin = self.of(volume)
        seen = {lba: self.see(head, origin, lba) for lba in range(count)}
        return store_content({lba: block for lba, block in seen.items() if block is not None}, count * BLOCK_SIZE)

    def of(self, volume: VolumeId) -> tuple[Blocks, VolumeId]:
        if volume in self.snapshots:
            return self.snapshots[volume].blocks, self.snapshots[volume].origin
        return self.heads[volume].blocks, self.origins.get(volume, VolumeId(b""))

    def piece(self, volume: VolumeId, lba: int) -> FetchedPiece:
        blocks, origin = self.of(volume)
        if lba not in blocks:
            count = self.snapshots[origin].count if origin else 0
            return FetchedPiece(Extent(lba, 1), None, Version(0), (), lba < count)
        content, version = blocks[lba]
        return FetchedPiece(Extent(lba, 1), content, version, (checksum(content),) if content is not None else ())

    def fetch(self, volume, extents, min_version, done) -> None:
        done = self.to_asker(done)

        def act() -> None:
            if volume not in self.heads and volume not in self.snapshots:
                gone = UpstreamRefusal(messages.NO_SUCH_SNAPSHOT, "no such snapshot")
                self.queue.append(lambda: done(gone))
                return
            pieces = [self.piece(volume, lba) for extent in extents for lba in range(extent.start, extent.end)]
            self.fetched[volume] = self.fetched.get(volume, 0) + len(pieces)
            self.queue.append(lambda: done(pieces))

        self.queue.append(act)

    def allocation(self, volume, extent, done, *, through) -> None:
        done = self.to_asker(done)

        def act() -> None:
            pieces = []
            for lba in range(extent.start, min(extent.end, extent.start + 700)):
                one = self.piece(volume, lba)
                if through and one.origin:
                    one = one._replace(plain=self.see(*self.of(volume), lba), origin=False)
                pieces.append(one._replace(plain=b"" if one.plain is not None else None, checksums=()))
            self.queue.append(lambda: done(pieces))

        self.queue.append(act)

    def changed(self, volume, since, start, done) -> None:
        done = self.to_asker(done)
        extents = self.since.get((volume, since))
        if extents is None:
            self.queue.append(lambda: done(UpstreamRefusal(messages.NO_SUCH_SNAPSHOT, "no such snapshot")))
        else:
            found = [common for one in extents if (common := one.intersect(Extent(start, 1 << 39))) is not None]
            page = ChangedPage(found, -1)
            self.queue.append(lambda: done(page))

    def stage(self, cut, index, frames, holes, done) -> None:
        self.heads[cut.volume].stage(cut, index, frames, holes, done)

    def commit(self, cut, *words) -> None:
        self.heads[cut.volume].commit(cut, *words)


class CloneRig(Rig):
    """A base's snapshot with random data, two clones of it, and a clone of a snapshot of a clone."""

    def __init__(self, seed: int, *, blocks: int = 1500, base_blocks: int = 1200, clones=CLONES, **settings) -> None:
        self.base_blocks = base_blocks
        self.wanted = list(clones)
        self.family: FamilyStore | None = None
        self.volumes: dict[VolumeId, CacheVolume] = {}
        super().__init__(seed, blocks=blocks, **settings)

    def start(self) -> None:
        if self.family is None:
            self.family = FamilyStore(self.rng)
            self.fill(self.family)
        self.store = self.family
        super().start()

    def fill(self, family: FamilyStore) -> None:
        base = self.random_blocks(self.base_blocks, share=0.7)
        middle = self.random_blocks(self.base_blocks, share=0.2)
        nothing = VolumeId(b"")
        family.snapshots[BASE] = Frozen("base@s", base, nothing, self.base_blocks, FROZEN_VERSION)
        family.snapshots[MIDDLE] = Frozen("middle@s", middle, BASE, self.base_blocks + 90, FROZEN_VERSION)
        for volume, origin in zip(CLONES, (BASE, BASE, MIDDLE), strict=True):
            family.add_head(volume, origin)

    def random_blocks(self, count: int, *, share: float) -> Blocks:
        chosen = [lba for lba in range(count) if self.rng.random() < share]
        return {
            lba: (self.block(), Version(make_version(Epoch(1), ChangeSequence(self.rng.randrange(1, 8)))))
            for lba in chosen
        }

    def block(self) -> bytes | None:
        return None if self.rng.random() < 0.2 else self.rng.randbytes(8) * (BLOCK_SIZE // 8)

    def chain(self, origin: VolumeId) -> list[SnapshotView]:
        views = []
        while origin:
            one = self.family.snapshots[origin]
            size = one.count * BLOCK_SIZE
            views.append(SnapshotView(origin, one.name, size, one.version, STORE_ID, one.origin))
            origin = one.origin
        return views

    def view(self, volume_id: VolumeId) -> StoreView:
        head = self.family.heads[volume_id]
        head.open()
        origin = self.family.origins.get(volume_id, VolumeId(b""))
        name = volume_id.decode().replace(" ", "-")
        return StoreView(volume_id, name, self.size, head.epoch, head.version, STORE_ID, origin)

    def attach(self) -> None:
        for volume_id in self.wanted:
            self.volumes[volume_id] = self.attach_one(volume_id)
        if self.volumes:
            self.volume = next(iter(self.volumes.values()))

    def attach_one(self, volume_id: VolumeId, stale=()) -> CacheVolume:
        view = self.view(volume_id)
        known = self.engine.by_id(volume_id)
        if known is not None and known.attached:
            self.engine.attaching.reopened(known, view)
            return known
        got: list[CacheVolume | None] = []
        chain = self.chain(view.origin)
        self.engine.attaching.attach(view, stale, read_only=False, attached=got.append, chain=chain)
        self.run_until(lambda: bool(got))
        assert got[0] is not None
        return got[0]

    def detach(self, volume: CacheVolume) -> None:
        self.volume = volume
        assert self.drain()
        got: list[bool] = []
        self.engine.attaching.detach(volume, leave_dirty=False, settled=got.append)
        self.run_until(lambda: bool(got))

    def attach_snapshot(self, snapshot: VolumeId) -> CacheVolume:
        got: list[CacheVolume | None] = []
        self.engine.sources.attach(self.chain(snapshot), attached=got.append)
        self.run_until(lambda: bool(got))
        assert got[0] is not None
        return got[0]

    def detach_snapshot(self, volume: CacheVolume) -> None:
        got: list[bool] = []
        self.engine.sources.detach(volume, got.append)
        self.run_until(lambda: bool(got))
        assert got == [True]

    def learn(self) -> None:
        """Wait until the store has told all it knows."""
        self.run_until(lambda: not self.family.queue and not any(v.asking_map for v in self.engine.volumes.values()))

    def content_of(self, volume: CacheVolume) -> bytes:
        self.volume = volume
        return b"".join(self.read(at, min(1 << 20, volume.size - at)) for at in range(0, volume.size, 1 << 20))

    def cached(self, volume_id: VolumeId) -> int:
        volume = self.engine.by_id(volume_id)
        return 0 if volume is None else self.engine.cached_blocks().get(volume.key, 0)

"""A cache engine on simulated ports: a device that may lose what was not synced, and a store in memory.

Every completion waits in one list until the rig runs it, in an order that a seed decides where the ports allow any
order. So one seed is one run.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.cache import CacheEngine, EngineSettings
from forebay_cache.engine.front import Allocation, Chunk, IoError
from forebay_cache.engine.ports import BuildRequest, BuiltPart, CutIdentity, FetchedPiece, UpstreamRefusal
from forebay_cache.engine.recovery import blank_device, recover
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.cut_end import RESIZE, CutEnd
from forebay_cache.format.record import RECORD_ENTRIES_MAX
from forebay_cache.format.superblock import Superblock, choose, plan_geometry
from forebay_core.checksums import ZERO_BLOCK, block_checksums, checksum
from forebay_core.extents import Extent, from_blocks
from forebay_core.units import BLOCK_SIZE, Buffer, Epoch, StoreId, Version, VolumeId, make_version, sequence_of
from forebay_wire import messages

VOLUME_ID = VolumeId(b"v" * 16)
STORE_ID = StoreId(b"s" * 16)
FIRST_CONTENT = 0  # blocks of a new volume are holes
CHUNK_PLACES = 96  # of a checkpoint: more than a zone, less than two, so that small devices have many chunks
RECORD_BLOCKS = (RECORD_ENTRIES_MAX, 12)  # of one record, by seed: zones are so small that few hold a full one
SWEEP_STEP_BLOCKS = 8  # so that most trims take several steps
LATE_MAX = 6  # requests of a dead daemon that arrive before the next one opens its volumes


class SimulatedDevice:
    """Bytes, and beside them those writes that no sync has covered."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.durable = bytearray(size)
        self.bytes = bytearray(size)
        self.unsynced: list[tuple[int, bytes]] = []
        self.rng = rng
        self.queue: list[Callable[[], None]] = []
        self.writes: list[Callable[[], None]] = []
        self.now_share = 0.5
        self.slow_before = 0  # reads below this offset wait longer: loading a checkpoint
        self.slow: list[Callable[[], None]] = []
        self.slow_share = 0.02
        self.failing = False
        self.syncs = 0
        self.drop_syncs = False  # planted fault: a sync that does nothing

    def read_now(self, offset: int, size: int) -> Buffer | None:
        return bytes(self.bytes[offset : offset + size]) if self.rng.random() < self.now_share else None

    def read_into_now(self, offset: int, view: memoryview) -> bool:
        view[:] = self.bytes[offset : offset + view.nbytes]
        return self.rng.random() < self.now_share

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        queue = self.slow if offset < self.slow_before else self.queue
        queue.append(lambda: done(bytes(self.bytes[offset : offset + size])))

    def write(self, offset: int, buffers: Sequence[Buffer], done: Callable[[bool], None]) -> None:
        def act() -> None:
            if self.failing:
                done(False)
                return
            content = b"".join(buffers)
            self.bytes[offset : offset + len(content)] = content
            self.unsynced.append((offset, content))
            done(True)

        self.writes.append(act)

    def sync(self, done: Callable[[bool], None]) -> None:
        covered = len(self.unsynced)

        def act() -> None:
            self.syncs += 1
            if not self.drop_syncs:
                for offset, content in self.unsynced[:covered]:
                    self.durable[offset : offset + len(content)] = content
                del self.unsynced[:covered]
            done(True)

        # A second sync cannot start before this is done, so `covered` counts from the front.
        self.queue.append(act)

    def read_whole(self, offset: int, size: int) -> bytes:
        return bytes(self.bytes[offset : offset + size])

    def step(self) -> bool:
        choices = [0] * len(self.queue) + ([1] if self.writes else [])
        if self.slow and self.rng.random() < self.slow_share:
            self.slow.pop(self.rng.randrange(len(self.slow)))()
            return True
        if not choices:
            return False
        if self.rng.choice(choices):
            self.writes.pop(0)()
        else:
            self.queue.pop(self.rng.randrange(len(self.queue)))()
        return True

    def kill(self) -> None:
        """The daemon dies: what was written stays, what was queued may be half done."""
        if self.writes and self.rng.random() < 0.5:
            pass  # the write under way is lost as a whole here; torn ones come with the power cut
        self.queue.clear()
        self.slow.clear()
        self.writes.clear()

    def cut_power(self) -> None:
        """Unsynced writes survive in any subset, torn at sectors."""
        self.kill()
        after = bytearray(self.durable)
        for offset, content in self.unsynced:
            for at in range(0, len(content), 512):
                if self.rng.random() < 0.7:
                    after[offset + at : offset + at + 512] = content[at : at + 512]
        self.durable = after
        self.bytes = bytearray(after)
        self.unsynced = []


class Daemons:
    """Who speaks to a store: `newest` is the number of the daemon that lives; the others are dead."""

    def __init__(self) -> None:
        self.newest = 0


class SimulatedStore:
    """Head of one volume: block -> (bytes, version), and the rules of cuts and sessions.

    A dead daemon hears no answer. What it had sent may still arrive, until the next one opens the volume.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.daemons = Daemons()
        self.session = 0  # the daemon that opened the volume last
        self.blocks: dict[int, tuple[bytes | None, Version]] = {}
        self.version = Version(0)
        self.epoch = Epoch(1)
        self.staged: dict[int, dict[int, tuple[list[tuple[int, bytes]], list[Extent]]]] = {}
        self.queue: list[Callable[[], None]] = []
        self.away = False
        self.fetched_blocks = 0
        self.history: list[tuple[Version, dict[int, bytes]]] = [(Version(0), {})]
        self.lose_acknowledgements = 0.0
        self.snapshots: dict[str, tuple[Version, int, dict[int, bytes]]] = {}  # by name: version, size, content
        self.size = 0  # as the last resize said

    def plain(self) -> dict[int, bytes]:
        return {lba: content for lba, (content, _) in self.blocks.items() if content is not None}

    def open(self) -> None:
        """Begin a session of the daemon that lives, which ends those before it."""
        self.session = self.daemons.newest

    def arrives(self, daemon: int) -> bool:
        """Tell whether the store listens to what a daemon sent, dead or not."""
        return daemon >= self.session

    def to_asker(self, done) -> Callable[..., None]:
        """Return what answers the daemon that lives now, as long as it does."""
        asker = self.daemons.newest

        def answer(*words: object) -> None:
            if asker == self.daemons.newest:
                done(*words)

        return answer

    def fetch(self, volume, extents, min_version, done) -> None:
        done = self.to_asker(done)

        def act() -> None:
            assert self.version >= min_version
            pieces = []
            for extent in extents:
                for lba in range(extent.start, extent.end):
                    content, version = self.blocks.get(lba, (None, Version(0)))
                    sums = (checksum(content),) if content is not None else ()
                    pieces.append(FetchedPiece(Extent(lba, 1), content, version, sums))
                    self.fetched_blocks += 1
            # The answer is what the store held now; it may arrive later.
            self.queue.append(lambda: done(pieces))

        self.queue.append(act)

    def allocation(self, volume, extent, done, *, through) -> None:
        done = self.to_asker(done)
        pieces = [
            FetchedPiece(Extent(lba, 1), b"" if self.blocks.get(lba, (None,))[0] is not None else None, Version(0), ())
            for lba in range(extent.start, extent.end)
        ]
        self.queue.append(lambda: done(pieces))

    def stage(self, cut: CutIdentity, index: int, frames, holes, done) -> None:
        sender, done = self.daemons.newest, self.to_asker(done)

        def act() -> None:
            if not self.arrives(sender):
                return
            blocks = [(int.from_bytes(frame[:8], "little"), frame[8:]) for frame in frames]
            self.staged.setdefault(cut.attempt, {})[index] = (blocks, list(holes))
            done(None)

        self.queue.append(act)

    def commit(self, cut: CutIdentity, part_count: int, committed_ns: int, end, done) -> None:
        sender, done = self.daemons.newest, self.to_asker(done)

        def act() -> None:
            if not self.arrives(sender):
                return
            last = make_version(cut.epoch, cut.last)
            if cut.epoch != self.epoch:
                done(UpstreamRefusal(messages.FENCED, "fenced"))
                return
            if self.version == last:
                done(None)
                return
            assert sequence_of(self.version) + 1 == cut.first, (self.version, cut)
            parts = self.staged.get(cut.attempt, {})
            assert sorted(parts) == list(range(part_count)), (sorted(parts), part_count)
            for blocks, holes in parts.values():
                for extent in holes:
                    for lba in list(self.blocks) if extent.count > 5000 else range(extent.start, extent.end):
                        if extent.start <= lba < extent.end:
                            self.blocks[lba] = (None, last)
                for lba, content in blocks:
                    self.blocks[lba] = (content, last)
            self.version = last
            self.history.append((last, self.plain()))
            if end is not None:
                assert end.version == last, (end, last)
                self._end(end)
            if self.rng.random() >= self.lose_acknowledgements:
                done(None)
            else:
                self.queue.append(act)  # it asks again

        self.queue.append(act)

    def _end(self, end: CutEnd) -> None:
        if end.kind == RESIZE:
            self.size = end.size
        else:
            assert end.name not in self.snapshots
            self.snapshots[end.name] = (self.version, end.size, self.plain())

    def step(self) -> bool:
        if self.away or not self.queue:
            return False
        self.queue.pop(self.rng.randrange(len(self.queue)))()
        return True


class SimulatedBuilder:
    """Reads and compares at some later moment; a frame here is an lba and its bytes."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device

    def build(self, request: BuildRequest, done) -> None:
        def act() -> None:
            frames, holes, corrupt, found = [], [], [], []
            for lba, offset, expected in zip(
                request.lbas.tolist(), request.offsets.tolist(), request.checksums.tolist(), strict=True
            ):
                content = self.device.read_whole(offset, BLOCK_SIZE)
                if checksum(content) != expected:
                    corrupt.append(lba)
                    found.append(checksum(content))
                elif content == ZERO_BLOCK:
                    holes.append(lba)
                else:
                    frames.append(lba.to_bytes(8, "little") + content)
            done(BuiltPart(frames, from_blocks(holes), len(frames) * BLOCK_SIZE, corrupt, found))

        self.device.queue.append(act)


class Rig:
    """One engine, its ports, and a model of what a guest may see."""

    def __init__(
        self,
        seed: int,
        *,
        size: int = 24 << 20,
        zone_blocks: int = 64,
        blocks: int = 2000,
        device: bytes = b"d" * 16,
        **settings,
    ) -> None:
        self.rng = random.Random(seed)
        self.device = SimulatedDevice(size, self.rng)
        self.store = SimulatedStore(self.rng)
        geometry = plan_geometry(size, zone_blocks)
        superblock = Superblock(device, 1, *geometry, 0)
        for offset, content in blank_device(superblock):
            self.device.bytes[offset : offset + len(content)] = content
        self.device.durable[:] = self.device.bytes
        self.size = blocks * BLOCK_SIZE
        self.settings = EngineSettings(
            **{
                "cut_blocks_max": 400,
                "cut_age_ns_max": 400_000_000,
                "checkpoint_chunk_places": CHUNK_PLACES,
                "sweep_step_blocks": SWEEP_STEP_BLOCKS,
                "record_blocks": RECORD_BLOCKS[seed % len(RECORD_BLOCKS)],
                **settings,
            }
        )
        self.now_ns = 0
        self.alarm_ns: int | None = None
        self.reports: list[str] = []
        self.engine: CacheEngine
        self.volume: CacheVolume
        self.start()
        self.attach()

    def start(self) -> None:
        # What a restarted daemon reads it syncs first.
        for offset, content in self.device.unsynced:
            self.device.durable[offset : offset + len(content)] = content
        self.device.unsynced.clear()
        self.store.daemons.newest += 1
        superblock = choose(self.device.bytes[:BLOCK_SIZE], self.device.bytes[BLOCK_SIZE : 2 * BLOCK_SIZE])
        recovered = recover(self.device.read_whole, superblock)
        self.engine = CacheEngine(
            recovered,
            device=self.device,
            upstream=self.store,
            builder=SimulatedBuilder(self.device),
            settings=self.settings,
            life=self.rng.getrandbits(64),
            report=self.reports.append,
            alarm=self.set_alarm,
        )
        self.engine.start()

    def set_alarm(self, due_ns: int) -> None:
        self.alarm_ns = due_ns

    def attach(self) -> None:
        self.store.open()
        view = StoreView(VOLUME_ID, "v", self.size, self.store.epoch, self.store.version, STORE_ID)
        known = self.engine.by_id(VOLUME_ID)
        if known is not None and known.attached:
            self.volume = known
            self.engine.attaching.reopened(known, view)
            return
        got: list[CacheVolume | None] = []
        self.engine.attaching.attach(view, [], read_only=False, attached=got.append)
        self.run_until(lambda: bool(got))
        assert got[0] is not None
        self.volume = got[0]

    def restart(self, *, power: bool) -> None:
        """End the daemon and start one; of what it had sent, a little is done before the volume is opened again."""
        if power:
            self.device.cut_power()
        else:
            self.device.kill()
        self.start()
        for _ in range(self.rng.randrange(LATE_MAX)):
            self.store.step()
        self.attach()

    def step(self) -> bool:
        first, second = (self.device, self.store) if self.rng.random() < 0.7 else (self.store, self.device)
        if self.rng.random() < 0.02:
            self.tick()
        if self.alarm_ns is not None and self.alarm_ns <= self.now_ns:
            self.pace()
        return first.step() or second.step()

    def pace(self) -> None:
        self.alarm_ns = None
        self.engine.pace(self.now_ns)

    def tick(self) -> None:
        self.now_ns += 50_000_000
        self.engine.tick(self.now_ns, self.now_ns)

    def run_until(self, reached: Callable[[], bool], limit: int = 200_000) -> None:
        for _ in range(limit):
            if reached():
                return
            if not self.step():
                self.tick()
        raise AssertionError("the engine makes no progress")

    # --- guest requests that wait -------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        got: list[tuple[IoError, Sequence[Chunk]]] = []
        self.volume.read(offset, length, lambda error, chunks: got.append((error, chunks)))
        self.volume.kick()
        self.run_until(lambda: bool(got))
        assert got[0][0] == IoError.OK, (got[0][0], self.reports)
        return joined(got[0][1])

    def write(self, offset: int, payload: bytes, *, fua: bool = False) -> IoError:
        got: list[IoError] = []
        self.volume.write(offset, payload, fua, got.append)
        self.volume.kick()
        self.run_until(lambda: bool(got))
        return got[0]

    def flush(self) -> IoError:
        got: list[IoError] = []
        self.volume.flush(got.append)
        self.run_until(lambda: bool(got))
        return got[0]

    def drain(self) -> bool:
        got: list[bool] = []
        self.engine.destage.drain(self.volume, got.append)
        self.run_until(lambda: bool(got))
        return got[0]

    def allocation(self, offset: int, length: int) -> Sequence[Allocation]:
        got: list[Sequence[Allocation]] = []
        self.volume.allocation(offset, length, lambda error, runs: got.append(runs))
        self.run_until(lambda: bool(got))
        return got[0]

    def content(self) -> bytes:
        return b"".join(self.read(at, min(1 << 20, self.size - at)) for at in range(0, self.size, 1 << 20))


def joined(chunks: Sequence[Chunk]) -> bytes:
    return b"".join(bytes(chunk.length) if chunk.buffer is None else bytes(chunk.buffer) for chunk in chunks)


def store_content(plain: dict[int, bytes], size: int) -> bytes:
    content = bytearray(size)
    for lba, block in plain.items():
        content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE] = block
    return bytes(content)


def check_books(engine: CacheEngine) -> None:
    """Compare what the engine counts with what it holds."""
    table = engine.map
    keys = table.key_array
    linked = table.linked_mask(0, table.place_count)
    assert not (linked & (keys == 0)).any()
    held = {int(p) for p in np.flatnonzero((keys != 0) & ~linked)}
    assert held == set(table.held_places().tolist())
    assert table.live_array.tolist() == linked.reshape(-1, table.zone_blocks).sum(axis=1).tolist()
    for volume in engine.volumes.values():
        dirty = {
            int(key) & ((1 << 40) - 1)
            for key, version in zip(keys[linked].tolist(), table.version_array[linked].tolist(), strict=True)
            if key >> 40 == volume.key
            and version > volume.acknowledged
            and not any(one.covers(key, version) for one in table.hidden)
        }
        listed = set(volume.dirty) | {lba for cut in volume.cuts for run in cut.runs for lba in run.tolist()}
        assert dirty <= listed, sorted(dirty - listed)[:5]
        for hole in volume.holes:
            for lba in range(hole.start, min(hole.end, hole.start + 3000)):
                assert table.find(volume.key << 40 | lba) < 0, lba
    for key in engine.admission.ring.blocks:
        owner, place = engine.volumes[key >> 40], table.find(key)
        assert owner.holes.find(key & ((1 << 40) - 1)) is None, "a held block is a hole by now"
        assert place < 0 or table.versions[place] <= owner.acknowledged, "a held block was changed"


__all__ = ["Rig", "block_checksums", "check_books", "joined", "store_content"]

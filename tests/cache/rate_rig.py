"""A rig whose clock moves only from event to event, and which notes what was sent upstream when, to the nanosecond."""

import random
from collections.abc import Callable

from engine_rig import STORE_ID, Rig, SimulatedStore

from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.cuts import HOLE_SIZE
from forebay_cache.engine.front import IoError
from forebay_cache.engine.volume import CacheVolume
from forebay_core.units import BLOCK_SIZE, Epoch, Version, VolumeId

NS = 1_000_000_000
FILL_BLOCKS = 50
SECOND_ID = VolumeId(b"w" * 16)


class TwoStores(SimulatedStore):
    """A store of two volumes: itself has the first, `second` the other; what is sent to either is noted."""

    def __init__(self, rng: random.Random, note: Callable[[VolumeId, int], None]) -> None:
        super().__init__(rng)
        self.second = SimulatedStore(rng)
        self.second.queue, self.second.daemons = self.queue, self.daemons
        self.note = note

    def fetch(self, volume, extents, min_version, done) -> None:
        if volume == SECOND_ID:
            self.second.fetch(volume, extents, min_version, done)
        else:
            super().fetch(volume, extents, min_version, done)

    def stage(self, cut, index, frames, holes, done) -> None:
        self.note(cut.volume, sum(map(len, frames)) + HOLE_SIZE * len(holes))
        if cut.volume == SECOND_ID:
            self.second.stage(cut, index, frames, holes, done)
        else:
            super().stage(cut, index, frames, holes, done)

    def commit(self, cut, part_count, committed_ns, end, done) -> None:
        if cut.volume == SECOND_ID:
            self.second.commit(cut, part_count, committed_ns, end, done)
        else:
            super().commit(cut, part_count, committed_ns, end, done)


class RateRig(Rig):
    """Completions take no time; alarms come `late_ns` after they were asked for, ticks every `tick_ns`."""

    late_ns = 0
    tick_ns = 50_000_000

    def __init__(self, seed: int, **settings) -> None:
        self.sent: list[tuple[int, int, VolumeId]] = []
        self.tick_at_ns = 0
        super().__init__(seed, **settings)

    def start(self) -> None:
        if not isinstance(self.store, TwoStores):
            self.store = TwoStores(self.rng, lambda volume, size: self.sent.append((self.now_ns, size, volume)))
        super().start()

    def settle(self) -> None:
        while self.device.step() or self.store.step() or self._take_turn():
            pass

    def _take_turn(self) -> bool:
        """Let the engine go on with what it does step by step: that takes no time, so it is no event of its own."""
        if self.engine._soon:
            self.pace()
            return True
        return False

    def pass_time(self, seconds: float, each: Callable[[], None] = lambda: None) -> None:
        """Let time pass; `each` runs after every event."""
        until_ns = self.now_ns + int(seconds * NS)
        self.settle()
        while True:
            if self.tick_at_ns <= self.now_ns:
                self.tick_at_ns = self.now_ns + self.tick_ns
            alarm_ns = until_ns + 1 if self.alarm_ns is None else max(self.alarm_ns, self.now_ns) + self.late_ns
            due_ns = min(self.tick_at_ns, alarm_ns)
            if due_ns > until_ns:
                self.now_ns = until_ns
                return
            self.now_ns = due_ns
            if due_ns == alarm_ns:
                self.pace()
            else:
                self.engine.tick(self.now_ns, self.wall_ns())
            self.settle()
            each()
            self.settle()

    def wall_ns(self) -> int:
        return self.now_ns

    def add_volume(self) -> CacheVolume:
        got: list[CacheVolume | None] = []
        view = StoreView(SECOND_ID, "w", self.size, Epoch(1), Version(0), STORE_ID)
        self.engine.attaching.attach(view, [], read_only=False, attached=got.append)
        self.run_until(lambda: bool(got))
        assert got[0] is not None
        return got[0]

    def fill(self, first: int, count: int, volume: CacheVolume | None = None) -> list[IoError]:
        """Write blocks that are no zeros, all of them different, without waiting for the answers."""
        got: list[IoError] = []
        for at in range(first, first + count, FILL_BLOCKS):
            some = min(FILL_BLOCKS, first + count - at)
            (volume or self.volume).write(at * BLOCK_SIZE, self.blocks(some), False, got.append)
            (volume or self.volume).kick()
            self.settle()
        return got

    def blocks(self, count: int) -> bytes:
        """Return blocks of eight random bytes over and over: the builder of the rig does not compress."""
        return b"".join(self.rng.randbytes(8) * (BLOCK_SIZE // 8) for _ in range(count))

    def limit(self, average: int, peak: int, volume: CacheVolume | None = None, *, together: bool = False) -> None:
        settled: list[bool] = []
        target = None if together else volume or self.volume
        self.engine.set_limit(target, settled.append, average=average, peak=peak)
        self.settle()
        assert settled == [True]

    def bytes_between(self, start_ns: int, end_ns: int, volume: VolumeId | None = None) -> int:
        return sum(size for at, size, of in self.sent if start_ns <= at < end_ns and volume in (None, of))

    def highest_second(self, since_ns: int = 0) -> int:
        """Return the most bytes that any second has; one that begins with a message has most."""
        sent = [one for one in self.sent if one[0] >= since_ns]
        highest = total = first = 0
        for at, size, _ in sent:
            total += size
            while at - sent[first][0] >= NS:
                total -= sent[first][1]
                first += 1
            highest = max(highest, total)
        return highest

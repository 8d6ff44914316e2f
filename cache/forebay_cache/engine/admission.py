"""What becomes of fetched blocks: they wait in memory, serve reads, and the policy decides when they fall out.

Invariants: see `ring`.
Crash: nothing is kept of what has not been appended.
"""

from typing import TYPE_CHECKING, Final

from forebay_cache.engine.limits import (
    AHEAD_BLOCKS_MAX,
    DECIDED_PER_TICK_MAX,
    HELD_NS_MAX,
    HOLES_KEPT_MAX,
    QUEUED_BLOCKS_FILL_MAX,
    ZONES_RESERVED,
)
from forebay_cache.engine.policy import ring_blocks
from forebay_cache.engine.ports import FetchedPiece
from forebay_cache.engine.ring import AHEAD, LEAVING, SPARE, USED, Held, Ring
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, LBA_BITS, LBA_MAX

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.fetches import Unit
    from forebay_cache.engine.volume import CacheVolume


class Admission:
    """Takes what fetches bring, and gives it to reads, to the log, or up."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        blocks = ring_blocks(engine.policy.capacity)
        self.ring: Final = Ring(used_max=blocks, spare_max=blocks, ahead_max=AHEAD_BLOCKS_MAX)

    def known(self, volume: "CacheVolume", extent: Extent) -> list[Extent]:
        """Return the blocks for which the store has nothing to tell: cached, held, holes, or about to change."""
        find, held = self._engine.map.find, self.ring.blocks
        first = volume.key << LBA_BITS
        known = [
            Extent(lba, 1) for lba in range(extent.start, extent.end) if first | lba in held or find(first | lba) >= 0
        ]
        known += [Extent(hole.start, hole.end - hole.start) for hole in volume.holes.overlapping(extent)]
        return known + self._engine.writes.changing(volume.key, extent)

    def offer(self, unit: "Unit", piece: FetchedPiece) -> None:
        """Hold what was fetched, or note that it is a hole, or the origin's."""
        engine, volume, extent = self._engine, unit.volume, piece.extent
        if engine.failed or volume.key not in engine.volumes or (volume.temporary and not volume.attached):
            return
        if piece.origin:
            engine.sources.learn(volume, extent)
            return
        find, held = engine.map.find, self.ring.blocks
        first = volume.key << LBA_BITS
        absent = [lba for lba in range(extent.start, extent.end) if first | lba not in held and find(first | lba) < 0]
        if piece.plain is None:
            # While loading, an absent block may yet turn out to be cached, as zeros that the store knows as a hole.
            if len(volume.holes) < HOLES_KEPT_MAX // 2 and not engine.loading.active:
                for lba in absent:
                    volume.holes.add_where_absent(Extent(lba, 1), piece.version)
            return
        view = memoryview(piece.plain)
        for lba in absent:
            i = lba - extent.start
            # A copy, because a view would keep all of the answer in memory for one block of it.
            plain = bytes(view[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT])
            self.ring.put(first | lba, Held(plain, piece.version, piece.checksums[i], self._pool(unit, lba)))
            if unit.is_kept(lba):
                self._decide(first | lba)
        self._settle()

    def take(self, key: int, run: list[Held], *, passing: bool) -> None:
        """Held blocks from `key` on were asked for; `passing`: as part of a long sequential read."""
        for at, held in enumerate(run, key):
            if held.pool in (SPARE, AHEAD) and self.ring.blocks.get(at) is held:
                pool = SPARE if passing and self._passes_over(at) else USED
                if pool != held.pool:
                    self.ring.move(at, pool)
        self._settle()

    def applied(self, key: int) -> None:
        """A fill is in the map, or has lost against something newer."""
        if self.is_leaving(key):
            self.ring.remove(key)

    def is_leaving(self, key: int) -> bool:
        """Tell whether a block is on its way to the device."""
        held = self.ring.blocks.get(key)
        return held is not None and held.pool == LEAVING

    def changed(self, volume: "CacheVolume", extent: Extent) -> None:
        """Blocks change, or left the map: neither what is held nor what is under way of them is true any more."""
        self._engine.fetches.touch(volume, extent)
        self.ring.forget(volume.key << LBA_BITS | extent.start, extent.count)

    def tick(self, now_ns: int) -> None:
        """Decide about what has waited for long, so that a kill takes little of what is warm."""
        self.ring.now_ns = now_ns
        for key in self.ring.waited(HELD_NS_MAX, DECIDED_PER_TICK_MAX):
            self._decide(key)

    def decide_all(self) -> None:
        """Ask for every used block now, because the daemon stops."""
        for key in self.ring.used():
            self._decide(key)

    # --- inside -----------------------------------------------------------------------------------------------

    def _pool(self, unit: "Unit", lba: int) -> int:
        if unit.is_asked(lba):
            return USED
        if unit.is_passing(lba):
            return SPARE if self._passes_over(unit.volume.key << LBA_BITS | lba) else USED
        return AHEAD if unit.ahead else SPARE

    def _passes_over(self, key: int) -> bool:
        """Tell whether a block that passes by in a long stream is not worth a write, now that its use is counted."""
        return self._engine.policy.passes_over(key)

    def _settle(self) -> None:
        for key in self.ring.fallen() if self.ring.is_full else ():
            self._decide(key)

    def _decide(self, key: int) -> None:
        """Append a block to the log if it is worth that and there is room, else give it up."""
        engine, held = self._engine, self.ring.blocks[key]
        volume, lba, log = engine.volumes.get(key >> LBA_BITS), key & LBA_MAX, engine.log
        if (
            volume is None
            or volume.error
            or (volume.temporary and not volume.attached)
            or engine.failed
            or engine.map.find(key) >= 0
            or engine.free_zones <= ZONES_RESERVED + 1
            or log.queued_blocks > QUEUED_BLOCKS_FILL_MAX
            or not (engine.sources.keep(volume, lba) if volume.temporary else engine.policy.admits(key))
        ):
            self.ring.remove(key)
            return
        log.seal_if_full()
        batch = log.data_batch()
        log.add_fill(batch, volume.key, lba, held.version, held.checksum)
        batch.buffers.append(held.plain)
        log.seal_if_full()  # else it waits for company: the next tick or guest's write sends it on its way
        self.ring.move(key, LEAVING)

"""Reclaiming zones: a victim's worthy clean blocks and all its dirty and pinned ones are moved to the log's end, the
rest is dropped, and once that is durable the zone is filled anew. So the SSD is written sequentially when it is full.

Invariants:
    A zone that replay from the newest checkpoint would read is no victim, nor one whose entries are not loaded yet or
    whose use counts the policy does not know yet.
    A zone is freed only when a sync has covered all that superseded or moved its blocks; at once if nothing was moved
    and all that it ever held is upstream: should the superseding be lost, these blocks are fetched again.
    Moved blocks keep version and checksum; a block that changed while it was moved is not touched.
    No MOVE stands in the log behind a newer change of its block: replay may not know that change any more. Where a
    closed cut needs the older version it is moved by a PIN, which replay never takes for the newest.
    Guests stop at ZONES_RESERVED free zones, moves go on below it; a victim fills less than it frees: its blocks are
    gathered, so that their records are full ones.
Crash: a moved block is found at either place; of equal versions the later record wins.
"""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import (
    VICTIM_CANDIDATES,
    VICTIM_GAIN_RATIO,
    ZONES_PER_SPARE,
    ZONES_RESERVED,
    ZONES_SPARE_MAX,
    ZONES_SPARE_MIN,
)
from forebay_cache.engine.log import Batch
from forebay_cache.format import record
from forebay_core.checksums import checksum
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX, Buffer

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine

PlaceArray = npt.NDArray[np.int64]


class _Victim(NamedTuple):
    zone: int
    keep: PlaceArray


class _Move:
    """The blocks of one victim on their way: read run by run, appended a record's worth at a time."""

    __slots__ = ("blocks", "places", "slices", "unread", "whole", "zone")

    def __init__(self, zone: int, runs: int) -> None:
        self.zone = zone
        self.places: list[int] = []  # read, not appended yet
        self.blocks: list[memoryview] = []  # and their bytes
        self.unread = runs
        self.slices = 0  # appended, not applied
        self.whole = True


class Reclaim:
    """Keeps some zones free."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self.spare = min(ZONES_SPARE_MAX, max(ZONES_SPARE_MIN, engine.zones.zone_count // ZONES_PER_SPARE))
        self._busy = 0  # zones being emptied or waiting for the sync that frees them
        self._moving = 0  # blocks that are about to take new places
        self._empty: list[int] = []  # wait to be synced together
        self._lingering: list[int] = []  # synced, but somebody still reads from them
        self.moved_blocks = 0
        self.dropped_blocks = 0

    def kick(self) -> None:
        """Take one more victim unless enough zones are free or on their way; called after every applied record."""
        engine = self._engine
        self._release_lingering()
        if engine.failed or len(engine.zones.free) + self._busy >= self.spare:
            return
        victim = self._choose()
        if victim is None:
            engine.checkpoints.want()
            self._free_empty()
            return
        if victim.keep.size and self._moving + victim.keep.size > self._room():
            self._free_empty()  # what is moving already may take the last free zones
            return
        self._busy += 1
        engine.zones.begin_emptying(victim.zone)
        if victim.keep.size:
            self._move(victim.zone, victim.keep)
        elif self._is_upstream(victim.zone):
            self._forget(victim.zone)
            self._synced([victim.zone])
        else:
            self._clear(victim.zone)

    def _is_upstream(self, zone: int) -> bool:
        """Tell whether all that the zone ever held is upstream, also for who starts after a power cut now."""
        zones = self._engine.zones
        behind = zones.first_positions[zone] + zones.zone_blocks  # a zone holds fewer records than blocks
        return behind <= self._engine.destage.upstream_position()

    @property
    def promised_zones(self) -> int:
        """Free zones that moves under way will fill; guests and fills leave them alone."""
        zones = self._engine.zones
        return -(-self._moving * 4 // (3 * zones.zone_blocks))

    def _room(self) -> int:
        """Return how many blocks may be moved without touching the last free zone; a quarter is left for headers."""
        zones, log = self._engine.zones, self._engine.log
        return max(0, log.room_in_zone + (len(zones.free) - 1) * zones.zone_blocks) * 3 // 4

    def prepare(self) -> None:
        """Before the log begins: free zones that hold nothing dirty, at once, because all is durable now.

        A checkpoint may show blocks in zones that had been free when the daemon died, even in all of them.
        """
        engine = self._engine
        zones = engine.zones
        for zone in list(zones.full):
            if len(zones.free) >= self.spare:
                return
            if self._may_empty(zone) and not self._to_keep(zone, worthy=False).size:
                zones.begin_emptying(zone)
                self._forget(zone)
                zones.freed(zone)

    # --- choosing ---------------------------------------------------------------------------------------------

    def _choose(self) -> _Victim | None:
        """Return the zone with the fewest blocks to keep among the oldest ones, widening the search if all are bad, or
        if what they keep has nowhere to go.

        When zones are really short, clean blocks are kept nowhere: only what is dirty must not be lost.
        """
        zones = self._engine.zones
        good = min(zones.zone_blocks * 3 // 4, self._room() - self._moving)
        strict = len(zones.free) > ZONES_RESERVED
        oldest = [zone for zone in islice(zones.full, VICTIM_CANDIDATES) if self._is_victim(zone)]
        best = self._best(oldest, worthy=strict)
        if best is None or best.keep.size > max(good, 0):
            end = 16 * VICTIM_CANDIDATES if self._engine.loading.active else None
            rest = (zone for zone in islice(zones.full, VICTIM_CANDIDATES, end) if self._is_victim(zone))
            better = self._best(islice(rest, 8 * VICTIM_CANDIDATES), worthy=False)
            best = min((v for v in (best, better) if v is not None), key=lambda v: v.keep.size, default=None)
        if best is not None and self._cost(best.keep.size) > zones.zone_blocks - zones.zone_blocks // VICTIM_GAIN_RATIO:
            return None  # too little would be gained
        return best

    def _is_victim(self, zone: int) -> bool:
        engine = self._engine
        return engine.loading.knows(zone) and engine.use_counts.knows(zone) and self._may_empty(zone)

    def _may_empty(self, zone: int) -> bool:
        zones, checkpoints = self._engine.zones, self._engine.checkpoints
        return (
            zones.readers[zone] == 0
            and zones.first_positions[zone] < checkpoints.replay_position
            and zone not in checkpoints.replay_zones
        )

    def _best(self, candidates: Iterable[int], *, worthy: bool) -> _Victim | None:
        best: _Victim | None = None
        for zone in candidates:
            if worthy and best is not None and self._worthy_count(zone) >= best.keep.size:
                continue  # it keeps at least these
            keep = self._to_keep(zone, worthy=worthy)
            if best is None or keep.size < best.keep.size:
                best = _Victim(zone, keep)
            if keep.size == 0:
                break  # none is better
        return best

    def _worthy_count(self, zone: int) -> int:
        zones = self._engine.zones
        worthy = self._engine.policy.worthy(zones.place_at(zone, 0), zones.zone_blocks)
        return int(np.count_nonzero(worthy))

    def _to_keep(self, zone: int, *, worthy: bool) -> PlaceArray:
        engine = self._engine
        first, count = engine.zones.place_at(zone, 0), engine.zones.zone_blocks
        places = slice(first, first + count)
        if engine.map.hidden:  # none of that is to be kept, but what a closed cut needs
            engine.sweeps.settle_places(np.arange(first, first + count))
        keys = engine.map.key_array[places]
        held = keys != 0
        if not held.any():
            return np.empty(0, np.int64)
        versions = engine.map.version_array[places]
        # Dirty or pinned. What is upstream in memory only, because its acknowledgement is not in the log, would not be
        # after a crash.
        keep = held & (versions > engine.noted_versions.take((keys >> np.uint64(LBA_BITS)).astype(np.int64)))
        if worthy:
            keep |= engine.map.linked_mask(first, count) & engine.policy.worthy(first, count)
        return np.flatnonzero(keep) + first

    def _cost(self, count: int) -> int:
        """Return the blocks that so many moved blocks fill, headers and a begun record included."""
        return count + -(-count // self._engine.log.record_blocks) + 1

    # --- moving -----------------------------------------------------------------------------------------------

    def _move(self, zone: int, keep: PlaceArray) -> None:
        """Read what is kept, run by run, and append it; when all is applied and durable the zone is empty."""
        breaks = np.flatnonzero(np.diff(keep) != 1) + 1
        runs = [run.tolist() for run in np.split(keep, breaks)]
        self._moving += keep.size
        move = _Move(zone, len(runs))
        for places in runs:
            self._move_run(move, places)

    def _move_run(self, move: _Move, places: list[int]) -> None:
        engine = self._engine

        def done(answer: Buffer | None) -> None:
            if engine.failed:
                return
            move.unread -= 1
            if answer is None:
                engine.report(f"zone {move.zone} can't be read and is left as it is")
                move.whole = False
                self._moving -= len(places)
            else:
                view = memoryview(answer)
                move.places += places
                move.blocks += [view[at : at + BLOCK_SIZE] for at in range(0, view.nbytes, BLOCK_SIZE)]
            if move.unread == 0 or len(move.places) >= record.RECORD_ENTRIES_MAX:
                self._append(move)

        engine.device.read(engine.zones.offset_of(places[0]), len(places) << BLOCK_SHIFT, done)

    def _append(self, move: _Move) -> None:
        """Append the blocks that are still wanted. Dirty ones go as they are: a bad one stays an error."""
        engine = self._engine
        log = engine.log
        places, blocks, move.places, move.blocks = move.places, move.blocks, [], []
        last = self._append_wanted(places, blocks)
        move.slices += 1

        def applied(ok: bool) -> None:
            self._moving -= len(places)
            move.slices -= 1
            if ok and not (move.unread or move.slices):
                self._moved(move)

        if last is None:
            applied(True)
        else:
            last.settled.append(applied)
            log.seal_if_full()
            log.kick()

    def _append_wanted(self, places: list[int], blocks: list[memoryview]) -> Batch | None:
        """Return the record after which all is moved or superseded, None if that is so now."""
        engine = self._engine
        log, table = engine.log, engine.map
        engine.sweeps.settle_places(np.array(places))
        superseded = engine.writes.superseded(table.key_array.take(places)).tolist()
        last: Batch | None = None
        for place, block, is_superseded in zip(places, blocks, superseded, strict=True):
            key = table.keys[place]
            is_linked = table.is_linked(place)
            if key == 0 or (is_linked and is_superseded) or not self._is_sound(key, place, block):
                continue
            log.seal_if_full()
            last = log.data_batch()
            volume_key, lba = key >> LBA_BITS, key & LBA_MAX
            kind = record.MOVE if is_linked else record.PIN
            log.add_copy(last, kind, volume_key, lba, table.versions[place], table.checksums[place], place)
            last.buffers.append(block)
            self.moved_blocks += 1
        if any(superseded):
            last = log.unapplied()[-1]
        return last

    def _moved(self, move: _Move) -> None:
        """All is applied: what was kept has left, unless a cut was closed and needs a version that was superseded."""
        if not move.whole:
            self._busy -= 1  # it stays as it is, with what could not be read; the next start looks at it again
            return
        left = self._to_keep(move.zone, worthy=False)
        if left.size:
            self._move(move.zone, left)
        else:
            self._clear(move.zone)

    def _is_sound(self, key: int, place: int, block: memoryview) -> bool:
        """Compare a block with its checksum; forget it if it is bad and the store has it."""
        engine = self._engine
        expected, found = engine.map.checksums[place], checksum(block)
        if expected == found:
            return True
        volume = engine.volumes[key >> LBA_BITS]
        clean = engine.map.is_linked(place) and engine.map.versions[place] <= volume.acknowledged
        engine.report_corruption(volume, key & LBA_MAX, place, expected, found, clean=clean)
        if clean:
            engine.drop_block(key, place)
        return not clean

    def _clear(self, zone: int) -> None:
        self._forget(zone)
        self._empty.append(zone)
        if len(self._empty) >= self.spare // 4 or len(self._engine.zones.free) <= ZONES_RESERVED + 1:
            self._free_empty()

    def _forget(self, zone: int) -> None:
        engine = self._engine
        first, count = engine.zones.place_at(zone, 0), engine.zones.zone_blocks
        linked = np.flatnonzero(engine.map.linked_mask(first, count)) + first
        # Its keys need not be forgotten: the zone is older than the checkpoint, so nothing older has another content.
        engine.loading.forget_zone(zone)
        engine.policy.removed(linked)
        self.dropped_blocks += int(linked.size)
        engine.map.clear_zone(first, count)
        engine.zones.emptied(zone)

    def _free_empty(self) -> None:
        zones, self._empty = self._empty, []
        log = self._engine.log
        if zones:
            log.when_durable(log.applied.position, lambda ok: self._synced(zones) if ok else None)

    def _synced(self, zones: list[int]) -> None:
        self._lingering += zones
        self._release_lingering()
        self._engine.resume_writers()

    def _release_lingering(self) -> None:
        if not self._lingering:
            return
        zones = self._engine.zones
        for zone in self._lingering:
            if zones.readers[zone] == 0:
                zones.freed(zone)
                self._busy -= 1
        self._lingering = [zone for zone in self._lingering if zones.readers[zone] > 0]

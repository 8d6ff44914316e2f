"""Reclaiming zones: a victim's worthy clean blocks and all its dirty and pinned ones are moved to the log's end, the
rest is dropped, and once that is durable the zone is filled anew. So the SSD is written sequentially when it is full.

Invariants:
    A zone that replay from the newest checkpoint would read is no victim, nor one whose entries are not loaded yet or
    whose use counts the policy does not know yet.
    A zone is freed only when a sync has covered all that superseded or moved its blocks; at once if all that it ever
    held is upstream: should the superseding or the moves be lost, these blocks are fetched again.
    Guests stop at ZONES_RESERVED free zones, moves go on below it; a victim fills less than it frees: its blocks are
    gathered, so that their records are full ones.
Crash: see `moving`.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.emptying import NONE_WORTHY
from forebay_cache.engine.limits import (
    VICTIM_CANDIDATES,
    VICTIM_GAIN_RATIO,
    ZONES_PER_SPARE,
    ZONES_RESERVED,
    ZONES_SPARE_MAX,
    ZONES_SPARE_MIN,
)
from forebay_cache.engine.moving import Moving
from forebay_cache.engine.policy import WORTHY_FROM

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine

PlaceArray = npt.NDArray[np.int64]


class _Victim(NamedTuple):
    zone: int
    keep: PlaceArray


class Reclaim:
    """Keeps some zones free."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self.spare = min(ZONES_SPARE_MAX, max(ZONES_SPARE_MIN, engine.zones.zone_count // ZONES_PER_SPARE))
        self._busy = 0  # zones being emptied or waiting for the sync that frees them
        self.moving: Final = Moving(engine, self._moved)
        self._empty: list[int] = []  # wait to be synced together
        self._lingering: list[int] = []  # synced, but somebody still reads from them
        self._found = np.empty(engine.zones.zone_blocks, np.int64)  # reused by each look for what a zone keeps
        self.dropped_blocks = 0

    def kick(self) -> None:
        """Take one more victim unless enough zones are free or on their way; called after every applied record."""
        engine = self._engine
        if self._lingering:
            self._release_lingering()
        if engine.failed or len(engine.zones.free) + self._busy >= self.spare:
            return
        victim = self._choose()
        if victim is None:
            engine.checkpoints.want()
            self._free_empty()
            return
        if victim.keep.size and self.moving.blocks + victim.keep.size > self._room():
            self._free_empty()  # what is moving already may take the last free zones
            return
        self._busy += 1
        engine.zones.begin_emptying(victim.zone)
        if victim.keep.size:
            self.moving.begin(victim.zone, victim.keep)
        else:
            self._clear(victim.zone)

    def _is_upstream(self, zone: int) -> bool:
        """Tell whether all that the zone ever held is upstream, also for who starts after a power cut now."""
        zones = self._engine.zones
        behind = zones.first_positions[zone] + zones.zone_blocks  # a zone holds fewer records than blocks
        return behind <= self._engine.destage.upstream_position()

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
        for zone in self._unused(list(zones.full)):
            if len(zones.free) >= self.spare:
                return
            if not self._to_keep(zone, worthy=False).size:
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
        good = min(zones.zone_blocks * 3 // 4, self._room() - self.moving.blocks)
        strict = len(zones.free) > ZONES_RESERVED
        best = self._best(self._victims(islice(zones.full, VICTIM_CANDIDATES)), worthy=strict)
        if best is None or best.keep.size > max(good, 0):
            end = 16 * VICTIM_CANDIDATES if self._engine.loading.active else None
            rest = self._victims(islice(zones.full, VICTIM_CANDIDATES, end))
            better = self._best(islice(rest, 8 * VICTIM_CANDIDATES), worthy=False)
            best = min((v for v in (best, better) if v is not None), key=lambda v: v.keep.size, default=None)
        if best is not None and self._cost(best.keep.size) > zones.zone_blocks - zones.zone_blocks // VICTIM_GAIN_RATIO:
            return None  # too little would be gained
        return best

    def _victims(self, zones: Iterable[int]) -> Iterator[int]:
        """Return those of full zones that may be emptied and of which all is known."""
        loading, use_counts = self._engine.loading, self._engine.use_counts
        unused = self._unused(zones)
        if loading.active or use_counts.active:
            return (zone for zone in unused if loading.knows(zone) and use_counts.knows(zone))
        return unused

    def _unused(self, zones: Iterable[int]) -> Iterator[int]:
        """Yield those of full zones that nobody reads from and no replay needs."""
        readers, first_positions = self._engine.zones.readers, self._engine.zones.first_positions
        checkpoints = self._engine.checkpoints
        needed, needed_from = checkpoints.replay_zones, checkpoints.replay_position
        for zone in zones:
            if readers[zone] == 0 and first_positions[zone] < needed_from and zone not in needed:
                yield zone

    def _best(self, candidates: Iterable[int], *, worthy: bool) -> _Victim | None:
        best: _Victim | None = None
        for zone in candidates:
            keep = self._to_keep(zone, worthy=worthy, most=None if best is None else best.keep.size)
            if best is None or keep.size < best.keep.size:
                best = _Victim(zone, keep)
            if keep.size == 0:
                break  # none is better
        return best

    def _to_keep(self, zone: int, *, worthy: bool, most: int | None = None) -> PlaceArray:
        """Return the places to keep, or the first `most` of them: what is dirty or pinned, and what is worthy or not.

        What is upstream in memory only, because its acknowledgement is not in the log, would not be after a crash.
        """
        engine = self._engine
        first, count = engine.zones.place_at(zone, 0), engine.zones.zone_blocks
        if engine.map.hidden:  # none of that is to be kept, but what a closed cut needs
            engine.sweeps.settle_places(np.arange(first, first + count))
        worthy_from, found = WORTHY_FROM if worthy else NONE_WORTHY, self._found[:most]
        kept = engine.map.find_kept(first, count, engine.policy.states, engine.noted_versions, worthy_from, found)
        return found[:kept].copy()

    def _cost(self, count: int) -> int:
        """Return the blocks that so many moved blocks fill, headers and a begun record included."""
        return count + -(-count // self._engine.log.record_blocks) + 1

    # --- moving -----------------------------------------------------------------------------------------------

    def _moved(self, zone: int, whole: bool) -> None:
        """All is applied: what was kept has left, unless a cut was closed and needs a version that was superseded."""
        if not whole:
            self._busy -= 1  # it stays as it is, with what could not be read; the next start looks at it again
            return
        left = self._to_keep(zone, worthy=False)
        if left.size:
            self.moving.begin(zone, left)
        else:
            self._clear(zone)

    def _clear(self, zone: int) -> None:
        self._forget(zone)
        if self._is_upstream(zone):
            self._synced([zone])
            return
        self._empty.append(zone)
        if len(self._empty) >= self.spare // 4 or len(self._engine.zones.free) <= ZONES_RESERVED + 1:
            self._free_empty()

    def _forget(self, zone: int) -> None:
        engine = self._engine
        first, count = engine.zones.place_at(zone, 0), engine.zones.zone_blocks
        # Its keys need not be forgotten: the zone is older than the checkpoint, so nothing older has another content.
        engine.loading.forget_zone(zone)
        engine.policy.removed(np.arange(first + 1, first + count))  # a zone begins with a header
        self.dropped_blocks += engine.map.clear_zone(first, count)
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
        self._engine.log.kick(patient=True)  # entries without data may wait for a zone while no writer does

    def _release_lingering(self) -> None:
        zones = self._engine.zones
        for zone in self._lingering:
            if zones.readers[zone] == 0:
                zones.freed(zone)
                self._busy -= 1
        self._lingering = [zone for zone in self._lingering if zones.readers[zone] > 0]

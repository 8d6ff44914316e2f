"""Judges of a cache engine's books: space adds up, limits hold. They look at memory only to compare it with itself."""

import numpy as np
from sim_world import Violation

from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.limits import (
    BATCHES_IN_FLIGHT_MAX,
    HOLES_KEPT_MAX,
    PARTS_IN_FLIGHT_MAX,
    SNAPSHOTS_PENDING_MAX,
)
from forebay_cache.engine.policy import ring_blocks
from forebay_cache.engine.recovery import ReadDevice, Recovered, recover
from forebay_cache.engine.ring import USED
from forebay_cache.engine.zones import ZoneState
from forebay_cache.format import record
from forebay_cache.format.superblock import choose
from forebay_core.units import BLOCK_SIZE, LBA_BITS, LBA_MAX

WRITES_MAX = BATCHES_IN_FLIGHT_MAX + 1
"""Writes that the device may have at a time: records, and one of a checkpoint."""


def claim(ok: bool, what: str) -> None:
    """Raise unless a statement holds."""
    if not ok:
        raise Violation(what)


def check_books(engine: CacheEngine) -> None:
    """Compare what the engine counts with what it holds."""
    table = engine.map
    keys = table.key_array
    linked = table.linked_mask(0, table.place_count)
    claim(not (linked & (keys == 0)).any(), "a place is linked and holds nothing")
    held = {int(p) for p in np.flatnonzero((keys != 0) & ~linked)}
    claim(held == set(table.held_places().tolist()), "held places are not in the second table")
    shown = linked & ~table.hidden_mask(keys, np.arange(keys.size))
    for volume in engine.volumes.values():
        mine = shown & (keys >> np.uint64(LBA_BITS) == volume.key)
        dirty = set((keys[mine & (table.version_array > volume.acknowledged)] & np.uint64(LBA_MAX)).tolist())
        listed = set(volume.dirty) | {lba for cut in volume.cuts for run in cut.runs for lba in run.tolist()}
        claim(dirty <= listed, "there are dirty blocks that nobody will send")
        claim(len(dirty) <= volume.dirty_blocks, f"{volume.name}: {volume.dirty_blocks} dirty blocks are counted")
        for hole in volume.holes:
            places = table.find_run(volume.key << LBA_BITS | hole.start, min(hole.end - hole.start, 500))
            claim(bool((places < 0).all()), f"{volume.name}: a block is hole and data")
        newest = max(volume.acknowledged, *(cut.last_version for cut in volume.cuts), 0)
        claim(newest <= volume.applied <= volume.version, f"{volume.name}: its versions are out of order")


def check_ring(engine: CacheEngine) -> None:
    """Nothing newer is known of what is held in memory."""
    ring, table = engine.admission.ring, engine.map
    for key in ring.blocks:
        volume, place = engine.volumes.get(key >> LBA_BITS), table.find(key)
        if volume is not None:
            claim(volume.holes.find(key & LBA_MAX) is None, f"{volume.name}: a held block is a hole by now")
            claim(place < 0 or table.versions[place] <= volume.acknowledged, f"{volume.name}: a held block was changed")
    claim(ring.count(USED) <= ring_blocks(engine.policy.capacity), "more blocks are held than the ring has room for")


def check_zones(engine: CacheEngine) -> None:
    """Each zone is in one state, and nothing lives in a free one."""
    zones, table = engine.zones, engine.map
    states = list(zones.states)
    claim(sorted(zones.free) == [z for z, s in enumerate(states) if s == ZoneState.FREE], "free zones don't add up")
    claim(sorted(zones.full) == [z for z, s in enumerate(states) if s == ZoneState.FULL], "full zones don't add up")
    seals = sum(batch.kind == record.SEAL for batch in (*engine.log._sealed, *engine.log._in_flight))
    claim(states.count(ZoneState.OPEN) == 1 + seals, "more than one zone is open")
    used = set((np.flatnonzero(table.key_array) // zones.zone_blocks).tolist())
    claim(not used & set(zones.free), "free zones hold blocks")
    linked = np.flatnonzero(table.linked_mask(0, table.place_count))
    live = np.bincount(linked // zones.zone_blocks, minlength=zones.zone_count)
    claim(bool((live == table.live_array).all()), "blocks per zone don't add up")


def check_limits(engine: CacheEngine, writes_max: int) -> None:
    """What has a bound keeps to it."""
    claim(writes_max <= WRITES_MAX, f"{writes_max} writes were under way")
    claim(0 <= engine.destage._parts <= PARTS_IN_FLIGHT_MAX, f"{engine.destage._parts} parts are under way")
    in_flight = len(engine.log._in_flight)
    claim(in_flight <= BATCHES_IN_FLIGHT_MAX, f"{in_flight} batches are under way")
    for volume in engine.volumes.values():
        plain = [cut for cut in volume.cuts if cut.end is None]
        claim(len(plain) <= 1, f"{volume.name}: {len(plain)} cuts without an end are closed")
        claim(not plain or volume.cuts[0] is plain[0], f"{volume.name}: a cut without an end waits behind another")
        claim(all(cut.resting for cut in volume.cuts[1:]), f"{volume.name}: two cuts are sent at a time")
        claim(len(volume.pending_snapshots) <= SNAPSHOTS_PENDING_MAX, f"{volume.name}: too many snapshots wait")
        claim(len(volume.holes) <= HOLES_KEPT_MAX + 64, f"{volume.name}: {len(volume.holes)} holes are kept")


def check_engine(engine: CacheEngine, writes_max: int) -> None:
    """All of the above, of an engine that has not failed."""
    if not engine.failed:
        check_books(engine)
        check_zones(engine)
        check_limits(engine, writes_max)
        check_ring(engine)


def check_recovers(read: ReadDevice) -> None:
    """A device can be recovered, twice with one result."""
    first, second = _recovered(read), _recovered(read)
    same = (first.map.key_array == second.map.key_array).all() and first.point == second.point
    claim(bool(same), "one image recovers to two states")


def _recovered(read: ReadDevice) -> Recovered:
    superblock = choose(read(0, BLOCK_SIZE), read(BLOCK_SIZE, BLOCK_SIZE), place="image")
    return recover(read, superblock, whole=True)

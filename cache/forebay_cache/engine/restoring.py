"""Taking over what a start has found on the device: volumes, what of them is not upstream, and their closed cuts.

Of the closed cuts only those count whose end is a snapshot or a resize; what else was closed belongs to the cut behind
it. What of it the store has got meanwhile is left out when it says where it stands.

Invariants:
    Each block that is newer than upstream is listed in the cut that its version falls into, or as dirty.
    No block of a cut is in a hole of it.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from forebay_cache.engine.blockmap import BlockMap
from forebay_cache.engine.cuts import Cut
from forebay_cache.engine.dirty import DirtyBlocks, distinct
from forebay_cache.engine.limits import RESTORE_PLACES
from forebay_cache.engine.ports import U64Array
from forebay_cache.engine.rates import Limit
from forebay_cache.engine.recovery import Recovered, RecoveredVolume
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import CLOSED, LEFT_DIRTY, NO_ORIGIN, READ_ONLY, SNAPSHOT
from forebay_core.extents import Extent
from forebay_core.units import LBA_BITS, LBA_MAX, Epoch, StoreId, Version, VolumeId

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine

_LBA_MASK: Final = np.uint64(LBA_MAX)


def restore(engine: "CacheEngine", recovered: Recovered) -> None:
    """Fill an engine that has just been made."""
    for volume in recovered.volumes.values():
        _restore_volume(engine, volume)
    engine.destage.total.set_limit(engine.limit_of(None))
    listing = _Listing(engine, recovered)
    for first in range(0, engine.map.place_count, RESTORE_PLACES):
        listing.add(first)
    listing.close_cuts()
    engine.count_dirty_blocks()
    engine.sources.recovered()
    engine.attaching.forget_released()


def _restore_volume(engine: "CacheEngine", found: RecoveredVolume) -> None:
    note = found.note
    volume = CacheVolume(engine, note.volume_key, VolumeId(note.volume_id), StoreId(note.store), note.name, note.size)
    volume.resize(note.name, note.size, read_only=bool(note.flags & READ_ONLY))
    volume.epoch = Epoch(note.epoch)
    volume.own_limit = Limit(note.average, note.peak)
    volume.shaper.set_limit(engine.limit_of(volume))
    volume.front = note.front
    volume.attached = not note.flags & (LEFT_DIRTY | CLOSED)
    volume.snapshot = bool(note.flags & SNAPSHOT)
    volume.held = not note.flags & (CLOSED | SNAPSHOT)
    volume.origin = VolumeId(b"" if note.origin == NO_ORIGIN else note.origin)
    volume.origins = found.origins
    volume.version = volume.applied = Version(max(found.version, found.acknowledged))
    volume.acknowledged = volume.noted = Version(found.acknowledged)
    volume.acknowledgement_logged(0, version=volume.noted, upstream_position=0)
    volume.ends = list(found.ends)
    for hole in found.holes.newer_than(max([found.acknowledged, *(end.version for end in found.ends)])):
        volume.open_holes.add(Extent(hole.start, hole.end - hole.start), hole.version)
    volume.holes = found.holes
    volume.forget_holes()  # not earlier: in mid-replay a hole keeps older records out of the map
    engine.volumes[note.volume_key] = volume


class _Listing:
    """Finds for each cut the blocks that may have a version in it."""

    def __init__(self, engine: "CacheEngine", recovered: Recovered) -> None:
        self._engine = engine
        self._recovered = recovered
        self._dirty = {
            key: [*(DirtyBlocks() for _ in found.ends), engine.volumes[key].dirty]
            for key, found in recovered.volumes.items()
        }

    def add(self, first: int) -> None:
        """List what is newer than upstream in a run of places."""
        engine, table = self._engine, self._engine.map
        zones = slice(first // table.zone_blocks, (first + RESTORE_PLACES - 1) // table.zone_blocks + 1)
        if not (table.live_array[zones].any() or table.held_array[zones].any()):
            return  # nothing of a large map that is mostly not loaded yet is touched
        part = slice(first, first + RESTORE_PLACES)
        keys, versions = table.key_array[part], table.version_array[part]
        volume_keys = (keys >> np.uint64(LBA_BITS)).astype(np.int64)
        known = volume_keys < engine.acknowledged_versions.size
        acknowledged = engine.acknowledged_versions.take(np.where(known, volume_keys, 0))
        dirty = np.flatnonzero((keys != 0) & (versions > acknowledged))
        owners = volume_keys[dirty]
        for key in distinct(owners).tolist():
            if key in engine.volumes:
                mine = dirty[owners == key]
                self._list(key, keys[mine] & _LBA_MASK, versions[mine])

    def _list(self, volume_key: int, lbas: U64Array, versions: U64Array) -> None:
        cuts = self._dirty[volume_key]
        ends = np.array([end.version for end in self._recovered.volumes[volume_key].ends], np.uint64)
        index = np.searchsorted(ends, versions)
        for i in distinct(index).tolist():
            cuts[i].add(lbas[index == i])

    def close_cuts(self) -> None:
        """Make the closed cuts of all volumes."""
        for key, found in self._recovered.volumes.items():
            volume = self._engine.volumes[key]
            cuts: list[Cut] = []
            for end, holes, dirty in zip(found.ends, found.closed_holes, self._dirty[key], strict=False):
                cut = Cut(
                    dirty.take(),
                    holes,
                    floor=cuts[-1].last_version if cuts else volume.acknowledged,
                    last_version=Version(end.version),
                    end=end,
                    opened_ns=0,
                    closed_wall_ns=0,
                    closed_position=0,
                )
                for run in cut.runs:
                    _settle_holes(self._engine.map, key, cut, run)
                cuts.append(cut)
            self._engine.destage.take_over(volume, cuts)


def _settle_holes(table: BlockMap, volume_key: int, cut: Cut, lbas: U64Array) -> None:
    """Let the newer count of a hole of a cut and a block in it."""
    versions = cut.holes.versions_at(lbas)
    for i in np.flatnonzero(versions).tolist():
        lba, trimmed = int(lbas[i]), int(versions[i])
        key = volume_key << LBA_BITS | lba
        place = table.find(key)
        if place < 0 or not cut.floor < table.versions[place] <= cut.last_version:
            place = int(table.find_held(np.array([key], np.uint64), above=cut.floor, to=cut.last_version)[0])
        if place >= 0 and table.versions[place] > trimmed:
            cut.holes.remove(Extent(lba, 1))
        elif place >= 0:
            table.clear_places(np.array([place]))

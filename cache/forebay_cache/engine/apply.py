"""Applying a written record: the map, the holes and the books of the policy follow the log, entry by entry.

Invariants:
    After a record is applied each of its WRITE blocks is mapped to its new place, unless a later entry changed it.
    A version of a closed cut that is overwritten or trimmed stays held at its place, and the cut knows where.
"""

from typing import TYPE_CHECKING

import numpy as np

from forebay_cache.engine.destage import Cut
from forebay_cache.engine.log import Batch, Entry
from forebay_cache.format import record
from forebay_core.extents import Extent
from forebay_core.units import LBA_BITS, Version

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume


class Apply:
    """Called by the log for each record, in order."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine

    def __call__(self, batch: Batch) -> None:
        """Apply one record."""
        for entry in batch.entries:
            kind = entry.kind
            if kind == record.WRITE:
                self._write(batch, entry)
            elif kind == record.FILL:
                self._fill(entry)
            elif kind == record.MOVE:
                self._move(entry)
            elif kind in (record.TRIM, record.ZERO):
                self._zero(entry)
            elif kind == record.DROP:
                self._drop(entry)
        self._engine.record_applied()

    def _write(self, batch: Batch, entry: Entry) -> None:
        engine = self._engine
        volume = engine.volumes[entry.volume_key]
        key = entry.volume_key << LBA_BITS | entry.start
        pending = engine.writes.pending
        if pending.get(key) is batch:
            del pending[key]
        table = engine.map
        old = table.find(key)
        newly_dirty = True
        if old >= 0:
            old_version = table.versions[old]
            if old_version > volume.acknowledged:
                if volume.cuts and old_version <= volume.closed_version:
                    self._pin(volume, key, entry.start, old)
                else:
                    newly_dirty = False
        elif len(volume.holes):
            volume.holes.remove(Extent(entry.start, 1))
        table.insert(key, entry.version, entry.checksum, entry.place)
        if old >= 0:
            engine.policy.moved(old, entry.place)
        else:
            engine.policy.inserted(entry.place, key)
        if newly_dirty:
            volume.dirty.append(entry.start)
            engine.dirty_blocks += 1
        volume.applied = Version(entry.version)

    def _fill(self, entry: Entry) -> None:
        engine = self._engine
        key = entry.volume_key << LBA_BITS | entry.start
        if entry.volume_key in engine.volumes and engine.map.find(key) < 0:
            engine.map.insert(key, entry.version, entry.checksum, entry.place)
            engine.policy.inserted(entry.place, key)

    def _move(self, entry: Entry) -> None:
        engine = self._engine
        table = engine.map
        key = entry.volume_key << LBA_BITS | entry.start
        source = entry.source
        if table.keys[source] != key or table.versions[source] != entry.version:
            return  # it was overwritten, trimmed or acknowledged meanwhile
        if table.is_linked(source):
            table.insert(key, entry.version, entry.checksum, entry.place)
            engine.policy.moved(source, entry.place)
            return
        cut = _cut_of(engine.volumes[entry.volume_key], entry.version)
        assert cut is not None, "a held place belongs to a closed cut"
        cut.pinned[cut.index_of(entry.start)] = entry.place
        table.wipe(source)
        table.hold(key, entry.version, entry.checksum, entry.place)

    def _zero(self, entry: Entry) -> None:
        engine = self._engine
        volume = engine.volumes[entry.volume_key]
        engine.writes.event_applied()
        extent = Extent(entry.start, entry.checksum)
        for cut in volume.cuts:
            self._pin_extent(volume, cut, extent)
        key = entry.volume_key << LBA_BITS | extent.start
        for places in engine.map.remove_range(key, extent.count, below=entry.version):
            engine.policy.removed(places)
        volume.holes.add(extent, entry.version)
        volume.applied = Version(entry.version)

    def _drop(self, entry: Entry) -> None:
        engine = self._engine
        extent = Extent(entry.start, entry.checksum)
        key = entry.volume_key << LBA_BITS | extent.start
        for places in engine.map.remove_range(key, extent.count, below=entry.version):
            engine.policy.removed(places)
        engine.volumes[entry.volume_key].holes.remove(extent)

    def _pin(self, volume: "CacheVolume", key: int, lba: int, place: int) -> None:
        cut = _cut_of(volume, self._engine.map.versions[place])
        assert cut is not None
        cut.pinned[cut.index_of(lba)] = place
        self._engine.map.unlink(key)

    def _pin_extent(self, volume: "CacheVolume", cut: Cut, extent: Extent) -> None:
        """Pin the blocks of a closed cut that are about to be trimmed."""
        table = self._engine.map
        first, end = np.searchsorted(cut.lbas, (extent.start, extent.end))
        lbas = cut.lbas[first:end]
        if not lbas.size:
            return
        places = table.find_many(lbas | np.uint64(volume.key << LBA_BITS))
        current = (places >= 0) & (table.version_array.take(np.maximum(places, 0)) == cut.versions[first:end])
        table.unlink_places(places[current])
        self._engine.policy.removed(places[current])
        cut.pinned[np.flatnonzero(current) + int(first)] = places[current]


def _cut_of(volume: "CacheVolume", version: int) -> Cut | None:
    for cut in volume.cuts:
        if cut.first_version <= version <= cut.last_version:
            return cut
    return None

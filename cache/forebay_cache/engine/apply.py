"""Applying a written record: the map, the holes and the books of the policy follow the log, entry by entry.

Invariants:
    After a record is applied each of its WRITE blocks is mapped to its new place, unless a later entry changed it.
    A version of a closed cut that is overwritten or trimmed stays held at its place, and the cut knows where.
"""

from typing import TYPE_CHECKING

import numpy as np

from forebay_cache.engine.destage import Cut
from forebay_cache.engine.log import Batch, Block, Change, Run
from forebay_cache.format import record
from forebay_core.extents import Extent
from forebay_core.units import LBA_BITS, LBA_MAX, Version

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume


class Apply:
    """Called by the log for each record, in order."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine

    def __call__(self, batch: Batch) -> None:
        """Apply one record."""
        for item in batch.data:
            if isinstance(item, Run):
                self._write_run(batch, item)
            elif item[0] == record.WRITE:
                self._write(batch, item)
            elif item[0] == record.FILL:
                self._fill(item)
            else:
                self._move(item)
        for change in batch.changes:
            if change.kind in (record.TRIM, record.ZERO):
                self._zero(change)
            elif change.kind == record.DROP:
                self._drop(change)
        self._engine.record_applied()

    def _write(self, batch: Batch, block: Block) -> None:
        """One block: the hottest path of writing, so the map is walked once unless a version may have to be pinned."""
        _, volume_key, lba, version, checksum, place, _ = block
        engine = self._engine
        volume = engine.volumes[volume_key]
        key = volume_key << LBA_BITS | lba
        pending = engine.writes.pending
        if pending.get(key) is batch:
            del pending[key]
        table = engine.map
        if volume.cuts:
            self._pin_if_closed(volume, key, lba)
        old = table.insert(key, version, checksum, place)
        if old >= 0:
            engine.policy.moved(old, place)
        else:
            if len(volume.holes):
                volume.holes.remove(Extent(lba, 1))
            engine.policy.inserted(place, key)
        if old < 0 or table.versions[old] <= volume.acknowledged:
            volume.dirty.append(lba)
            engine.dirty_blocks += 1
        volume.applied = Version(version)

    def _write_run(self, batch: Batch, run: Run) -> None:
        """The same for consecutive blocks, with arrays."""
        engine = self._engine
        table = engine.map
        volume = engine.volumes[run.volume_key]
        count = run.checksums.size
        first = run.volume_key << LBA_BITS | run.lba
        pending = engine.writes.pending
        for key in range(first, first + count):
            if pending.get(key) is batch:
                del pending[key]
        if volume.cuts:
            for cut in volume.cuts:
                self._pin_extent(volume, cut, Extent(run.lba, count))
        keys = np.arange(first, first + count, dtype=np.uint64)
        places = np.arange(run.place, run.place + count, dtype=np.int64)
        old = table.insert_many(keys, np.full(count, run.version, np.uint64), run.checksums, places)
        there = old >= 0
        engine.policy.moved_many(old[there], places[there])
        engine.policy.inserted_many(places[~there], keys[~there])
        if len(volume.holes):
            volume.holes.remove(Extent(run.lba, count))
        was_dirty = there & (table.version_array.take(np.maximum(old, 0)) > np.uint64(volume.acknowledged))
        lbas = keys[~was_dirty] & np.uint64(LBA_MAX)
        volume.dirty.frombytes(lbas.tobytes())
        engine.dirty_blocks += lbas.size
        volume.applied = Version(run.version)

    def _fill(self, block: Block) -> None:
        _, volume_key, lba, version, checksum, place, _ = block
        engine = self._engine
        key = volume_key << LBA_BITS | lba
        if volume_key in engine.volumes and engine.map.find(key) < 0:
            engine.map.insert(key, version, checksum, place)
            engine.policy.inserted(place, key)

    def _move(self, block: Block) -> None:
        _, volume_key, lba, version, checksum, place, source = block
        engine = self._engine
        table = engine.map
        key = volume_key << LBA_BITS | lba
        if table.keys[source] != key or table.versions[source] != version:
            return  # it was overwritten, trimmed or acknowledged meanwhile
        if table.is_linked(source):
            table.insert(key, version, checksum, place)
            engine.policy.moved(source, place)
            return
        cut = _cut_of(engine.volumes[volume_key], version)
        assert cut is not None, "a held place belongs to a closed cut"
        cut.pinned[cut.index_of(lba)] = place
        table.wipe(source)
        table.hold(key, version, checksum, place)

    def _zero(self, change: Change) -> None:
        engine = self._engine
        volume = engine.volumes[change.volume_key]
        engine.writes.event_applied()
        extent = Extent(change.start, change.value)
        for cut in volume.cuts:
            self._pin_extent(volume, cut, extent)
        key = change.volume_key << LBA_BITS | extent.start
        for places in engine.map.remove_range(key, extent.count, below=change.version):
            engine.policy.removed(places)
            volume.trimmed = volume.trimmed or places.size > 0
        volume.holes.add(extent, change.version)
        volume.applied = Version(change.version)

    def _drop(self, change: Change) -> None:
        engine = self._engine
        extent = Extent(change.start, change.value)
        key = change.volume_key << LBA_BITS | extent.start
        for places in engine.map.remove_range(key, extent.count, below=change.version):
            engine.policy.removed(places)
        engine.volumes[change.volume_key].holes.remove(extent)

    def _pin_if_closed(self, volume: "CacheVolume", key: int, lba: int) -> None:
        place = self._engine.map.find(key)
        if place >= 0 and volume.acknowledged < self._engine.map.versions[place] <= volume.closed_version:
            self._pin(volume, key, lba, place)

    def _pin(self, volume: "CacheVolume", key: int, lba: int, place: int) -> None:
        cut = _cut_of(volume, self._engine.map.versions[place])
        assert cut is not None
        cut.pinned[cut.index_of(lba)] = place
        self._engine.map.unlink(key)
        self._engine.policy.removed(np.array([place]))

    def _pin_extent(self, volume: "CacheVolume", cut: Cut, extent: Extent) -> None:
        """Pin the blocks of a closed cut that are about to be trimmed or overwritten."""
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

"""Applying a written record: the map, the holes and the books of the policy follow the log, entry by entry.

Invariants:
    After a record is applied each of its WRITE blocks is mapped to its new place, unless a later entry changed it.
    A version of a closed cut that is overwritten or trimmed stays held at its place.
    A cut is closed at the moment when the snapshot or resize that ends it is applied: all before it is in the map, and
    nothing behind it.
"""

from typing import TYPE_CHECKING

import numpy as np

from forebay_cache.engine.entering import Entered, Moved
from forebay_cache.engine.log import Batch, Change, Fill, Moves, Writes
from forebay_cache.format import record
from forebay_cache.format.cut_end import RESIZE, CutEnd
from forebay_core.extents import Extent, from_blocks
from forebay_core.units import BLOCK_SHIFT, LBA_BITS, LBA_MAX, Version

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine


class Apply:
    """Called by the log for each record, in order."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._found = Entered.make()
        self._moved = Moved.make()

    def __call__(self, batch: Batch) -> None:
        """Apply one batch."""
        for item in batch.data:
            if isinstance(item, Writes):
                self._write(item, batch.record_blocks)
            elif isinstance(item, Moves):
                self._move(item)
            else:
                self._fill(item)
        if batch.end is not None:
            self._end(batch.end)
        for change in batch.changes:
            if change.kind in (record.TRIM, record.ZERO):
                self._zero(change)
            elif change.kind == record.DROP:
                self._drop(change)
        self._engine.record_applied()

    def _write(self, writes: Writes, record_blocks: int) -> None:
        """Blocks that a guest wrote: the hottest path of writing, so nothing is done one by one here."""
        engine = self._engine
        volume = engine.volumes[writes.volume_key]
        found, count = self._found, writes.count
        if engine.map.hidden:
            engine.sweeps.settle_keys(writes.keys(record_blocks))
        dirty_count, _ = engine.map.enter_writes(
            writes.headers,
            record_blocks,
            writes.number,
            writes.index,
            count,
            writes.first_place,
            acknowledged=volume.acknowledged,
            closed=volume.closed_version,
            found=found,
        )
        engine.policy.written(found.places, found.olds, found.keys, count)
        volume.dirty.add(found.dirty_lbas[:dirty_count])
        engine.dirty_blocks += dirty_count
        if hole_count := len(volume.holes):
            fresh = found.keys[:count][found.olds[:count] < 0] & np.uint64(LBA_MAX)
            for extent in from_blocks(fresh):
                volume.holes.remove(extent)
                volume.open_holes.remove(extent)
            engine.hole_count += max(0, len(volume.holes) - hole_count)  # some were cut in two
        if volume.origins is not None:
            volume.origins.remove_many(found.keys[:count][found.olds[:count] < 0] & np.uint64(LBA_MAX))
        volume.applied = Version(writes.version)

    def _fill(self, fill: Fill) -> None:
        volume_key, lba, version, checksum, place = fill
        engine = self._engine
        key = volume_key << LBA_BITS | lba
        if volume_key in engine.volumes and engine.map.find(key) < 0:
            if engine.map.hidden:
                engine.sweeps.settle_keys(np.array([key], np.uint64))
            engine.map.insert(key, version, checksum, place)
            engine.policy.inserted(place)
        engine.admission.applied(key)

    def _move(self, moves: Moves) -> None:
        """Blocks that reclaim moved: all at once but for pinned versions, which are few."""
        engine, found = self._engine, self._moved
        header, entry, sources, first_place = moves
        if engine.map.hidden:
            engine.sweeps.settle_places(sources)
        entry += record.ENTRIES_INDEX
        moved_count, held_count = engine.map.enter_moves(header, entry, sources, first_place, found=found)
        if moved_count:
            engine.policy.moved(found.sources[:moved_count], found.places[:moved_count])
        for i in found.held[:held_count].tolist():
            self._move_held(int(sources[i]), first_place + i)

    def _move_held(self, source: int, place: int) -> None:
        engine, table = self._engine, self._engine.map
        key, version, checksum = table.keys[source], table.versions[source], table.checksums[source]
        table.wipe(source)
        if version > engine.acknowledged_versions[key >> LBA_BITS]:
            table.hold(key, version, checksum, place)

    def _end(self, end: CutEnd) -> None:
        engine = self._engine
        volume = engine.volumes[end.volume_key]
        volume.applied = Version(end.version)
        if end.kind == RESIZE and end.size > volume.size:
            # The store does not know the new end before it has the cut, and refuses reads behind the old one.
            volume.holes.add(Extent(volume.block_count, (end.size >> BLOCK_SHIFT) - volume.block_count), end.version)
            engine.hole_count += 1
            volume.grow(end.size)
        engine.destage.close_at(volume, end)

    def _zero(self, change: Change) -> None:
        engine = self._engine
        volume = engine.volumes[change.volume_key]
        engine.writes.event_applied()
        extent = Extent(change.start, change.value)
        key = change.volume_key << LBA_BITS | extent.start
        kept = (volume.acknowledged, volume.closed_version)
        engine.sweeps.remove(key, extent.count, below=change.version, kept=kept)
        volume.trimmed = True
        engine.loading.forget(key, extent.count)
        volume.holes.add(extent, change.version)
        if volume.origins is not None:
            volume.origins.remove(extent)
        volume.open_holes.add(extent, change.version)
        volume.applied = Version(change.version)

    def _drop(self, change: Change) -> None:
        engine = self._engine
        extent = Extent(change.start, change.value)
        key = change.volume_key << LBA_BITS | extent.start
        engine.sweeps.remove(key, extent.count, below=change.version)
        engine.loading.forget(key, extent.count)
        volume = engine.volumes[change.volume_key]
        volume.holes.remove(extent)
        if volume.origins is not None:
            volume.origins.forget(extent)

"""Snapshots in the cache: served read-only as devices of their own, and read through to by the clones made of them.

A snapshot never changes, so it has no epoch and no writer; it is a row of the volume table under its own id, and what
is cached of it is shared by all its clones here. A snapshot that is a clone's has an origin itself: a chain.

One that is attached and that no clone needs is *temporary*: its blocks have a bounded share of the cache, are not
worth keeping however often they are hit, and go when it is detached.

Invariants:
    A volume has a source if and only if it has an origin map, and then the source's row stands before its own in the
    log. A snapshot that a held volume, an attached snapshot or an arriving one reads through to is not forgotten.
    A block has its bit in the map only if the store said so, and nothing was written, trimmed or dropped there since.
Crash: rows are in log and checkpoint; what was cached of a temporary snapshot is dropped at the next start.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import ORIGINS_LOGGED_MAX, TEMPORARY_BLOCKS_MIN, TEMPORARY_SHARE
from forebay_cache.engine.log import Settled
from forebay_cache.engine.origin_map import OriginMap
from forebay_cache.engine.ports import FetchedPiece, UpstreamRefusal
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format import record
from forebay_cache.format.volume_note import NBD_ONLY, Front
from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import LBA_BITS, StoreId, Version, VolumeId

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine


class SnapshotView(NamedTuple):
    """What the store said of a snapshot; `name` is `volume@snapshot`, `origin` what it reads through to, or empty."""

    id: VolumeId
    name: str
    size: int
    version: Version
    store: StoreId
    origin: VolumeId


class Sources:
    """Brings snapshots in, finds blocks through them, and lets them go."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._needed: set[int] = set()  # keys of snapshots that somebody reads through to
        self._fresh: set[int] = set()  # keys of rows that were just made, for somebody who is not connected yet
        self._ring = array("Q")  # keys of blocks that temporary snapshots brought in, in a circle
        self._ring_at = 0
        self._ring_max = max(TEMPORARY_BLOCKS_MIN, engine.map.place_count // TEMPORARY_SHARE)

    # --- coming and going -------------------------------------------------------------------------------------

    def bring_in(self, chain: Sequence[SnapshotView]) -> CacheVolume | None:
        """Return the first of a chain of snapshots, each the origin of the one before it; None if it is empty.

        Raises:
            ForebayError: one is known from another store, or the volume table is full.
        """
        source: CacheVolume | None = None
        for view in reversed(chain):
            volume = self._engine.by_id(view.id) or self._new(view)
            if volume.store != view.store:
                raise ForebayError(f"snapshot {view.name} is cached here from another store; detach its clones first")
            self.connect(volume, view.origin, source)
            source = volume
        return source

    def settled(self) -> None:
        """Somebody was attached or detached: look anew who is needed, and who is temporary."""
        self._fresh.clear()
        self._needed.clear()
        for volume in self._engine.volumes.values():
            if volume.held or volume.attached or self._engine.attaching.is_arriving(volume):
                self._need_sources(volume)
        for volume in self._engine.volumes.values():
            volume.temporary = volume.snapshot and volume.key not in self._needed

    def may_be_forgotten(self, volume: CacheVolume) -> bool:
        """Tell whether nobody needs what is cached of a volume."""
        return not (volume.attached or volume.key in self._needed or volume.key in self._fresh)

    def connect(self, volume: CacheVolume, origin: VolumeId, source: CacheVolume | None) -> None:
        """Let a volume read through to a source from now on, or to none."""
        volume.origin = origin
        if volume.source is not source:
            volume.source = source
            volume.origins = None if source is None else OriginMap(source.block_count)

    def attach(
        self,
        chain: Sequence[SnapshotView],
        *,
        attached: Callable[[CacheVolume | None], None],
        front: Front = NBD_ONLY,
    ) -> None:
        """Serve the first snapshot of a chain read-only from now on; None answers a failed device.

        Raises:
            ForebayError: it is attached already, or what `bring_in` raises.
        """
        known = self._engine.by_id(chain[0].id)
        if known is not None and (known.attached or known.closing):
            raise ForebayError(f"snapshot {known.name} is attached already, or still being detached")
        volume = self.bring_in(chain)
        assert volume is not None
        volume.error = ""
        volume.attached = True
        volume.front = front
        self.settled()

        def noted(ok: bool) -> None:
            if ok:
                self.ask_map(volume)
            attached(volume if ok else None)

        self._engine.attaching.note(volume, noted)

    def detach(self, volume: CacheVolume, settled: Settled) -> None:
        """Stop serving a snapshot. The fronts have closed it. What is cached of it goes, unless clones read it."""
        assert volume.snapshot
        volume.attached = False
        volume.front = NBD_ONLY
        volume.closing = True
        self.settled()

        def dropped(ok: bool) -> None:
            volume.closing = False
            if ok and self.may_be_forgotten(volume):
                self._engine.attaching.forget(volume)
            settled(ok)

        def noted(ok: bool) -> None:
            if ok and volume.temporary:
                everything = [Extent(0, volume.block_count)]
                self._engine.attaching.drop(volume, everything, Version(volume.version + 1), dropped)
            else:
                dropped(ok)

        self._engine.attaching.note(volume, noted)

    def recovered(self) -> None:
        """All rows are known again: connect them; what was cached of temporary snapshots goes."""
        engine = self._engine
        for volume in engine.volumes.values():
            volume.source = engine.by_id(volume.origin) if volume.origin else None
            if volume.source is None:
                volume.origins = None
            elif volume.origins is None or volume.origins.block_count != volume.source.block_count:
                volume.origins = OriginMap(volume.source.block_count)
        self.settled()
        for volume in engine.volumes.values():
            if volume.temporary and volume.attached:
                engine.attaching.forget_blocks(volume)
            if volume.snapshot and volume.attached:
                engine.after(0, partial(self.ask_map, volume))

    def gone(self, source: CacheVolume) -> bool:
        """The store has a snapshot no more. It could be deleted, so none of its clones needs it: each has all blocks.

        Returns whether such clones are here: they are to be asked again, under their own ids.
        """
        found = False
        for volume in self._engine.volumes.values():
            if volume.source is source and volume.origins is not None:
                volume.origins.forget(Extent(0, volume.origins.block_count))
                found = True
        if source.attached:
            self._engine.destage.stop_volume(source, "this snapshot was deleted in the store; detach it")
        return found

    # --- blocks -----------------------------------------------------------------------------------------------

    def find(self, volume: CacheVolume, lba: int) -> int:
        """Return the place of a block that the volume has none for itself, from the sources below it, or -1."""
        while volume.source is not None and volume.origins is not None and volume.origins.has(lba):
            volume = volume.source
            place = self._engine.map.find(volume.key << LBA_BITS | lba)
            if place >= 0:
                return place
        return -1

    def find_run(self, volume: CacheVolume, extent: Extent, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return places of consecutive blocks with those filled in that the sources have; `places` may be changed."""
        for index in np.flatnonzero(places < 0).tolist():
            places[index] = self.find(volume, extent.start + index)
            if places[index] < 0:
                break
        return places

    def learn(self, volume: CacheVolume, extent: Extent) -> None:
        """The store said that these blocks read as the origin does, and nothing happened to them since."""
        if volume.origins is not None:
            volume.origins.add(extent)

    def keep(self, volume: CacheVolume, lba: int) -> bool:
        """Tell whether a block of a temporary snapshot may be cached: another one goes if they have their share."""
        key = volume.key << LBA_BITS | lba
        if len(self._ring) < self._ring_max:
            self._ring.append(key)
            return True
        if self._engine.admission.is_leaving(self._ring[self._ring_at]):
            return False  # it could not be dropped yet
        old, self._ring[self._ring_at] = self._ring[self._ring_at], key
        self._ring_at = (self._ring_at + 1) % self._ring_max
        owner = self._engine.volumes.get(old >> LBA_BITS)
        place = self._engine.map.find(old)
        if place >= 0 and owner is not None and owner.temporary and old != key:
            self._engine.drop_block(old, place)
        return True

    # --- learning the whole map -------------------------------------------------------------------------------

    def ask_map(self, volume: CacheVolume) -> None:
        """Ask the store for all that is not known yet of a volume's map, and of those below it."""
        seen: CacheVolume | None = volume
        while seen is not None:
            self._ask_next(seen)
            seen = seen.source

    def _ask_next(self, volume: CacheVolume) -> None:
        origins, source = volume.origins, volume.source
        if origins is None or volume.asking_map or origins.asked_to >= origins.block_count:
            return
        volume.asking_map = True
        asked = Extent(origins.asked_to, origins.block_count - origins.asked_to)
        acknowledged = volume.acknowledged

        def answered(answer: Sequence[FetchedPiece] | UpstreamRefusal) -> None:
            volume.asking_map = False
            if isinstance(answer, UpstreamRefusal) or volume.error or volume.source is not source:
                return  # what is asked for later is learned then, block by block
            # A cut that went over meanwhile may hold blocks that the answer does not know.
            if volume.acknowledged == acknowledged and volume.origins is origins:
                self._learn_all(volume, origins, answer)
            self._ask_next(volume)

        self._engine.upstream.allocation(volume.id, asked, answered, through=False)

    def _learn_all(self, volume: CacheVolume, origins: OriginMap, answer: Sequence[FetchedPiece]) -> None:
        """Take over the answer, but for blocks that changed here and are not in the store."""
        for piece in answer:
            if piece.origin:
                origins.add(piece.extent)
        learned = Extent(answer[0].extent.start, answer[-1].extent.end - answer[0].extent.start)
        origins.remove_many(volume.dirty.all())
        for run in (run for cut in volume.cuts for run in cut.runs):
            origins.remove_many(run)
        for hole in volume.holes.overlapping(learned):
            origins.remove(Extent(hole.start, hole.end - hole.start))
        for extent in self._engine.writes.changing(volume.key, learned):
            origins.remove(extent)
        origins.asked_to = max(origins.asked_to, learned.end)
        if len(answer) <= ORIGINS_LOGGED_MAX:
            self._log_learned(volume, origins, [piece.extent for piece in answer if piece.origin])

    def _log_learned(self, volume: CacheVolume, origins: OriginMap, extents: Sequence[Extent]) -> None:
        """Log what was learned, so that a kill does not take it. If that is much, the next checkpoint has to do."""
        runs = [run for extent in extents for run in origins.overlapping(extent)]
        for run in runs[:ORIGINS_LOGGED_MAX]:
            self._engine.log.add_event(record.ORIGIN, volume.key, run.start, origins.asked_to, run.count)
        self._engine.log.kick()

    # --- inside -----------------------------------------------------------------------------------------------

    def _new(self, view: SnapshotView) -> CacheVolume:
        engine = self._engine
        key = engine.attaching.new_key()
        volume = CacheVolume(engine, key, view.id, view.store, view.name, view.size)
        volume.snapshot = True
        volume.resize(view.name, view.size, read_only=True)
        volume.adopt(view.version)
        engine.volumes[key] = volume
        self._fresh.add(key)
        volume.origin = view.origin
        engine.attaching.note(volume, lambda _ok: None)
        return volume

    def _need_sources(self, volume: CacheVolume) -> None:
        self._needed.update(source.key for source in volume.sources())

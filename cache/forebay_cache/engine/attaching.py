"""Attaching and detaching: how what the cache holds of a volume and what the store holds come together.

The store's version decides. Equal: all that is cached is valid. Ahead by our own doing (an acknowledgement was lost):
taken over. Ahead otherwise: what changed since is dropped, unless we hold changes of our own, which are never merged
silently. Behind: refused by the store when it is asked with our version.

Invariants:
    A volume is served only after its row, and what was dropped for it, is durable.
    A volume that is being attached is neither forgotten nor attached a second time.
    The store's version is adopted only when all that is stale by it is out of the map.
    What is cached of a volume, dirty or clean, is of the one store that its row names; no other is asked or told.
Crash: the row in the log says whether the volume is attached, held with dirty blocks, or released.
"""

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from forebay_cache.engine.limits import SWEEPS_MAX, VOLUMES_MAX
from forebay_cache.engine.log import Settled
from forebay_cache.engine.sources import SnapshotView
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format import record
from forebay_cache.format.volume_note import NBD_ONLY, Front
from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, LBA_BITS, Epoch, StoreId, Version, VolumeId, format_size, format_store

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine


SALVAGE_FIRST = "stop this daemon and save them with forebay cache salvage"


class StoreView(NamedTuple):
    """What the store said when it granted the right to write."""

    id: VolumeId
    name: str
    size: int
    epoch: Epoch
    version: Version
    store: StoreId
    origin: VolumeId = VolumeId(b"")  # id of the snapshot that a clone reads through to; empty: none


class Standing(enum.Enum):
    """How cache and store relate."""

    VALID = "valid"
    STALE = "stale"  # ask what changed since `acknowledged`
    CONFLICT = "conflict"


class Attaching:
    """Brings volumes in and lets them go."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._last_key = 0
        self._arriving: dict[int, StoreView] = {}  # by key: what is granted to volumes whose stale blocks still go

    def acknowledged(self, volume_id: VolumeId) -> Version:
        """Return the version to ask the store with; 0 for a volume that the device does not know."""
        volume = self._engine.by_id(volume_id)
        return volume.acknowledged if volume is not None else Version(0)

    def refuse_stranger(self, name: str, store: StoreId, *, volume_id: VolumeId | None = None) -> None:
        """Look whether a volume that a store offers is another one than what is kept here under its name or id.

        Raises:
            ForebayError: it is, and what is kept must not be joined with it.
        """
        for volume in self._engine.volumes.values():
            mine = volume.held or volume.has_changes
            if volume.store != store and (volume.id == volume_id or (volume.name == name and mine)):
                raise ForebayError(wrong_store(volume.name, volume.store, store))
            if volume.name == name and volume.has_changes and volume_id not in (None, volume.id):
                raise ForebayError(
                    f"this cache keeps changes of another volume {name}, {volume.id.hex()}, which the store no longer "
                    f"has under this name (now {volume_id.hex() if volume_id else ''}): {SALVAGE_FIRST}"
                )

    def compare(self, view: StoreView) -> Standing:
        """Tell whether what is cached may be served."""
        volume = self._engine.by_id(view.id)
        if volume is None or view.version == volume.acknowledged:
            foreign = volume is not None and volume.has_changes and view.epoch != volume.epoch
            return Standing.CONFLICT if foreign else Standing.VALID
        if _is_own_history(volume, view):
            return Standing.VALID
        return Standing.CONFLICT if volume.has_changes else Standing.STALE

    def attach(
        self,
        view: StoreView,
        stale: Sequence[Extent],
        *,
        read_only: bool,
        attached: Callable[[CacheVolume | None], None],
        chain: Sequence[SnapshotView] = (),
        front: Front = NBD_ONLY,
    ) -> None:
        """Serve a volume from now on. `stale` is what changed since our version; None answers a failed device.

        `chain` are the snapshots that a clone reads through to: its origin first, then that one's.

        Raises:
            ForebayError: it is attached already, or about to be, or holds changes that the store would not take.
        """
        engine = self._engine
        self.refuse_stranger(view.name, view.store, volume_id=view.id)
        volume = engine.by_id(view.id)
        if volume is not None and volume.attached:
            raise ForebayError(f"volume {view.name} is attached already")
        if volume is not None and volume.key in self._arriving:
            raise ForebayError(f"volume {view.name} is being attached; try again")
        if self.compare(view) is Standing.CONFLICT:
            assert volume is not None
            dirty = format_size(volume.dirty_blocks << 12)
            raise ForebayError(
                f"volume {view.name} was changed elsewhere while this cache still holds {dirty} of changes that the "
                f"store has never seen; they are kept and not merged: {SALVAGE_FIRST}"
            )
        assert [view.origin] == [one.id for one in chain[:1]] or not (view.origin or chain)
        source = engine.sources.bring_in(chain)
        if volume is None:
            key = self.new_key()
            volume = CacheVolume(engine, key, view.id, view.store, view.name, view.size)
            volume.shaper.set_limit(engine.limit_of(volume))
            engine.volumes[volume.key] = volume
        volume.error = ""
        if view.size < volume.size:  # what lay behind its end now must not come back when it grows again
            stale = [*stale, Extent(view.size >> BLOCK_SHIFT, volume.size - view.size >> BLOCK_SHIFT)]
        volume.resize(view.name, view.size, read_only=read_only)
        volume.front = front
        engine.sources.connect(volume, view.origin, source)
        found = volume
        self._arriving[found.key] = view
        engine.sources.settled()

        def dropped(ok: bool) -> None:
            if ok:  # what is fetched from now on may be older than what is still hidden below the store's version
                engine.sweeps.when_over(lambda ok: self._admit(found, view, ok, attached))
            else:
                self._admit(found, view, False, attached)

        self.drop(found, stale, view.version, dropped)

    def reopened(self, volume: CacheVolume, view: StoreView) -> None:
        """The store granted our epoch again, after a reconnect or a restart: go on destaging, unless it has failed."""
        if volume.error or self._arriving.get(volume.key) == view:
            return  # one that arrives takes this over when it is admitted
        standing = self.compare(view)
        if standing is Standing.VALID and view.epoch == volume.epoch:
            self._take_over(volume, view)
            self._engine.sources.ask_map(volume)
        else:
            self._engine.destage.stop_volume(
                volume,
                f"the store is at epoch {view.epoch}, version {view.version:#x}, this cache at epoch {volume.epoch}, "
                f"version {volume.acknowledged:#x}: the volume was changed elsewhere; "
                + (SALVAGE_FIRST if volume.has_changes else "detach and attach it again"),
            )

    def detach(self, volume: CacheVolume, *, leave_dirty: bool, settled: Settled) -> None:
        """Stop serving. The fronts have closed it; without `leave_dirty` it is drained and released upstream."""
        volume.attached = False
        volume.front = NBD_ONLY
        volume.held = leave_dirty
        volume.destaging = False
        volume.closing = True
        self._engine.sources.settled()
        self.note(volume, settled)

    def set_front(self, volume: CacheVolume, front: Front, settled: Settled) -> None:
        """Note how a volume is attached now; `settled` hears when that is durable."""
        volume.front = front
        self.note(volume, settled)

    def is_arriving(self, volume: CacheVolume) -> bool:
        """Tell whether a volume is being attached."""
        return volume.key in self._arriving

    # --- inside -----------------------------------------------------------------------------------------------

    def _take_over(self, volume: CacheVolume, view: StoreView) -> None:
        volume.take_epoch(view.epoch)
        volume.destaging = True
        volume.warning = ""
        self._engine.destage.granted(volume, view.version)

    def drop(self, volume: CacheVolume, stale: Sequence[Extent], version: Version, settled: Settled) -> None:
        """Make the stale blocks vanish, twice: a move of one that is under way may be logged behind the first time,
        and replay, which begins anywhere, must meet a drop behind it."""
        if not stale:
            settled(True)
            return

        for extent in stale:
            self._engine.admission.changed(volume, extent)

        def again(ok: bool) -> None:
            if ok:
                self._append_drops(volume, stale, version, settled)
            else:
                settled(False)

        self._append_drops(volume, stale, version, again)

    def _append_drops(self, volume: CacheVolume, stale: Sequence[Extent], version: Version, settled: Settled) -> None:
        """Log the drops a few at a time, because each may hide many blocks."""
        log, sweeps = self._engine.log, self._engine.sweeps
        some, rest = stale[:SWEEPS_MAX], stale[SWEEPS_MAX:]

        def applied(ok: bool) -> None:
            if ok and rest:
                sweeps.when_over(lambda _ok: self._append_drops(volume, rest, version, settled))
            else:
                settled(ok)

        for extent in some[:-1]:
            log.add_event(record.DROP, volume.key, extent.start, version, extent.count)
        log.add_event(record.DROP, volume.key, some[-1].start, version, some[-1].count, applied)
        log.kick()

    def _admit(
        self, volume: CacheVolume, view: StoreView, ok: bool, attached: Callable[[CacheVolume | None], None]
    ) -> None:
        """Nothing stale is mapped any more, and no record behind this point can bring it back: only now the store's
        version is ours. A checkpoint that said so earlier would make stale blocks valid after a crash."""
        del self._arriving[volume.key]
        volume.attached = volume.held = ok
        if not ok:
            attached(None)
            return
        volume.closing = False
        self._take_over(volume, view)
        self._engine.sources.settled()
        self._engine.sources.ask_map(volume)
        self.note(volume, lambda noted: attached(volume if noted else None))

    def note(self, volume: CacheVolume, settled: Settled) -> None:
        """Log the row of a volume, and what of it is upstream; `settled` hears when that is durable."""
        log = self._engine.log

        def written(ok: bool) -> None:
            if ok:
                # A commit that was answered meanwhile is not in this record.
                if version == volume.acknowledged and not volume.has_changes:
                    position = log.applied.position
                    volume.acknowledgement_logged(position, version=version, upstream_position=position)
                log.when_durable(log.applied.position, settled)
            else:
                settled(False)

        # The event goes behind the row, before which replay knows no such volume. Without it the version that was
        # adopted from the store would be forgotten: fills would count as dirty, and reopening would see a stranger.
        version = volume.acknowledged
        log.add_note(volume.note(), lambda _ok: None)
        log.add_event(record.ACKNOWLEDGED, volume.key, 0, version, 0, written)
        log.kick()

    def new_key(self) -> int:
        """Make room for one more volume, and return a key that none had in this life: fetches and records of a
        forgotten one may be under way, and after a crash replay knows it again.

        Raises:
            ForebayError: there is no room.
        """
        self.forget_released(room=1)
        if len(self._engine.volumes) >= VOLUMES_MAX:
            raise ForebayError(f"{VOLUMES_MAX} volumes are attached to this cache; detach one first")
        self._last_key = max(self._last_key, *self._engine.volumes, 0) + 1
        return self._last_key

    def forget_released(self, *, room: int = 0) -> None:
        """Forget released volumes, lowest keys first, until `room` more would fit the table.

        Forgetting is not logged: after a crash replay may know them again, so this runs at each start as well.
        """
        engine = self._engine
        for key, volume in sorted(engine.volumes.items()):
            if len(engine.volumes) + room <= VOLUMES_MAX:
                return
            used = volume.held or volume.has_changes or key in self._arriving
            if not used and engine.sources.may_be_forgotten(volume):
                self.forget(volume)

    def forget(self, volume: CacheVolume) -> None:
        """Forget a volume with all that is cached of it."""
        self.forget_blocks(volume)
        self._last_key = max(self._last_key, volume.key)
        self._engine.sample.forget(volume.key)
        del self._engine.volumes[volume.key]

    def forget_blocks(self, volume: CacheVolume) -> None:
        """Forget what is cached of a volume that nobody reads."""
        engine, key = self._engine, volume.key << LBA_BITS
        engine.sweeps.remove(key, 1 << LBA_BITS, below=(1 << 64) - 1)
        engine.loading.forget(key, 1 << LBA_BITS)
        engine.admission.ring.forget(key, 1 << LBA_BITS)


def wrong_store(name: str, home: StoreId, found: bytes) -> str:
    """Return the line that says that a volume lives in another store than the one found."""
    return (
        f"volume {name} of this cache lives in store {format_store(home)}, but the one it is connected to is store "
        f"{format_store(found)}: nothing of it is asked or sent there; start the cache with --store of its own store"
    )


def _is_own_history(volume: CacheVolume, view: StoreView) -> bool:
    """Tell whether a store that moved on did so only by what this device sent."""
    return view.epoch == volume.epoch and volume.acknowledged < view.version <= volume.version

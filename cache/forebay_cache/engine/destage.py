"""Destaging: cuts are closed, made durable here, built into frames, staged in parts and committed upstream.

A cut closes when it is old or large enough, when somebody drains, or when the write buffer is nearly full; the open
cut grows meanwhile, so writers never wait for a cut. At most one closed cut of a volume exists: unsent neighbours
are one cut.

Invariants:
    A closed cut holds the latest version of each block at its last sequence, and a sync has covered it before
    anything of it is sent.
    Overwritten versions of a closed cut are pinned: their place stays held until the commit is acknowledged.
    `_parts` <= PARTS_IN_FLIGHT_MAX.
Crash: what was acknowledged is known to the store, which is asked on reopening; all the rest is the open cut.
"""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import HOLES_KEPT_MAX, HOLES_PER_PART, PART_BLOCKS, PARTS_IN_FLIGHT_MAX
from forebay_cache.engine.ports import BuildRequest, BuiltPart, CutIdentity, U64Array, UpstreamRefusal
from forebay_cache.format import record
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Sequence, Version, make_version, sequence_of
from forebay_wire import messages

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume

Drained = Callable[[bool], None]

_FATAL: Final = (messages.FENCED, messages.OUT_OF_ORDER, messages.STORE_BEHIND, messages.NO_SUCH_VOLUME)


class Cut:
    """One closed cut. `pinned[i]` is the place of version `versions[i]` of block `lbas[i]` once it was overwritten."""

    __slots__ = (
        "first_version",
        "holes",
        "identity",
        "last_version",
        "lba_view",
        "lbas",
        "next_part",
        "pinned",
        "resting",
        "staged",
        "versions",
    )

    def __init__(self, identity: CutIdentity, lbas: U64Array, versions: U64Array, holes: list[Extent]) -> None:
        self.identity = identity
        self.lbas = lbas
        self.lba_view = lbas.data
        self.versions = versions
        self.last_version = make_version(identity.epoch, identity.last)
        self.first_version = int(versions.min()) if versions.size else self.last_version
        self.pinned: npt.NDArray[np.int64] = np.full(lbas.size, -1, np.int64)
        self.holes = holes
        self.next_part = 0
        self.resting = False  # nobody sends it: the volume failed, was refused or detached
        self.staged = 0

    @property
    def block_count(self) -> int:
        """Blocks with data."""
        return int(self.lbas.size)

    @property
    def part_count(self) -> int:
        """Messages it takes; at least one."""
        blocks = -(-self.block_count // PART_BLOCKS)
        return max(1, blocks, -(-len(self.holes) // HOLES_PER_PART))

    def index_of(self, lba: int) -> int:
        """Return where a block stands in the cut, or -1."""
        index = bisect_left(self.lba_view, lba)
        return index if index < len(self.lba_view) and self.lba_view[index] == lba else -1


class Destage:
    """Moves dirty data upstream, for all volumes."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._sending: deque[tuple[CacheVolume, Cut]] = deque()
        self._parts = 0
        self._drains: list[tuple[CacheVolume, Version, Drained]] = []
        self._attempts = 0
        self._now_ns = 0
        self._wall_ns = 0
        self.plain_bytes = 0
        self.stored_bytes = 0

    @property
    def dirty_blocks(self) -> int:
        """Blocks of all volumes that are not upstream (an upper bound)."""
        return sum(volume.dirty_blocks for volume in self._engine.volumes.values())

    def tick(self, now_ns: int, wall_ns: int) -> None:
        """Close the cuts whose time has come."""
        self._now_ns = now_ns
        self._wall_ns = wall_ns
        for volume in self._engine.volumes.values():
            if not volume.has_changes:
                volume.opened_ns = 0
                continue
            if volume.opened_ns == 0:
                volume.opened_ns = now_ns
            if self._is_due(volume):
                self._close(volume)

    def relieve(self) -> None:
        """The write buffer is nearly full: close what can be closed, the dirtiest volume first."""
        volumes = [v for v in self._engine.volumes.values() if v.has_changes and not v.cuts and self._may_send(v)]
        if volumes:
            self._close(max(volumes, key=lambda volume: len(volume.dirty) + len(volume.holes)))

    def drain(self, volume: "CacheVolume", drained: Drained) -> None:
        """Tell when all that is in the log now is upstream (True), or that the volume has failed (False)."""
        self._engine.log.kick()
        if volume.error or self._engine.failed:
            drained(False)
        elif volume.version <= volume.acknowledged:
            drained(True)
        else:
            self._drains.append((volume, volume.version, drained))
            if volume.has_changes and not volume.cuts and self._may_send(volume):
                self._close(volume)

    def stop_volume(self, volume: "CacheVolume", reason: str) -> None:
        """Give up on a volume: its dirty blocks stay, its I/O fails, whoever drains is told."""
        volume.error = volume.error or reason
        for cut in volume.cuts:
            self._rest(cut)
        self._settle_drains()
        self._engine.resume_writers()

    def fail(self) -> None:
        """The device failed: nothing is sent any more, whoever drains is told."""
        self._sending.clear()
        drains, self._drains = self._drains, []
        for _, _, drained in drains:
            drained(False)

    def granted(self, volume: "CacheVolume") -> None:
        """The store granted the volume, and `acknowledged` says where it stands: cuts that it has are over, one that
        nobody sends is begun anew."""
        for cut in list(volume.cuts):
            if cut.last_version <= volume.acknowledged:
                self._rest(cut)
                self._acknowledged(volume, cut, volume.acknowledged)
            elif cut.resting:
                self._begin_anew(volume, cut)

    def _rest(self, cut: Cut) -> None:
        """Send nothing more of a cut until the volume is granted again."""
        cut.resting = True
        self._sending = deque(item for item in self._sending if item[1] is not cut)

    def _begin_anew(self, volume: "CacheVolume", cut: Cut) -> None:
        identity = self._identify(volume)
        cut.identity = identity._replace(first=cut.identity.first, last=cut.identity.last)
        cut.next_part = cut.staged = 0
        cut.resting = False
        self._send(volume, cut)

    # --- closing ----------------------------------------------------------------------------------------------

    def _may_send(self, volume: "CacheVolume") -> bool:
        return volume.destaging and not volume.error and not self._engine.failed

    def _is_due(self, volume: "CacheVolume") -> bool:
        if volume.cuts or not self._may_send(volume):
            return False
        settings = self._engine.settings
        return (
            self._now_ns - volume.opened_ns >= settings.cut_age_ns_max
            or len(volume.dirty) >= settings.cut_blocks_max
            or len(volume.holes) >= HOLES_KEPT_MAX
            or self._is_draining(volume)
        )

    def _is_draining(self, volume: "CacheVolume") -> bool:
        return any(drain[0] is volume for drain in self._drains)

    def forget_trimmed(self, volume: "CacheVolume") -> None:
        """Take the blocks out of the list of dirty ones that were trimmed since."""
        lbas, _ = self._open_blocks(volume)
        volume.dirty = array("Q")
        volume.dirty.frombytes(lbas.tobytes())
        volume.trimmed = False

    def _open_blocks(self, volume: "CacheVolume") -> tuple[U64Array, U64Array]:
        """Return lba and version of each block that is newer than the closed cuts, sorted."""
        table = self._engine.map
        lbas = np.unique(np.frombuffer(volume.dirty, np.uint64)) if volume.dirty else np.empty(0, np.uint64)
        places = table.find_many(lbas | np.uint64(volume.key << LBA_BITS))
        there = places >= 0
        versions = table.version_array.take(places[there])
        newer = versions > np.uint64(volume.closed_version)
        return lbas[there][newer], versions[newer]

    def _close(self, volume: "CacheVolume") -> None:
        engine = self._engine
        lbas, versions = self._open_blocks(volume)
        holes = [Extent(h.start, h.end - h.start) for h in volume.holes.newer_than(volume.acknowledged)]
        cut = Cut(self._identify(volume), lbas, versions, holes)
        volume.dirty = array("Q")
        volume.trimmed = False
        volume.opened_ns = 0
        volume.cuts.append(cut)
        engine.log.kick()
        engine.log.when_durable(engine.log.applied.position, lambda ok: self._send(volume, cut) if ok else None)

    def _identify(self, volume: "CacheVolume") -> CutIdentity:
        self._attempts += 1
        attempt = (self._engine.life + self._attempts) & 0xFFFFFFFFFFFFFFFF
        first = Sequence(sequence_of(volume.acknowledged) + 1)
        return CutIdentity(volume.id, volume.epoch, attempt, first, sequence_of(volume.applied))

    # --- sending ----------------------------------------------------------------------------------------------

    def _send(self, volume: "CacheVolume", cut: Cut) -> None:
        if not self._may_send(volume):
            cut.resting = True
            return
        self._sending.append((volume, cut))
        self._pump()

    def _pump(self) -> None:
        while self._sending and self._parts < PARTS_IN_FLIGHT_MAX:
            volume, cut = self._sending.popleft()
            index = cut.next_part
            cut.next_part += 1
            if cut.next_part < cut.part_count:
                self._sending.append((volume, cut))
            self._parts += 1
            self._build(volume, cut, index)

    def _build(self, volume: "CacheVolume", cut: Cut, index: int) -> None:
        engine = self._engine
        part = slice(index * PART_BLOCKS, (index + 1) * PART_BLOCKS)
        lbas = cut.lbas[part]
        if not lbas.size:
            self._stage(volume, cut, index, BuiltPart((), (), 0, (), ()))
            return
        places = engine.map.find_many(lbas | np.uint64(volume.key << LBA_BITS))
        current = engine.map.version_array.take(np.maximum(places, 0)) == cut.versions[part]
        places = np.where((places >= 0) & current, places, cut.pinned[part])
        zones = engine.hold_zones(places)
        request = BuildRequest(
            lbas=lbas,
            offsets=places.astype(np.uint64) * np.uint64(BLOCK_SIZE) + np.uint64(engine.zones.zones_offset),
            checksums=engine.map.checksum_array.take(places),
        )
        attempt = cut.identity.attempt

        def built(answer: BuiltPart | None) -> None:
            engine.release_zones(zones)
            if attempt != cut.identity.attempt or cut.resting:
                self._part_over()
            elif answer is None or answer.corrupt:
                self._part_over()
                self.stop_volume(volume, _corruption(request, answer, volume))
            else:
                self._stage(volume, cut, index, answer)

        assert bool((places >= 0).all()), "a block of a closed cut lost its place"
        engine.builder.build(request, built)

    def _stage(self, volume: "CacheVolume", cut: Cut, index: int, part: BuiltPart) -> None:
        attempt = cut.identity.attempt
        trimmed = cut.holes[index * HOLES_PER_PART : (index + 1) * HOLES_PER_PART]
        holes = sorted((*trimmed, *part.holes))
        self.plain_bytes += part.plain_size
        self.stored_bytes += sum(len(frame) for frame in part.frames)

        def staged(refusal: UpstreamRefusal | None) -> None:
            self._part_over()
            if attempt != cut.identity.attempt or cut.resting:
                return
            if refusal is not None:
                self._refused(volume, cut, refusal)
                return
            cut.staged += 1
            if cut.staged == cut.part_count:
                self._commit(volume, cut)

        self._engine.upstream.stage(cut.identity, index, part.frames, holes, staged)

    def _part_over(self) -> None:
        self._parts -= 1
        self._pump()

    def _commit(self, volume: "CacheVolume", cut: Cut) -> None:
        attempt = cut.identity.attempt

        def committed(answer: Version | UpstreamRefusal) -> None:
            if attempt != cut.identity.attempt or cut.resting:
                return
            if isinstance(answer, UpstreamRefusal):
                self._refused(volume, cut, answer)
            else:
                self._acknowledged(volume, cut, answer)

        self._engine.upstream.commit(cut.identity, cut.part_count, self._wall_ns, committed)

    def _refused(self, volume: "CacheVolume", cut: Cut, refusal: UpstreamRefusal) -> None:
        if refusal.code in _FATAL:
            self.stop_volume(volume, f"the store refuses this volume's changes: {refusal.text}")
            return
        volume.warning = f"destaging is being tried again: {refusal.text}"
        self._rest(cut)

        def again() -> None:
            if cut.resting and cut in volume.cuts and self._may_send(volume):
                self._begin_anew(volume, cut)

        self._engine.after(self._engine.settings.retry_ns, again)

    def _acknowledged(self, volume: "CacheVolume", cut: Cut, version: Version) -> None:
        engine = self._engine
        volume.warning = ""
        volume.acknowledged = max(volume.acknowledged, version)
        volume.cuts.remove(cut)
        engine.map.clear_places(cut.pinned[cut.pinned >= 0])
        engine.log.add_event(record.ACKNOWLEDGED, volume.key, 0, volume.acknowledged, 0)
        engine.log.kick()
        if len(volume.holes) >= HOLES_KEPT_MAX // 2:
            volume.holes.forget_up_to(volume.acknowledged)
        self._settle_drains()
        if self._is_draining(volume) and volume.has_changes and self._may_send(volume):
            self._close(volume)
        engine.resume_writers()

    def _settle_drains(self) -> None:
        still = []
        for drain in self._drains:
            volume, version, drained = drain
            if volume.acknowledged >= version:
                drained(True)
            elif volume.error:
                drained(False)
            else:
                still.append(drain)
        self._drains = still


def _corruption(request: BuildRequest, answer: BuiltPart | None, volume: "CacheVolume") -> str:
    if answer is None:
        return f"volume {volume.name}: the device could not be read while destaging"
    lba = answer.corrupt[0]
    index = bisect_left(request.lbas.data, lba)
    return (
        f"volume {volume.name}: corrupt block {lba} that is not in the store yet, at offset "
        f"{int(request.offsets[index])} of the cache device: expected {int(request.checksums[index]):#x}, "
        f"found {answer.found[0]:#x}"
    )

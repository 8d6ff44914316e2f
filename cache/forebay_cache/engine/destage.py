"""Destaging: cuts are closed, made durable here, built into frames, staged in parts and committed upstream.

A cut closes when it is old or large enough, when somebody drains, or when the write buffer is nearly full; the open
cut grows meanwhile, so writers never wait for a cut. At most one closed cut of a volume exists: unsent neighbours
are one cut.

A volume without a limit is sent as fast as the store takes it. With one (its own, or that of all together) what is
built waits until `pace` finds no bucket in debt: only there the time is known, so only there it is sent and charged.

Invariants:
    A closed cut holds the latest version of each block at its last sequence, and a sync has covered it before
    anything of it is sent.
    Of a volume's closed cuts only the first one is sent; the others rest.
    Overwritten versions of a closed cut are pinned: their place stays held until the commit is acknowledged.
    No step that closes a cut looks at its blocks: one that ends with a snapshot is closed while guests write on.
    `_parts` counts what is being built or staged of cuts that nothing limits, and is at most PARTS_IN_FLIGHT_MAX
    whenever more is begun; `_slices` those being staged of the others, at most SLICES_IN_FLIGHT_MAX.
    A cut that rests holds none of either: what of it is still under way no longer counts and is not listened to.
Crash: what was acknowledged is known to the store, which is asked on reopening; the rest is closed cuts up to the last
snapshot or resize that is not upstream, and the open cut.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.changes import Tracked
from forebay_cache.engine.cuts import Cut, Slice, blocks_of, slices, whole_slice
from forebay_cache.engine.holes import HoleMap
from forebay_cache.engine.limits import (
    HOLES_KEPT_MAX,
    HOLES_PER_PART,
    PART_BLOCKS,
    PARTS_IN_FLIGHT_MAX,
    READY_BLOCKS_MAX,
    SLICES_IN_FLIGHT_MAX,
)
from forebay_cache.engine.ports import BuildRequest, BuiltPart, CutIdentity, U64Array, UpstreamRefusal
from forebay_cache.engine.rates import NEVER, NS, Shaper, urgency
from forebay_cache.format import record
from forebay_cache.format.cut_end import CutEnd
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Sequence, Version, VolumeId, sequence_of
from forebay_wire import messages
from forebay_wire.limits import PARTS_PER_CUT_MAX

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume

Drained = Callable[[bool], None]

_FATAL: Final = (messages.FENCED, messages.OUT_OF_ORDER, messages.STORE_BEHIND, messages.NO_SUCH_VOLUME)


class Chunk(NamedTuple):
    """Blocks that are built together, with the places where they lie, and holes that go with them."""

    lbas: U64Array
    places: npt.NDArray[np.int64]
    holes: list[Extent]


class Destage:
    """Moves dirty data upstream, for all volumes."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self.total = Shaper()  # of all volumes together
        self._sending: deque[tuple[CacheVolume, Cut]] = deque()  # something is to be built of each
        self._ready: deque[tuple[CacheVolume, Cut]] = deque()  # limited ones with slices that wait for `pace`
        self._parts = 0
        self._slices = 0
        self._limited_blocks = 0  # of limited cuts, being built or ready
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
        self._press()
        for volume in self._engine.volumes.values():
            if not volume.has_changes:
                volume.opened_ns = volume.dirty_since_ns = 0
                continue
            volume.dirty_since_ns = volume.dirty_since_ns or wall_ns
            if volume.opened_ns == 0:
                volume.opened_ns = now_ns
            if self._is_due(volume):
                self._close(volume)

    def relieve(self) -> None:
        """The write buffer is nearly full: close what can be closed, the dirtiest volume first."""
        volumes = [v for v in self._engine.volumes.values() if v.has_changes and not v.cuts and self._may_send(v)]
        if volumes:
            self._close(max(volumes, key=lambda volume: len(volume.dirty) + len(volume.holes)))

    def drain(self, volume: "CacheVolume", drained: Drained, *, through: Version | None = None) -> None:
        """Tell when all that is in the log now, or up to the version `through`, is upstream, and the device knows it
        (True), or that the volume has failed (False)."""
        self._engine.log.kick()
        version = volume.version if through is None else through
        if volume.error or self._engine.failed:
            drained(False)
        elif version <= volume.noted:
            drained(True)
        else:
            self._drains.append((volume, version, drained))
            if volume.has_changes and not volume.cuts and self._may_send(volume):
                self._close(volume)

    def until_commit_ns(self, volume: "CacheVolume") -> int:
        """Estimate when the cut of a limited volume that is on its way is upstream; 0 if there is no saying."""
        if not (volume.cuts and self._is_limited(volume) and self._may_send(volume)):
            return 0
        cut = volume.cuts[0]
        stored = self.stored_bytes / self.plain_bytes if self.plain_bytes else 1.0
        left = (cut.block_count - cut.next_block) * BLOCK_SIZE * stored + sum(piece.size for piece in cut.ready)
        return int(left * NS / min(volume.shaper.allowed, self.total.allowed))

    def stop_volume(self, volume: "CacheVolume", reason: str) -> None:
        """Give up on a volume: its dirty blocks stay, its I/O fails, whoever drains is told."""
        if not volume.error:
            self._engine.report(f"volume {volume.name} is stopped: {reason}")
        volume.error = volume.error or reason
        for cut in volume.cuts:
            self._rest(cut)
        self._settle_drains()
        self._pump()
        self._engine.resume_writers()

    def fail(self) -> None:
        """The device failed: nothing is sent any more, whoever drains is told."""
        self._sending.clear()
        self._ready.clear()
        drains, self._drains = self._drains, []
        for _, _, drained in drains:
            drained(False)

    def upstream_position(self) -> int:
        """Return the log position below which every change is upstream, and would be known to be after a power cut."""
        durable = self._engine.log.durable
        return min((v.upstream_position(durable) for v in self._engine.volumes.values()), default=durable)

    def granted(self, volume: "CacheVolume", version: Version) -> None:
        """The store granted the volume, and stands at `version`: cuts that it has are over, one that nobody sends is
        begun anew."""
        ahead = version > volume.acknowledged
        volume.adopt(version)
        for cut in list(volume.cuts):
            if cut.last_version <= volume.acknowledged:
                self._rest(cut)
                self._end(volume, cut)
        self._wake(volume)
        if ahead:  # what brought it there may have been a cut of an earlier life: then nothing else is told of it
            self.prune_dirty(volume)
            self._engine.count_dirty_blocks()
            self._note_acknowledged(volume, upstream_position=0)

    def _rest(self, cut: Cut) -> None:
        """Send nothing more of a cut until the volume is granted again; what is under way keeps nobody waiting."""
        cut.resting = True
        self._sending = deque(item for item in self._sending if item[1] is not cut)
        self._ready = deque(item for item in self._ready if item[1] is not cut)
        self._release(cut)

    def _wake(self, volume: "CacheVolume") -> None:
        """Send the first cut from its start if it rests and may go."""
        if volume.cuts:
            cut = volume.cuts[0]
            if cut.resting and cut.durable and self._may_send(volume):
                cut.begin(self._identify(volume, cut), acknowledged=volume.acknowledged)
                self._send(volume, cut)

    def suspend(self, volume: "CacheVolume") -> None:
        """The store does not let us have the volume for now: nothing of it is under way any more until `granted`."""
        volume.destaging = False
        for cut in volume.cuts:
            self._rest(cut)
        self._pump()

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

    def prune_dirty(self, volume: "CacheVolume") -> None:
        """Take the blocks out of the list of dirty ones that were trimmed since, or are upstream."""
        table = self._engine.map
        lbas = volume.dirty.all()
        places = table.find_many(lbas | np.uint64(volume.key << LBA_BITS))
        versions = table.version_array.take(np.maximum(places, 0))
        volume.dirty.replace(lbas[(places >= 0) & (versions > np.uint64(volume.closed_version))])
        volume.trimmed = False

    def close_at(self, volume: "CacheVolume", end: CutEnd) -> None:
        """A snapshot or resize was just applied: close the cut that ends with it."""
        self._close(volume, end)

    def _close(self, volume: "CacheVolume", end: CutEnd | None = None) -> None:
        log = self._engine.log
        cut = Cut(
            volume.dirty.take(),
            volume.open_holes,
            floor=volume.closed_version,
            last_version=volume.applied,
            end=end,
            opened_ns=volume.opened_ns or self._now_ns,
            closed_wall_ns=self._wall_ns,
            closed_position=log.applied.position,
        )
        volume.open_holes = HoleMap()
        volume.trimmed = False
        volume.opened_ns = 0
        volume.cuts.append(cut)
        log.kick()
        log.when_durable(log.applied.position, lambda ok: self._durable(volume, cut) if ok else None)

    def _durable(self, volume: "CacheVolume", cut: Cut) -> None:
        """A sync has covered a cut; the store may have taken its volume away and granted it again meanwhile."""
        cut.durable = True
        self._wake(volume)

    def take_over(self, volume: "CacheVolume", cuts: list[Cut]) -> None:
        """These are the closed cuts that a start has found; what it found is durable."""
        for cut in cuts:
            cut.durable = True
        volume.cuts = cuts

    def _identify(self, volume: "CacheVolume", cut: Cut) -> CutIdentity:
        self._attempts += 1
        attempt = (self._engine.life + self._attempts) & 0xFFFFFFFFFFFFFFFF
        first = Sequence(sequence_of(volume.acknowledged) + 1)
        return CutIdentity(volume.id, volume.epoch, attempt, first, sequence_of(cut.last_version))

    # --- building ---------------------------------------------------------------------------------------------

    def _send(self, volume: "CacheVolume", cut: Cut) -> None:
        # Who was away does not catch up on those who were not.
        least = min((other.destaged_bytes for other, _ in self._ready), default=0)
        volume.destaged_bytes = max(volume.destaged_bytes, least)
        self._sending.append((volume, cut))
        self._pump()

    def _is_limited(self, volume: "CacheVolume") -> bool:
        return volume.shaper.limited or self.total.limited

    def _pump(self) -> None:
        """Build of each cut in turn, as far as there is room; limited and other ones keep no one of the other kind
        waiting. A limited cut comes back here when little of it is left to send."""
        waiting: deque[tuple[CacheVolume, Cut]] = deque()
        while self._sending:
            volume, cut = self._sending.popleft()
            limited = self._is_limited(volume)
            if self._limited_blocks >= READY_BLOCKS_MAX if limited else self._parts >= PARTS_IN_FLIGHT_MAX:
                waiting.append((volume, cut))
            elif not self._build(volume, cut, limited=limited):
                waiting.append((volume, cut))  # what was looked at is trimmed: others have their turn
                self._engine.soon(self._pump)
            elif cut.has_unbuilt and not limited:
                self._sending.append((volume, cut))
        self._sending = waiting

    def _build(self, volume: "CacheVolume", cut: Cut, *, limited: bool) -> bool:
        """Build the next chunk; False: there is nothing in it, but there may be in a later one."""
        size_max = self._slice_size_max(volume, cut)
        chunk = self._next_chunk(volume, cut, blocks_of(size_max, PART_BLOCKS) if limited else PART_BLOCKS)
        if not (chunk.lbas.size or chunk.holes):
            if cut.has_unbuilt:
                return False
            if cut.is_staged:  # there is nothing behind what is staged, or in the whole cut but its end
                self._commit(volume, cut)
            if cut.sent or cut.building or cut.ready or cut.end:
                return True
        count = int(chunk.lbas.size)
        if limited:
            self._limited_blocks += count
            cut.limited_blocks += count
        else:
            self._parts += 1
            cut.parts += 1

        def made(part: BuiltPart) -> None:
            found = sorted((*chunk.holes, *part.holes))
            if limited:
                pieces = list(slices(part.frames, found, plain_size=part.plain_size, size_max=size_max))
                pieces[-1] = pieces[-1]._replace(chunk_blocks=count)
                self._hold(volume, cut, pieces)
            else:
                self._stage(volume, cut, whole_slice(part.frames, found, part.plain_size), limited=False)

        if count:
            self._read(volume, cut, chunk, made)
        else:
            made(BuiltPart((), (), 0, (), ()))
        return True

    def _read(self, volume: "CacheVolume", cut: Cut, chunk: Chunk, made: Callable[[BuiltPart], None]) -> None:
        """Have the frames of a chunk's blocks made; a bad block stops the volume."""
        engine, attempt = self._engine, cut.attempt
        zones = engine.hold_zones(chunk.places)
        request = BuildRequest(
            lbas=chunk.lbas,
            offsets=chunk.places.astype(np.uint64) * np.uint64(BLOCK_SIZE) + np.uint64(engine.zones.zones_offset),
            checksums=engine.map.checksum_array.take(chunk.places),
        )
        cut.building += 1

        def built(answer: BuiltPart | None) -> None:
            engine.release_zones(zones)
            if attempt != cut.attempt or cut.resting:
                return
            cut.building -= 1
            if answer is None or answer.corrupt:
                self.stop_volume(volume, _corruption(request, answer, volume))
            else:
                made(answer)

        engine.builder.build(request, built)

    def _next_chunk(self, volume: "CacheVolume", cut: Cut, block_count: int) -> Chunk:
        """Take the next blocks, with the places where their versions in the cut lie now, and the next holes."""
        table = self._engine.map
        lbas = cut.next_lbas(block_count)
        keys = lbas | np.uint64(volume.key << LBA_BITS)
        self._engine.sweeps.settle_keys(keys)
        places = table.find_many(keys)
        versions = table.version_array.take(np.maximum(places, 0))
        current = (places >= 0) & (versions > np.uint64(cut.floor)) & (versions <= np.uint64(cut.last_version))
        older = np.flatnonzero(~current)
        if older.size:
            places[older] = table.find_held(keys[older], above=cut.floor, to=cut.last_version)
        found = places >= 0
        return Chunk(lbas[found], places[found], cut.next_holes(HOLES_PER_PART))

    def _slice_size_max(self, volume: "CacheVolume", cut: Cut) -> int:
        """Return the bytes of a slice that keeps to the limits, or more if the cut would have too many of them."""
        bound = min(volume.shaper.slice_size_max, self.total.slice_size_max)
        return max(bound, cut.size_left_max // max(1, PARTS_PER_CUT_MAX // 2 - cut.sent))

    # --- sending ----------------------------------------------------------------------------------------------

    def _hold(self, volume: "CacheVolume", cut: Cut, pieces: list[Slice]) -> None:
        """Keep what is built until it may go."""
        if not cut.ready:
            self._ready.append((volume, cut))
        cut.ready.extend(pieces)
        self._engine.alarm(0)

    def pace(self, now_ns: int) -> int:
        """Send of limited volumes what may go at this moment of the monotonic clock, a slice of each in turn.

        Returns when there is more to send, NEVER if that is not a matter of time.
        """
        self.total.refill(now_ns)
        going = True
        next_ns = NEVER
        while going:
            going = False
            next_ns = NEVER
            for volume, cut in self._in_turn():
                if self._slices >= SLICES_IN_FLIGHT_MAX or cut.resting:
                    continue
                volume.shaper.refill(now_ns)
                due_ns = max(self.total.due_ns(), volume.shaper.due_ns())
                if not self._may_send(volume):
                    self._rest(cut)
                elif due_ns <= now_ns:
                    self._send_slice(volume, cut)
                    going = True
                else:
                    next_ns = min(next_ns, due_ns)
        self._pump()
        return next_ns

    def _in_turn(self) -> list[tuple["CacheVolume", Cut]]:
        """Return who has slices ready; who shares a limit with others and had the least of it comes first."""
        ready = list(self._ready)
        if self.total.limited:
            ready.sort(key=lambda item: item[0].destaged_bytes)
        return ready

    def _send_slice(self, volume: "CacheVolume", cut: Cut) -> None:
        piece = cut.ready.popleft()
        cut.limited_blocks -= piece.chunk_blocks
        self._limited_blocks -= piece.chunk_blocks
        if not cut.ready:
            self._ready.remove((volume, cut))
        if len(cut.ready) <= 1 and cut.has_unbuilt and not cut.building and (volume, cut) not in self._sending:
            self._sending.append((volume, cut))
        self._stage(volume, cut, piece, limited=True)

    def _stage(self, volume: "CacheVolume", cut: Cut, piece: Slice, *, limited: bool) -> None:
        assert cut.identity is not None
        attempt = cut.attempt
        index = cut.sent
        cut.sent += 1
        self.plain_bytes += piece.plain_size
        self.stored_bytes += sum(len(frame) for frame in piece.frames)
        volume.destaged_bytes += piece.size
        volume.shaper.take(piece.size)
        self.total.take(piece.size)
        if limited:
            self._slices += 1
            cut.slices += 1

        def staged(refusal: UpstreamRefusal | None) -> None:
            if attempt != cut.attempt or cut.resting:
                return
            if limited:
                self._slices -= 1
                cut.slices -= 1
            else:
                self._parts -= 1
                cut.parts -= 1
            if refusal is not None:
                self._refused(volume, cut, refusal)
            else:
                cut.staged += 1
                if cut.is_staged:
                    self._commit(volume, cut)
            self._pump()
            if self._ready:
                self._engine.alarm(0)

        self._engine.upstream.stage(cut.identity, index, piece.frames, piece.holes, staged)

    def _release(self, cut: Cut) -> None:
        """What of a cut is under way does not count any more."""
        self._parts -= cut.parts
        self._slices -= cut.slices
        self._limited_blocks -= cut.limited_blocks
        cut.parts = cut.slices = cut.limited_blocks = 0
        cut.ready.clear()

    # --- limits -----------------------------------------------------------------------------------------------

    def _press(self) -> None:
        """Let the allowed rates follow the fill of the buffer and the age of what is in it; drains go at the peak."""
        volumes = self._engine.volumes.values()
        if not (self.total.limited or any(volume.shaper.limited for volume in volumes)):
            return
        fill = self._engine.buffer_fill
        draining = {drain[0].key for drain in self._drains}
        oldest_ns = self._now_ns
        for volume in volumes:
            if volume.has_changes:
                opened_ns = (volume.cuts[0].opened_ns if volume.cuts else volume.opened_ns) or self._now_ns
                oldest_ns = min(oldest_ns, opened_ns)
                pressure = 1.0 if volume.key in draining else urgency(fill, self._now_ns - opened_ns)
                volume.shaper.press(self._now_ns, pressure)
        self.total.press(self._now_ns, 1.0 if draining else urgency(fill, self._now_ns - oldest_ns))

    # --- committing -------------------------------------------------------------------------------------------

    def _commit(self, volume: "CacheVolume", cut: Cut) -> None:
        assert cut.identity is not None
        attempt = cut.attempt

        def committed(refusal: UpstreamRefusal | None) -> None:
            if attempt != cut.attempt or cut.resting:
                return
            if refusal is not None:
                self._refused(volume, cut, refusal)
            else:
                self._acknowledged(volume, cut, cut.last_version)

        self._engine.upstream.commit(cut.identity, cut.sent, self._wall_ns, cut.end, committed)

    def _refused(self, volume: "CacheVolume", cut: Cut, refusal: UpstreamRefusal) -> None:
        if refusal.code in _FATAL:
            self.stop_volume(volume, f"the store refuses this volume's changes: {refusal.text}")
            return
        volume.warning = f"destaging is being tried again: {refusal.text}"
        self._rest(cut)

        self._engine.after(self._engine.settings.retry_ns, lambda: self._wake(volume))

    def _acknowledged(self, volume: "CacheVolume", cut: Cut, version: Version) -> None:
        volume.warning = ""
        volume.acknowledged = max(volume.acknowledged, version)
        self._end(volume, cut)
        self._note_acknowledged(volume, upstream_position=cut.closed_position)
        self._wake(volume)

    def _end(self, volume: "CacheVolume", cut: Cut) -> None:
        """Forget a cut that is upstream: what it pinned is dead by its version, and goes with its zone."""
        volume.cuts.remove(cut)
        volume.dirty_since_ns = cut.closed_wall_ns  # what is left came behind the cut
        if cut.end is not None:
            volume.ends.remove(cut.end)
            if cut.end.name:
                volume.known_snapshots[cut.end.name] = Tracked(VolumeId(cut.end.snapshot), Version(cut.end.version))

    def _note_acknowledged(self, volume: "CacheVolume", *, upstream_position: int) -> None:
        """Tell the device how far the volume is upstream; whoever waits for room may have it now."""
        engine, version = self._engine, volume.acknowledged

        def logged(ok: bool) -> None:
            if ok:
                position = engine.log.applied.position
                volume.acknowledgement_logged(position, version=version, upstream_position=upstream_position)
                self._noted(volume, version)

        engine.log.add_event(record.ACKNOWLEDGED, volume.key, 0, version, 0, logged)
        engine.log.kick()
        volume.forget_holes()
        engine.resume_writers()

    def _noted(self, volume: "CacheVolume", version: Version) -> None:
        """Who drains is told now, when the device knows as well: after a kill right behind it the blocks are clean."""
        volume.noted = max(volume.noted, version)
        self._settle_drains()
        if self._is_draining(volume) and volume.has_changes and not volume.cuts and self._may_send(volume):
            self._close(volume)

    def _settle_drains(self) -> None:
        still = []
        for drain in self._drains:
            volume, version, drained = drain
            if volume.noted >= version:
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

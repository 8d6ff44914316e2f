"""The engine of the cache daemon: one device, all its volumes, no I/O of its own.

It is called by fronts (through `CacheVolume`), by the shell's completions, and by `tick`; it calls the ports. All on
one thread, none of it waits.

Invariants:
    After `failed` is set nothing is written any more and every request is answered with an error.
    `dirty_blocks` is never less than the blocks that are newer than upstream.
Crash: `recovery.recover` makes what this class starts from.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.admission import Admission
from forebay_cache.engine.allocations import Allocations
from forebay_cache.engine.apply import Apply
from forebay_cache.engine.attaching import Attaching
from forebay_cache.engine.changes import Changes
from forebay_cache.engine.checkpoints import Checkpoints
from forebay_cache.engine.cut_ends import CutEnds
from forebay_cache.engine.destage import Destage
from forebay_cache.engine.fetches import Fetches
from forebay_cache.engine.limits import (
    HOLES_KEPT_MAX,
    HOLES_PER_TICK_MAX,
    OPEN_CUT_BLOCKS_MAX,
    RANGE_LOOKUPS_MAX,
    RECOUNT_NS,
    RETIRED_ZONES_RATIO,
    ZONES_RESERVED,
)
from forebay_cache.engine.loading import Loading
from forebay_cache.engine.log import Log, Settled
from forebay_cache.engine.policy import FrequencyPolicy, PolicySettings
from forebay_cache.engine.ports import Builder, Device, Upstream, UpstreamRefusal
from forebay_cache.engine.rates import (
    NEVER,
    NO_LIMIT,
    NOT_SET,
    SLOWING_FILL,
    STOPPING_FILL,
    Limit,
    changed_limit,
    is_settable,
)
from forebay_cache.engine.read_ahead import ReadAhead
from forebay_cache.engine.reads import Reads
from forebay_cache.engine.reclaim import Reclaim
from forebay_cache.engine.recorder import Recorder
from forebay_cache.engine.recovery import Recovered, device_tag
from forebay_cache.engine.restoring import restore
from forebay_cache.engine.sample import AccessSample
from forebay_cache.engine.slowing import Slowing
from forebay_cache.engine.sources import Sources
from forebay_cache.engine.streams import BYPASS_BLOCKS, READ_AHEAD_BLOCKS
from forebay_cache.engine.sweeping import Sweeps
from forebay_cache.engine.use_counts import UseCounts
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.engine.writes import Writes
from forebay_cache.format import record
from forebay_cache.format.checkpoint import CHUNK_PLACES, hole_count_max
from forebay_core.errors import ForebayError
from forebay_core.units import LBA_BITS, RATE_MAX, RATE_MIN, Version, VolumeId, format_size
from forebay_wire import messages


class EngineSettings(NamedTuple):
    """What an admin may set. `fill_blocks` divides 240; times are nanoseconds."""

    cut_blocks_max: int = 65536
    cut_age_ns_max: int = 10_000_000_000
    dirty_share_max: float = 0.6
    fill_blocks: int = 4
    read_ahead_blocks: int = READ_AHEAD_BLOCKS  # of one volume; 0: none
    bypass_blocks: int = BYPASS_BLOCKS  # misses of a stream from which on it passes by; 0: never
    retry_ns: int = 2_000_000_000
    limit: Limit = NO_LIMIT  # of destaging, for volumes without one of their own
    total_limit: Limit = NO_LIMIT  # of all volumes together, unless the device holds one
    checkpoint_chunk_places: int = CHUNK_PLACES
    record_blocks: int = record.RECORD_ENTRIES_MAX  # data blocks of one record of the log; fewer only in tests
    sweep_step_blocks: int = RANGE_LOOKUPS_MAX  # of a trim up to which they leave the map at once
    policy: PolicySettings = PolicySettings()
    volume_floor: float = 0.5  # what each volume in use may keep, as part of an equal share


class _Timer(NamedTuple):
    due_ns: int
    act: Callable[[], None]


class CacheEngine:
    """State shared by the parts, and what the shell calls. `life` is random for each start of the daemon."""

    def __init__(
        self,
        recovered: Recovered,
        *,
        device: Device,
        upstream: Upstream,
        builder: Builder,
        settings: EngineSettings,
        life: int,
        report: Callable[[str], None],
        alarm: Callable[[int], None] = lambda _due_ns: None,
    ) -> None:
        self.superblock = recovered.superblock
        self.map, self.zones = recovered.map, recovered.zones
        self.zones_offset = recovered.zones.zones_offset
        self.device, self.upstream, self.builder = device, upstream, builder
        self.settings, self.life = settings, life
        self.report, self.alarm = report, alarm
        self.failed = ""
        self.policy = FrequencyPolicy(recovered.map.key_array, settings=settings.policy, seed=life)
        self.sample, self.recorder = AccessSample(), Recorder()
        self.volumes: dict[int, CacheVolume] = {}
        self.acknowledged_versions: npt.NDArray[np.uint64] = np.zeros(64, np.uint64)
        self.noted_versions: npt.NDArray[np.uint64] = np.zeros(64, np.uint64)  # what the log says of them
        self.dirty_blocks = 0
        self.retired_zones: set[int] = set()
        self.log = Log(
            device,
            self.zones,
            device_tag=device_tag(self.superblock),
            life=life,
            apply=Apply(self),
            on_failure=self.fail,
            promised_zones=lambda: self.reclaim.moving.promised_zones,
            record_blocks=settings.record_blocks,
        )
        self.sweeps = Sweeps(self)
        self.reads, self.writes = Reads(self), Writes(self)
        self.admission, self.read_ahead = Admission(self), ReadAhead(self)
        self.fetches = Fetches(upstream, settings.fill_blocks, self.admission, later=partial(self.after, 0))
        self.allocations, self.changes = Allocations(self), Changes(self)
        self.destage = Destage(self)
        self.slowing = Slowing(self)
        self.cut_ends = CutEnds(self)
        self.reclaim = Reclaim(self)
        self.checkpoints = Checkpoints(self, recovered.kept)
        self.attaching = Attaching(self)
        self.sources = Sources(self)
        self.own_limit = Limit(recovered.limit_average, recovered.limit_peak)  # of all volumes together
        self.loading = Loading(self, recovered.unloaded)
        self.use_counts = UseCounts(self, recovered.counts)
        self._timers: list[_Timer] = []
        self._soon: list[Callable[[], None]] = []
        self._now_ns = self._recount_at_ns = 0
        self.hole_count = 0  # of all volumes and of trims under way: never less, but for what was learned since a tick
        self._hole_count_max = hole_count_max(self.map.place_count)  # of a checkpoint
        self._dirty_max = int(self.map.place_count * settings.dirty_share_max)
        self._protected: list[int] = []  # keys of the volumes that the policy keeps a floor for
        restore(self, recovered)
        self._start_point = recovered.point

    # --- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write. The device was synced since it was recovered."""
        self.log.begin(self._start_point)
        self.reclaim.prepare()
        self.checkpoints.want()
        self.loading.start()
        if self.loading.active:
            self.loading.when_over(self._known_all)
        self.use_counts.start(self._known_all)

    def tick(self, now_ns: int, wall_ns: int) -> None:
        """Let time pass: called about every 50 ms with a monotonic and the wall clock."""
        self.observe(now_ns - self._now_ns if self._now_ns else 0)
        self._now_ns = self.recorder.now_ns = now_ns
        due = [timer for timer in self._timers if timer.due_ns <= now_ns]
        self._timers = [timer for timer in self._timers if timer.due_ns > now_ns]
        for timer in due:
            timer.act()
        self._recount_dirty_blocks()
        self.count_holes()
        self.destage.tick(now_ns, wall_ns)
        self.slowing.tick(now_ns)
        self._protect()
        self.admission.tick(now_ns)
        self.pace(now_ns)
        self.checkpoints.step()
        self.reclaim.kick()
        self.log.kick()
        self.log.note_durable()
        self.resume_writers()

    def pace(self, now_ns: int) -> None:
        """Do what depends on time more finely than ticks do: called when `alarm` said so, with the monotonic clock.

        `alarm(due_ns)` asks for the next call, at once if that time is past; it replaces what was asked for before.
        """
        self._take_turns()
        if self.failed:
            return
        due_ns = NEVER if self._soon else min(self.destage.pace(now_ns), self.slowing.pace(now_ns))
        if self._soon:  # also what these asked for: their alarm would be replaced
            due_ns = 0
        if due_ns < NEVER:
            self.alarm(due_ns)

    def soon(self, act: Callable[[], None]) -> None:
        """Act in a turn of its own, after others had theirs."""
        self._soon.append(act)
        self.alarm(0)

    def _take_turns(self) -> None:
        turns, self._soon = self._soon, []
        for act in turns:
            act()

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        """Act at the first tick after so many nanoseconds."""
        self._timers.append(_Timer(self._now_ns + delay_ns, act))

    def observe(self, span_ns: int = 0) -> None:
        """Take over what the policy sampled since the last time, which was so long ago."""
        keys = self.policy.take_sample(self.sample.limit)
        self.sample.add(keys, accesses=self.policy.figures()["accesses"], span_ns=span_ns)

    def stop(self, settled: Settled) -> None:
        """Make everything acknowledged durable and leave a fresh checkpoint; fronts are closed already."""
        self.admission.decide_all()
        self.log.kick()
        self.checkpoints.want(settled)

    def fail(self, reason: str) -> None:
        """The device can't be trusted any more: stop, and answer everybody who waits."""
        if not self.failed:
            self.failed = reason
            self.report(f"the cache device failed and is not used any more: {reason}; restart to recover")
            self.log.fail()
            self.writes.fail()
            self.cut_ends.fail()
            self.destage.fail()
            self.loading.fail()
            self.sweeps.fail()
            self._take_turns()
            self.admission.ring.clear()
            self.checkpoints.fail()

    # --- volumes ----------------------------------------------------------------------------------------------

    def attached(self) -> list[CacheVolume]:
        """Return the volumes that fronts may serve."""
        return [volume for volume in self.volumes.values() if volume.attached]

    def by_id(self, volume_id: VolumeId) -> CacheVolume | None:
        """Return a volume that the device knows, attached or not."""
        return next((volume for volume in self.volumes.values() if volume.id == volume_id), None)

    def held(self) -> list[CacheVolume]:
        """Return the volumes whose epoch is ours: the attached ones and those left dirty."""
        return [volume for volume in self.volumes.values() if volume.held]

    def set_acknowledged(self, volume_key: int, version: Version) -> None:
        """Keep the array of acknowledged versions, by volume key, in step."""
        self.acknowledged_versions = _with(self.acknowledged_versions, volume_key, version)

    def set_noted(self, volume_key: int, version: Version) -> None:
        """Keep the array of noted versions, by volume key, in step."""
        self.noted_versions = _with(self.noted_versions, volume_key, version)

    def cached_blocks(self) -> dict[int, int]:
        """Return mapped blocks by volume key; looks at every place, for status only."""
        keys = self.map.key_array
        counts = np.bincount((keys[keys != 0] >> np.uint64(LBA_BITS)).astype(np.int64))
        return {key: int(counts[key]) for key in self.volumes if key < counts.size}

    # --- limits -----------------------------------------------------------------------------------------------

    def limit_of(self, volume: CacheVolume | None) -> Limit:
        """Return the limit in effect of a volume, or of all together."""
        own = self.own_limit if volume is None else volume.own_limit
        default = self.settings.total_limit if volume is None else self.settings.limit
        return own if own != NOT_SET else default

    def set_limit(
        self, volume: CacheVolume | None, settled: Settled, *, average: int = 0, peak: int = 0, reset: bool = False
    ) -> None:
        """Limit a volume, or all together; `settled` hears when that is durable. 0 leaves a value as it is.

        Raises:
            ForebayError: the values are out of bounds, or the average is above the peak.
        """
        effective = self.limit_of(volume)
        limit = NOT_SET if reset else changed_limit(effective, average=average, peak=peak)
        if not (reset or is_settable(limit)):
            raise ForebayError(
                f"average {format_size(limit.average)}/s and peak {format_size(limit.peak)}/s are no limit: allowed is "
                f"{format_size(RATE_MIN)}/s <= average <= peak <= {format_size(RATE_MAX)}/s"
            )
        log = self.log

        def written(ok: bool) -> None:
            if ok:
                log.when_durable(log.applied.position, settled)
            else:
                settled(False)

        if volume is None:
            self.own_limit = limit
            self.destage.total.set_limit(self.limit_of(None))
            log.add_event(record.LIMIT, 0, 0, limit.average, limit.peak, written)
        else:
            volume.own_limit = limit
            volume.shaper.set_limit(self.limit_of(volume))
            log.add_note(volume.note(), written)
        log.kick()
        self.alarm(0)

    # --- services to the parts --------------------------------------------------------------------------------

    def has_room(self, volume: CacheVolume) -> bool:
        """Tell whether one more change of a guest may be appended; if not, see to it that it soon may."""
        if self._has_room(volume):
            return True
        self.reclaim.kick()
        self.destage.relieve()
        return self._has_room(volume)

    def _has_room(self, volume: CacheVolume) -> bool:
        dirty_blocks, hole_count = self.dirty_blocks, self.hole_count  # of all: seldom has the volume to be asked
        return (
            len(self.zones.free) > ZONES_RESERVED + self.reclaim.moving.promised_zones
            and dirty_blocks < self._dirty_max
            and (hole_count < HOLES_KEPT_MAX or len(volume.holes) < HOLES_KEPT_MAX)
            and volume.appended_blocks < volume.appended_max
            and (dirty_blocks < OPEN_CUT_BLOCKS_MAX or len(volume.dirty) < OPEN_CUT_BLOCKS_MAX)
            and hole_count < self._hole_count_max - HOLES_PER_TICK_MAX
        )

    @property
    def buffer_fill(self) -> float:
        """Dirty blocks as a share of what may be dirty."""
        return self.dirty_blocks / self._dirty_max

    @property
    def stopping_room(self) -> int:
        """Blocks that those who hold most of the buffer may still add before they wait."""
        return max(0, int(self._dirty_max * STOPPING_FILL) - self.dirty_blocks)

    @property
    def free_zones(self) -> int:
        """Free zones that are not promised to moves."""
        return len(self.zones.free) - self.reclaim.moving.promised_zones

    def record_applied(self) -> None:
        """A record is in the map: let those go on who waited for it or for room."""
        self.writes.applied()
        self.reclaim.kick()
        self.resume_writers()

    def resume_writers(self) -> None:
        """There may be room again."""
        if self.cut_ends.waiting:
            self.cut_ends.resume()
        self.writes.resume()

    def hold_zones(self, places: npt.NDArray[np.int64]) -> list[int]:
        """Keep the zones of these places as they are until `release_zones`."""
        zones: list[int] = np.unique(places // self.zones.zone_blocks).tolist()
        for zone in zones:
            self.zones.readers[zone] += 1
        return zones

    def release_zones(self, zones: Sequence[int]) -> None:
        """Undo `hold_zones`."""
        for zone in zones:
            self.zones.readers[zone] -= 1

    def retire_zone(self, zone: int) -> None:
        """A block of the zone can't be read: keep what else is in it, but do not fill it again before a restart."""
        if zone not in self.retired_zones and len(self.retired_zones) < self.zones.zone_count // RETIRED_ZONES_RATIO:
            self.retired_zones.add(zone)
            self.hold_zones(np.array([self.zones.place_at(zone, 0)]))

    def count_dirty_blocks(self) -> None:
        """Count anew; in between `dirty_blocks` only grows."""
        self.dirty_blocks = sum(volume.dirty_blocks for volume in self.volumes.values())

    def count_holes(self) -> bool:
        """Count the holes of all volumes anew, and forget what the store knows as well when they are many.

        Returns whether a checkpoint takes those that are left.
        """
        volumes = self.volumes.values()
        count = sum(volume.hole_count for volume in volumes)
        if count >= (self._hole_count_max - HOLES_PER_TICK_MAX) // 2:
            for volume in volumes:
                volume.holes.forget_up_to(volume.acknowledged)
            count = sum(volume.hole_count for volume in volumes)
        self.hole_count = count + self.writes.event_count
        return count <= self._hole_count_max

    def drop_block(self, key: int, place: int) -> None:
        """Forget a clean block."""
        self.policy.removed(np.array([place]), volume_key=key >> LBA_BITS)
        self.map.remove(key)
        self.loading.forget(key, 1)

    def read_refused(self, volume: CacheVolume, refusal: UpstreamRefusal) -> None:
        """The store refused a read. An epoch that is over ends the volume here: what it has cached is of another
        history than what others are served now."""
        if refusal.code == messages.FENCED:
            self.destage.stop_volume(volume, f"the store refuses this volume's reads: {refusal.text}")
        elif not volume.error:
            self.report(f"volume {volume.name}: a read was refused by the store: {refusal.text}")

    def report_corruption(
        self, volume: CacheVolume, lba: int, place: int, expected: int, found: int | None, *, clean: bool
    ) -> None:
        """Say where a block is bad and what becomes of it."""
        then = "it is fetched again" if clean else "only this copy existed; reading it is an error"
        what = "it can't be read" if found is None else f"expected checksum {expected:#x}, found {found:#x}"
        self.report(
            f"corrupt block {lba} of volume {volume.name} at offset {self.zones.offset_of(place)}: {what}; {then}"
        )

    # --- inside -----------------------------------------------------------------------------------------------

    def _recount_dirty_blocks(self) -> None:
        """Count; when the buffer seems nearly full, leave out what was trimmed since it became dirty, once a second."""
        self.count_dirty_blocks()
        if self.buffer_fill >= SLOWING_FILL and self._now_ns >= self._recount_at_ns:
            self._recount_at_ns = self._now_ns + RECOUNT_NS
            for volume in self.volumes.values():
                if volume.trimmed:
                    self.destage.prune_dirty(volume)
            self.count_dirty_blocks()

    def _protect(self) -> None:
        """Tell the policy which volumes are in use."""
        keys = [volume.key for volume in self.volumes.values() if volume.attached and not volume.temporary]
        if keys != self._protected:
            self._protected = keys
            self.policy.protect(keys, floor_share=self.settings.volume_floor)

    def _known_all(self) -> None:
        """If all clean entries are in the map and the policy knows the dirty ones: go on with what waited for that."""
        if self.loading.active or self.use_counts.active:
            return
        self.policy.restored()
        self.reclaim.kick()
        self.checkpoints.step()
        self.resume_writers()


def _with(versions: npt.NDArray[np.uint64], key: int, version: Version) -> npt.NDArray[np.uint64]:
    """Set one element of an array that grows as it must; return the array."""
    if key >= versions.size:
        versions = np.append(versions, np.zeros(2 * key - versions.size, np.uint64))
    versions[key] = version
    return versions

"""What the daemon does when it is told to, from attach to status: steps between store, engine and front.

Invariants:
    At most one attach or detach of a name is under way.
    A volume is listed for clients exactly while the engine has it attached, except during the steps between.
Crash: the row on the device says whether a volume is attached; an attached one is served again at the next start. A
volume that was detached here but not given back at the store is taken up again by the next attach.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from forebay_cache.engine.attaching import SALVAGE_FIRST, Standing, StoreView
from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.nbd_limits import CLOSE_GRACE_S
from forebay_cache.engine.rates import NOT_SET, Shaper
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front
from forebay_cache.service.answers import answer_sample
from forebay_cache.service.completions import outcome
from forebay_cache.service.cut_end_commands import CutEndCommands
from forebay_cache.service.device_fronts import DeviceFronts
from forebay_cache.service.exports import AttachedExports
from forebay_cache.service.nbd_server import NbdServer
from forebay_cache.service.policy_status import policy_status
from forebay_cache.service.run_folder import RunFolder
from forebay_cache.service.snapshot_exports import SnapshotExports, is_snapshot_name
from forebay_cache.service.store_session import FINAL_CODES, StoreSession
from forebay_cache.service.trace_commands import TraceCommands
from forebay_cache.service.upstream import StoreUpstream
from forebay_core.errors import ForebayError, RefusedError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, Buffer, Epoch, StoreId, Version, VolumeId, format_rate, sequence_of
from forebay_wire import messages
from forebay_wire.messages import (
    Attached,
    CacheStatus,
    HeldReport,
    LimitStatus,
    Opened,
    Sample,
    SnapshotRow,
    TraceRows,
    VolumeRow,
    VolumeStatus,
)

STALE_EXTENTS_MAX: Final = 4096
"""Changed extents up to which they are dropped one by one; beyond it all that is cached of the volume is dropped."""

AWAY_GRACE_S: Final = 1.0
"""How long requests may go on at a detach that leaves changes here while the store is away: some may never end."""

_LOG = logging.getLogger(__name__)


class Shell:
    """Implements the control server's `Commands`, and hears of the store's answers for volumes."""

    def __init__(
        self,
        *,
        engine: CacheEngine,
        session: StoreSession,
        upstream: StoreUpstream,
        nbd: NbdServer,
        exports: AttachedExports,
        folder: RunFolder,
        device: str,
        device_size: int,
        fronts: DeviceFronts | None = None,
        draw: Callable[[int], bytes] = secrets.token_bytes,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._engine = engine
        self._session = session
        self._upstream = upstream
        self._nbd = nbd
        self._exports = exports
        self._folder = folder
        self._device = device
        self._device_size = device_size
        self._fronts = fronts or DeviceFronts()
        self._changing: set[str] = set()
        self._traces = TraceCommands(engine.recorder)
        self._snapshots = SnapshotExports(engine, session)
        self._cut_ends = CutEndCommands(engine, session, draw=draw, wall_ns=wall_ns)

    def resume(self) -> None:
        """Serve the volumes that were attached when the daemon ended, whether the store is there or not.

        Those that were left dirty are opened at the store as well: their epoch is ours, and what they hold goes
        upstream without anybody attaching them. They stay ours then, as `detach --leave-dirty` says.
        """
        for volume in self._engine.attached():
            self._exports.add(volume)
            if volume.snapshot:
                self._cut_ends.learn_soon(volume)
        self._snapshots.resume()
        for volume in self._engine.held():
            if volume.attached or volume.has_changes:
                self._session.keep_open(volume.id, volume.store, volume.name, volume.acknowledged)

    # --- the store's answers ----------------------------------------------------------------------------------

    def on_reopened(self, volume_id: VolumeId, opened: Opened) -> None:
        """The store granted the volume again after a reconnect."""
        volume = self._engine.by_id(volume_id)
        if volume is not None and volume.held:
            self._engine.attaching.reopened(volume, _view(opened, volume.store))
            self._cut_ends.learn_soon(volume)

    def on_refused(self, volume_id: VolumeId, code: str, text: str) -> None:
        """The store does not grant the volume (now, or for good)."""
        volume = self._engine.by_id(volume_id)
        if volume is not None and volume.snapshot:
            self._snapshots.refused(volume, code, text)
            return
        if volume is None or not volume.held:
            return
        if code in FINAL_CODES:
            then = f"; changes that are only here are kept: {SALVAGE_FIRST}" if volume.has_changes else ""
            self._engine.destage.stop_volume(
                volume, f"the store gave volume {volume.name} to somebody else: {text}{then}"
            )
        else:
            self._engine.destage.suspend(volume)
            volume.warning = text

    def held(self, store: StoreId, wall_ns: int) -> list[HeldReport]:
        """Tell a store how far we are ahead of it, so that somebody knows what is gone if this device is lost."""
        return [
            HeldReport(volume.id, volume.epoch, volume.version, volume.dirty_since_ns, wall_ns)
            for volume in self._engine.held()
            if volume.store == store and not volume.error
        ]

    # --- commands ---------------------------------------------------------------------------------------------

    async def attach(
        self, name: str, *, read_only: bool, take_over: bool, front: str = "nbd", block_size: int = 0
    ) -> Attached:
        """Open a volume and serve it; return where.

        Raises:
            ForebayError: the store or the engine says no.
        """
        with self._alone(name):
            wanted = self._fronts.wanted(front, block_size)
            volume = self._find(name)
            if volume is not None and not (volume.error and take_over):
                self._check_same(volume, wanted, read_only=read_only)
                await self._fronts.bring_back(volume)
                return self._place(volume)
            if volume is not None and not volume.snapshot:
                wanted = wanted._replace(number=volume.front.number if volume.front.kind is wanted.kind else 0)
                return await self._take_over(volume, read_only=read_only, front=wanted)
            if is_snapshot_name(name):
                volume = await self._snapshots.attach(name, front=wanted)
                await self._cut_ends.learn(volume)
            else:
                volume = await self._open(name, read_only=read_only, take_over=take_over, front=wanted)
            return await self._show(volume)

    async def detach(self, name: str, *, leave_dirty: bool, timeout_ms: int = 0) -> None:
        """Destage (unless `leave_dirty`), stop serving, give the volume back.

        Raises:
            RefusedError: it is not attached, has failed, or the store does not take it back now.
        """
        with self._alone(name):
            volume = self._attached(name)
            await self._fronts.detach(volume, timeout_ms / 1000)
            if not (leave_dirty or volume.snapshot):
                await self._drain(volume)
            await self._give_back(volume, leave_dirty=leave_dirty)
            _LOG.info("detached volume %s", name)

    async def drain(self, name: str) -> None:
        """Destage all that was acknowledged before.

        Raises:
            RefusedError: it is not attached, or has failed.
        """
        await self._drain(self._attached(name))

    async def limit(self, name: str, *, average: int, peak: int, reset: bool) -> None:
        """Limit the destaging of a volume, or with an empty name of all together; durable when it returns.

        Raises:
            ForebayError: the values are no limit, the volume is not attached, or the device failed.
        """
        engine = self._engine
        volume = self._attached(name) if name else None

        def begin(settled: Callable[[bool], None]) -> None:
            engine.set_limit(volume, settled, average=average, peak=peak, reset=reset)

        if not await outcome(begin):
            raise RefusedError(messages.FAILED, f"the cache device failed: {engine.failed}")
        _LOG.info("limit of %s: %s", name or "all volumes", " and ".join(map(format_rate, engine.limit_of(volume))))

    async def snapshot(self, volume: str, name: str, *, stored: bool) -> SnapshotRow:
        """Take a snapshot; return when it is durable here, or with `stored` when the store has it.

        Raises:
            ForebayError: the volume is not attached, has failed or has one of this name, or too many are pending.
        """
        row = await self._cut_ends.snapshot(self._attached(volume), name, stored=stored)
        _LOG.info("took snapshot %s@%s, sequence %d", volume, name, sequence_of(Version(row.version)))
        return row

    async def resize(self, name: str, size: int) -> VolumeRow:
        """Make a volume larger; return when that is durable here.

        Raises:
            ForebayError: the volume is not attached, has failed, or would become smaller.
        """
        volume = self._attached(name)
        row = await self._cut_ends.resize(volume, size)
        self._nbd.resized(name)
        self._fronts.resized(volume)
        _LOG.info("volume %s has %d bytes now", name, row.size)
        return row

    async def status(self) -> CacheStatus:
        """Tell how everything is."""
        engine = self._engine
        # Counting looks at every place: beside the event loop, where a torn look only makes the count inexact.
        cached = await asyncio.get_running_loop().run_in_executor(None, engine.cached_blocks)
        return CacheStatus(
            device=self._device,
            device_size=self._device_size,
            capacity_bytes=engine.map.place_count * BLOCK_SIZE,
            cached_bytes=sum(cached.values()) * BLOCK_SIZE,
            dirty_bytes=engine.destage.dirty_blocks * BLOCK_SIZE,
            free_zones=len(engine.zones.free),
            hit_blocks=sum(volume.hit_blocks for volume in engine.volumes.values()),
            miss_blocks=sum(volume.miss_blocks for volume in engine.volumes.values()),
            written_blocks=sum(volume.appended_blocks for volume in engine.volumes.values()),
            destaged_plain_bytes=engine.destage.plain_bytes,
            destaged_stored_bytes=engine.destage.stored_bytes,
            log_bytes=engine.log.bytes_written,
            store=self._session.address,
            store_connected=self._session.connected,
            volumes=tuple(self._volume_status(v, cached) for v in self._listed()),
            error=engine.failed or self._session.error or self._upstream.waiting_for_space,
            limit=_limit_status(engine.destage.total, own=engine.own_limit != NOT_SET),
            policy=policy_status(engine),
        )

    def sample(self) -> tuple[Sample, Sequence[Buffer]]:
        """Tell which blocks were used lately, of those that are sampled."""
        return answer_sample(self._engine)

    def record(self, who: object, name: str) -> None:
        """Record for a connection what is asked of a volume, or with an empty name of all.

        Raises:
            ForebayError: the volume is not attached, or there are enough recordings.
        """
        self._traces.begin(who, self._attached(name).key if name else None)

    async def take_trace(self, who: object, *, last: bool) -> tuple[TraceRows, Sequence[Buffer]]:
        """Return what was recorded for a connection since the last time.

        Raises:
            RefusedError: nothing is.
        """
        return await self._traces.take(who, last=last)

    def lost_connection(self, who: object) -> None:
        """Record no more for it."""
        self._traces.end(who)

    # --- steps ------------------------------------------------------------------------------------------------

    def _check_same(self, volume: CacheVolume, wanted: Front, *, read_only: bool) -> None:
        """Refuse to attach a volume that is attached, unless it is attached just so."""
        if volume.error:
            raise RefusedError(messages.FAILED, f"volume {volume.name} has stopped: {volume.error}")
        is_front = (volume.front.kind, volume.front.block_size) == (wanted.kind, wanted.block_size)
        if not is_front or (volume.read_only != read_only and not volume.snapshot):
            raise RefusedError(messages.BAD_REQUEST, f"volume {volume.name} is attached otherwise; detach it first")
        refusal = self._session.refusal(volume.id)
        if refusal is not None and refusal.code == messages.WRONG_STORE:
            raise refusal

    async def _take_over(self, stopped: CacheVolume, *, read_only: bool, front: Front) -> Attached:
        """Open a volume again that has stopped; its device stays if it is to be the same, and this works."""
        self._fronts.suspend(stopped)
        name, before = stopped.name, stopped.front
        try:
            if front.kind is not before.kind:
                await self._fronts.abandon(name, before)
            await self._leave(stopped)
            return await self._show(await self._open(name, read_only=read_only, take_over=True, front=front))
        except (Exception, asyncio.CancelledError):
            await asyncio.shield(self._fronts.abandon(name, before))
            raise

    async def _show(self, volume: CacheVolume) -> Attached:
        """Serve a volume that was just opened and make its device; if that fails the volume is given back."""
        self._exports.add(volume)
        try:
            await self._fronts.attach(volume)
        except ForebayError:
            await self._give_back(volume, leave_dirty=volume.has_changes)
            raise
        _LOG.info("attached volume %s, epoch %d", volume.name, volume.epoch)
        return self._place(volume)

    async def _give_back(self, volume: CacheVolume, *, leave_dirty: bool) -> None:
        self._exports.remove(volume.name)
        away = leave_dirty and not self._session.connected
        await self._nbd.close_export(volume.name, AWAY_GRACE_S if away else CLOSE_GRACE_S)
        if volume.snapshot:
            await self._snapshots.detach(volume)
        elif leave_dirty:
            await self._leave(volume)
        else:
            await self._release(volume)

    async def _open(self, name: str, *, read_only: bool, take_over: bool, front: Front) -> CacheVolume:
        """Take the volume at the store and bring it into the engine; if that fails it is given back."""
        attaching = self._engine.attaching
        attaching.refuse_stranger(name, await self._session.connected_store())  # before that asks for anything
        row = await self._session.find_volume(name)
        since = attaching.acknowledged(VolumeId(row.id))
        opened, store = await self._session.open_volume(name, take_over=take_over, acknowledged=since)
        view = _view(opened, store)
        before = self._engine.by_id(view.id)
        held = before is not None and before.held and before.epoch == view.epoch
        try:
            chain = await self._snapshots.chain(view.origin, store)
            with self._snapshots.reading(chain):
                stale = await self._stale(view, since) if attaching.compare(view) is Standing.STALE else []
                await outcome(
                    lambda done: attaching.attach(
                        view,
                        stale,
                        read_only=read_only,
                        attached=lambda volume: done(volume is not None),
                        chain=chain,
                        front=front,
                    )
                )
        except ForebayError:
            if held:
                self._session.forget(view.id)
            else:
                await self._session.release(view.id, view.epoch)
            raise
        volume = self._find(name)
        if volume is None:
            raise RefusedError(messages.FAILED, f"the cache device failed: {self._engine.failed}")
        await self._cut_ends.learn(volume)
        return volume

    async def _stale(self, view: StoreView, since: Version) -> list[Extent]:
        """Return what changed since a version; all of it when that is too much, or nobody knows any more."""
        everything = [Extent(0, view.size // BLOCK_SIZE)]
        stale: list[Extent] = []
        try:
            async for page in self._upstream.changed_since(view.id, since):
                stale += page
                if len(stale) > STALE_EXTENTS_MAX:
                    return everything
        except RefusedError as error:
            if error.code != messages.HISTORY_GONE:
                raise
            return everything
        return stale

    async def _drain(self, volume: CacheVolume) -> None:
        if not await outcome(lambda done: self._engine.destage.drain(volume, done)):
            reason = volume.error or self._engine.failed or "it was detached meanwhile"
            raise RefusedError(messages.FAILED, f"volume {volume.name} can't be drained: {reason}")

    async def _leave(self, volume: CacheVolume) -> None:
        """Stop serving; dirty blocks and epoch stay on the device."""
        self._exports.remove(volume.name)
        await self._nbd.close_export(volume.name)
        self._session.forget(volume.id)
        await self._settle(volume, leave_dirty=True)

    async def _release(self, volume: CacheVolume) -> None:
        """Stop serving a volume whose clients are gone, and give it back at the store."""
        volume.closing = True  # what a client left behind is refused, so nothing comes behind the drain
        try:
            await self._drain(volume)
        except RefusedError:
            volume.closing = False
            self._exports.add(volume)
            raise
        epoch = volume.epoch
        await self._settle(volume, leave_dirty=False)
        try:
            await self._session.release(volume.id, epoch)
        except ForebayError as error:
            self._session.forget(volume.id)
            raise RefusedError(
                messages.FAILED,
                f"volume {volume.name} is drained and detached here, but the store could not be told ({error}); "
                "attach and detach it again, or take it over elsewhere",
            ) from error

    async def _settle(self, volume: CacheVolume, *, leave_dirty: bool) -> None:
        attaching = self._engine.attaching
        if not await outcome(lambda done: attaching.detach(volume, leave_dirty=leave_dirty, settled=done)):
            raise RefusedError(messages.FAILED, f"the cache device failed: {self._engine.failed}")
        self._snapshots.forget_unneeded()

    # --- looking up -------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        if name in self._changing:
            raise RefusedError(messages.VOLUME_IN_USE, f"volume {name} is being attached or detached; try again")
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    def _find(self, name: str) -> CacheVolume | None:
        return next((volume for volume in self._engine.attached() if volume.name == name), None)

    def _attached(self, name: str) -> CacheVolume:
        volume = self._find(name)
        if volume is None:
            raise RefusedError(messages.NOT_ATTACHED, f"volume {name} is not attached here; forebay status lists them")
        return volume

    def _listed(self) -> list[CacheVolume]:
        return sorted(self._engine.attached(), key=lambda volume: volume.name)

    def _place(self, volume: CacheVolume) -> Attached:
        return Attached(self._folder.uri(volume.name), *self._fronts.place(volume))

    def _volume_status(self, volume: CacheVolume, cached: dict[int, int]) -> VolumeStatus:
        """Tell how a volume is; `cached` are the cached blocks by volume key."""
        place = self._fronts.place(volume)
        below = sum(cached.get(source.key, 0) for source in volume.sources())
        return VolumeStatus(
            name=volume.name,
            size=volume.size,
            uri=self._folder.uri(volume.name),
            read_only=volume.read_only,
            epoch=volume.epoch,
            sequence=sequence_of(volume.version),
            acknowledged_version=volume.acknowledged,
            dirty_bytes=volume.dirty_blocks * BLOCK_SIZE,
            cached_bytes=cached.get(volume.key, 0) * BLOCK_SIZE,
            hit_blocks=volume.hit_blocks,
            miss_blocks=volume.miss_blocks,
            connections=self._nbd.connection_count(volume.name),
            error=volume.error or volume.warning,
            limit=_limit_status(volume.shaper, own=volume.own_limit != NOT_SET),
            write_delay_us=self._engine.slowing.delay_of(volume) // 1000,
            pending_snapshots=tuple(volume.pending_snapshots),
            origin=volume.source.name if volume.source is not None else "",
            origin_cached_bytes=below * BLOCK_SIZE,
            front=volume.front.kind.name.lower(),
            path=place.path,
            link=place.link,
        )


def _limit_status(shaper: Shaper, *, own: bool) -> LimitStatus:
    if not shaper.limited:
        return LimitStatus(own=own)
    return LimitStatus(*shaper.limit, shaper.allowed, own)


def _view(opened: Opened, store: StoreId) -> StoreView:
    row = opened.row
    origin = VolumeId(row.origin)
    return StoreView(VolumeId(row.id), row.name, row.size, Epoch(opened.epoch), Version(row.version), store, origin)

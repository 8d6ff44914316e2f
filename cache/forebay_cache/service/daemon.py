"""The cache daemon: opens and recovers the device, serves, and ends cleanly on SIGTERM and SIGINT.

Invariants:
    What was attached is served before the store is asked anything.
    An exception that nobody expected ends the process: what it had acknowledged is on the device, and the next start
    recovers from what is true, not from what a bug left in memory.
Crash: see engine.recovery; the kernel frees the locks, the builder's processes end with us.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from typing import Any, Final

from forebay_cache.engine.cache import CacheEngine, EngineSettings
from forebay_cache.engine.policy import PolicySettings
from forebay_cache.engine.rates import NO_LIMIT, Limit, changed_limit
from forebay_cache.engine.recovery import Recovered
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front, FrontKind
from forebay_cache.service.alarm import Alarm
from forebay_cache.service.builder import ProcessBuilder
from forebay_cache.service.completions import outcome
from forebay_cache.service.control import ControlServer
from forebay_cache.service.device import FileDevice
from forebay_cache.service.device_file import DeviceFile, open_device
from forebay_cache.service.device_fronts import DeviceFronts
from forebay_cache.service.exports import AttachedExports
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.fuse_device import FuseDevice
from forebay_cache.service.fuse_keeper import FuseKeeper
from forebay_cache.service.kernel_front import KernelFront
from forebay_cache.service.loop_front import LoopFront
from forebay_cache.service.memory_guard import guard_allocations
from forebay_cache.service.nbd_netlink import NbdNetlink
from forebay_cache.service.nbd_server import NbdServer, NbdSettings
from forebay_cache.service.opening import recover_device
from forebay_cache.service.run_folder import RunFolder, group_number
from forebay_cache.service.sample_file import SampleFile
from forebay_cache.service.shell import Shell
from forebay_cache.service.spinning import SpinningSelector
from forebay_cache.service.store_session import StoreSession
from forebay_cache.service.turns import Turns
from forebay_cache.service.upstream import StoreUpstream
from forebay_core.config import CacheSettings
from forebay_core.errors import EXIT_FAILED, ForebayError, WrongUsageError
from forebay_core.notify import Watchdog, notify
from forebay_core.starting import raise_file_limit, tell_parent
from forebay_core.units import BLOCK_SHIFT, DeviceId
from forebay_wire.address import parse_address
from forebay_wire.reach import check_reach, read_key

TICK_S: Final = 0.05
SWITCH_INTERVAL_S: Final = 0.0005
"""How long the thread that writes waits for a busy event loop. Measured 2026-11, 16 writes of 4 KiB in flight, 2 shared
cores: 36 us a write with Python's 5 ms, 15 us with this, 26 us with a tenth of it."""

CLOSE_GRACE_S: Final = 3.0
"""Time that clients' and commands' requests have to end when the daemon stops."""

STOP_TIMEOUT_S: Final = 60.0
WILDCARDS: Final = ("", "0.0.0.0", "::")
FILES_MAX: Final = 8192

_LOG = logging.getLogger("forebay.cache")


def run(settings: CacheSettings) -> int:
    """Serve volumes until told to end; return the exit code.

    Raises:
        ForebayError: it can't start; the text is one line that says why and what to do.
    """
    if not __debug__:
        raise WrongUsageError("python -O removes checks that this daemon needs; start it without -O")
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    key = read_key(settings.key_file)
    check_reach(settings, key)  # before anything is made
    group = group_number(settings.nbd_group)
    raise_file_limit(FILES_MAX)
    guard_allocations()  # before there are threads, which inherit it
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    folder = RunFolder(settings.run_dir, group)
    try:
        file = open_device(settings.device, settings.size)
        try:
            mark = FailureMark(folder.path, file.fd)
            recovered = recover_device(file, zone_size=settings.zone_size, format_anew=settings.format, mark=mark)
        except BaseException:
            if file.made:
                file.path.unlink(missing_ok=True)
            os.close(file.fd)
            raise
        selector = SpinningSelector()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            return runner.run(_serve(settings, key, folder, file, mark, recovered, selector))
    finally:
        folder.close()


async def _serve(
    settings: CacheSettings,
    key: bytes | None,
    folder: RunFolder,
    file: DeviceFile,
    mark: FailureMark,
    recovered: Recovered,
    selector: SpinningSelector,
) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_crash)
    turns = Turns(loop, selector.ready)
    device = FileDevice(file, turns, mark)
    selector.syncing = device.is_syncing
    try:
        daemon = _Daemon(settings, key, folder, device, recovered, turns)
        try:
            return await daemon.serve()
        finally:
            await daemon.close()
    finally:
        device.close()


class _Daemon:
    """The parts of a running daemon."""

    def __init__(
        self,
        settings: CacheSettings,
        key: bytes | None,
        folder: RunFolder,
        device: FileDevice,
        recovered: Recovered,
        turns: Turns,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._watchdog = Watchdog(self._loop)
        self._ticking: asyncio.TimerHandle | None = None
        self._alarm = Alarm(self._loop, lambda now_ns: self._engine.pace(now_ns))
        identity = DeviceId(recovered.superblock.device)
        self._session = StoreSession(
            [parse_address(address) for address in settings.store],
            key=key,
            device=identity,
            jitter=random.random,
            on_reopened=lambda volume, opened: self._shell.on_reopened(volume, opened),
            on_refused=lambda volume, code, text: self._shell.on_refused(volume, code, text),
            held=lambda store: self._shell.held(store, time.time_ns()),
        )
        self._upstream = StoreUpstream(self._session)
        self._builder = ProcessBuilder(device.path, level=settings.compression_level, workers=1, loop=self._loop)
        self._engine = CacheEngine(
            recovered,
            device=device,
            upstream=self._upstream,
            builder=self._builder,
            settings=_engine_settings(settings),
            life=secrets.randbits(64),
            report=_LOG.error,
            alarm=self._alarm.set,
        )
        device.on_failure = self._engine.fail
        self._sample = SampleFile(self._engine, folder.path, identity)
        self._exports = AttachedExports()
        self._nbd = NbdServer(self._exports, NbdSettings(socket_group=folder.group), turns)
        self._kernel = KernelFront(NbdNetlink(), self._nbd, cache=identity, note=self._note_front)
        self._fronts = self._make_fronts()
        self._shell = Shell(
            engine=self._engine,
            session=self._session,
            upstream=self._upstream,
            nbd=self._nbd,
            exports=self._exports,
            folder=folder,
            device=device.path,
            device_size=device.size,
            fronts=self._fronts,
        )
        self._control = ControlServer(self._shell, key=key, device=identity)

    def _make_fronts(self) -> DeviceFronts:
        keeper = FuseKeeper(self._folder.path)
        # Loop devices are over files: whatever is told to all is told to them first.
        return DeviceFronts([self._kernel, LoopFront(keeper, note=self._note_front), FuseDevice(keeper)])

    async def serve(self) -> int:
        """Serve until a signal; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping)
        self._sample.load()
        self._engine.start()
        self._sample.start()
        self._tick()
        self._shell.resume()
        ready = await self._listen()
        self._session.start()
        await self._kernel.named()  # udev may read what only the store has; who waits for us opens devices by name
        _LOG.info("%s", ready)
        tell_parent(ready)
        notify("READY=1")
        self._watchdog.start()
        await self._stop.wait()
        _LOG.info("stopping")
        notify("STOPPING=1")
        await self._control.close(CLOSE_GRACE_S)
        await self._fronts.close()
        await self._nbd.close(CLOSE_GRACE_S)
        await self._sample.close(save=True)
        return await self._settle()

    async def close(self) -> None:
        """Free everything; whether it was served cleanly or not."""
        self._watchdog.stop()
        await self._control.close(0)
        await self._nbd.close(0)
        await self._sample.close(save=False)
        if self._ticking is not None:
            self._ticking.cancel()
        self._alarm.cancel()
        await self._upstream.close()
        self._builder.close()

    async def _listen(self) -> str:
        """Open the fronts and the control sockets; return the line that says where they are.

        Devices of volumes come back before anything else is answered but NBD, which some of them are made of.
        """
        settings = self._settings
        places = [f"READY nbd=unix:{self._folder.nbd_socket}"]
        nbd_socket = self._folder.nbd_socket
        inherited = await self._nbd.listen_inherited(own=nbd_socket, allow_remote=settings.nbd_allow_remote)
        await self._nbd.listen_unix(nbd_socket)
        if inherited:
            places.append(f"nbd=inherited:{inherited}")
        await self._fronts.resume(self._engine.attached())
        attached = self._engine.attached()
        await self._kernel.end_strays([one.name for one in attached if one.front.kind is FrontKind.KERNEL])
        if settings.nbd is not None:
            address = parse_address(settings.nbd)
            port = await self._nbd.listen_tcp(address.host, address.port, allow_remote=settings.nbd_allow_remote)
            places.append(f"nbd=tcp:{address._replace(port=port)}")
        await self._control.listen_unix(self._folder.control_socket)
        if settings.control is not None:
            control = await self._control.listen_tcp(parse_address(settings.control))
            self._session.control = str(control if control.host not in WILDCARDS else control._replace(host=_host()))
            places.append(f"control=tcp:{control}")
        return " ".join(places)

    async def _settle(self) -> int:
        """Make everything durable and leave a checkpoint; the exit code says whether that worked."""
        if not self._engine.failed:
            with contextlib.suppress(TimeoutError):
                if await asyncio.wait_for(outcome(self._engine.stop), STOP_TIMEOUT_S):
                    return 0
        _LOG.error("the cache device could not be brought up to date; the next start recovers from its log")
        return EXIT_FAILED

    def _tick(self) -> None:
        self._engine.tick(time.monotonic_ns(), time.time_ns())
        self._ticking = self._loop.call_later(TICK_S, self._tick)

    async def _note_front(self, volume: CacheVolume, front: Front) -> None:
        if not await outcome(lambda done: self._engine.attaching.set_front(volume, front, done)):
            raise ForebayError(f"the cache device failed: {self._engine.failed}")

    def _stopping(self) -> None:
        if self._stop.is_set():
            os._exit(EXIT_FAILED)  # told twice: at once, as after kill -9
        self._stop.set()


def _host() -> str:
    """Return the name under which others may reach a daemon that listens on every address of this host."""
    return socket.gethostname()


def _engine_settings(settings: CacheSettings) -> EngineSettings:
    return EngineSettings(
        cut_blocks_max=settings.cut_size_max >> BLOCK_SHIFT,
        cut_age_ns_max=int(settings.cut_age_s_max * 1e9),
        dirty_share_max=settings.dirty_share_max,
        fill_blocks=settings.fill_blocks,
        read_ahead_blocks=settings.read_ahead_size >> BLOCK_SHIFT,
        bypass_blocks=settings.bypass_size >> BLOCK_SHIFT,
        limit=_limit(settings.destage_average, settings.destage_peak),
        total_limit=changed_limit(
            NO_LIMIT, average=settings.destage_total_average or 0, peak=settings.destage_total_peak or 0
        ),
        policy=PolicySettings(settings.write_price, settings.window_max),
        volume_floor=settings.volume_floor,
    )


def _limit(average: int | None, peak: int | None) -> Limit:
    """Return the limit of these settings; one alone is the other as well."""
    return changed_limit(NO_LIMIT, average=average or 0, peak=peak or 0) if average or peak else NO_LIMIT


def _crash(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End the process on an exception that nobody expected."""
    error = context.get("exception")
    if error is None:
        _LOG.error("%s", context.get("message"))
        return
    _LOG.critical("%s: the daemon ends", context.get("message"), exc_info=error)
    logging.shutdown()
    os._exit(EXIT_FAILED)

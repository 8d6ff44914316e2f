"""`--front kernel`: volumes as /dev/nbdN, by the kernel's own NBD client over socket pairs that this daemon serves.

Invariants:
    Whatever ends of a pair the kernel does not hold are closed with this process, so its death severs every device.
    A connection of the kernel is never answered with ESHUTDOWN and never dropped for being slow: its guests would see
    an I/O error where they are to wait.
Crash: the kernel keeps the devices and what they were asked for; the next start gives each a fresh socket.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from forebay_cache.engine.kernel_device import Connect, Found, KernelDevice, Mend, State
from forebay_cache.engine.nbd_negotiation import transmission_flags
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front, FrontKind
from forebay_cache.service.device_fronts import NoteFront, Place, Steps
from forebay_cache.service.device_links import FOLDER, links_by_udev, make_link, remove_link
from forebay_cache.service.nbd_netlink import KernelPort
from forebay_cache.service.nbd_server import NbdServer
from forebay_core.errors import ForebayError, RefusedError
from forebay_core.units import DeviceId
from forebay_wire import messages

NODE_WAIT_S: Final = 5.0
"""How long the node of a new device may take to appear."""

NAMES_WAIT_S: Final = 10.0
"""How long a start waits for udev to name devices, behind the first answers; what takes longer comes later."""

KERNEL_WAIT_S: Final = 20.0
"""How long the kernel may take to answer a message; a start does not wait longer for a device."""

PREFIX: Final = "forebay/"
"""What the identifiers of our devices begin with; the cache's and the volume's name follow."""

USERS_POLL_S: Final = 0.2
_POLL_S: Final = 0.02
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Attached:
    """A volume with its device. `lock`: one step at a time."""

    def __init__(self, volume: CacheVolume, device: KernelDevice) -> None:
        self.volume = volume
        self.device = device
        self.link = ""
        self.lock = asyncio.Lock()
        self.sever: Callable[[], None] | None = None  # closes our end of its socket

    @property
    def path(self) -> str:
        """The node of the device; empty while there is none."""
        return "" if self.device.number is None else f"/dev/nbd{self.device.number}"


class KernelFront:
    """Implements DeviceFront."""

    kind = FrontKind.KERNEL

    def __init__(
        self, port: KernelPort, nbd: NbdServer, *, cache: DeviceId, note: NoteFront, links: Path = FOLDER
    ) -> None:
        """`note` logs the front of a volume durably."""
        self._links = links
        self._port = port
        self._nbd = nbd
        self._cache = cache
        self._note = note
        self._attached: dict[str, _Attached] = {}
        self._steps = Steps()
        self._naming = Steps()
        self._closing = False
        self._guarded = False

    def check(self) -> None:
        """See DeviceFront."""
        self._port.check()

    async def attach(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        attached = self._add(volume)
        try:
            async with attached.lock:
                await self._bring(attached)
                await self._name(attached)
        except BaseException:
            await asyncio.shield(self._undo(attached))
            raise

    async def resume(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        self._port.check()
        attached = self._add(volume)
        async with attached.lock:
            await self._bring(attached)
            # udev may want to read what only the store has, which is not asked before we are there.
            if links_by_udev():
                self._naming.start(self._name(attached), f"{attached.path} gets no name")
            else:
                await self._name(attached)

    async def detach(self, volume: CacheVolume, timeout_s: float) -> None:
        """See DeviceFront."""
        attached = self._attached.get(volume.name)
        if attached is None:
            return
        async with attached.lock:
            if attached.device.state is not State.ABSENT:
                await self._wait_unused(attached, timeout_s)
            await self._disconnect(attached)
            self._attached.pop(volume.name, None)

    def suspend(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        attached = self._attached.pop(volume.name, None)
        if attached is not None and attached.sever is not None:
            attached.sever()

    async def abandon(self, name: str, front: Front) -> None:
        """See DeviceFront."""
        found = await _off(self._port.devices)
        for device in found:
            if device.identifier == self._identifier(name):
                await self._end(device)

    async def named(self) -> None:
        """Wait until devices that came back have their names, by which guests open them; for a while."""
        await self._naming.finish(NAMES_WAIT_S)

    async def end_strays(self, served: Collection[str]) -> None:
        """Disconnect devices of this cache that belong to no volume served by them: nobody will ever answer there.

        Devices of other caches may be served by other daemons of this host; which of them nobody serves is not known.
        """
        names = {self._identifier(name) for name in served}
        own = self._identifier("")
        for device in await _off(self._port.devices):
            if device.identifier.startswith(own) and device.identifier not in names:
                await self._end(device)
            elif device.identifier.startswith(PREFIX) and device.identifier not in names:
                path, whose = f"/dev/nbd{device.number}", device.identifier.removeprefix(PREFIX)
                _LOG.warning(
                    "%s is of another cache, %s; if that is gone for good: nbd-client -d %s", path, whose, path
                )

    def resized(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        attached = self._attached.get(volume.name)
        if attached is not None:
            self._steps.start(self._resize(attached), f"{attached.path} does not see its new size")

    def place(self, volume: CacheVolume) -> Place:
        """See DeviceFront."""
        attached = self._attached.get(volume.name)
        if attached is None or attached.device.state is State.ABSENT:
            return Place()
        return Place(attached.path, attached.link)

    async def close(self) -> None:
        """See DeviceFront: a device that nobody uses is disconnected, so that nobody comes to wait for no daemon."""
        self._closing = True
        for attached in list(self._attached.values()):
            async with attached.lock:
                if attached.device.state is State.LIVE and not await _off(self._port.users, attached.device.number):
                    await self._disconnect(attached)
            if attached.sever is not None:
                attached.sever()
        self._steps.cancel()
        self._naming.cancel()

    # --- steps ------------------------------------------------------------------------------------------------

    def _add(self, volume: CacheVolume) -> _Attached:
        front = volume.front
        device = KernelDevice(
            self._identifier(volume.name),
            size=volume.size,
            block_size=front.block_size,
            flags=transmission_flags(volume),
            number=front.number - 1 if front.number else None,
        )
        attached = self._attached[volume.name] = _Attached(volume, device)
        return attached

    def _identifier(self, name: str) -> str:
        return f"{PREFIX}{self._cache.hex()}/{name}"

    async def _end(self, device: Found) -> None:
        """Disconnect a device that nobody is to serve any more."""
        path, name = f"/dev/nbd{device.number}", device.identifier.rpartition("/")[2]
        _LOG.error("%s: volume %s is not served by it any more: it ends, and whoever uses it gets errors", path, name)
        try:
            await _off(self._port.disconnect, device.number, wait_s=KERNEL_WAIT_S)
        except OSError as error:
            _LOG.error("%s can't be disconnected (%s); end it yourself: nbd-client -d %s", path, error, path)
            return
        await _off(remove_link, name, path, self._links)

    async def _guard(self) -> None:
        """With the first device, once."""
        if not self._guarded:
            self._guarded = True
            await _off(self._port.guard)

    async def _bring(self, attached: _Attached) -> None:
        """Make the device, or take it over, note its number and wait until it can be used."""
        device, volume = attached.device, attached.volume
        await self._guard()
        devices = await _off(self._port.devices)
        device.size = volume.size
        command: Connect | Mend | None = device.begin(devices)
        while command is not None:
            command = await self._carry_out(attached, command)
        await self._tell_size(attached)
        if device.number is not None and volume.front.number != device.number + 1:
            await self._note(volume, volume.front._replace(number=device.number + 1))
        await self._settle(attached)

    async def _carry_out(self, attached: _Attached, command: Connect | Mend) -> Connect | None:
        """Send a command with a fresh socket; return the next one, if that is another."""
        device = attached.device
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        lost = partial(self._lost, attached)
        attached.sever = self._nbd.adopt(ours, theirs, attached.volume, lost)
        number = command.number
        try:
            with theirs:
                if isinstance(command, Connect):
                    number = await _off(self._port.connect, command, theirs.fileno(), wait_s=KERNEL_WAIT_S)
                else:
                    await _off(self._port.mend, command, theirs.fileno(), wait_s=KERNEL_WAIT_S)
        except OSError as error:
            attached.sever()
            other = device.refused(error.errno or errno.EIO)
            if other is None:
                _LOG.warning("%s: a fresh socket was refused: %s", attached.path, error)
                self._mend_soon(attached)
            return other
        assert number is not None
        if device.done(number):
            self._mend_soon(attached)
        return None

    async def _settle(self, attached: _Attached) -> None:
        """Wait for the node of a device and its size."""
        path, number = attached.path, attached.device.number
        assert number is not None
        try:
            await _off(self._port.tune, number)
        except OSError as error:
            _LOG.warning("%s: after a crash of this daemon its requests wait up to 30 s (%s)", path, error.strerror)
        until = time.monotonic() + NODE_WAIT_S
        while not await _off(self._port.has_appeared, number, attached.device.size):
            if time.monotonic() > until:
                raise ForebayError(f"{path} does not appear with its size; is devtmpfs mounted at /dev?")
            await asyncio.sleep(_POLL_S)
        _LOG.info("volume %s is %s", attached.volume.name, path)

    async def _name(self, attached: _Attached) -> None:
        attached.link = await _off(make_link, attached.volume.name, attached.path, self._links)

    def _lost(self, attached: _Attached) -> None:
        """The kernel closed its socket, or we did."""
        attached.sever = None
        current = self._attached.get(attached.volume.name) is attached
        if attached.device.lost() and current and not self._closing:
            self._mend_soon(attached)

    def _mend_soon(self, attached: _Attached) -> None:
        self._steps.start(self._mend(attached), f"{attached.path} has no socket; whoever uses it waits")

    async def _mend(self, attached: _Attached) -> None:
        """Give a severed device a fresh socket."""
        await asyncio.sleep(attached.device.delay_s)
        async with attached.lock:
            device, volume = attached.device, attached.volume
            if device.state is not State.SEVERED or self._attached.get(volume.name) is not attached:
                return
            device.size = volume.size
            command = device.mend(await _off(self._port.devices))
            if command is None:
                volume.warning = f"somebody disconnected {attached.path}; attach the volume again"
                _LOG.error("volume %s: %s", volume.name, volume.warning)
            else:
                await self._carry_out(attached, command)
                await self._tell_size(attached)

    async def _resize(self, attached: _Attached) -> None:
        async with attached.lock:
            await self._tell_size(attached)

    async def _tell_size(self, attached: _Attached) -> None:
        """Tell the device the size of its volume, if it is another one."""
        attached.device.size = attached.volume.size
        command = attached.device.resize(await _off(self._port.devices))
        if command is not None:
            try:
                await _off(self._port.resize, command)
            except OSError as error:
                _LOG.error("%s: its new size was refused: %s", attached.path, error.strerror)

    async def _wait_unused(self, attached: _Attached, timeout_s: float) -> None:
        """Wait until nobody uses the device; what was written is with us then.

        Raises:
            RefusedError: somebody still does.
        """
        until = time.monotonic() + timeout_s
        while True:
            users = await _off(self._port.users, attached.device.number)
            if not users:
                return
            if time.monotonic() >= until:
                who = ", ".join(users)
                raise RefusedError(
                    messages.VOLUME_IN_USE, f"volume {attached.volume.name} is in use: {attached.path} is {who}"
                )
            await asyncio.sleep(USERS_POLL_S)

    async def _disconnect(self, attached: _Attached) -> None:
        path, number = attached.path, attached.device.leave()
        if number is None:
            return
        with contextlib.suppress(OSError):  # it is gone already
            await _off(self._port.disconnect, number)
        attached.device.left()
        await _off(remove_link, attached.volume.name, path, self._links)

    async def _undo(self, attached: _Attached) -> None:
        """An attach failed: leave nothing of it."""
        async with attached.lock:
            await self._disconnect(attached)
            if attached.sever is not None:
                attached.sever()
            self._attached.pop(attached.volume.name, None)


async def _off(call: Callable[..., _T], *arguments: object, wait_s: float | None = None) -> _T:
    """Call something that blocks, beside the event loop; TimeoutError, an OSError, if it takes longer than `wait_s`."""
    async with asyncio.timeout(wait_s):
        return await asyncio.get_running_loop().run_in_executor(None, partial(call, *arguments))

"""`--front loop`: volumes as /dev/loopN with direct I/O over the files of the FUSE front.

Invariant: a device that the front's mount does not carry any more is never taken for a living one.
Crash: the kernel keeps the devices, the FUSE front keeps their files and what they were asked for; the next start finds
both. If the front has died, its devices are dead: they are taken away, and made anew over the next mount.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final

from forebay_cache.engine.fuse_folder import Served
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front, FrontKind
from forebay_cache.service import fuse_mount, loop_device
from forebay_cache.service.device_fronts import NoteFront, Place, Steps, tell_missing
from forebay_cache.service.device_links import FOLDER, make_link, remove_link
from forebay_cache.service.device_users import users_of
from forebay_cache.service.fuse_device import release_file
from forebay_cache.service.fuse_keeper import FuseKeeper
from forebay_core.errors import ForebayError, RefusedError
from forebay_wire import messages

POLL_S: Final = 0.1
_LOG = logging.getLogger(__name__)


class _Loop:
    """A volume with its device, if it has one now. `lock`: one step at a time."""

    def __init__(self, volume: CacheVolume) -> None:
        self.volume = volume
        self.number: int | None = volume.front.number - 1 if volume.front.number else None
        self.link = ""
        self.lock = asyncio.Lock()


class LoopFront:
    """Implements DeviceFront."""

    kind = FrontKind.LOOP

    def __init__(self, keeper: FuseKeeper, *, note: NoteFront, links: Path = FOLDER) -> None:
        """`note` logs the front of a volume durably."""
        self._keeper = keeper
        self._note = note
        self._links = links
        self._loops: dict[str, _Loop] = {}
        self._steps = Steps()
        keeper.restarted.append(self._restore)

    def check(self) -> None:
        """See DeviceFront."""
        fuse_mount.check_fuse()
        loop_device.check_loop()

    async def attach(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        loop = self._loops[volume.name] = _Loop(volume)
        try:
            async with loop.lock:
                await self._bring(loop)
        except BaseException:
            await asyncio.shield(self._undo(loop))
            raise

    async def resume(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        self.check()
        await self.attach(volume)

    async def detach(self, volume: CacheVolume, timeout_s: float) -> None:
        """See DeviceFront."""
        loop = self._loops.get(volume.name)
        if loop is None:
            return
        end_s = asyncio.get_running_loop().time() + timeout_s
        async with loop.lock:
            while not await self._remove(loop):
                if asyncio.get_running_loop().time() >= end_s:
                    who = await self._users(loop)
                    raise RefusedError(messages.VOLUME_IN_USE, f"volume {volume.name} is in use: {who}")
                await asyncio.sleep(POLL_S)
            await release_file(self._keeper, volume.name, max(timeout_s, 1.0))
            self._loops.pop(volume.name, None)

    def suspend(self, volume: CacheVolume) -> None:
        """See DeviceFront: who uses the device gets errors until `attach`, as the volume has stopped."""

    async def abandon(self, name: str, front: Front) -> None:
        """See DeviceFront; a device that somebody has open goes when he closes it."""
        self._loops.pop(name, None)
        number = front.number - 1
        if await asyncio.to_thread(loop_device.backing_of, number) == str(self._keeper.path(name)):
            await asyncio.to_thread(loop_device.remove, number)
            await asyncio.to_thread(remove_link, name, loop_device.path_of(number), self._links)
        await self._keeper.hide(name)

    def resized(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        loop = self._loops.get(volume.name)
        if loop is not None:
            self._steps.start(self._grow(loop), f"volume {volume.name}: its device does not see its new size")

    def place(self, volume: CacheVolume) -> Place:
        """See DeviceFront."""
        loop = self._loops.get(volume.name)
        if loop is None or loop.number is None:
            return Place()
        return Place(loop_device.path_of(loop.number), loop.link)

    async def close(self) -> None:
        """See DeviceFront: a device that nobody uses is taken away, so that nobody comes to wait for no daemon."""
        self._steps.cancel()
        for loop in self._loops.values():
            async with loop.lock:
                await self._remove(loop)

    # --- steps ------------------------------------------------------------------------------------------------

    async def _bring(self, loop: _Loop) -> None:
        """Show the volume's file, find its device or make one, note its number and name it."""
        volume = loop.volume
        await self._keeper.serve(volume.name, Served(volume.size, volume.read_only))
        file = self._keeper.path(volume.name)
        before, loop.number = loop.number, None
        number = await asyncio.to_thread(_living, file, before)
        if number is None:
            number = await asyncio.to_thread(loop_device.make, file, read_only=volume.read_only)
        loop.number = number
        if before is not None and before != number:
            await asyncio.to_thread(remove_link, volume.name, loop_device.path_of(before), self._links)
        if volume.front.number != number + 1:
            await self._note(volume, volume.front._replace(number=number + 1))
        path = loop_device.path_of(number)
        loop.link = await asyncio.to_thread(make_link, volume.name, path, self._links)
        _LOG.info("volume %s is %s", volume.name, path)

    async def _remove(self, loop: _Loop) -> bool:
        """Take the device away unless somebody uses it; tell whether it is gone."""
        number = loop.number
        if number is None:
            return True
        file, path = self._keeper.path(loop.volume.name), loop_device.path_of(number)
        ours = await asyncio.to_thread(loop_device.backing_of, number) == str(file)
        if ours and not await asyncio.to_thread(_remove_unused, number):
            return False
        await asyncio.to_thread(remove_link, loop.volume.name, path, self._links)
        loop.number = None
        return True

    async def _users(self, loop: _Loop) -> str:
        assert loop.number is not None
        path = loop_device.path_of(loop.number)
        users = await asyncio.to_thread(users_of, path)
        return f"{path} is {', '.join(users) or 'open in a process that /proc does not show'}"

    async def _undo(self, loop: _Loop) -> None:
        """An attach failed: leave nothing of it."""
        async with loop.lock:
            await self._remove(loop)
            self._loops.pop(loop.volume.name, None)
            try:
                await self._keeper.release(loop.volume.name)
            except ForebayError as error:
                _LOG.error("volume %s: %s", loop.volume.name, error)

    async def _grow(self, loop: _Loop) -> None:
        async with loop.lock:
            volume = loop.volume
            await self._keeper.serve(volume.name, Served(volume.size, volume.read_only))
            if loop.number is not None:
                await asyncio.to_thread(loop_device.adopt_size, loop.number)

    def _restore(self) -> None:
        """The FUSE front died and another one is there: make all devices anew."""
        for loop in self._loops.values():
            self._steps.start(self._bring_back(loop), f"volume {loop.volume.name}: its device did not come back")

    async def _bring_back(self, loop: _Loop) -> None:
        async with loop.lock:
            volume = loop.volume
            if self._loops.get(volume.name) is not loop:
                return
            try:
                await self._bring(loop)
            except ForebayError as error:
                tell_missing(volume, error)


def _remove_unused(number: int) -> bool:
    return not users_of(loop_device.path_of(number)) and loop_device.remove(number)


def _living(file: Path, before: int | None) -> int | None:
    """Return the device that is over a file, or None.

    Those over the same file of a dead mount are taken away, and those that a daemon made that was killed at it.
    """
    found = loop_device.devices_of(file)
    for number in {*found, *(() if before is None else (before,))}:
        if loop_device.is_dead(number):
            if not loop_device.remove(number):
                _LOG.warning("%s is dead and still in use; it goes when it is closed", loop_device.path_of(number))
            found = [other for other in found if other != number]
    kept = before if before in found else next(iter(found), None)
    for number in found:
        if number != kept:
            _remove_unused(number)
    return kept

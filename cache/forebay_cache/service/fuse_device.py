"""The front that shows a volume as a file: `forebay attach --front fuse`."""

import asyncio
from typing import Final

from forebay_cache.engine.fuse_folder import Served
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front, FrontKind
from forebay_cache.service import fuse_mount
from forebay_cache.service.device_fronts import Place, Steps
from forebay_cache.service.file_users import describe_users
from forebay_cache.service.fuse_keeper import FuseKeeper
from forebay_core.errors import RefusedError
from forebay_wire import messages

POLL_S: Final = 0.1


class FuseDevice:
    """Implements DeviceFront; the keeper does the work."""

    kind = FrontKind.FUSE

    def __init__(self, keeper: FuseKeeper) -> None:
        self._keeper = keeper
        self._steps = Steps()

    def check(self) -> None:
        """See DeviceFront."""
        fuse_mount.check_fuse()

    async def attach(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        await self._keeper.serve(volume.name, Served(volume.size, volume.read_only))

    async def resume(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        await self.attach(volume)

    async def detach(self, volume: CacheVolume, timeout_s: float) -> None:
        """See DeviceFront."""
        await release_file(self._keeper, volume.name, timeout_s)

    def suspend(self, volume: CacheVolume) -> None:
        """See DeviceFront: who has the file open gets errors until `attach`, as the volume has stopped."""

    async def abandon(self, name: str, front: Front) -> None:
        """See DeviceFront."""
        await self._keeper.hide(name)

    def resized(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        self._steps.start(self.attach(volume), f"volume {volume.name}: its file does not see its new size")

    def place(self, volume: CacheVolume) -> Place:
        """See DeviceFront."""
        return Place(str(self._keeper.path(volume.name))) if self._keeper.shows(volume.name) else Place()

    async def close(self) -> None:
        """See DeviceFront."""
        await self._keeper.close()


async def release_file(keeper: FuseKeeper, name: str, timeout_s: float) -> None:
    """Show a volume no longer, when nobody has it open.

    Raises:
        RefusedError: somebody still has after `timeout_s`; the text says who.
    """
    end_s = asyncio.get_running_loop().time() + timeout_s
    while await keeper.release(name):
        if asyncio.get_running_loop().time() >= end_s:
            users = await asyncio.to_thread(describe_users, keeper.path(name))
            raise RefusedError(messages.VOLUME_IN_USE, f"volume {name} is in use by {users}; close {keeper.path(name)}")
        await asyncio.sleep(POLL_S)

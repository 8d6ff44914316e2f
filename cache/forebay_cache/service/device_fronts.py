"""The fronts that give a volume a device or a file of its own, besides the NBD socket that serves them all.

Invariants:
    A front is asked only for volumes whose row names it.
    At most one step of a volume is under way: the shell sees to it.
Crash: the rows say which front each volume has; `resume` brings all of them back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Final, NamedTuple, Protocol

from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front, FrontKind
from forebay_core.errors import ForebayError, RefusedError
from forebay_wire import messages

NAMES: Final = {kind.name.lower(): kind for kind in FrontKind}
_LOG = logging.getLogger(__name__)

NoteFront = Callable[[CacheVolume, Front], Awaitable[None]]
"""Logs the front of a volume durably."""


class Place(NamedTuple):
    """Where a device or file is; `link` is a name of it that outlives restarts, if it has one."""

    path: str = ""
    link: str = ""


class DeviceFront(Protocol):
    """One kind of front. Everything may raise a ForebayError."""

    @property
    def kind(self) -> FrontKind:
        """Which one it is."""

    def check(self) -> None:
        """Look whether this host can do it, before anything is opened."""

    async def attach(self, volume: CacheVolume) -> None:
        """Make the device or file of a volume that is served; nothing is left of it if this fails."""

    async def resume(self, volume: CacheVolume) -> None:
        """The same for a volume that was attached when the daemon ended: what is still there is used again."""

    async def detach(self, volume: CacheVolume, timeout_s: float) -> None:
        """Take it away once nobody uses it; if somebody still does after `timeout_s`, refuse and say who."""

    def suspend(self, volume: CacheVolume) -> None:
        """The volume stops being served for a while; `attach` follows, or `abandon`."""

    async def abandon(self, name: str, front: Front) -> None:
        """A suspended volume is not served any more: take away what it had; who uses that gets errors, not waits."""

    def resized(self, volume: CacheVolume) -> None:
        """The volume became larger."""

    def place(self, volume: CacheVolume) -> Place:
        """Tell where it is."""

    async def close(self) -> None:
        """The daemon ends: let everything wait for the next one."""


class Steps:
    """Steps of a front that nobody waits for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, step: Coroutine[object, object, None], failure: str) -> None:
        """Take a step beside everything else; if it fails, `failure` and the reason are a line of the log."""
        task = asyncio.create_task(step)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, failure))

    async def finish(self, timeout_s: float) -> None:
        """Wait for what is under way, but not longer than that."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def cancel(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()

    def _ended(self, failure: str, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, (ForebayError, OSError)):
            _LOG.error("%s: %s", failure, error)
        elif error is not None:  # a bug
            task.get_loop().call_exception_handler({"message": failure, "exception": error})


def tell_missing(volume: CacheVolume, error: ForebayError) -> None:
    """Warn of a volume whose device did not come back."""
    volume.warning = f"its device did not come back: {error}"
    _LOG.error("volume %s: %s", volume.name, volume.warning)


class DeviceFronts:
    """The fronts of this daemon, by kind."""

    def __init__(self, fronts: Sequence[DeviceFront] = ()) -> None:
        self._fronts = {front.kind: front for front in fronts}

    def wanted(self, name: str, block_size: int) -> Front:
        """Return what a command asked for by name.

        Raises:
            ForebayError: there is no such front, or the host can't do it.
        """
        kind = NAMES.get(name)
        if kind is None or (kind is not FrontKind.NBD and kind not in self._fronts):
            raise RefusedError(messages.BAD_REQUEST, f"front {name[:20]!r}: this daemon has {', '.join(self._names())}")
        if kind is not FrontKind.NBD:
            self._fronts[kind].check()
        return Front(kind, block_size)

    async def attach(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        if (front := self._of(volume)) is not None:
            await front.attach(volume)

    async def detach(self, volume: CacheVolume, timeout_s: float) -> None:
        """See DeviceFront."""
        if (front := self._of(volume)) is not None:
            await front.detach(volume, timeout_s)

    async def resume(self, volumes: Sequence[CacheVolume]) -> None:
        """Bring back the devices of volumes, all at once; one that does not come back is told, and keeps no other."""
        await asyncio.gather(*(self._resume(volume) for volume in volumes))

    async def bring_back(self, volume: CacheVolume) -> None:
        """Make the device of an attached volume again that did not come back at the start, or was taken away.

        Raises:
            ForebayError: it does not come back now.
        """
        front = self._of(volume)
        if front is not None and not front.place(volume).path:
            await front.resume(volume)
            volume.warning = ""

    def suspend(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        if (front := self._of(volume)) is not None:
            front.suspend(volume)

    async def abandon(self, name: str, front: Front) -> None:
        """See DeviceFront; that this does not work either is only told."""
        kind = self._fronts.get(front.kind)
        try:
            if kind is not None:
                await kind.abandon(name, front)
        except ForebayError as error:
            _LOG.error("volume %s: what it was seen by is left over: %s", name, error)

    def resized(self, volume: CacheVolume) -> None:
        """See DeviceFront."""
        if (front := self._of(volume)) is not None:
            front.resized(volume)

    def place(self, volume: CacheVolume) -> Place:
        """See DeviceFront."""
        front = self._of(volume)
        return front.place(volume) if front is not None else Place()

    async def close(self) -> None:
        """See DeviceFront."""
        for front in self._fronts.values():
            await front.close()

    async def _resume(self, volume: CacheVolume) -> None:
        front = self._of(volume)
        if front is None:
            if volume.front.kind is not FrontKind.NBD:
                volume.warning = f"this daemon has no front {volume.front.kind.name.lower()}; detach the volume"
            return
        try:
            await front.resume(volume)
        except ForebayError as error:
            tell_missing(volume, error)

    def _of(self, volume: CacheVolume) -> DeviceFront | None:
        return self._fronts.get(volume.front.kind)

    def _names(self) -> list[str]:
        return [name for name, kind in NAMES.items() if kind is FrontKind.NBD or kind in self._fronts]

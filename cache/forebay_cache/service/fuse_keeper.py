"""Keeps a FUSE front alive as long as something is to be served by it, and tells it what.

Invariants:
    A name is in `_served` exactly from `serve` to its release: what a new front is told first.
    One call is under way at a time.
Crash: the front lives on and its users wait; the next daemon finds it by its socket.
"""

import asyncio
import contextlib
import logging
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from forebay_cache.engine.fuse_folder import Served
from forebay_cache.service import fuse_mount
from forebay_cache.service.fuse_calls import LINE_SIZE_MAX, READY, SOCKET, VOLUMES, Call, CallAnswer
from forebay_core.errors import ForebayError

START_TIMEOUT_S: Final = 30.0
CALL_TIMEOUT_S: Final = 10.0
REAP_TIMEOUT_S: Final = 2.0
RESTART_PAUSE_S: Final = 1.0
"""Between starts of fronts that die at once."""

_LOG = logging.getLogger(__name__)


class FuseKeeper:
    """The daemon's end; `restarted` is called when a new front serves what a dead one did."""

    def __init__(self, run_dir: Path) -> None:
        self.restarted: list[Callable[[], None]] = []
        self._run_dir = run_dir
        self._served: dict[str, Served] = {}
        self._alone = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watching: asyncio.Task[None] | None = None
        self._answers: asyncio.Queue[CallAnswer | None] = asyncio.Queue()
        self._child: subprocess.Popen[str] | None = None

    def path(self, name: str) -> Path:
        """Return where a volume is seen."""
        return self._run_dir / VOLUMES / name

    def shows(self, name: str) -> bool:
        """Tell whether a volume is to be seen, by this front or the next one."""
        return name in self._served

    async def serve(self, name: str, served: Served) -> None:
        """Show a volume, or tell its new size.

        Raises:
            ForebayError: there can be no front; the volume is not shown.
        """
        async with self._alone:
            before = self._served.get(name)
            self._served[name] = served
            try:
                if not await self._ensure():
                    await self._call(_serve(name, served))
            except ForebayError:
                del self._served[name]
                if before is not None:
                    self._served[name] = before
                raise

    async def release(self, name: str) -> int:
        """Show a volume no longer; return how many have it open, in which case it stays.

        Raises:
            ForebayError: the front does not answer.
        """
        async with self._alone:
            openings = await self._call(Call(release=name)) if self._writer is not None else 0
            if not openings:
                self._served.pop(name, None)
            if not self._served:
                await self._gone()
            return openings

    async def hide(self, name: str) -> None:
        """Show a volume no longer, whether somebody has it open or not.

        Raises:
            ForebayError: the front does not answer.
        """
        async with self._alone:
            self._served.pop(name, None)
            openings = await self._call(Call(release=name, hide=True)) if self._writer is not None else 0
            if not self._served and not openings:
                await self._gone()

    async def close(self) -> None:
        """The daemon ends: so does the front, unless somebody has something open, who waits for the next daemon."""
        async with self._alone:
            if self._watching is not None:
                self._watching.cancel()
            if self._writer is not None:
                with contextlib.suppress(OSError):
                    self._writer.write(msgspec.json.encode(Call(end=True)) + b"\n")
                    await self._writer.drain()
                self._writer.close()
                self._writer = None
            await self._reap(0)

    # --- inside -----------------------------------------------------------------------------------------------

    async def _call(self, call: Call) -> int:
        assert self._writer is not None
        try:
            self._writer.write(msgspec.json.encode(call) + b"\n")
            answer = await asyncio.wait_for(self._answers.get(), CALL_TIMEOUT_S)
        except (OSError, TimeoutError):
            answer = None
        if answer is None:
            self._writer.close()
            raise ForebayError("the FUSE front does not answer; it is started anew, try again")
        return answer.open

    async def _ensure(self) -> bool:
        """Have a front that serves everything; tell whether that took a new connection to one."""
        if self._writer is not None:
            return False
        await self._start()
        for name, served in self._served.items():
            await self._call(_serve(name, served))
        return True

    async def _start(self) -> None:
        """Connect to a living front, or start one."""
        if not await self._connect():
            self._child = await asyncio.to_thread(_start_front, self._run_dir)
            if not await self._connect():
                raise ForebayError("the FUSE front ended when it had begun")

    async def _connect(self) -> bool:
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(self._run_dir / SOCKET, limit=LINE_SIZE_MAX)
        except OSError:
            return False
        self._answers = asyncio.Queue()
        self._watching = asyncio.create_task(self._watch(self._reader, self._answers))
        return True

    async def _watch(self, reader: asyncio.StreamReader, answers: asyncio.Queue[CallAnswer | None]) -> None:
        """Take answers until the front is gone; start another one if it is needed."""
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError):
            while line := await reader.readline():
                answers.put_nowait(msgspec.json.decode(line, type=CallAnswer))
        answers.put_nowait(None)
        async with self._alone:
            self._drop()
        await self._reap(REAP_TIMEOUT_S)
        while self._served and self._writer is None:
            _LOG.error("the FUSE front ended; starting another one")
            try:
                async with self._alone:
                    await self._ensure()
            except ForebayError as error:
                _LOG.error("%s", error)
                await asyncio.sleep(RESTART_PAUSE_S)
            else:
                for call in self.restarted:
                    call()

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = self._watching = None

    async def _gone(self) -> None:
        """Wait until a front that has nothing to serve is gone, mount and all."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
        if self._reader is not None and self._writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._reader.read(), CALL_TIMEOUT_S)
        self._drop()
        await self._reap(REAP_TIMEOUT_S)

    async def _reap(self, timeout_s: float) -> None:
        """Take the exit code of a front that was our child."""
        child = self._child
        if child is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(child.wait, timeout_s)
            self._child = None


def _serve(name: str, served: Served) -> Call:
    return Call(serve=name, size=served.size, read_only=served.read_only)


def _start_front(run_dir: Path) -> "subprocess.Popen[str]":
    """Start one in a session of its own and return when it has mounted.

    Raises:
        ForebayError: it could not.
    """
    fuse_mount.check_fuse()
    words = [sys.executable, "-m", "forebay_cache.service.fuse_front", str(run_dir)]
    try:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        raise ForebayError(f"the FUSE front can't be started ({error.strerror})") from error
    assert child.stdout is not None
    with child.stdout:
        ready, _, _ = select.select([child.stdout], [], [], START_TIMEOUT_S)
        said = child.stdout.readline().strip() if ready else "the FUSE front did not start in time"
    if said != READY:
        child.kill()
        child.wait()
        raise ForebayError(said or "the FUSE front ended before it had begun; see the daemon's log")
    return child

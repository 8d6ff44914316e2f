"""The cleaner at work: when a pass begins, how fast it goes, and what is told of it.

It looks by itself soon after something was written, and once more, thoroughly, when clients have been quiet for a
while; `ask` lets it clean thoroughly at once. It copies at a limited rate, faster only when the space would grow out
of hand. Invariants: one pass at a time; a pass that meets an error ends and is tried again later.
Crash: see `forebay_store.engine.cleaner`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final, assert_never

from forebay_core.errors import ForebayError, NoSpaceError
from forebay_store.engine.books import is_of_index
from forebay_store.engine.cleaner import Append, Cleaner, Job, Pause, Records, Work
from forebay_store.engine.cleaning import DamagedPlace
from forebay_store.engine.ports import Index, SegmentBackend
from forebay_store.engine.pushback import Pushback, space_pressure
from forebay_store.engine.space import BUSY, RESTING, DiskRoom, Pressure, Space
from forebay_store.format.segment import SegmentName
from forebay_store.limits import (
    CLEAN_IDLE_S,
    CLEAN_LOOK_SHARE,
    CLEAN_LOOK_SIZE,
    CLEAN_PAUSE_S,
    CLEAN_RETRY_S,
    CLEAN_YIELD,
    PURGE_PAUSE_S,
    RESERVE_SHARE,
    RESERVE_SIZE_MAX,
)
from forebay_wire import messages

_LOG: Final = logging.getLogger("forebay.store")


class CleanerShell:
    """Cleans one open store."""

    def __init__(
        self,
        index: Index,
        backend: SegmentBackend,
        *,
        store: bytes,
        rate: int,
        room: Callable[[], DiskRoom],
        append: Callable[[Records], Awaitable[None]],
        fresh_number: Callable[[], int],
        on_damage: Callable[[list[DamagedPlace]], None],
        condemn: Callable[[ForebayError], None],
        purging: Callable[[], bool],
        shrink: Callable[[], object],
    ) -> None:
        """`rate` is in bytes per second; `room` asks the disk; `append` puts records into the log and returns when the
        index shows them; `condemn` is told of damage to the index; `purging` tells whether what was deleted is still
        being taken out of the index; `shrink` gives back what the index no longer needs, and is called when a thorough
        pass has ended.
        """
        self._room = room
        self._cleaner = Cleaner(index, backend, store=store, room=lambda: room().free)
        self._rate = rate
        self._append = append
        self._fresh_number = fresh_number
        self._on_damage = on_damage
        self._condemn = condemn
        self._purging = purging
        self._shrink = shrink
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "cleaner")
        self._wake = asyncio.Event()
        self._asked = False
        self._written = True  # something, since the last look; at the start nobody knows
        self._staged_size = 0  # bytes that came since the last commit was answered
        self._fresh_size = 0  # bytes since the last look
        self._look_size = CLEAN_LOOK_SIZE
        self._pushback = Pushback()
        self._looked_at: Space | None = None  # when it was last known how much lives
        self._since_look_size = 0  # bytes that came since
        self._arriving_size = 0  # bytes that were let in and are not answered yet
        self._rested = False  # after a thorough pass nothing was written
        self._quiet_from_s = self._loop.time()
        self._active_s = 0.0
        self._running = False
        self._passes = 0
        self._error = ""
        self._task = self._loop.create_task(self._run())

    def bar(self, segments: Iterable[SegmentName]) -> None:
        """Damage was found in these: they are no victims any more, and the index may need a new checkpoint."""
        self._cleaner.bar(segments)
        self._written = True

    def note_read(self) -> None:
        """A client reads."""
        self._active_s = self._loop.time()

    def note_request(self, size: int) -> None:
        """A client changes something, with so many bytes."""
        self._quiet_from_s = self._active_s = self._loop.time()
        self._written = True
        self._rested = False
        self._staged_size += size

    def note_commit(self) -> None:
        """The index shows a cut: when many bytes came the next look comes at once, and not before it would see them."""
        self._written = True
        self._fresh_size += self._staged_size
        self._staged_size = 0
        if self._fresh_size >= self._look_size:
            self._wake.set()

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """Span the taking of data, none for a trim: the last bytes of a disk are for those, deletions and cleaning.

        Data that was let in and is not on the disk yet counts, or many clients at once would take those bytes.

        Raises:
            NoSpaceError: there is no room for it.
        """
        if size and self._room().free - self._arriving_size - size < self._reserve():
            self._wake.set()
            raise NoSpaceError("the disk under the store is full but for what freeing space needs; free some")
        self._arriving_size += size
        try:
            yield
        finally:
            self._arriving_size -= size

    async def wait_turn(self, size: int) -> None:
        """Wait before data is taken if garbage grows faster than it is cleaned, and is about to fill the disk.

        A look is old when a job takes long: what came since counts as if it made as much dead.
        """
        cleaner = self._cleaner
        if cleaner.space is not self._looked_at:
            self._looked_at, self._since_look_size = cleaner.space, 0
        self._since_look_size += size
        if not self._running:
            return
        delay_s = self._pushback.delay_s(
            size,
            self._loop.time(),
            disk_size=cleaner.disk_size + self._since_look_size,
            live_size=cleaner.live_size,
            free_size=self._room().free,
            is_disk_low=self._is_disk_low(),
        )
        if delay_s:
            await asyncio.sleep(delay_s)

    def _is_disk_low(self) -> bool:
        return self._room().free < 2 * self._reserve()

    def _reserve(self) -> int:
        space = self._cleaner.space
        least = min(RESERVE_SIZE_MAX, int(self._room().total * RESERVE_SHARE))
        return max(least, 2 * space.checkpoint_size) if space is not None else least

    def ask(self) -> None:
        """Clean thoroughly, now."""
        self._asked = True
        self._wake.set()

    @property
    def segments_freed(self) -> int:
        """Segments deleted since the start."""
        return self._cleaner.counts.segments_freed

    @property
    def bytes_freed(self) -> int:
        """Their bytes."""
        return self._cleaner.counts.bytes_freed

    def status(self) -> messages.CleanStatus:
        """Return what a status shows."""
        counts = self._cleaner.counts
        return messages.CleanStatus(
            running=self._running or self._asked,
            passes=self._passes,
            segments_freed=counts.segments_freed,
            bytes_freed=counts.bytes_freed,
            bytes_copied=counts.bytes_copied,
            error=self._error,
        )

    async def stop(self) -> None:
        """End after the job under way."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()

    # The passes.

    async def _run(self) -> None:
        while True:
            await self._wait(CLEAN_RETRY_S if self._error else CLEAN_PAUSE_S)
            asked = self._asked
            idle = self._loop.time() - self._quiet_from_s >= CLEAN_IDLE_S
            if not (asked or self._written or (idle and not self._rested)):
                continue
            if asked:
                await self._wait_purged()
            self._asked = self._written = False
            self._fresh_size = 0
            await self._pass(asked)
            self._passes += asked
            self._rested = (asked or idle) and not self._written and not self._error

    async def _wait(self, pause_s: float) -> None:
        if not self._asked:
            timer = self._loop.call_later(pause_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
        self._wake.clear()

    async def _wait_purged(self) -> None:
        """Wait for the end of purging: who deletes something and lets the store clean then wants that space back."""
        while self._purging():
            await asyncio.sleep(PURGE_PAUSE_S)

    async def _pass(self, asked: bool) -> None:
        self._running = True
        jobs = self._cleaner.clean(pressure=lambda _: self._pressure(asked), checkpoint=self._fresh_number)
        try:
            for job in jobs:
                await self._perform(job, asked)
            if self._pressure(asked) is RESTING:
                await self._loop.run_in_executor(self._thread, self._shrink)
            self._error = ""
            if self._cleaner.space is not None:
                self._look_size = max(CLEAN_LOOK_SIZE, int(self._cleaner.live_size * CLEAN_LOOK_SHARE))
        except ForebayError as error:
            self._error = str(error)
            _LOG.warning("cleaning ended early: %s", error)
            if is_of_index(error):
                self._condemn(error)
        except Exception as error:
            self._error = f"a bug ({type(error).__name__}: {error})"
            _LOG.exception("a bug in the cleaner")
        finally:
            jobs.close()
            self._running = False
            damaged = self._cleaner.take_damaged()
            if damaged:
                self._on_damage(damaged)

    async def _perform(self, job: Job, asked: bool) -> None:
        match job:
            case Work(call):
                await self._loop.run_in_executor(self._thread, call)
            case Append(records):
                await self._append(records)
            case Pause(size):
                await asyncio.sleep(size / self._rate * self._patience(asked))
            case _:
                assert_never(job)

    def _pressure(self, asked: bool) -> Pressure:
        idle = self._loop.time() - self._quiet_from_s >= CLEAN_IDLE_S
        return RESTING if asked or idle or self._is_disk_low() else BUSY

    def _patience(self, asked: bool) -> float:
        """Return how many times the pause to make: more while clients work, none when the space grows out of hand."""
        yields = CLEAN_YIELD if self._loop.time() - self._active_s < CLEAN_PAUSE_S else 1.0
        if asked:
            return yields
        return yields * (1.0 - space_pressure(self._cleaner.disk_size, self._cleaner.live_size)) ** 2

"""The scrub at work: when a pass begins, how fast it goes, what it found, and where it goes on after a restart.

Invariants: one pass at a time; a damaged segment is told to the cleaner, which leaves it alone. What is known to be
damaged stays known until a whole pass has not found it again.
Crash: the pass goes on behind the last segment that its file names.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, Protocol, TypeVar

from forebay_core.errors import CorruptionError, ForebayError
from forebay_store.engine.books import Audit, is_of_index
from forebay_store.engine.cleaning import DamagedPlace
from forebay_store.engine.moving import segment_name
from forebay_store.engine.ports import Index, SegmentBackend
from forebay_store.engine.scrubbing import check_segment, place_of, shown_at
from forebay_store.format.damage_file import ScrubState, Shown
from forebay_store.format.rows import Table, decode_segment_row
from forebay_store.format.segment import NO_SEGMENT, SegmentName
from forebay_store.limits import DAMAGE_PER_PAGE_MAX, DAMAGE_ROWS_MAX, SCRUB_PAUSE_S, SCRUB_ROWS_PER_LOOK, SCRUB_YIELD_S
from forebay_wire import messages

Result = TypeVar("Result")
_LOG: Final = logging.getLogger("forebay.store")


class File(Protocol):
    """Where the state of the scrub is kept."""

    def read(self) -> ScrubState:
        """Return what was kept."""

    def write(self, state: ScrubState) -> None:
        """Keep this instead."""


class ScrubShell:
    """Scrubs one open store."""

    def __init__(
        self,
        index: Index,
        backend: SegmentBackend,
        file: File,
        *,
        store: bytes,
        rate: int,
        every_ns: int,
        wall_ns: Callable[[], int],
        bar: Callable[[Iterable[SegmentName]], None],
        condemn: Callable[[ForebayError], None],
        proved: Callable[[], None],
    ) -> None:
        """`rate` is in bytes per second; a pass begins by itself `every_ns` after the last one, never with 0. `condemn`
        is told of damage to the index, which is looked at once after the start as well; `proved` is called in a thread
        when it was found whole."""
        self._index = index
        self._backend = backend
        self._file = file
        self._store = store
        self._own_rate = self._rate = rate
        self._every_ns = every_ns
        self._wall_ns = wall_ns
        self._bar = bar
        self._condemn = condemn
        self._proved = proved
        self._is_audited = False  # since the start
        self._ending = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "scrub")
        self._wake = asyncio.Event()
        self._state = file.read()
        self._found = list(self._state.rows) if self._state.is_running else []  # by the pass under way
        self._places: list[DamagedPlace] = []  # told by others, not looked up yet
        self._kept_s = self._loop.time()
        bar({row.segment for row in self._state.rows})
        self._task = self._loop.create_task(self._run())

    def ask(self, rate: int) -> None:
        """Begin a pass, or go on with the one under way; `rate` 0: that of the settings."""
        self._rate = rate or self._own_rate
        if not self._state.is_running:
            self._begin()
        self._wake.set()

    def note_error(self, error: CorruptionError) -> None:
        """A read met damage."""
        place = place_of(error)
        if place is not None:
            self.note_places([place])

    def note_places(self, places: list[DamagedPlace]) -> None:
        """Others met damage; what is damaged by it is looked up soon."""
        known = {(row.segment, row.offset) for row in self._state.rows}
        fresh = [place for place in places if (place.segment, place.offset) not in known]
        self._bar({place.segment for place in places})
        self._places += fresh[: DAMAGE_ROWS_MAX - len(self._places)]
        if fresh:
            self._wake.set()

    def status(self) -> messages.ScrubStatus:
        """Return what a status shows."""
        state = self._state
        return messages.ScrubStatus(
            running=state.is_running,
            checked_size=state.checked_size,
            total_size=state.total_size,
            damaged=len(state.rows),
            started_ns=state.started_ns,
            finished_ns=state.finished_ns,
        )

    def damage(self, message: messages.GetDamage) -> messages.Damage:
        """Answer GetDamage."""
        after = max(0, message.after)
        end = after + max(1, min(message.count_max, DAMAGE_PER_PAGE_MAX))
        rows = self._state.rows[after:end]
        return messages.Damage(tuple(map(_damaged, rows)), end < len(self._state.rows))

    async def stop(self) -> None:
        """End after the step under way; the next start goes on from there."""
        self._ending.set()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._loop.run_in_executor(self._thread, self._file.write, self._state)
        self._thread.shutdown()

    # The pass.

    async def _run(self) -> None:
        while True:
            try:
                if not self._is_audited:
                    await self._in_thread(self._audit)
                await self._look_up()
                if self._is_due() and not self._state.is_running:
                    self._begin()
                if self._state.is_running:
                    await self._pass()
            except ForebayError as error:
                if is_of_index(error):
                    self._condemn(error)
                    return
                _LOG.warning("the scrub waits: %s", error)
            except Exception:
                _LOG.exception("a bug in the scrub")
            timer = self._loop.call_later(SCRUB_PAUSE_S, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
            self._wake.clear()

    def _is_due(self) -> bool:
        """Tell whether the last pass is long ago, or was when the clock was far ahead."""
        return self._every_ns > 0 and abs(self._wall_ns() - self._state.finished_ns) >= self._every_ns

    def _begin(self) -> None:
        self._found = []
        self._state = self._state._replace(
            position=NO_SEGMENT, checked_size=0, total_size=0, started_ns=self._wall_ns(), is_running=True
        )

    async def _pass(self) -> None:
        segments = await self._in_thread(self._segments)
        self._state = self._state._replace(
            total_size=self._state.checked_size + sum(size for name, size in segments if name > self._state.position)
        )
        for name, size in segments:
            if name > self._state.position:
                await self._check(name, size)
        await self._in_thread(self._audit)
        self._state = self._state._replace(
            position=NO_SEGMENT,
            finished_ns=self._wall_ns(),
            is_running=False,
            rows=tuple(sorted(set(self._found)))[:DAMAGE_ROWS_MAX],
        )
        self._rate = self._own_rate
        await self._keep()
        _LOG.info("scrub ended: %d bytes checked, %d extents damaged", self._state.checked_size, len(self._state.rows))

    async def _check(self, name: SegmentName, size: int) -> None:
        places = await self._in_thread(lambda: check_segment(self._backend, name, store=self._store))
        if places:
            await self._note_damaged(name, places)
        self._state = self._state._replace(position=name, checked_size=self._state.checked_size + size)
        if self._loop.time() - self._kept_s >= SCRUB_PAUSE_S or places:
            await self._keep()
        await self._look_up()
        await asyncio.sleep(size / self._rate)

    async def _note_damaged(self, name: SegmentName, places: list[DamagedPlace]) -> None:
        """Note what is damaged, unless the segment is needed no more: it may have been deleted while it was checked."""
        needed = await self._in_thread(self._segments)
        if name in {one for one, _ in needed}:
            self._note(await self._in_thread(lambda: self._shown(places)))
            self._bar({name})

    async def _look_up(self) -> None:
        """Find out what is damaged by the damage that others met."""
        places, self._places = self._places, []
        if places:
            self._note(await self._in_thread(lambda: self._shown(places)))
            await self._keep()

    def _note(self, found: list[Shown]) -> None:
        self._found += found
        if found:
            known = tuple(sorted({*self._state.rows, *found}))
            self._state = self._state._replace(rows=known[:DAMAGE_ROWS_MAX])
            _LOG.error("%d damaged extents found, the first in %s", len(found), found[0].segment.text)

    async def _keep(self) -> None:
        self._kept_s = self._loop.time()
        await self._in_thread(lambda state=self._state: self._file.write(state))  # type: ignore[misc]

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await self._loop.run_in_executor(self._thread, call)

    # In the thread.

    def _segments(self) -> list[tuple[SegmentName, int]]:
        with self._index.view() as reader:
            return [
                (segment_name(key), decode_segment_row(value).size) for key, value in reader.scan(Table.SEGMENTS, b"")
            ]

    def _shown(self, places: list[DamagedPlace]) -> list[Shown]:
        with self._index.view() as reader:
            return shown_at(reader, self._backend, places)

    def _audit(self) -> None:
        """Compare the rows of the index with each other, giving way to the event loop again and again."""
        with self._index.view() as reader:
            audit = Audit(reader)
            while audit.step(SCRUB_ROWS_PER_LOOK):
                if self._ending.wait(SCRUB_YIELD_S):
                    return
        self._is_audited = True
        self._proved()
        _LOG.info("the index is whole: %d rows", audit.row_count)


def _damaged(row: Shown) -> messages.DamagedExtent:
    segment = "" if row.segment == NO_SEGMENT else row.segment.text
    return messages.DamagedExtent(row.name, row.start, row.count, segment, row.offset, row.text)

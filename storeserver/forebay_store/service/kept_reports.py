"""What caches report, kept over restarts: the engine of it, and when its file is written.

News is written at once, but no more than once in REPORTS_PAUSE_S; that all is as it was is written less often still.
Invariants: one write at a time; the engine is touched from the event loop only.
Crash: up to a pause of reports is forgotten.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Protocol

from forebay_store.engine.held import HeldReports
from forebay_store.engine.ports import IndexReader
from forebay_store.format.reports import Reports
from forebay_store.format.rows import VolumeState
from forebay_store.limits import REPORTS_PAUSE_S, REPORTS_REFRESH_S
from forebay_wire import messages


class File(Protocol):
    """Where reports are kept."""

    def read(self) -> Reports:
        """Return what was kept."""

    def write(self, kept: Reports) -> None:
        """Keep this instead."""


class KeptReports:
    """The reports of one open store; `thread` is where its file is written."""

    def __init__(self, file: File, view: Callable[[], AbstractContextManager[IndexReader]], thread: Executor) -> None:
        self._file = file
        self._view = view
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._held = HeldReports()
        self._written_s = self._loop.time() - REPORTS_REFRESH_S
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None
        with view() as reader:
            self._held.restore(reader, file.read())

    def receive(self, node: bytes, reports: Sequence[messages.HeldReport]) -> list[bytes]:
        """Keep what a cache says; return the ids of the volumes that it does not hold."""
        with self._view() as reader:
            lost = self._held.receive(reader, node, reports)
        self._write_soon()
        return lost

    def told(self, row: VolumeState) -> messages.Held:
        """Answer GetHeld."""
        return self._held.told(row)

    def note_opened(self, opened: messages.Opened) -> None:
        """Note that a volume was opened, perhaps by another cache."""
        self._held.note_epoch(opened.row.id, opened.epoch, opened.row.version)
        self._write_soon()

    async def stop(self) -> None:
        """Write what is not written yet."""
        if self._writing is not None:
            await self._writing
        if self._timer is not None:
            self._timer.cancel()
        if self._held.changed or self._held.heard:
            await self._loop.run_in_executor(self._thread, self._file.write, self._held.kept())

    def _write_soon(self) -> None:
        if self._writing is not None or not (self._held.changed or self._held.heard):
            return
        due_s = self._written_s + (REPORTS_PAUSE_S if self._held.changed else REPORTS_REFRESH_S)
        if self._timer is not None:
            if self._timer.when() <= due_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due_s, self._write)

    def _write(self) -> None:
        self._timer = None
        self._written_s = self._loop.time()
        self._writing = self._loop.run_in_executor(self._thread, self._file.write, self._held.kept())
        self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        writing.result()  # an error is a bug, and goes to the loop's handler: no report is worth the store
        self._write_soon()

"""The SSD behind the engine: buffered reads and writes of one locked file or block device.

A read tries the page cache first (`RWF_NOWAIT`, about 1 us) and goes to the kernel's io_uring, or to a pool of
threads, when that would wait. One thread writes, in the order given; one thread syncs, so records go on being written
while `fdatasync` runs.

Invariants:
    Every accepted command is completed once, on the loop's thread, never inside the call.
    After a failed write or sync every later command fails: a second sync would prove nothing about the first. A mark
    is left before that is told, so the next start does not believe what is in memory.
Crash: what was written is in the page cache and survives the daemon; what a finished sync covers survives the host.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Final, NamedTuple, Protocol

from forebay_cache.service.completions import Completions
from forebay_cache.service.device_file import DeviceFile
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.ring_reads import RING_ENTRIES, RingReads
from forebay_cache.service.thread_reads import ThreadReads
from forebay_cache.service.uring import Ring
from forebay_core.units import BLOCK_SIZE, Buffer

COMMANDS_MAX: Final = 65536
"""Commands of one kind that wait; the fronts' bound on requests keeps far below it."""

IOV_MAX: Final = 1024
"""Buffers of one pwritev, as Linux has it."""

_LOG = logging.getLogger(__name__)


class Reads(Protocol):
    """Reads that may wait for the disk."""

    @property
    def waiting(self) -> int:
        """Reads that nobody has begun."""

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        """Read; None is an error, which was logged. Completed on the loop's thread, later."""

    def close(self) -> None:
        """Finish what was given."""


class _Write(NamedTuple):
    offset: int
    buffers: Sequence[Buffer]
    done: Callable[[bool], None]


class FileDevice:
    """Implements the engine's `Device` port; takes the descriptor over and closes it."""

    def __init__(
        self, file: DeviceFile, loop: asyncio.AbstractEventLoop, mark: FailureMark, *, ring: bool = True
    ) -> None:
        """`ring` False: read by threads even where there is an io_uring.

        `on_failure`, when set, is told why before the first failed command is completed.
        """
        self._file = file
        self._fd = file.fd
        self._failed = False
        self._mark = mark
        self.on_failure: Callable[[str], None] | None = None
        self._completions = Completions(loop)
        self._reads = self._make_reads(file, loop) if ring else ThreadReads(file, self._completions)
        self._writes: SimpleQueue[_Write | None] = SimpleQueue()
        self._syncs: SimpleQueue[Callable[[bool], None] | None] = SimpleQueue()
        # Daemon threads: a second signal ends the program while a disk hangs.
        self._threads = [
            threading.Thread(target=run, name=f"device{run.__name__}", daemon=True)
            for run in (self._write_loop, self._sync_loop)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def path(self) -> str:
        """Where the device is."""
        return str(self._file.path)

    @property
    def size(self) -> int:
        """Bytes, whole blocks."""
        return self._file.size

    @property
    def failed(self) -> bool:
        """Whether a write or sync failed; everything is refused since."""
        return self._failed

    def read_now(self, offset: int, size: int) -> Buffer | None:
        """Return the bytes if they are in memory, else None."""
        buffer = memoryview(bytearray(size))
        return buffer if self.read_into_now(offset, buffer) else None

    def read_into_now(self, offset: int, view: memoryview) -> bool:
        """Fill the view if its bytes are in memory."""
        try:
            return os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT) == view.nbytes and not self._failed
        except OSError:
            return False  # EAGAIN: not in memory; anything else comes back, and is logged, when it is read with waiting

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        """Read, waiting elsewhere; None is an error, which was logged."""
        assert offset % BLOCK_SIZE == 0
        assert size > 0 and size % BLOCK_SIZE == 0
        if self._refuses("read", self._reads.waiting):
            self._completions.post(partial(done, None))
        else:
            self._reads.read(offset, size, done)

    def write(self, offset: int, buffers: Sequence[Buffer], done: Callable[[bool], None]) -> None:
        """Write behind all writes given before; False is an error, which was logged."""
        assert offset % BLOCK_SIZE == 0
        if self._refuses("write", self._writes.qsize()):
            self._completions.post(partial(done, False))
        else:
            self._writes.put(_Write(offset, buffers, done))

    def sync(self, done: Callable[[bool], None]) -> None:
        """fdatasync; covers every write that was completed before this call."""
        if self._refuses("sync", self._syncs.qsize()):
            self._completions.post(partial(done, False))
        else:
            self._syncs.put(done)

    def close(self) -> None:
        """Finish what was given, join the threads, complete the rest and unlock the device."""
        self._reads.close()
        self._writes.put(None)
        self._syncs.put(None)
        for thread in self._threads:
            thread.join()
        self._completions.close()
        os.close(self._fd)

    def _make_reads(self, file: DeviceFile, loop: asyncio.AbstractEventLoop) -> Reads:
        try:
            return RingReads(file, Ring(RING_ENTRIES), loop)
        except OSError as error:
            _LOG.info("%s: reading with threads, because there is no io_uring here: %s", file.path, error.strerror)
            return ThreadReads(file, self._completions)

    def _refuses(self, what: str, waiting: int) -> bool:
        if waiting >= COMMANDS_MAX:
            _LOG.error("%s: %s refused, %d are waiting already", self.path, what, waiting)
            return True
        return self._failed

    def _write_loop(self) -> None:
        while (command := self._writes.get()) is not None:
            self._completions.post(partial(command.done, self._write_fully(command.offset, command.buffers)))

    def _write_fully(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        rest = list(buffers)
        while rest and not self._failed:
            batch = rest[:IOV_MAX]
            try:
                count = os.pwritev(self._fd, batch, offset)
            except OSError as error:
                self._fail("write", offset, error)
                break
            offset += count
            rest[: len(batch)] = _unwritten(batch, count)
        return not self._failed

    def _sync_loop(self) -> None:
        while (done := self._syncs.get()) is not None:
            if not self._failed:
                try:
                    os.fdatasync(self._fd)
                except OSError as error:
                    self._fail("sync", 0, error)
            self._completions.post(partial(done, not self._failed))

    def _fail(self, what: str, offset: int, error: OSError) -> None:
        _LOG.critical("%s: %s at offset %d failed, the device is stopped: %s", self.path, what, offset, error)
        try:
            self._mark.set()
        except OSError as mark_error:
            _LOG.critical("%s: no mark of that can be left (%s); restart the host before it", self.path, mark_error)
        self._completions.post(partial(self._tell, f"{what} failed: {error.strerror}"))
        self._failed = True  # last: whatever is refused for it, on whichever thread, is completed behind the reason

    def _tell(self, reason: str) -> None:
        if self.on_failure is not None:
            self.on_failure(reason)


def _unwritten(batch: Sequence[Buffer], count: int) -> list[Buffer]:
    """Return what is left of the buffers behind the first `count` bytes."""
    for index, buffer in enumerate(batch):
        view = memoryview(buffer).cast("B")
        if count < view.nbytes:
            return [view[count:], *batch[index + 1 :]]
        count -= view.nbytes
    assert count == 0
    return []

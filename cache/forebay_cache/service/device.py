"""The SSD behind the engine: buffered reads and writes of one locked file or block device.

A read tries the page cache first (`RWF_NOWAIT`, about 1 us) and goes to the kernel's io_uring, or to a pool of
threads, when that would wait. To write a record is to copy it into the page cache: that is done at once, one block in
12 us instead of the 60 that handing it to a thread costs, as long as such writes turn out not to wait. One thread does
the others. Syncs are the kernel's, or a thread's, so records go on being written while `fdatasync` runs.

Invariants:
    Every accepted command is completed once, on the loop's thread, never inside the call.
    Writes are carried out and completed in the order given: none is done at once while one is with the thread.
    After a failed write or sync every later command fails: a second sync would prove nothing about the first. A mark
    is left before that is told, so the next start does not believe what is in memory.
Crash: what was written is in the page cache and survives the daemon; what a finished sync covers survives the host.
"""

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Final, Protocol

from forebay_cache.engine.limits import BATCH_RECORDS_MAX
from forebay_cache.format.record import RECORD_ENTRIES_MAX
from forebay_cache.service.completions import Completions
from forebay_cache.service.device_file import DeviceFile
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.gathering import rest_of
from forebay_cache.service.ring_reads import RING_ENTRIES, RingReads
from forebay_cache.service.ring_syncs import SYNC_ENTRIES, RingSyncs
from forebay_cache.service.sync_order import SyncOrder
from forebay_cache.service.thread_reads import ThreadReads
from forebay_cache.service.thread_syncs import ThreadSyncs, fdatasync
from forebay_cache.service.turns import Turns
from forebay_cache.service.uring import Ring
from forebay_cache.service.writeback import begin_writeback
from forebay_core.units import BLOCK_SIZE, KIB, Buffer

COMMANDS_MAX: Final = 65536
"""Commands of one kind that wait; the fronts' bound on requests keeps far below it."""

IOV_MAX: Final = 1024
"""Buffers of one pwritev, as Linux has it."""

NEAR_SIZE_MAX: Final = BATCH_RECORDS_MAX * (1 + RECORD_ENTRIES_MAX) * BLOCK_SIZE
"""Bytes of a write that is done at once, 250 us: any batch of the log.

Measured 2026-11, 2 cores, 1 MiB writes at depth 8: handing those to the thread, or to a worker of io_uring, while the
loop receives the next one won nothing (0.70 to 0.75 ms a MiB each way) and took 0.1 ms more CPU.
"""

PUSH_SIZE_MAX: Final = 128 * KIB
"""Bytes of a write whose way to the disk begins at once when a sync does: 17 us for a block with its header."""

PUSH_BUFFERS_MAX: Final = 2
"""Buffers of it: a header and what one client wrote. More are of several clients, whom the loop's time limits: then the
kernel's worker begins, on another processor (measured 2026-11, 16 that flush each write: 5 % more gets done)."""

NEAR_NS_MAX: Final = 500_000
"""A write at once that took longer may have waited: for memory, or for the disk. Or others had the processor."""

WATCHED_WRITES: Final = 64
"""After such a one so many are watched: a thread that waits gives the processor away, which is counted."""

FAR_WRITES: Final = 1024
"""So many writes go to the thread after a watched one that waited."""

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


class Syncs(Protocol):
    """Syncs that wait for the disk; one at a time."""

    def sync(self, done: Callable[[OSError | None], None]) -> None:
        """Begin an fdatasync; told of its error, on the loop's thread, later."""

    def close(self) -> None:
        """Finish what was given."""


class FileDevice:
    """Implements the engine's `Device` port; takes the descriptor over and closes it."""

    def __init__(self, file: DeviceFile, turns: Turns, mark: FailureMark, *, ring: bool = True) -> None:
        """`ring` False: read by threads even where there is an io_uring.

        `on_failure`, when set, is told why before the first failed command is completed.
        """
        self._file = file
        self._fd = file.fd
        self._failed = False
        self._mark = mark
        self.on_failure: Callable[[str], None] | None = None
        self._turns = turns
        self._completions = Completions(turns)
        self._reads, self._syncs = self._make_rings(file) if ring else self._make_threads(file)
        self._order = SyncOrder(self._begin_sync, self._sync_failed)
        self.is_syncing = self._order.is_under_way  # the selector asks at each look
        self._closed = False
        self._stopping: threading.Thread | None = None
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._far = 0  # jobs with the thread, or done and not completed
        self._far_writes = 0  # that go to the thread because one at once has waited
        self._watched_writes = 0
        # A daemon thread: a second signal ends the program while a disk hangs.
        self._thread = threading.Thread(target=self._run_jobs, name="device-write", daemon=True)
        self._thread.start()

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
        """Write bytes behind all writes given before; False is an error, which was logged."""
        assert offset % BLOCK_SIZE == 0
        size = sum(map(len, buffers))
        if not (self._far or self._failed or self._far_writes) and size <= NEAR_SIZE_MAX:
            self._write_near(offset, buffers, size, done)
        elif self._refuses("write", self._far):
            self._completions.post(partial(done, False))
        else:
            if self._far_writes and not self._far:
                self._far_writes -= 1
            self._give(lambda: self._write_far(offset, buffers, done))

    def sync(self, done: Callable[[bool], None]) -> None:
        """fdatasync; covers every write that was completed before this call."""
        if self._refuses("sync", self._order.waiting):
            self._completions.post(partial(done, False))
        elif self._order.ask(done):
            self._turns.post(lambda: done(not self._failed))

    def close(self) -> None:
        """Finish what was given, join the threads, complete the rest and unlock the device."""
        self._reads.close()
        self._jobs.put(None)
        self._thread.join()
        self._completions.run()
        self._syncs.close()
        self._closed = True
        self._completions.run()
        if self._stopping is not None:
            self._stopping.join()
        self._completions.close()
        os.close(self._fd)

    def _make_rings(self, file: DeviceFile) -> tuple[Reads, Syncs]:
        try:
            syncs = RingSyncs(file.fd, Ring(SYNC_ENTRIES), self._turns)
            try:
                return RingReads(file, Ring(RING_ENTRIES), self._turns), syncs
            except OSError:
                syncs.close()
                raise
        except OSError as error:
            _LOG.info("%s: reading with threads, because there is no io_uring here: %s", file.path, error.strerror)
            return self._make_threads(file)

    def _make_threads(self, file: DeviceFile) -> tuple[Reads, Syncs]:
        return ThreadReads(file, self._completions), ThreadSyncs(file.fd, self._completions)

    def _refuses(self, what: str, waiting: int) -> bool:
        if waiting >= COMMANDS_MAX:
            _LOG.error("%s: %s refused, %d are waiting already", self.path, what, waiting)
            return True
        return self._failed

    # --- writes -----------------------------------------------------------------------------------------------

    def _write_near(self, offset: int, buffers: Sequence[Buffer], size: int, done: Callable[[bool], None]) -> None:
        waits = _waits() if self._watched_writes else 0
        began_ns = time.perf_counter_ns()
        error = self._write_fully(offset, buffers, size)
        if error is not None:
            self._give(lambda: self._stop("write", offset, error, lambda: self._written(done, False)))
            return
        if size <= PUSH_SIZE_MAX and len(buffers) <= PUSH_BUFFERS_MAX and self._order.begins_ahead:
            begin_writeback(self._fd, offset, size)
        if time.perf_counter_ns() - began_ns > NEAR_NS_MAX:
            self._slow(waited=self._watched_writes > 0 and _waits() > waits)
        elif self._watched_writes:
            self._watched_writes -= 1
        self._order.written()
        self._turns.post(partial(done, True))

    def _slow(self, *, waited: bool) -> None:
        if waited:
            self._far_writes = FAR_WRITES
        self._watched_writes = WATCHED_WRITES

    def _write_far(self, offset: int, buffers: Sequence[Buffer], done: Callable[[bool], None]) -> None:
        """Write, on the thread."""
        if self._failed:
            self._completions.post(partial(self._written, done, False))
        elif (error := self._write_fully(offset, buffers, sum(map(len, buffers)))) is not None:
            self._stop("write", offset, error, lambda: self._written(done, False))
        else:
            self._completions.post(partial(self._written, done, True))

    def _written(self, done: Callable[[bool], None], ok: bool) -> None:
        self._far -= 1
        if ok:
            self._order.written()
        done(ok)

    def _write_fully(self, offset: int, buffers: Sequence[Buffer], size: int) -> OSError | None:
        """Write all of the buffers, which have so many bytes; nearly always one call does."""
        rest = buffers
        while True:
            batch = rest[:IOV_MAX]
            try:
                count = os.pwritev(self._fd, batch, offset)
            except OSError as error:
                return error
            if count == size:
                return None
            offset += count
            size -= count
            rest = [*rest_of(batch, count), *rest[len(batch) :]]

    def _give(self, job: Callable[[], None]) -> None:
        """Have the thread do a job, which posts `_written` when it is over."""
        self._far += 1
        self._jobs.put(job)

    def _run_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    # --- syncs ------------------------------------------------------------------------------------------------

    def _begin_sync(self, done: Callable[[OSError | None], None]) -> None:
        if self._closed:  # what a completion asks for while we close
            self._turns.post(partial(done, fdatasync(self._fd)))
        else:
            self._syncs.sync(done)

    def _sync_failed(self, error: OSError) -> None:
        self._stopping = threading.Thread(
            target=self._stop, args=("sync", 0, error, self._order.give_up), daemon=True, name="device-stop"
        )
        self._stopping.start()

    # --- failure ----------------------------------------------------------------------------------------------

    def _stop(self, what: str, offset: int, error: OSError, tell: Callable[[], None]) -> None:
        """Stop the device, then tell; on a thread, because the mark is a file that is synced."""
        if not self._failed:
            self._fail(what, offset, error)
        self._completions.post(tell)

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


def _waits() -> int:
    """Return how often this thread has waited so far; a microsecond, so only asked where something was slow."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

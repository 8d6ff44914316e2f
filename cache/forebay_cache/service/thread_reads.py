"""Reads of a device by a pool of threads, where there is no io_uring.

Invariant: every accepted read is completed once, on the loop's thread, never inside the call.
"""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Final, NamedTuple

from forebay_cache.service.completions import Completions
from forebay_cache.service.device_file import DeviceFile
from forebay_core.units import Buffer

READ_THREADS: Final = 8

_LOG = logging.getLogger(__name__)


class _Read(NamedTuple):
    offset: int
    size: int
    done: Callable[[Buffer | None], None]


class ThreadReads:
    """Implements the device's `Reads`."""

    def __init__(self, file: DeviceFile, completions: Completions) -> None:
        self._file = file
        self._completions = completions
        self._queue: SimpleQueue[_Read | None] = SimpleQueue()
        # Daemon threads: a second signal ends the program while a disk hangs.
        self._threads = [
            threading.Thread(target=self._run, name=f"device-read-{index}", daemon=True)
            for index in range(READ_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Reads that no thread has begun."""
        return self._queue.qsize()

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        """Read; None is an error, which was logged."""
        self._queue.put(_Read(offset, size, done))

    def close(self) -> None:
        """Finish what was given; the completions are posted then."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (command := self._queue.get()) is not None:
            self._completions.post(partial(command.done, self._read_fully(command.offset, command.size)))

    def _read_fully(self, offset: int, size: int) -> Buffer | None:
        buffer = bytearray(size)
        view = memoryview(buffer)
        at = 0
        while at < size:
            try:
                count = os.preadv(self._file.fd, (view[at:],), offset + at)
            except OSError as error:
                _LOG.error("%s: reading %d bytes at offset %d failed: %s", self._file.path, size, offset, error)
                return None
            if count == 0:
                _LOG.error("%s: ends at offset %d, inside a read of %d bytes", self._file.path, offset + at, size)
                return None
            at += count
        return buffer

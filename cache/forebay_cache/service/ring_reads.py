"""Reads of a device through an io_uring: no threads, so nothing fights the event loop for the GIL.

Reads of one turn of the loop go to the kernel in one call, and their completions come with one eventfd. Measured
against eight threads (2 shared cores, loaded, 2026-11): CPU per cold 4 KiB read 22 us instead of 60. Writes stay with
a thread: the kernel gives buffered ones to workers of its own, which cost 90 to 190 us instead of 14 to 40.

Invariants:
    Every accepted read is completed once, on the loop's thread, never inside the call.
    The memory of a read stays referenced in _reads until its completion.
"""

import ctypes
import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Final

from forebay_cache.service.device_file import DeviceFile
from forebay_cache.service.turns import Turns, clear_event
from forebay_cache.service.uring import Ring
from forebay_core.units import Buffer

RING_ENTRIES: Final = 256
"""Reads that the kernel works on; further ones wait here."""

_RESUBMIT_S: Final = 0.001
_TRANSIENT: Final = (errno.EINTR, errno.EAGAIN)

_LOG = logging.getLogger(__name__)


class _Read:
    """A read of which `at` bytes are there."""

    __slots__ = ("address", "at", "buffer", "done", "export", "offset", "size")

    def __init__(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        self.offset = offset
        self.size = size
        self.buffer = bytearray(size)
        self.export = ctypes.c_char.from_buffer(self.buffer)
        self.address = ctypes.addressof(self.export)
        self.done = done
        self.at = 0


class RingReads:
    """Implements the device's `Reads`."""

    def __init__(self, file: DeviceFile, ring: Ring, turns: Turns) -> None:
        self._file = file
        self._ring = ring
        self._turns = turns
        self._tag = 0
        self._reads: dict[int, _Read] = {}  # by tag
        self._waiting: deque[_Read] = deque()
        self._flushing = False
        self._closed = False
        turns.add_reader(ring.event_fd, self._wake)

    @property
    def waiting(self) -> int:
        """Reads that the kernel was not given yet."""
        return len(self._waiting)

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        """Read; None is an error, which was logged."""
        self._give(_Read(offset, size, done))

    def close(self) -> None:
        """Finish and complete what was given."""
        self._turns.remove_reader(self._ring.event_fd)
        while self._waiting or self._reads:
            self._flush()
            if self._reads:
                self._ring.wait()
                self._reap()
        self._closed = True
        self._ring.close()

    def _give(self, read: _Read) -> None:
        self._waiting.append(read)
        if not self._flushing:
            self._flushing = True
            self._turns.soon(self._flush)

    def _flush(self) -> None:
        """Give the kernel all that there is room for, in one call."""
        if self._closed:
            return
        self._flushing = False
        while self._waiting and self._ring.has_room:
            read = self._waiting.popleft()
            self._tag += 1
            self._reads[self._tag] = read
            offset, address = read.offset + read.at, read.address + read.at
            self._ring.prepare_read(self._file.fd, offset, address, read.size - read.at, self._tag)
        if self._ring.submit():
            self._reap()
        else:
            self._flushing = True
            self._turns.loop.call_later(_RESUBMIT_S, self._flush)

    def _wake(self) -> None:
        clear_event(self._ring.event_fd)
        self._reap()

    def _reap(self) -> None:
        for tag, result in self._ring.completions():
            self._arrived(self._reads.pop(tag), result)
        if self._waiting and not self._flushing:
            self._flushing = True
            self._turns.soon(self._flush)

    def _arrived(self, read: _Read, result: int) -> None:
        if result > 0:
            read.at += result
        if read.at == read.size:
            read.done(read.buffer)
        elif result > 0 or -result in _TRANSIENT:
            self._give(read)
        else:
            self._report(read, -result)
            read.done(None)

    def _report(self, read: _Read, number: int) -> None:
        path, size = self._file.path, read.size
        if number == 0:
            _LOG.error("%s: ends at offset %d, inside a read of %d bytes", path, read.offset + read.at, size)
        else:
            _LOG.error("%s: reading %d bytes at offset %d failed: %s", path, size, read.offset, os.strerror(number))

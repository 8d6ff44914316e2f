"""A cache device that no daemon uses, opened to be read only: for checking it and for saving what is on it.

Invariants:
    The descriptor can't write, and is locked (flock) until it is closed: no daemon starts on the device meanwhile.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from forebay_cache.service.device_file import lock_device
from forebay_core.errors import ForebayError, InUseError, UnreadableError, WrongUsageError
from forebay_core.units import BLOCK_SIZE


class StoppedDevice(NamedTuple):
    """An open device of `size` bytes, whole blocks."""

    fd: int
    path: Path
    size: int

    def read(self, offset: int, size: int) -> bytearray:
        """Return the bytes.

        Raises:
            UnreadableError: they can't be read, or the device ends before them.
        """
        buffer = bytearray(size)
        view = memoryview(buffer)
        at = 0
        while at < size:
            try:
                count = os.preadv(self.fd, (view[at:],), offset + at)
            except OSError as error:
                raise UnreadableError(place=f"{size} bytes at offset {offset}", reason=str(error.strerror)) from error
            if count == 0:
                raise UnreadableError(place=f"offset {offset + at}", reason="the device ends there")
            at += count
        return buffer


@contextmanager
def open_stopped(path: Path) -> Iterator[StoppedDevice]:
    """Open and lock a device.

    Raises:
        WrongUsageError: there is none.
        InUseError: a daemon uses it.
        ForebayError: the operating system says no.
    """
    if not (path.is_file() or path.is_block_device()):
        raise WrongUsageError(f"{path}: is no cache file or block device")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_EXCL if path.is_block_device() else 0))
    except OSError as error:
        text = f"{path}: can't be opened ({error.strerror})"
        raise (InUseError if error.errno == errno.EBUSY else ForebayError)(text) from error
    try:
        lock_device(fd, path)
        size = os.lseek(fd, 0, os.SEEK_END)
        yield StoppedDevice(fd, path, size - size % BLOCK_SIZE)
    finally:
        os.close(fd)

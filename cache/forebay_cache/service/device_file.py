"""The cache device as a file descriptor: created, sized, locked.

Invariants:
    A descriptor returned from here is locked (flock) until it is closed, so one daemon at a time uses a device.
    A regular file that was made or adopted blank is allocated in full: the disk below can't become full later. And it
    is written in full, where that makes later syncs faster.
Crash: the kernel drops the lock. A file whose making was interrupted is blank, and is made whole at the next start.
"""

import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Final, NamedTuple

from forebay_cache.service.blank_search import find_foreign
from forebay_cache.service.device_users import users_of
from forebay_cache.service.zeroing import write_zeros_once
from forebay_core.errors import ForebayError, InUseError, NoSpaceError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, format_size

SUPERBLOCKS_SIZE: Final = 2 * BLOCK_SIZE
"""Bytes at the start of a device that are zeros while it is blank."""

LET_GO_S: Final = 5.0
"""How long a process that has ended may keep a device: what its ring had begun, a write perhaps, ends behind it."""

_LET_GO_POLL_S: Final = 0.02
_LOCKS: Final = Path("/proc/locks")
_LOCKS_SIZE_MAX: Final = 1 << 20


class DeviceFile(NamedTuple):
    """An open, locked device. `size` in bytes, whole blocks; `blank`: it may be formatted unasked.

    `foreign_offset`: where something else's bytes are, if only the superblocks are zeros.
    """

    fd: int
    path: Path
    size: int
    blank: bool
    foreign_offset: int | None = None
    made: bool = False  # just now, so nobody misses it


def open_device(path: Path, size: int | None) -> DeviceFile:
    """Open and lock the device; a regular file that does not exist is made with `size` bytes.

    Raises:
        WrongUsageError: the path is neither file nor block device, or its size is missing or another one.
        InUseError: another process uses it.
        NoSpaceError: the disk can't hold the file; nothing is left behind.
        ForebayError: the operating system says no.
    """
    try:
        return _open(path, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(
                f"{path}: no space for a cache of {format_size(size or 0)}; free some or choose a smaller --size"
            ) from error
        raise ForebayError(f"{path}: can't be opened as cache device ({error.strerror})") from error


def _open(path: Path, size: int | None) -> DeviceFile:
    flags = os.O_RDWR | os.O_CLOEXEC
    created = False
    try:
        fd = _claim(path, flags) if path.is_block_device() else os.open(path, flags)
    except FileNotFoundError:
        if size is None:
            raise WrongUsageError(f"{path}: does not exist; give --size to make a cache file") from None
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        created = True
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUseError(f"{path}: is in use (mounted, or claimed by another process)") from error
        raise
    try:
        lock_device(fd, path)
        return _measure(fd, path, size)._replace(made=created)
    except BaseException:
        if created:
            path.unlink(missing_ok=True)
        os.close(fd)
        raise


def _claim(path: Path, flags: int) -> int:
    """Open a block device that nobody else has; wait for one who is ending."""
    until_s = time.monotonic() + LET_GO_S
    while True:
        try:
            # O_EXCL without O_CREAT claims a block device against mounts and other claims.
            return os.open(path, flags | os.O_EXCL)
        except OSError as error:
            if error.errno != errno.EBUSY or users_of(str(path)) or time.monotonic() >= until_s:
                raise
        time.sleep(_LET_GO_POLL_S)


def lock_device(fd: int, path: Path) -> None:
    """Lock an open device until its descriptor is closed; wait for one who is ending.

    Raises:
        InUseError: another process has it.
    """
    until_s = time.monotonic() + LET_GO_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _lock_holder(fd)
            if pid is not None or time.monotonic() >= until_s:
                holder = f"process {pid}" if pid is not None else "another process"
                raise InUseError(f"{path}: is in use by {holder}; stop it first or use another device") from None
        time.sleep(_LET_GO_POLL_S)


def drop_pages(fd: int) -> None:
    """Sync a device and forget what is in memory of it, so that it is read from the disk.

    Raises:
        OSError: it can't be synced; what is in memory was forgotten nevertheless.
    """
    try:
        os.fdatasync(fd)  # pages that are still to be written are not dropped
    finally:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _lock_holder(fd: int) -> int | None:
    """Return the process that holds the flock, if the kernel's table tells and it still runs."""
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with _LOCKS.open() as table:
            lines = table.read(_LOCKS_SIZE_MAX).splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted and _runs(int(fields[4])):
            return int(fields[4])
    return None


def _runs(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def _measure(fd: int, path: Path, wanted: int | None) -> DeviceFile:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise WrongUsageError(f"{path}: is neither a regular file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    blank = _has_blank_superblocks(fd)
    foreign_offset = find_foreign(fd, size) if blank else None
    blank = blank and foreign_offset is None
    if stat.S_ISREG(mode) and blank:
        size = _allocate(fd, path, max(size, wanted or 0))
    if wanted is not None and size != wanted:
        raise WrongUsageError(f"{path}: has {size} bytes, --size says {wanted}; leave --size out to use it as it is")
    return DeviceFile(fd, path, size - size % BLOCK_SIZE, blank, foreign_offset)


def _has_blank_superblocks(fd: int) -> bool:
    try:
        return not any(os.pread(fd, SUPERBLOCKS_SIZE, 0))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False  # whether the other copy tells what this device is, is seen when it is opened


def _allocate(fd: int, path: Path, size: int) -> int:
    """Give a blank file all of its blocks, so that a later write can't meet a full disk."""
    if size == 0:
        raise WrongUsageError(f"{path}: is empty; give --size")
    os.posix_fallocate(fd, 0, size)
    write_zeros_once(fd, path, size)
    os.fsync(fd)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return size

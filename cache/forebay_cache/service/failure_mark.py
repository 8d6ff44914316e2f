"""A mark in the run directory: a write or sync of the device failed, so its pages in memory are not to be believed.

After a failed fdatasync Linux calls the pages clean: they are read back as if they were on the disk, and a second sync
succeeds without writing anything. So a start that finds the mark drops them and reads what the disk has. A folder of a
tmpfs, as /run is, lives as long as those pages do; anywhere else the mark costs one start with nothing in memory.

Invariants:
    The mark is durable before anybody is told that the command failed.
    It names the file or device itself, as the pages do: not its path, which may change.
Crash: a mark stays until a start has recovered the device.
Source: A. Rebello et al., Can Applications Recover from fsync Failures?, USENIX ATC 2020.
"""

import os
import stat
from pathlib import Path


class FailureMark:
    """The mark of one device in one run directory."""

    def __init__(self, folder: Path, fd: int) -> None:
        """`fd`: the open device."""
        status = os.fstat(fd)
        is_block = stat.S_ISBLK(status.st_mode)
        number, name = (status.st_rdev, "block") if is_block else (status.st_dev, str(status.st_ino))
        self._folder = folder
        self._path = folder / f"failed-{os.major(number)}-{os.minor(number)}-{name}"

    @property
    def is_set(self) -> bool:
        """Whether a command failed since the device was last recovered."""
        return self._path.exists()

    def set(self) -> None:
        """Leave the mark, durably; may be repeated, on any thread.

        Raises:
            OSError: it can't be left.
        """
        os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def clear(self) -> None:
        """Take it away: what is in memory was read from the disk."""
        self._path.unlink(missing_ok=True)

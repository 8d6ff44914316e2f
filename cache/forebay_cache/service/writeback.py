"""Have the kernel begin to write a range of a file out, as a sync that is about to come would.

The sync is begun by a worker of the kernel, which has to wake up first, on another processor: 25 to 40 us in which the
disk could work. This only begins earlier what that worker would do; it promises nothing, and what becomes of it is told
by the sync. It does not wait for the disk unless the disk's queue is full.
"""

import ctypes
from typing import Final

_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE
# PyDLL keeps the GIL: it would cost more to get it back than this takes.
_sync_file_range = ctypes.PyDLL(None)["sync_file_range"]
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def begin_writeback(fd: int, offset: int, size: int) -> None:
    """Begin to write out so many bytes; where that can't be done the sync does all of it."""
    _sync_file_range(fd, offset, size, _WRITE)

"""Looking for something else's bytes on a device whose superblocks are zeros: such a device may be formatted unasked.

Zeros at the front prove little: a disk image may begin with an empty boot block, btrfs has its magic at 64 KiB and
ISO 9660 at 32 KiB. So all that a file holds is read; of a block device, which does not tell where it was written, the
ends and blocks spread over it.

What an interrupted formatting of ours left behind counts as zeros.
"""

import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from forebay_cache.format.unfinished import is_unfinished
from forebay_core.checksums import ZERO_BLOCK
from forebay_core.units import BLOCK_SIZE, MIB

ENDS_SIZE: Final = 4 * MIB
"""Bytes looked at, at either end of a block device: partition tables, file systems and RAIDs begin or end there."""

SAMPLES: Final = 256
"""Blocks in between that are looked at; a tenth of a second on an SSD, some seconds on a disk."""

_READ_SIZE: Final = MIB
_ZEROS: Final = bytes(_READ_SIZE)


def find_foreign(fd: int, size: int) -> int | None:
    """Return the offset of a block that holds something else, or None.

    Raises:
        OSError: it can't be read.
    """
    places = _sampled(size) if stat.S_ISBLK(os.fstat(fd).st_mode) else _written(fd, size)
    for start, end in places:
        for offset in range(start, end, _READ_SIZE):
            found = _foreign_block(os.pread(fd, min(_READ_SIZE, end - offset), offset), offset)
            if found is not None:
                return found
    return None


def _foreign_block(view: bytes, offset: int) -> int | None:
    if view == _ZEROS[: len(view)]:
        return None
    for at in range(0, len(view), BLOCK_SIZE):
        block = view[at : at + BLOCK_SIZE]
        if block != ZERO_BLOCK[: len(block)] and not is_unfinished(block, offset=offset + at):
            return offset + at
    return None


def _written(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a file holds data, as start and end, in whole blocks."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start - start % BLOCK_SIZE, at


def _sampled(size: int) -> Iterator[tuple[int, int]]:
    yield 0, min(size, ENDS_SIZE)
    step = max(1, size // BLOCK_SIZE // SAMPLES)
    for block in range(step, size // BLOCK_SIZE, step):
        yield block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
    yield max(0, size - size % BLOCK_SIZE - ENDS_SIZE), size

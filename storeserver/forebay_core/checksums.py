"""xxh3-64 over blocks and records, and the test for zero blocks.

Every plain block is summed once when it arrives and compared whenever it is handed on (promise 3).
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from forebay_core.units import BLOCK_SIZE, Buffer

try:
    from forebay_core import _sums
except ImportError:  # no compiler when it was installed, or another processor
    _sums = None  # type: ignore[assignment]

U64Array = npt.NDArray[np.uint64]

checksum = xxh3_64_intdigest

ZERO_BLOCK: Final = bytes(BLOCK_SIZE)
ZERO_CHECKSUM: Final = xxh3_64_intdigest(ZERO_BLOCK)


def block_checksums(buffer: Buffer) -> U64Array:
    """Return the checksum of each 4096-byte block of a buffer of whole blocks."""
    size = memoryview(buffer).nbytes
    assert size % BLOCK_SIZE == 0
    sums = np.empty(size // BLOCK_SIZE, np.uint64)
    sum_blocks_fast(buffer, sums)
    return sums


def sum_blocks(blocks: Buffer, sums: U64Array, /) -> None:
    """Fill `sums`, which has an item for each block.

    The native twin is used where it was built: 0.09 us a block instead of 0.22 (2 cores EPYC, November 2026).
    """
    view = memoryview(blocks)
    sums[:] = [checksum(view[at : at + BLOCK_SIZE]) for at in range(0, view.nbytes, BLOCK_SIZE)]


def are_sound(blocks: Buffer, sums: Buffer, /) -> bool:
    """Tell whether each block of a buffer has the checksum, eight bytes in the order of the machine, listed for it.

    The native twin is used where it was built.
    """
    found = block_checksums(blocks)
    if memoryview(sums).nbytes != found.nbytes:
        raise ValueError("whole blocks and 8 bytes for each were expected")
    return found.tobytes() == bytes(sums)


are_sound_fast = getattr(_sums, "are_sound", are_sound)  # it lacks in what was built from an older source
sum_blocks_fast = sum_blocks if _sums is None else _sums.sum_blocks


def is_zero(buffer: Buffer) -> bool:
    """Tell whether a buffer of at most one frame holds only zeros."""
    view = memoryview(buffer)
    if view.nbytes == BLOCK_SIZE:
        # Comparing the view itself looks at each byte (20 us); copy and memcmp take 0.7 us.
        return bytes(view) == ZERO_BLOCK
    return not np.frombuffer(view, np.uint8 if view.nbytes % 8 else np.uint64).any()


def zero_blocks(buffer: Buffer) -> npt.NDArray[np.bool_]:
    """Return for each block of a buffer of whole blocks whether it holds only zeros."""
    words = np.frombuffer(buffer, np.uint64).reshape(-1, BLOCK_SIZE // 8)
    zero: npt.NDArray[np.bool_] = words[:, 0] == 0  # most blocks with data are known by their first word
    seeming = np.flatnonzero(zero)
    zero[seeming] = np.logical_not(words[seeming].any(axis=1))
    return zero

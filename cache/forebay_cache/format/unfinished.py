"""What formatting writes before the superblocks: the checkpoint of a blank device, which holds next to nothing.

Its header is the first block behind the superblocks; its zone rows are zeros; its chunk table holds the sums of those.
Where the table lies depends on the size of the zones, which nobody knows if the formatting was interrupted: so a block
anywhere that holds only such sums and zeros is taken for one of it. Nothing else ever holds them by chance.
"""

import struct
from functools import cache
from typing import Final

from forebay_cache.format.checkpoint import CHECKPOINT_MAGIC, CHUNK_SIZE
from forebay_cache.format.superblock import SUPERBLOCK_COUNT
from forebay_core.checksums import checksum
from forebay_core.units import BLOCK_SIZE, Buffer

_HEADER_OFFSET: Final = SUPERBLOCK_COUNT * BLOCK_SIZE
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


def is_unfinished(block: Buffer, *, offset: int) -> bool:
    """Tell whether a block at an offset of the device may be what an interrupted formatting left, whole or torn."""
    if len(block) != BLOCK_SIZE:
        return False
    if offset == _HEADER_OFFSET:
        return _U32.unpack_from(block) == (CHECKPOINT_MAGIC,)
    return all(word in _sums_of_zeros() for (word,) in _U64.iter_unpack(block))


@cache
def _sums_of_zeros() -> frozenset[int]:
    """Return 0 and the checksum of every chunk of zone rows that are zeros."""
    return frozenset({0, *(checksum(bytes(size)) for size in range(BLOCK_SIZE, CHUNK_SIZE + 1, BLOCK_SIZE))})

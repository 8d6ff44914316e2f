"""Whether a qcow2 image is as long as its tables say: qemu-img reads what is behind the end of a file as zeros.

Both levels of tables are read here and compared with the size of the file. A cluster that an image with extended
L2 entries began may end early, because such images are written by subclusters: there its first byte must be inside.

L1 entry, u64 big-endian: bits 9 to 55 are the offset of an L2 table of one cluster, 0 for none. L2 entry likewise, of
a cluster: bit 0 set, it reads as zeros; bit 62 set, it is compressed, and then the lower bits up to `x` = 62 -
(cluster_bits - 8) are a byte offset, and those above are how many sectors of 512 bytes follow that of the first byte.
With extended L2 entries a u64 follows each, of which subclusters are there.
"""

import os
import struct
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.errors import ForebayError
from forebay_core.units import MIB

L1_SIZE_MAX: Final = 32 * MIB
"""Bytes, as qemu has it."""

_FIELDS: Final = struct.Struct(">20xIQ4xIQ")
"""Of the header: cluster_bits at 20, size at 24, l1_size (entries) at 36, l1_offset at 40."""

_HEADER_SIZE: Final = 104
_FEATURES: Final = struct.Struct(">72xQ")
_EXTENDED_L2: Final = 0b10000
_VERSION: Final = struct.Struct(">4xI")
OFFSET: Final = np.uint64(0x00FF_FFFF_FFFF_FE00)
COMPRESSED: Final = np.uint64(1 << 62)
ZEROS: Final = np.uint64(1)
SECTOR_SIZE: Final = 512
OFFSET_MAX: Final = 1 << 62

U64Array = npt.NDArray[np.uint64]


class Shape(NamedTuple):
    """Where the tables of an image are. `size`: bytes of the disk; `extended`: its clusters have 32 subclusters."""

    cluster_bits: int
    size: int
    l1_count: int
    l1_offset: int
    extended: bool


def check_length(descriptor: int, place: str) -> None:
    """Compare an image, whose header was checked, with the size of its file.

    Raises:
        ForebayError: it was cut short, or its L1 table is too large.
    """
    file_size = os.lseek(descriptor, 0, os.SEEK_END)
    shape = read_shape(descriptor, place)
    end = shape.l1_offset + shape.l1_count * 8
    tables = np.unique(read_l1(descriptor, shape))
    for table in tables[tables != 0].tolist():
        rows = read_l2(descriptor, shape, table)[0]
        clusters_end = _clusters_end(rows, shape.cluster_bits, whole=not shape.extended)
        end = max(end, table + (1 << shape.cluster_bits), clusters_end)
    if end > -(-file_size // SECTOR_SIZE) * SECTOR_SIZE:
        raise ForebayError(
            f"{place}: was cut short: its clusters go to byte {end}, the file ends at byte {file_size}; copy it again"
        )


def read_shape(descriptor: int, place: str) -> Shape:
    """Return where the tables of an image are, whose header was checked.

    Raises:
        ForebayError: its L1 table is too large.
    """
    first = os.pread(descriptor, _HEADER_SIZE, 0).ljust(_HEADER_SIZE, b"\0")
    cluster_bits, size, l1_count, l1_offset = _FIELDS.unpack_from(first)
    extended = _VERSION.unpack_from(first)[0] > 2 and bool(_FEATURES.unpack_from(first)[0] & _EXTENDED_L2)
    if l1_count * 8 > L1_SIZE_MAX:
        raise ForebayError(f"{place}: its L1 table has {l1_count} entries, more than an image may have")
    return Shape(cluster_bits, size, l1_count, l1_offset, extended)


def read_l1(descriptor: int, shape: Shape) -> U64Array:
    """Return the offsets of the L2 tables, 0 where there is none."""
    return _entries(descriptor, shape.l1_offset, shape.l1_count * 8) & OFFSET


def read_l2(descriptor: int, shape: Shape, table: int) -> tuple[U64Array, U64Array | None]:
    """Return the entries of an L2 table and, if they are extended, which subclusters of each are there."""
    entries = _entries(descriptor, table, 1 << shape.cluster_bits)
    return (entries[::2], entries[1::2]) if shape.extended else (entries, None)


def _entries(descriptor: int, offset: int, size: int) -> U64Array:
    """Read a table; what is behind the end of the file is left out, which is noticed by where the table should end."""
    found = os.pread(descriptor, size, min(offset, OFFSET_MAX))
    return np.frombuffer(found, ">u8", len(found) // 8).astype(np.uint64)


def _clusters_end(rows: U64Array, cluster_bits: int, *, whole: bool) -> int:
    """Return the byte behind the last cluster of an L2 table, or behind what must be there of it; 0: there is none."""
    compressed = (rows & COMPRESSED) != 0
    offsets = rows[~compressed & ((rows & ZEROS) == 0)] & OFFSET
    end = int(offsets.max(initial=0))
    end += (1 << cluster_bits if whole else 1) if end else 0
    shift = np.uint64(62 - (cluster_bits - 8))
    low = rows[compressed] & ((np.uint64(1) << shift) - np.uint64(1))
    more = (rows[compressed] & (COMPRESSED - np.uint64(1))) >> shift
    sectors = (low >> np.uint64(9)) + more + np.uint64(1)
    return max(end, int(sectors.max(initial=0)) * SECTOR_SIZE)

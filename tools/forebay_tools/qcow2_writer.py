"""Writes a qcow2 image with some clusters, of which the others are left out: laid over another image they show it.

Version 3, no compression, no names of other files. Clusters are as small as a block as long as the L1 table stays
within what qemu takes (8 TiB): so an increment of scattered blocks holds just them. Clusters are added in the order of
the disk.
Invariants:
    A cluster of the file is used for one thing, or is a table of zeros that several L1 entries share.
    _entries is the L2 table of _table; those before it are written, those behind it hold nothing yet.
Crash: the header comes last; without it the file is no image.

Header, big-endian:

    offset  size  type  field            meaning
    ------  ----  ----  ---------------  -------------------------------------------
         0     4  u32   magic            "QFI" 0xfb
         4     4  u32   version          3
         8     8  u64   backing_offset   0: no backing file
        16     4  u32   backing_size     0
        20     4  u32   cluster_bits     12 to 21
        24     8  u64   size             bytes of the disk
        32     4  u32   crypt_method     0: none
        36     4  u32   l1_count         entries of the L1 table
        40     8  u64   l1_offset        where it begins
        48     8  u64   refcount_offset  where the table of refcount blocks begins
        56     4  u32   refcount_count   clusters of that table
        60     4  u32   snapshot_count   0
        64     8  u64   snapshot_offset  0
        72     8  u64   incompatible     0: no feature that a reader must know
        80     8  u64   compatible       0
        88     8  u64   autoclear        0
        96     4  u32   refcount_order   4: refcounts of 16 bits
       100     4  u32   header_size      104
       104     4  u32   extension        "FBIC": the image is an increment, not a whole disk
       108     4  u32   extension_size   0
       112     8  u64   extensions_end   0: there are no more

An L1 entry is the offset of an L2 table of one cluster, an L2 entry that of a cluster of the disk; bit 63 says that
nobody else refers to it. L2 entry 1: reads as zeros. Entry 0 of either: not in this image.
"""

import os
import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, Buffer
from forebay_tools.qcow2 import EXTENSION_INCREMENT, QCOW2_MAGIC
from forebay_tools.qcow2_tables import L1_SIZE_MAX

HEADER: Final = struct.Struct(">IIQIIQIIQQIIQQQQIIIIQ")
CLUSTER_BITS_MAX: Final = 21
assert HEADER.size == 120

_VERSION: Final = 3
_REFCOUNT_ORDER: Final = 4
_REFCOUNT_SIZE: Final = 2
_REFCOUNT_MAX: Final = 65535
_HEADER_SIZE: Final = 104
_COPIED: Final = 1 << 63
_ZEROS: Final = 1
_ENTRY_SIZE: Final = 8

Entries = npt.NDArray[np.uint64]


def cluster_bits_for(size: int) -> int:
    """Return the smallest clusters with which a disk has an L1 table that qemu takes."""
    assert size > 0
    for bits in range(BLOCK_SHIFT, CLUSTER_BITS_MAX + 1):
        if _l1_count(size, bits) * _ENTRY_SIZE <= L1_SIZE_MAX:
            return bits
    raise ForebayError(f"a disk of {size} bytes is too large for a qcow2 image")


class Qcow2Writer:
    """An image being written to an empty, open file. Adding is for one thread; `write` may run in another."""

    def __init__(self, descriptor: int, size: int, *, cluster_bits: int | None = None) -> None:
        self._descriptor = descriptor
        self._size = size
        self._bits = cluster_bits_for(size) if cluster_bits is None else cluster_bits
        self._cluster_size = 1 << self._bits
        self._per_table = self._cluster_size // _ENTRY_SIZE
        self._l1 = _zeros(_l1_count(size, self._bits))
        self._table = 0
        self._entries = _zeros(self._per_table)
        self._next = 1 + -(-self._l1.nbytes // self._cluster_size)
        self._shared: dict[int, int] = {}  # cluster of a table of zeros -> how many L1 entries have it
        self._end = 0  # first cluster of the disk behind what was added

    @property
    def cluster_blocks(self) -> int:
        """Blocks of one cluster."""
        return self._cluster_size // BLOCK_SIZE

    @property
    def file_size(self) -> int:
        """Bytes of the file so far."""
        return self._next * self._cluster_size

    def add_data(self, extent: Extent) -> Iterator[tuple[Extent, int]]:
        """Add whole clusters and yield runs of blocks with the offset in the file at which to write each."""
        for table, first, last in self._pieces(extent):
            self._turn_to(table)
            offset = self._next * self._cluster_size
            count = last - first
            self._next += count
            places = np.arange(count, dtype=np.uint64) * np.uint64(self._cluster_size)
            self._entries[first:last] = places + np.uint64(offset | _COPIED)
            start = (table * self._per_table + first) * self.cluster_blocks
            yield Extent(start, min(count * self.cluster_blocks, extent.end - start)), offset

    def add_zeros(self, extent: Extent) -> None:
        """Add whole clusters that read as zeros; this costs nothing by the cluster, however many there are."""
        first, last = self._clusters(extent)
        # Whole tables in the middle are one table that all share.
        table, end = -(-first // self._per_table), last // self._per_table
        if table >= end:
            self._mark_zeros(first, last)
            return
        self._mark_zeros(first, table * self._per_table)
        self._turn_to(table)
        while table < end:
            cluster = self._shared_table()
            taken = min(end - table, _REFCOUNT_MAX - self._shared[cluster])
            self._l1[table : table + taken] = cluster * self._cluster_size
            self._shared[cluster] += taken
            table += taken
        self._table = end
        self._mark_zeros(end * self._per_table, last)

    def write(self, offset: int, plain: Buffer) -> None:
        """Write bytes at an offset that `add_data` gave."""
        view = memoryview(plain)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            offset += count
            view = view[count:]

    def finish(self) -> None:
        """Write what makes an image of it. The file is not synced."""
        self._flush_table()
        self._drop_single_shares()
        self.write(self._cluster_size, self._l1.astype(">u8").tobytes())
        table_offset, table_clusters = self._write_refcounts()
        os.ftruncate(self._descriptor, self._next * self._cluster_size)
        header = HEADER.pack(
            QCOW2_MAGIC,
            _VERSION,
            0,
            0,
            self._bits,
            self._size,
            0,
            self._l1.size,
            self._cluster_size,
            table_offset,
            table_clusters,
            0,
            0,
            0,
            0,
            0,
            _REFCOUNT_ORDER,
            _HEADER_SIZE,
            EXTENSION_INCREMENT,
            0,
            0,
        )
        self.write(0, header)

    def _clusters(self, extent: Extent) -> tuple[int, int]:
        """Return the clusters of an extent, which ends with one or with the disk, and remember that they were added."""
        blocks = self.cluster_blocks
        assert extent.start % blocks == 0 and (extent.end % blocks == 0 or extent.end * BLOCK_SIZE >= self._size)
        first, last = extent.start // blocks, -(-extent.end // blocks)
        assert self._end <= first < last <= -(-self._size // self._cluster_size)
        self._end = last
        return first, last

    def _pieces(self, extent: Extent) -> Iterator[tuple[int, int, int]]:
        """Yield table, first and last entry of the parts of an extent that lie in one table each."""
        at, last = self._clusters(extent)
        while at < last:
            table, first = divmod(at, self._per_table)
            end = min(last, (table + 1) * self._per_table)
            yield table, first, first + end - at
            at = end

    def _mark_zeros(self, first: int, last: int) -> None:
        """Mark clusters of one table."""
        while first < last:
            table, at = divmod(first, self._per_table)
            end = min(last, (table + 1) * self._per_table)
            self._turn_to(table)
            self._entries[at : at + end - first] = _ZEROS
            first = end

    def _turn_to(self, table: int) -> None:
        if table != self._table:
            self._flush_table()
            self._table = table

    def _flush_table(self) -> None:
        if self._entries.any():
            offset = self._take_cluster()
            self._l1[self._table] = offset | _COPIED
            self.write(offset, self._entries.astype(">u8").tobytes())
            self._entries[:] = 0

    def _take_cluster(self) -> int:
        """Return the offset of a new cluster."""
        self._next += 1
        return (self._next - 1) * self._cluster_size

    def _shared_table(self) -> int:
        """Return the cluster of a table of zeros that may have one more reference."""
        newest = next(reversed(self._shared), None)
        if newest is None or self._shared[newest] == _REFCOUNT_MAX:
            offset = self._take_cluster()
            newest = offset // self._cluster_size
            self.write(offset, np.full(self._per_table, _ZEROS, ">u8").tobytes())
            self._shared[newest] = 0
        return newest

    def _drop_single_shares(self) -> None:
        """Say of a table of zeros with one reference what it is: nobody else has it."""
        for cluster in [cluster for cluster, count in self._shared.items() if count == 1]:
            self._l1[self._l1 == np.uint64(cluster * self._cluster_size)] |= np.uint64(_COPIED)
            del self._shared[cluster]

    def _write_refcounts(self) -> tuple[int, int]:
        """Write the refcounts of all clusters, their own included; return offset and clusters of their table."""
        per_block = self._cluster_size // _REFCOUNT_SIZE
        table_clusters = blocks = 0
        while True:
            total = self._next + table_clusters + blocks
            wanted = -(-total // per_block)
            if (wanted, -(-wanted * _ENTRY_SIZE // self._cluster_size)) == (blocks, table_clusters):
                break
            blocks, table_clusters = wanted, -(-wanted * _ENTRY_SIZE // self._cluster_size)
        table = self._next * self._cluster_size
        first = self._next + table_clusters
        self._next = total
        places = (np.arange(blocks, dtype=np.uint64) + np.uint64(first)) * np.uint64(self._cluster_size)
        self.write(table, places.astype(">u8").tobytes())
        for index in range(blocks):
            self.write((first + index) * self._cluster_size, self._refcounts(index * per_block, per_block))
        return table, table_clusters

    def _refcounts(self, first: int, count: int) -> bytes:
        counts = np.zeros(count, ">u2")
        counts[: self._next - first] = 1
        for cluster, shares in self._shared.items():
            if first <= cluster < first + count:
                counts[cluster - first] = shares
        return counts.tobytes()


def _l1_count(size: int, cluster_bits: int) -> int:
    covered = 1 << (cluster_bits + cluster_bits - 3)
    return -(-size // covered)


def _zeros(count: int) -> Entries:
    return np.zeros(count, np.uint64)

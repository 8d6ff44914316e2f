"""What is in a qcow2 image and what is left out, by block: an increment leaves alone what it does not hold.

A block is in the image if the cluster or subcluster around it holds data or is marked as zeros. Images are untrusted:
only numbers are read here, and the content comes from qemu-img. An image whose clusters are smaller than a block may
hold a part of one; it is refused, since the rest would have to come from elsewhere.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE
from forebay_tools.qcow2_tables import COMPRESSED, OFFSET, ZEROS, Shape, U64Array, read_l1, read_l2, read_shape

_LEFT_OUT: Final = 0
_READS_ZERO: Final = 1
_HOLDS: Final = 2

_SUBCLUSTERS: Final = 32
_SUBCLUSTER_BITS: Final = np.arange(_SUBCLUSTERS, dtype=np.uint64)

Kinds = npt.NDArray[np.uint8]


class Run(NamedTuple):
    """Blocks that an image holds; `zero`: they read as zeros and are not stored."""

    extent: Extent
    zero: bool


def held_runs(descriptor: int, place: str) -> Iterator[Run]:
    """Yield the blocks that an image holds, whose header was checked, in order.

    Raises:
        ForebayError: it holds a part of a block.
    """
    shape = read_shape(descriptor, place)
    cluster_size = 1 << shape.cluster_bits
    unit = cluster_size // _SUBCLUSTERS if shape.extended else cluster_size
    covered = cluster_size // (16 if shape.extended else 8) * cluster_size
    tables = read_l1(descriptor, shape)
    for index in np.flatnonzero(tables).tolist():
        kinds = _kinds(*read_l2(descriptor, shape, int(tables[index])))
        start = index * covered
        kinds = kinds[: max(0, -(-(shape.size - start) // unit))]
        if unit < BLOCK_SIZE:
            kinds = _by_blocks(kinds, BLOCK_SIZE // unit, start // BLOCK_SIZE, place)
        yield from _runs(kinds, max(unit, BLOCK_SIZE), start, shape)


def _kinds(rows: U64Array, subclusters: U64Array | None) -> Kinds:
    """Return what each cluster, or each subcluster, of an L2 table is."""
    compressed = (rows & COMPRESSED) != 0
    allocated = (rows & OFFSET) != 0
    if subclusters is None:
        kinds = np.where(allocated, _HOLDS, _LEFT_OUT)
        kinds = np.where((rows & ZEROS) != 0, _READS_ZERO, kinds)
        return np.where(compressed, _HOLDS, kinds).astype(np.uint8)
    bits = (subclusters[:, None] >> _SUBCLUSTER_BITS) & np.uint64(1)
    zeros = (subclusters[:, None] >> (_SUBCLUSTER_BITS + np.uint64(_SUBCLUSTERS))) & np.uint64(1)
    kinds = np.where((bits != 0) & allocated[:, None], _HOLDS, _LEFT_OUT)
    kinds = np.where(zeros != 0, _READS_ZERO, kinds)
    return np.where(compressed[:, None], _HOLDS, kinds).astype(np.uint8).ravel()


def _by_blocks(kinds: Kinds, per_block: int, first_lba: int, place: str) -> Kinds:
    """Return what each block is, whose parts are of the given kinds; zeros fill the last one."""
    missing = -kinds.size % per_block
    parts = np.pad(kinds, (0, missing), mode="edge").reshape(-1, per_block) if kinds.size else kinds.reshape(0, 1)
    left_out = (parts == _LEFT_OUT).sum(axis=1)
    cut = np.flatnonzero((left_out > 0) & (left_out < per_block))
    if cut.size:
        offset = (first_lba + int(cut[0])) * BLOCK_SIZE
        raise ForebayError(
            f"{place}: holds only a part of the {BLOCK_SIZE} bytes from {offset} on and can't be laid over a volume; "
            f"use an image with clusters of at least {BLOCK_SIZE} bytes"
        )
    whole: Kinds = parts.max(axis=1, initial=0)
    return whole


def _runs(kinds: Kinds, unit: int, start: int, shape: Shape) -> Iterator[Run]:
    """Yield runs of units of a kind, as blocks of a disk that may end within one."""
    breaks = np.flatnonzero(np.diff(kinds)) + 1
    bounds = [0, *breaks.tolist(), kinds.size]
    end = -(-shape.size // BLOCK_SIZE)
    for first, last in pairwise(bounds):
        if first < last and kinds[first] != _LEFT_OUT:
            lba = (start + first * unit) // BLOCK_SIZE
            count = min((last - first) * (unit // BLOCK_SIZE), end - lba)
            yield Run(Extent(lba, count), bool(kinds[first] == _READS_ZERO))

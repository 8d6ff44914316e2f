"""Extents: runs of blocks `[start, start + count)`, and their packed form for wire and disk.

Invariant of every list here: sorted by start, not overlapping, no empty extent.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.errors import ProtocolError
from forebay_core.units import LBA_MAX

EXTENT_DTYPE: Final = np.dtype([("start", "<u8"), ("count", "<u4")])
EXTENT_COUNT_MAX: Final = (1 << 32) - 1
assert EXTENT_DTYPE.itemsize == 12


class Extent(NamedTuple):
    """A run of blocks; as NamedTuple it is cheap and hashable. `count` of a tuple is shadowed on purpose."""

    start: int
    count: int  # type: ignore[assignment]

    @property
    def end(self) -> int:
        """First block behind the extent."""
        return self.start + self.count

    def intersect(self, other: "Extent") -> "Extent | None":
        """Return the blocks that both hold, or None."""
        start = max(self.start, other.start)
        end = min(self.end, other.end)
        return Extent(start, end - start) if start < end else None


def subtract(extent: Extent, holes: Iterable[Extent]) -> list[Extent]:
    """Return what is left of `extent` without the sorted, disjoint `holes`."""
    rest: list[Extent] = []
    at = extent.start
    for hole in holes:
        if hole.end <= at:
            continue
        if hole.start >= extent.end:
            break
        if hole.start > at:
            rest.append(Extent(at, hole.start - at))
        at = max(at, hole.end)
    if at < extent.end:
        rest.append(Extent(at, extent.end - at))
    return rest


def overlapping(extents: Sequence[Extent], extent: Extent) -> Iterator[Extent]:
    """Yield those of the extents that share a block with one extent, in the time of a binary search."""
    at = bisect_right(extents, extent.start, key=lambda one: one.end)
    while at < len(extents) and extents[at].start < extent.end:
        yield extents[at]
        at += 1


def from_blocks(lbas: Sequence[int] | npt.NDArray[np.uint64]) -> list[Extent]:
    """Return the extents that hold exactly the given sorted, distinct blocks."""
    array = np.asarray(lbas, np.int64)
    if array.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(array) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [array.size]))
    return [Extent(int(array[a]), int(b - a)) for a, b in zip(starts, ends, strict=True)]


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Return the union of extents given in any order, overlapping or not."""
    merged: list[Extent] = []
    for extent in sorted(extents):
        if merged and extent.start <= merged[-1].end:
            last = merged[-1]
            merged[-1] = Extent(last.start, max(last.end, extent.end) - last.start)
        else:
            merged.append(extent)
    return merged


def split(extent: Extent, count_max: int) -> list[Extent]:
    """Cut an extent into pieces of at most `count_max` blocks."""
    assert count_max > 0
    return [Extent(at, min(count_max, extent.end - at)) for at in range(extent.start, extent.end, count_max)]


def pack(extents: Iterable[Extent]) -> bytes:
    """Return the packed form: u64 start, u32 count, little-endian, 12 bytes each."""
    pieces = [piece for extent in extents for piece in _packable(extent)]
    return np.array(pieces, EXTENT_DTYPE).tobytes()


def unpack(packed: bytes, *, count_max: int) -> list[Extent]:
    """Return the extents of a packed list that came from a peer.

    Raises:
        ProtocolError: odd length, too many, empty, overlapping or beyond the largest volume.
    """
    if len(packed) % EXTENT_DTYPE.itemsize or len(packed) > count_max * EXTENT_DTYPE.itemsize:
        raise ProtocolError(f"extent list of {len(packed)} bytes is malformed or longer than {count_max} extents")
    array = np.frombuffer(packed, EXTENT_DTYPE)
    starts = array["start"]
    if array.size and (int(starts.max()) > LBA_MAX or int(array["count"].min()) == 0):
        raise ProtocolError("extent list holds an empty extent or one beyond the largest volume")
    ends = starts + array["count"]
    if array.size and int(ends[-1]) > LBA_MAX + 1:
        raise ProtocolError("extent list ends beyond the largest volume")
    if bool((starts[1:] < ends[:-1]).any()):
        raise ProtocolError("extent list is not sorted or overlaps")
    return [Extent(start, count) for start, count in array.tolist()]


def _packable(extent: Extent) -> Sequence[Extent]:
    return (extent,) if extent.count <= EXTENT_COUNT_MAX else split(extent, EXTENT_COUNT_MAX)

"""Extents of one volume that are known to read as zeros, with the version since which they do.

A hole comes from a trim or a write of zeroes (then its version is newer than upstream until its cut is acknowledged)
or was learned from the store.

Invariants:
    Extents are disjoint and not empty; a block with a mapped place is in no hole.
    Neighbours of one version are one extent.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from sortedcontainers import SortedDict

from forebay_cache.engine.ports import U64Array
from forebay_core.extents import Extent

_FEW: Final = 64


class Hole(NamedTuple):
    """An extent that reads as zeros since `version`."""

    start: int
    end: int
    version: int


class HoleMap:
    """Sorted, disjoint holes."""

    def __init__(self) -> None:
        self._ends: SortedDict = SortedDict()  # start -> (end, version)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Hole]:
        for start, (end, version) in self._ends.items():
            yield Hole(start, end, version)

    def add(self, extent: Extent, version: int) -> None:
        """Make the extent a hole of this version, replacing what was there."""
        start, end = extent.start, extent.end
        self.remove(extent)
        before = self._at_or_before(start)
        if before is not None and before.end == start and before.version == version:
            del self._ends[before.start]
            start = before.start
        after = self._ends.get(end)
        if after is not None and after[1] == version:
            del self._ends[end]
            end = after[0]
        self._ends[start] = (end, version)

    def add_where_absent(self, extent: Extent, version: int) -> None:
        """Make those parts of the extent holes that are not holes yet."""
        at = extent.start
        for hole in self.overlapping(extent):
            if hole.start > at:
                self.add(Extent(at, hole.start - at), version)
            at = hole.end
        if at < extent.end:
            self.add(Extent(at, extent.end - at), version)

    def remove(self, extent: Extent) -> None:
        """These blocks are no hole any more."""
        if len(self._ends) > _FEW and extent.start <= self._ends.peekitem(0)[0] and self._last_end() <= extent.end:
            self._ends = SortedDict()  # one by one they would be a long step
            return
        for hole in self.overlapping(extent):
            del self._ends[hole.start]
            if hole.start < extent.start:
                self._ends[hole.start] = (extent.start, hole.version)
            if hole.end > extent.end:
                self._ends[extent.end] = (hole.end, hole.version)

    def find(self, lba: int) -> Hole | None:
        """Return the hole that a block lies in."""
        hole = self._at_or_before(lba)
        return hole if hole is not None and lba < hole.end else None

    def versions_at(self, lbas: U64Array) -> U64Array:
        """Return for each block the version of the hole that it lies in, 0 where it is in none."""
        if not self._ends:
            return np.zeros(lbas.size, np.uint64)
        starts, ends, versions = np.array(list(self), np.uint64).T
        before = np.searchsorted(starts, lbas, side="right") - 1
        at = np.maximum(before, 0)
        return np.where((before >= 0) & (lbas < ends[at]), versions[at], np.uint64(0))

    def overlapping(self, extent: Extent) -> list[Hole]:
        """Return the holes that share a block with the extent, whole, in order."""
        if not self._ends:
            return []
        first = self.find(extent.start)
        holes = [first] if first is not None else []
        for start in self._ends.irange(extent.start, extent.end, inclusive=(first is None, False)):
            end, version = self._ends[start]
            if first is None or start != first.start:
                holes.append(Hole(start, end, version))
        return holes

    def newer_than(self, version: int) -> list[Hole]:
        """Return the holes with a higher version."""
        return [hole for hole in self if hole.version > version]

    def forget_up_to(self, version: int) -> None:
        """Drop what the store knows as well: holes of this version or older."""
        self._ends = SortedDict({hole.start: (hole.end, hole.version) for hole in self if hole.version > version})

    def _last_end(self) -> int:
        end: int = self._ends.peekitem(-1)[1][0]
        return end

    def _at_or_before(self, lba: int) -> Hole | None:
        index = self._ends.bisect_right(lba) - 1
        if index < 0:
            return None
        start, (end, version) = self._ends.peekitem(index)
        return Hole(start, end, version)

"""What of a checkpoint is not in the map yet: chunks of clean places, and which of their entries count no more.

A clean entry of a checkpoint is the oldest thing that can be known of a block: whatever was written, trimmed, fetched
or moved since has a record behind the checkpoint or happened in this life. So an entry that is loaded late loses
against anything that is in the map. What was trimmed, or dropped because it was stale or bad, is remembered here as
forgotten keys. Reclaim drops nothing that is newer than the checkpoint while older entries are still to come: zones
that were opened behind the newest checkpoint are no victims, and none is begun before all is loaded.

Invariants:
    A forgotten key, and a place of a forgotten zone, is never loaded.
    A zone is filled anew only when it is forgotten or known.
    Two entries of one key that are both not forgotten, and whose key is not in the map, have the same content.
Crash: the checkpoint is still there; no newer one is begun before all of it is loaded.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.format.checkpoint import Chunk

U64Array = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class UnloadedChunk(NamedTuple):
    """A chunk of places: `chunk.offset` is that on the device, `name` says where it lies in an error."""

    chunk: Chunk
    chunk_xxh3: int
    name: str


class Unloaded:
    """The chunks that are left, by their index among the chunks of places."""

    def __init__(self, zone_count: int, zone_blocks: int, chunk_places: int) -> None:
        self._chunk_places = chunk_places
        self._zone_blocks = zone_blocks
        self._forgotten_zones: Mask = np.zeros(zone_count, np.bool_)
        self._forgotten = _KeyRanges()
        self.chunks: dict[int, UnloadedChunk] = {}

    def add(self, chunk: Chunk, chunk_xxh3: int, name: str) -> None:
        """This chunk is for later."""
        self.chunks[chunk.first // self._chunk_places] = UnloadedChunk(chunk, chunk_xxh3, name)

    def sort(self, first_positions: "array[int]") -> None:
        """Bring the chunks into the order in which their zones were opened: reclaim takes the oldest."""
        self._forgotten.merge()  # what replay left may be much, and nobody waits yet
        chunks = sorted(self.chunks.items(), key=lambda one: first_positions[one[1].chunk.first // self._zone_blocks])
        self.chunks = dict(chunks)

    def forget(self, key: int, count: int) -> None:
        """What the chunks say of these blocks counts no more."""
        if self.chunks:
            self._forgotten.add(key, count)

    def forget_zone(self, zone: int) -> None:
        """What the chunks say of the places of a zone counts no more."""
        self._forgotten_zones[zone] = True

    def zones(self) -> Iterator[int]:
        """Yield the zones that chunks may still say something of."""
        return (zone for zone in range(self._forgotten_zones.size) if not self.knows(zone))

    def knows(self, zone: int) -> bool:
        """Tell whether all that is in a zone is in the map."""
        if not self.chunks or self._forgotten_zones[zone]:
            return True
        first = zone * self._zone_blocks
        last = first + self._zone_blocks - 1
        return all(
            index not in self.chunks for index in range(first // self._chunk_places, last // self._chunk_places + 1)
        )

    def counting(self, first_place: int, keys: U64Array) -> Mask:
        """Return for the entries of a run of places whether they count."""
        places = np.arange(first_place, first_place + keys.size)
        mask: Mask = (keys != 0) & ~self._forgotten_zones.take(places // self._zone_blocks)
        return mask & ~self._forgotten.cover(keys)


class _KeyRanges:
    """Ranges of keys. Asking costs what is new: it joins the others, which are sorted, disjoint and do not touch."""

    def __init__(self) -> None:
        self._new_firsts = array("Q")
        self._new_lasts = array("Q")
        self._firsts: U64Array = np.empty(0, np.uint64)
        self._lasts: U64Array = np.empty(0, np.uint64)

    def add(self, key: int, count: int) -> None:
        self._new_firsts.append(key)
        self._new_lasts.append(key + count - 1)

    def cover(self, keys: U64Array) -> Mask:
        """Return for each key whether a range holds it: whether one that begins up to it ends at or behind it."""
        self.merge()
        firsts, lasts = self._firsts, self._lasts
        if not firsts.size:
            return np.zeros(keys.size, np.bool_)
        before = np.searchsorted(firsts, keys, side="right")
        mask: Mask = (before > 0) & (lasts.take(np.maximum(before, 1) - 1) >= keys)
        return mask

    def merge(self) -> None:
        if not self._new_firsts:
            return
        firsts, lasts = np.array(self._new_firsts, np.uint64), np.array(self._new_lasts, np.uint64)
        order = np.argsort(firsts, kind="stable")
        index = np.searchsorted(self._firsts, firsts[order])
        firsts = np.insert(self._firsts, index, firsts[order])
        lasts = np.maximum.accumulate(np.insert(self._lasts, index, lasts[order]))
        apart = firsts[1:] > lasts[:-1] + np.uint64(1)
        self._firsts, self._lasts = firsts[np.append(True, apart)], lasts[np.append(apart, True)]
        self._new_firsts, self._new_lasts = array("Q"), array("Q")

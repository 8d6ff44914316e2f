"""Which blocks of a clone are known to read as its origin does: a bit for each, in pages of 32768 blocks.

A block without its bit is the clone's own, a hole of it, or nobody has asked yet: then the store is asked. So a bit
that is missing costs a question, and only one that is there too long would show the parent's data.

Invariants:
    states[page] is NONE or ALL, and then the page has no bits; or MIXED, and then `_bits` has its 4096 bytes.
    No block at or behind `block_count` has its bit.
    A page that was frozen is copied before it changes.
Crash: a checkpoint holds the pages; replay takes the bits of whatever was written, trimmed or dropped since.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_cache.format.checkpoint import ORIGIN_PAGE_SIZE, OriginPages
from forebay_core.extents import Extent

PAGE_BITS: Final = 15
PAGE_BLOCKS: Final = 1 << PAGE_BITS
PAGE_SIZE: Final = PAGE_BLOCKS // 8
assert PAGE_SIZE == ORIGIN_PAGE_SIZE
NONE: Final = 0
MIXED: Final = 1
ALL: Final = 2
_FEW: Final = 16

U64Array = npt.NDArray[np.uint64]
U8Array = npt.NDArray[np.uint8]


class OriginMap:
    """The bits of one clone, whose origin has `block_count` blocks."""

    def __init__(self, block_count: int) -> None:
        self.block_count: Final = block_count
        self._states: U8Array = np.zeros(-(-block_count // PAGE_BLOCKS), np.uint8)
        self._bits: dict[int, bytearray] = {}
        self._frozen: set[int] = set()
        self.asked_to = 0  # the store was asked of all blocks before this one since they last lost their bits unasked

    def has(self, lba: int) -> bool:
        """Tell whether a block is known to read as the origin does."""
        if lba >= self.block_count:
            return False
        page = lba >> PAGE_BITS
        state = self._states[page]
        if state != MIXED:
            return bool(state == ALL)
        at = lba & (PAGE_BLOCKS - 1)
        return bool(self._bits[page][at >> 3] >> (at & 7) & 1)

    def overlapping(self, extent: Extent) -> list[Extent]:
        """Return the runs of such blocks inside the extent, in order."""
        end = min(extent.end, self.block_count)
        if extent.count == 1:
            return [extent] if self.has(extent.start) else []
        if extent.start >= end:
            return []
        runs: list[Extent] = []
        page = extent.start >> PAGE_BITS
        states = self._states[page : (end - 1 >> PAGE_BITS) + 1]
        edges = np.flatnonzero((states[1:] != states[:-1]) | (states[1:] == MIXED)) + 1 + page
        for first, last in pairwise([page, *edges.tolist(), page + states.size]):
            start, stop = max(extent.start, first << PAGE_BITS), min(end, last << PAGE_BITS)
            for run in self._runs_of(first, start, stop):
                if runs and runs[-1].end == run.start:
                    runs[-1] = Extent(runs[-1].start, runs[-1].count + run.count)
                else:
                    runs.append(run)
        return runs

    def add(self, extent: Extent) -> None:
        """These blocks read as the origin does."""
        self._set(extent, ALL)

    def remove(self, extent: Extent) -> None:
        """These blocks are the clone's own, or holes of it, or it is not known any more."""
        self._set(extent, NONE)

    def forget(self, extent: Extent) -> None:
        """Nobody knows any more what these blocks are: the store is to be asked again."""
        self.remove(extent)
        self.asked_to = min(self.asked_to, extent.start)

    def remove_many(self, lbas: U64Array) -> None:
        """These blocks are the clone's own now."""
        if lbas.size <= _FEW:
            for lba in lbas.tolist():
                if self.has(lba):
                    self._set(Extent(lba, 1), NONE)
            return
        lbas = lbas[lbas < np.uint64(self.block_count)]
        pages = (lbas >> np.uint64(PAGE_BITS)).astype(np.int64)
        for page in np.unique(pages[self._states.take(pages) != NONE]).tolist():
            at = lbas[pages == page] & np.uint64(PAGE_BLOCKS - 1)
            view = np.frombuffer(self._page_to_change(page), np.uint8)
            np.bitwise_and.at(view, (at >> np.uint64(3)).astype(np.int64), ~_bit_of(at))

    def freeze(self, size_max: int) -> OriginPages | None:
        """Return an image that later changes leave alone, of at most `size_max` bytes; what does not fit is left out.

        Costs the number of pages, not of blocks.
        """
        states = self._states.copy()
        kept_max = (size_max - states.size) // PAGE_SIZE
        if states.size == 0 or kept_max < 0:
            return None
        pages = sorted(self._bits)
        states[pages[kept_max:]] = NONE
        self._frozen = set(pages[:kept_max])
        asked_to = self.asked_to if len(pages) <= kept_max else 0
        return OriginPages(states.tobytes(), [self._bits[page] for page in pages[:kept_max]], asked_to)

    def load(self, pages: OriginPages) -> None:
        """Take over an image of this map, if it is one of an origin of this size."""
        if len(pages.states) != self._states.size:
            return
        self.asked_to = min(pages.asked_to, self.block_count)
        self._states = np.frombuffer(pages.states, np.uint8).copy()
        mixed = np.flatnonzero(self._states == MIXED).tolist()
        self._bits = dict(zip(mixed, (bytearray(bits) for bits in pages.bits), strict=True))
        self._frozen = set()

    # --- pages ------------------------------------------------------------------------------------------------

    def _runs_of(self, page: int, start: int, end: int) -> Iterator[Extent]:
        """Yield the runs in blocks of a page, or of several that are not mixed and of one state."""
        state = self._states[page]
        if state == ALL:
            yield Extent(start, end - start)
        if state != MIXED:
            return
        first = start & (PAGE_BLOCKS - 1) & ~7
        packed = np.frombuffer(self._bits[page], np.uint8)[first >> 3 : ((end - 1) & (PAGE_BLOCKS - 1)) // 8 + 1]
        skip = (start & (PAGE_BLOCKS - 1)) - first
        bits = np.unpackbits(packed, bitorder="little")[skip : skip + end - start]
        edges = np.flatnonzero(np.diff(bits, prepend=0, append=0).astype(np.bool_))
        for low, high in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield Extent(start + low, high - low)

    def _set(self, extent: Extent, state: int) -> None:
        start, end = extent.start, min(extent.end, self.block_count)
        if start >= end:
            return
        first, last = -(-start // PAGE_BLOCKS), end >> PAGE_BITS
        if end == self.block_count:
            last = len(self._states)  # the last page is whole, however short it is
        if first > last or (first == last and start & (PAGE_BLOCKS - 1) and start >> PAGE_BITS == end - 1 >> PAGE_BITS):
            self._set_part(start, end, state)
            return
        if start < first << PAGE_BITS:
            self._set_part(start, first << PAGE_BITS, state)
        if last << PAGE_BITS < end:
            self._set_part(last << PAGE_BITS, end, state)
        for page in (np.flatnonzero(self._states[first:last] == MIXED) + first).tolist():
            del self._bits[page]
            self._frozen.discard(page)
        self._states[first:last] = state

    def _set_part(self, start: int, end: int, state: int) -> None:
        """Set blocks of one page."""
        page = start >> PAGE_BITS
        if self._states[page] == state:
            return
        bits = self._page_to_change(page)
        low, high = start & (PAGE_BLOCKS - 1), ((end - 1) & (PAGE_BLOCKS - 1)) + 1
        mask = ((1 << (high - low)) - 1) << (low & 7)
        at, size = low >> 3, (high + 7 >> 3) - (low >> 3)
        value = int.from_bytes(bits[at : at + size], "little")
        value = value | mask if state == ALL else value & ~mask
        bits[at : at + size] = value.to_bytes(size, "little")

    def _page_to_change(self, page: int) -> bytearray:
        """Return the bits of a page, which is mixed from now on."""
        if self._states[page] != MIXED:
            bits = bytearray(PAGE_SIZE)
            if self._states[page] == ALL:
                count = min(PAGE_BLOCKS, self.block_count - (page << PAGE_BITS))
                bits[:] = ((1 << count) - 1).to_bytes(PAGE_SIZE, "little")
            self._states[page] = MIXED
            self._bits[page] = bits
        elif page in self._frozen:
            self._bits[page] = bytearray(self._bits[page])
        self._frozen.discard(page)
        return self._bits[page]


def _bit_of(lbas: U64Array) -> U8Array:
    return np.left_shift(np.uint8(1), (lbas & np.uint64(7)).astype(np.uint8)).astype(np.uint8)

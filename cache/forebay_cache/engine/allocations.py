"""Telling data from holes: what the cache knows, and for the rest one question to the store."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from forebay_cache.engine.front import Allocation, AllocationReply, IoError
from forebay_cache.engine.limits import ALLOCATION_BLOCKS_MAX
from forebay_cache.engine.ports import FetchedPiece, UpstreamRefusal
from forebay_core.extents import Extent, from_blocks, subtract
from forebay_core.units import BLOCK_SHIFT, LBA_BITS

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume


class Allocations:
    """Answers for all volumes."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine

    def allocation(self, volume: "CacheVolume", offset: int, length: int, reply: AllocationReply) -> None:
        """See FrontVolume.allocation. Looks at no more than ALLOCATION_BLOCKS_MAX blocks at a time."""
        if volume.error or self._engine.failed:
            reply(IoError.IO, ())
            return
        start = offset >> BLOCK_SHIFT
        end = min((offset + length - 1 >> BLOCK_SHIFT) + 1, start + ALLOCATION_BLOCKS_MAX)
        extent = Extent(start, end - start)
        known = self._known(volume, extent)
        if sum(state.extent.count for state in known) == extent.count:
            reply(IoError.OK, _shape(known, offset))
            return
        if self._engine.loading.active:  # the store may be away, and the cache may know all the same
            self._engine.loading.when_over(lambda: self.allocation(volume, offset, length, reply))
            return

        def answered(answer: Sequence[FetchedPiece] | UpstreamRefusal) -> None:
            if isinstance(answer, UpstreamRefusal):
                self._engine.read_refused(volume, answer)
            if isinstance(answer, UpstreamRefusal) or volume.error:
                reply(IoError.IO, ())
                return
            # What the cache holds is newer, and it may have changed while the store was asked.
            now = self._known(volume, extent)
            covered = [state.extent for state in now]
            for piece in answer:
                common = piece.extent.intersect(extent)
                if common is not None:
                    now += [_State(rest, piece.plain is None) for rest in subtract(common, covered)]
            reply(IoError.OK, _shape(sorted(now), offset))

        unknown = subtract(extent, [state.extent for state in known])  # the store may not know a new end yet
        asked = Extent(unknown[0].start, unknown[-1].end - unknown[0].start)
        self._engine.upstream.allocation(volume.id, asked, answered, through=True)

    def _known(self, volume: "CacheVolume", extent: Extent) -> "list[_State]":
        """Return the state of all blocks that the cache knows, sorted."""
        places = self._engine.map.find_run(volume.key << LBA_BITS | extent.start, extent.count)
        lbas = (np.flatnonzero(places >= 0) + extent.start).astype(np.uint64)
        known = [_State(run, False) for run in from_blocks(lbas)]
        for hole in volume.holes.overlapping(extent):
            common = extent.intersect(Extent(hole.start, hole.end - hole.start))
            if common is not None:
                known.append(_State(common, True))
        if volume.source is not None and volume.origins is not None:
            for run in volume.origins.overlapping(extent):
                known += self._known(volume.source, run)
        return sorted(known)


class _State(NamedTuple):
    """An extent with one allocation state."""

    extent: Extent
    hole: bool


def _shape(states: Sequence[_State], offset: int) -> list[Allocation]:
    """Return runs of one state from `offset` on, up to the first block whose state is not known."""
    runs: list[Allocation] = []
    at = offset
    for extent, hole in states:
        if extent.start << BLOCK_SHIFT > at:
            break
        length = (extent.end << BLOCK_SHIFT) - at
        at += length
        if runs and runs[-1].hole == hole:
            runs[-1] = Allocation(runs[-1].length + length, hole)
        else:
            runs.append(Allocation(length, hole))
    assert runs, "the store answers for the first block at least"
    return runs

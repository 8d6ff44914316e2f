"""Reading ahead: what a sequential stream will want next is fetched into memory before it is asked for.

It goes to the ring alone (`ring.AHEAD`): not to the device, and no block that is used leaves for it. Whoever reads it
there counts as if it had been fetched then. What is cached or a hole is left out; so a stream that hits costs nothing.

Invariants:
    At most AHEAD_BLOCKS_MAX // 2 blocks are being fetched ahead of all streams, and no step asks for more than
    AHEAD_STEP_BLOCKS, so that others have their turn.
Crash: nothing is kept.
"""

from functools import partial
from typing import TYPE_CHECKING

from forebay_cache.engine.limits import AHEAD_BLOCKS_MAX, AHEAD_STEP_BLOCKS
from forebay_core.extents import Extent

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume


class ReadAhead:
    """Watches the reads of all volumes."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self.in_flight_blocks = 0

    def passes(self, volume: "CacheVolume", start: int, count: int) -> bool:
        """Tell whether a read is part of a stream so long that its blocks are not worth much."""
        after = self._engine.settings.bypass_blocks
        return after > 0 and volume.streams.missed_before(start, count) > after

    def missed(self, volume: "CacheVolume", start: int, count: int, missed: int) -> None:
        """A guest's read of some blocks did not find so many of them on the device."""
        if self._engine.loading.active:
            return
        ahead = volume.streams.read(start, count, missed, self._engine.settings.read_ahead_blocks)
        if ahead is not None:
            first, wanted = ahead
            self._fetch(volume, first, min(first + wanted, volume.block_count))

    def _fetch(self, volume: "CacheVolume", start: int, end: int) -> None:
        """Fetch step by step; what does not fit is fetched when it is asked for."""
        count = min(AHEAD_STEP_BLOCKS, end - start)
        if count <= 0 or self.in_flight_blocks + count > AHEAD_BLOCKS_MAX // 2 or volume.error or self._engine.failed:
            return
        self.in_flight_blocks += count
        self._engine.reads.ahead(volume, Extent(start, count), partial(self._fetched, count))
        if start + count < end:
            self._engine.soon(partial(self._fetch, volume, start + count, end))

    def _fetched(self, count: int) -> None:
        self.in_flight_blocks -= count

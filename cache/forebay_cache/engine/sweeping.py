"""Taking blocks out of the map that were trimmed or dropped: at once for who looks them up, step by step in fact.

A trim may concern every block that is cached. From the moment when it is applied what is older in its extent is
*hidden*: looking it up finds nothing. It leaves the map in steps, each in a turn of its own. Who is about to change
blocks of the map, or needs to know which places are held or worth keeping, has those blocks or places *settled* before:
what is hidden of them leaves the map then, as the steps would have done it.

Invariants:
    `map.hidden` is in the order in which its extents were hidden. Of several that cover a place the oldest one decides
    what becomes of it, so they are swept in that order as well.
    Nothing that a hidden extent covers enters the map: versions below that of the trim have no record behind it.
    Of a volume that was forgotten there is nothing in the map but what is hidden.
Crash: replay meets the trim, or the checkpoint has its hole and left out what it hides.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.units import LBA_BITS

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.log import Settled

U64Array = npt.NDArray[np.uint64]
PlaceArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Hidden(NamedTuple):
    """Blocks from `key` on that are hidden if their version is below `below`; those in `kept` turn held: see
    `BlockMap.remove_range`."""

    key: int
    block_count: int
    below: int
    kept: tuple[int, int] = (0, 0)

    def covers(self, key: int, version: int) -> bool:
        """Tell whether a block is hidden."""
        return 0 <= key - self.key < self.block_count and version < self.below

    def mask(self, keys: U64Array, versions: U64Array) -> Mask:
        """Tell the same of many."""
        # A key below the first one wraps around to a huge distance.
        found: Mask = (keys - np.uint64(self.key) < np.uint64(self.block_count)) & (versions < np.uint64(self.below))
        return found


class Sweeps:
    """Hides blocks, and takes hidden ones out."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._steps: Iterator[PlaceArray] | None = None  # of the oldest hidden extent
        self._swept_count = 0
        self._waiting: list[tuple[int, Settled]] = []  # and how many extents must be swept for it

    @property
    def count(self) -> int:
        """Extents that are hidden."""
        return len(self._engine.map.hidden)

    def remove(self, key: int, count: int, *, below: int, kept: tuple[int, int] = (0, 0)) -> None:
        """Take out the blocks from `key` on whose version is less than `below`: now if they are few, else they are
        hidden now."""
        table = self._engine.map
        one = Hidden(key, count, below, kept)
        if self.is_long(count):
            table.hidden.append(one)
            if len(table.hidden) == 1:
                self._engine.soon(self._step)
            return
        if table.hidden:
            self.settle_keys(np.arange(count, dtype=np.uint64) + np.uint64(key))
        for places in table.remove_range(key, count, below=below, kept=kept):
            self._engine.policy.removed(places, volume_key=key >> LBA_BITS)

    def is_long(self, count: int) -> bool:
        """Tell whether so many blocks are hidden before they leave."""
        return count > self._engine.settings.sweep_step_blocks

    def when_over(self, settled: "Settled") -> None:
        """Tell when nothing that is hidden now is left in the map; not at once if something is."""
        if self.count and not self._engine.failed:
            self._waiting.append((self._swept_count + self.count, settled))
        else:
            settled(not self._engine.failed)

    def fail(self) -> None:
        """The device failed: whoever waits is told."""
        waiting, self._waiting = self._waiting, []
        for _, settled in waiting:
            settled(False)

    def settle_keys(self, keys: U64Array) -> None:
        """These blocks are about to change: what is hidden of them leaves the map."""
        if self._engine.map.hidden:
            places = self._engine.map.find_linked(keys)
            self._settle(np.unique(places[places >= 0]))

    def settle_places(self, places: PlaceArray) -> None:
        """What is hidden of these distinct places leaves the map."""
        table = self._engine.map
        if table.hidden:
            self._settle(places[table.linked_at(places)])

    def _settle(self, places: PlaceArray) -> None:
        table = self._engine.map
        for one in table.hidden:
            if not places.size:
                return
            covered = one.mask(table.key_array.take(places), table.version_array.take(places))
            if covered.any():
                gone = table.clear_older(places[covered], one.below, one.kept)
                self._engine.policy.removed(gone, volume_key=one.key >> LBA_BITS)
                places = places[~covered]

    def _step(self) -> None:
        """Sweep a bit of the oldest hidden extent; when that is over begin with the next."""
        engine = self._engine
        hidden = engine.map.hidden
        if engine.failed:
            return
        one = hidden[0]
        if self._steps is None:
            step = engine.settings.sweep_step_blocks
            self._steps = engine.map.remove_range(one.key, one.block_count, below=one.below, kept=one.kept, step=step)
        places = next(self._steps, None)
        if places is not None:
            engine.policy.removed(places, volume_key=one.key >> LBA_BITS)
        else:
            self._steps = None
            del hidden[0]
            self._swept()
        if hidden:
            engine.soon(self._step)

    def _swept(self) -> None:
        self._swept_count += 1
        over = [settled for count, settled in self._waiting if count <= self._swept_count]
        self._waiting = [one for one in self._waiting if one[0] > self._swept_count]
        for settled in over:
            settled(True)
        self._engine.resume_writers()

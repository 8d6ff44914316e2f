"""Telling the policy after a start how often the blocks were used that a start had to know at once: the dirty ones.

It costs as much for each block as all else that a start does with it, and no answer depends on it. So it is done behind
the first answers, zone by zone. A block that is read before its zone's turn counts as just used, but as often as the
checkpoint says; one that is overwritten is a new one.

Invariants:
    A place whose block came in this life is left alone: the policy knows it already.
    Nothing is moved out of a zone, or judged there, before its turn: it is no victim of reclaim.
Crash: the checkpoint is still there; no newer one is begun before this is over.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine


class UseCounts:
    """Use counts of a checkpoint, by place, on their way to the policy."""

    def __init__(self, engine: "CacheEngine", counts: npt.NDArray[np.uint8]) -> None:
        self._engine = engine
        self._counts = counts
        self._zones = dict.fromkeys(engine.map.used_zones.tolist())
        self._over: Callable[[], None] = lambda: None

    @property
    def active(self) -> bool:
        """Whether the policy does not know all yet."""
        return bool(self._zones)

    def start(self, over: Callable[[], None]) -> None:
        """Go through all zones, one in each turn; `over` hears of the end, not at once."""
        self._over = over
        self._engine.soon(self._turn)

    def knows(self, zone: int) -> bool:
        """Whether the policy knows all blocks of a zone."""
        return zone not in self._zones

    def _turn(self) -> None:
        if self._engine.failed:
            return
        if self._zones:
            self._tell(self._zones.popitem()[0])
        if self._zones:
            self._engine.soon(self._turn)
        else:
            self._over()

    def _tell(self, zone: int) -> None:
        engine = self._engine
        count = engine.map.zone_blocks
        first = zone * count
        used = np.maximum(self._counts[first : first + count], 1)  # what came after the checkpoint was used since
        engine.policy.restore(first, np.where(engine.map.linked_mask(first, count), used, np.uint8(0)))

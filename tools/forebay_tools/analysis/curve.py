"""Hit ratio against size: the daemon's own policy in miniature, and an LRU, at many sizes, on a spatial sample.

A miniature of a cache of C blocks has C * rate blocks and sees the accesses of the sampled blocks alone. A sample that
by chance holds more or less of the hottest blocks has more or fewer hits but the same misses: so misses are counted and
compared with the accesses that a fair sample would have had (the correction of SHARDS).
"""

import math
from typing import Final, NamedTuple

from forebay_cache.engine.policy import PolicySettings, make_replay
from forebay_cache.engine.policy_core import Replay
from forebay_cache.engine.policy_lists import SAMPLE_SEED
from forebay_tools.analysis.accesses import Batch
from forebay_tools.analysis.survey import HASHES, Sampler

SHARES: Final = tuple(
    share / 100 for share in (0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
)
SAMPLES_DEFAULT: Final = 32768
MINIATURE_BLOCKS: Final = 1000
"""Blocks of the miniatures that choose the window inside each miniature."""


class Point(NamedTuple):
    """One size: hit ratios with the half width of their 95 % band, and blocks written into the cache per access."""

    size_blocks: int
    hit_ratio: float
    band: float
    lru_hit_ratio: float
    ssd_writes_per_access: float


class Curve:
    """Feeds all miniatures."""

    def __init__(self, distinct_blocks: int, samples: int, settings: PolicySettings) -> None:
        self.rate: Final = min(1.0, samples / distinct_blocks)
        self._limit = int(self.rate * HASHES)
        self._sampler = Sampler()
        self._accesses = 0
        self._sampled_blocks = max(1, round(distinct_blocks * self.rate))
        sizes = sorted({max(1, round(distinct_blocks * share)) for share in SHARES})
        self._caches: list[tuple[int, Replay, Replay]] = []
        for size in sizes:
            mini = max(1, round(size * self.rate))
            ours = make_replay(mini, settings=settings, seed=SAMPLE_SEED, miniature_blocks=MINIATURE_BLOCKS)
            self._caches.append((size, ours, make_replay(mini, is_lru=True, seed=SAMPLE_SEED)))

    def add(self, batch: Batch) -> None:
        """Show a batch to all."""
        parts, blocks = self._sampler.take(batch, self._limit)
        self._accesses += blocks
        for keys in parts:
            for _, ours, lru in self._caches:
                ours.feed(keys)
                lru.feed(keys)

    def points(self) -> list[Point]:
        """Return the curve; it never falls, as a larger cache can hold what a smaller one holds."""
        expected = max(1.0, self._accesses * self.rate)
        points: list[Point] = []
        for size, ours, lru in self._caches:
            figures = ours.figures()
            misses, writes = figures["accesses"] - figures["hits"], figures["writes"]
            ratio = min(1.0, max(0.0, 1 - misses / expected))
            others = lru.figures()
            lru_ratio = min(1.0, max(0.0, 1 - (others["accesses"] - others["hits"]) / expected))
            band = 0.0 if self.rate >= 1 else 1.96 * math.sqrt(ratio * (1 - ratio) / self._sampled_blocks)
            points.append(Point(size, ratio, band, lru_ratio, writes / expected))
        return points

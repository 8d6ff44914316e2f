"""Hit ratio against size: the daemon's own policy in miniature, and an LRU, at many sizes, on a spatial sample.

A miniature of a cache of C blocks has C * rate blocks and sees the accesses of the sampled blocks alone. A sample that
by chance holds more or less of the hottest blocks has more or fewer hits but the same misses: so misses are counted and
compared with the accesses that a fair sample would have had. `calibration` has the rest.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import MINIATURE_BLOCKS as WHOLE_MINIATURE_BLOCKS
from forebay_cache.engine.limits import VOLUME_SLOTS
from forebay_cache.engine.policy import PolicySettings, make_replay
from forebay_cache.engine.policy_core import Replay
from forebay_cache.engine.policy_lists import SAMPLE_SEED
from forebay_core.units import LBA_BITS
from forebay_tools.analysis.accesses import Batch, U64Array
from forebay_tools.analysis.calibration import Calibration, Estimate, Uses, uncalibrated
from forebay_tools.analysis.hashing import HASHES, sample_hashes

SHARES: Final = tuple(
    share / 100 for share in (0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
)
SAMPLES_DEFAULT: Final = 32768
MINIATURE_BLOCKS: Final = 2000
"""Blocks of the miniatures that choose the plan inside each miniature; of whole caches they are as in the daemon."""

LRU_BLOCKS: Final = 8192
"""Blocks of the sample that the LRU sees; it is there to compare with, and would take as much memory as ours."""

FEED_KEYS: Final = 1 << 14
"""Keys that are fed together: each cache is in the processor's for so long. One by one takes three times the time."""

CHAOS: Final = 0.8
"""Standard error of a hit ratio, times the root of the sampled blocks, that sampling does not explain: which plan the
policy follows is a near thing now and then. Set 2026-11 so that of nine traces' points 9 in 10 lie in their bands."""


class Point(NamedTuple):
    """One size: hit ratios, with the half width of the band that nine of ten lie in, and blocks written per access."""

    size_blocks: int
    hit_ratio: float
    band: float
    lru_hit_ratio: float
    ssd_writes_per_access: float


class Curve:
    """Feeds all miniatures."""

    def __init__(self, distinct_blocks: int, rate: float, settings: PolicySettings, uses: Uses | None = None) -> None:
        """`rate` is the share of the blocks that are sampled."""
        assert 0.0 < rate <= 1.0
        self.rate: Final = rate
        self._sampled_blocks = max(1, round(distinct_blocks * rate))
        self._lru_rate = rate if rate == 1.0 else min(rate, LRU_BLOCKS / distinct_blocks)
        self._calibrations = [None if uses is None else Calibration(uses, one) for one in (rate, self._lru_rate)]
        self._accesses = 0
        self._waiting: list[U64Array] = []
        self._shown = np.zeros(VOLUME_SLOTS, np.int64)  # sampled accesses by volume slot
        self._waiting_count = 0
        self._caches: list[tuple[int, Replay, Replay]] = []
        miniature_blocks = MINIATURE_BLOCKS if rate < 1.0 else WHOLE_MINIATURE_BLOCKS
        for size in sorted({max(1, round(distinct_blocks * share)) for share in SHARES}):
            ours = make_replay(size, rate=rate, settings=settings, seed=SAMPLE_SEED, miniature_blocks=miniature_blocks)
            lru = make_replay(size, rate=self._lru_rate, is_lru=True, seed=SAMPLE_SEED)
            self._caches.append((size, ours, lru))

    def show(self, keys: U64Array, *, accesses: int) -> None:
        """Show sampled keys to all; so many accesses they are a sample of."""
        self._accesses += accesses
        self._waiting.append(keys)
        self._waiting_count += keys.size
        if self._waiting_count >= FEED_KEYS:
            self._feed()

    def show_requests(self, batch: Batch) -> None:
        """Show whole requests to all, where each block is sampled: so the streams are those of the daemon."""
        assert self.rate == 1.0
        self._accesses += int(batch.counts.sum())
        self._shown += np.bincount(_slots(batch.keys), batch.counts, VOLUME_SLOTS).astype(np.int64)
        for _, ours, lru in self._caches:
            for cache in (ours, lru):
                cache.feed_requests(batch.keys, batch.counts, batch.writes)

    def points(self) -> list[Point]:
        """Return the curve."""
        self._feed()
        accesses = max(1, self._accesses)
        points: list[Point] = []
        for size, ours, lru in self._caches:
            found = _estimate(ours, self.rate, self._calibrations[0])
            other = _estimate(lru, self._lru_rate, self._calibrations[1])
            band = 1.96 * math.hypot(found.error / accesses, CHAOS / math.sqrt(self._sampled_blocks))
            writes = ours.figures()["writes"] / self.rate / accesses
            points.append(Point(size, _ratio(found, accesses), band, _ratio(other, accesses), writes))
        return points

    def volume_misses(self, size_blocks: int) -> list[int]:
        """Return the misses in the sample of each volume slot at the nearest size."""
        _, nearest, _ = min(self._caches, key=lambda cache: abs(cache[0] - size_blocks))
        misses: list[int] = (self._shown - np.frombuffer(nearest.volume_hits(), np.int64)).tolist()
        return misses

    def _feed(self) -> None:
        keys = np.concatenate([np.zeros(0, np.uint64), *self._waiting])
        self._waiting, self._waiting_count = [], 0
        self._shown += np.bincount(_slots(keys), minlength=VOLUME_SLOTS)
        few = keys if self._lru_rate == self.rate else keys[sample_hashes(keys) < np.uint64(self._lru_rate * HASHES)]
        for _, ours, lru in self._caches:
            ours.feed(keys)
            lru.feed(few)


def _slots(keys: U64Array) -> npt.NDArray[np.int64]:
    slots: npt.NDArray[np.int64] = ((keys >> np.uint64(LBA_BITS)) % np.uint64(VOLUME_SLOTS)).astype(np.int64)
    return slots


def _estimate(cache: Replay, rate: float, calibration: Calibration | None) -> Estimate:
    misses = np.frombuffer(cache.group_misses(), np.int64)
    return uncalibrated(misses, rate) if calibration is None else calibration.misses(misses)


def volume_slot(volume_key: int) -> int:
    """Return the slot in which the accesses of a volume are counted."""
    return volume_key % VOLUME_SLOTS


def _ratio(found: Estimate, accesses: int) -> float:
    return min(1.0, max(0.0, 1 - found.misses / accesses))

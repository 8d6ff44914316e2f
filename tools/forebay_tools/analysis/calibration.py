"""Misses of all blocks, from those of a sample: what a sample has too many or too few of by chance is set right.

How often each block was used is known of far more blocks than are sampled, first of all how many blocks there are,
each of which misses once. So the sample is cut into random groups; how their misses depend on how many blocks they
have that were used once, twice, often, is a regression; and its answer for the use counts of all blocks is the
estimate. What the regression leaves unexplained between the groups tells how far the estimate may be off.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.policy_core import MISS_GROUPS
from forebay_tools.analysis.accesses import U64Array
from forebay_tools.analysis.hashing import HASHES, groups, sample_hashes

Floats = npt.NDArray[np.float64]

USED_AT_LEAST: Final = (1, 2, 3, 5, 9)
USES_MAX: Final = 32
_FEATURES: Final = len(USED_AT_LEAST) + 1
_RIDGE: Final = 1e-3


class Uses(NamedTuple):
    """How often each block of a spatial sample was used; `rate` is the share of all blocks that it holds."""

    keys: U64Array
    counts: npt.NDArray[np.int64]
    rate: float


class Estimate(NamedTuple):
    """Misses and their standard error, by chance of the sample."""

    misses: float
    error: float


class Calibration:
    """Knows use counts; for samples of a rate that is not above theirs."""

    def __init__(self, uses: Uses, rate: float) -> None:
        assert rate <= uses.rate
        features = _features(uses.counts)
        sampled = sample_hashes(uses.keys) < np.uint64(min(HASHES - 1, int(rate * HASHES)))
        group = groups(uses.keys[sampled])
        self._rate = rate
        self._known = features.sum(1) / uses.rate
        self._seen: Floats = np.stack([np.bincount(group, row[sampled], MISS_GROUPS) for row in features], 1) / rate
        self._doubt = (1 - uses.rate) * rate / uses.rate  # of the known ones, as a share of the variance in the sample

    def misses(self, group_misses: npt.NDArray[np.int64]) -> Estimate:
        """Return the misses of all blocks from those that each group of the sample had."""
        repeated = group_misses / self._rate - self._seen[:, 0]  # beyond the first use of each block
        centred = self._seen - self._seen.mean(0)
        square = centred.T @ centred
        square += np.eye(_FEATURES) * max(1.0, _RIDGE * float(np.trace(square)) / _FEATURES)
        slopes = np.linalg.solve(square, centred.T @ (repeated - repeated.mean()))
        explained = centred @ slopes
        left = repeated - repeated.mean() - explained
        misses = self._known[0] + repeated.sum() + slopes @ (self._known - self._seen.sum(0))
        variance = float(left @ left) * MISS_GROUPS / (MISS_GROUPS - _FEATURES - 1)
        variance = variance * (1 - self._rate) + float(explained @ explained) * self._doubt
        return Estimate(float(misses), math.sqrt(variance))


def uncalibrated(group_misses: npt.NDArray[np.int64], rate: float) -> Estimate:
    """Return the same where no more is known than the sample, as SHARDS does: one that by chance holds more of the
    hottest blocks has more hits but the same misses."""
    variance = MISS_GROUPS * float(group_misses.var(ddof=1)) * (1 - rate)
    return Estimate(float(group_misses.sum()) / rate, math.sqrt(variance) / rate)


def _features(counts: npt.NDArray[np.int64]) -> Floats:
    rows = [counts >= least for least in USED_AT_LEAST]
    return np.stack([*rows, np.minimum(counts, USES_MAX)]).astype(np.float64)

"""The first look at a trace: how long it is, and how often blocks are used, of each volume, from a spatial sample.

Invariants:
    The keys that are kept are all blocks used so far whose sample hash is below `limit`; there are at most SURVEY_MAX.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import SAMPLED_MAX
from forebay_cache.engine.policy_core import sample_runs_fast
from forebay_cache.engine.policy_lists import SAMPLE_SEED
from forebay_core.units import LBA_BITS
from forebay_tools.analysis.accesses import REQUEST_BLOCKS_MAX, Batch, U64Array
from forebay_tools.analysis.calibration import Uses
from forebay_tools.analysis.hashing import HASHES, sample_hashes

SURVEY_MAX: Final = 1 << 17
_ROOM: Final = REQUEST_BLOCKS_MAX + SAMPLED_MAX


class Sampler:
    """Takes of batches the keys whose sample hash is below a limit."""

    def __init__(self) -> None:
        self._into = np.zeros(_ROOM, np.uint64)

    def take(self, batch: Batch, limit: int) -> tuple[list[U64Array], int]:
        """Return the sampled keys in order, in parts, and how many blocks the batch has."""
        parts, at, blocks = [], 0, 0
        while at < batch.keys.size:
            done, taken, total = sample_runs_fast(
                batch.keys[at:], batch.counts[at:], self._into, min(limit, HASHES - 1), SAMPLE_SEED
            )
            parts.append(self._into[:taken].copy())
            at += done
            blocks += total
        return parts, blocks


class Survey:
    """Counts accesses and estimates distinct blocks."""

    def __init__(self) -> None:
        self.accesses = 0
        self.last_ms = 0
        self.volume_accesses: dict[int, int] = {}
        self._limit = HASHES
        self._keys = np.zeros(0, np.uint64)
        self._counts = np.zeros(0, np.int64)
        self._new: list[U64Array] = []
        self._new_count = 0
        self._sampler = Sampler()

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
        parts, blocks = self._sampler.take(batch, self._limit)
        self.accesses += blocks
        if batch.keys.size:
            self.last_ms = max(self.last_ms, int(batch.times_ms.max()))
            self._count_volumes(batch)
        self._new += parts
        self._new_count += sum(part.size for part in parts)
        if self._new_count > SURVEY_MAX:
            self._merge()

    @property
    def distinct_blocks(self) -> int:
        """How many different blocks were used, about."""
        self._merge()
        return max(1, round(self._keys.size * HASHES / self._limit))

    def uses(self) -> Uses:
        """Return how often each surveyed block was used."""
        self._merge()
        return Uses(self._keys, self._counts, self._limit / HASHES)

    def working_sets(self) -> dict[int, int]:
        """Return the different blocks of each volume, about."""
        self._merge()
        volumes, counts = np.unique(self._keys >> np.uint64(LBA_BITS), return_counts=True)
        scale = HASHES / self._limit
        return {int(key): round(count * scale) for key, count in zip(volumes.tolist(), counts.tolist(), strict=True)}

    def _count_volumes(self, batch: Batch) -> None:
        volumes = batch.keys >> np.uint64(LBA_BITS)
        first = int(volumes[0])
        if int(volumes.min()) == int(volumes.max()):
            found = {first: int(batch.counts.sum())}
        else:
            names, at = np.unique(volumes, return_inverse=True)
            sums = np.bincount(at, batch.counts).astype(np.int64).tolist()
            found = dict(zip(names.tolist(), sums, strict=True))
        for key, count in found.items():
            self.volume_accesses[key] = self.volume_accesses.get(key, 0) + count

    def _merge(self) -> None:
        if not self._new:
            return
        keys, counts = np.unique(np.concatenate(self._new), return_counts=True)
        self._new, self._new_count = [], 0
        self._keys, self._counts = _added(self._keys, self._counts, keys, counts)
        while self._keys.size > SURVEY_MAX:
            self._limit //= 2
            kept = sample_hashes(self._keys) < np.uint64(self._limit)
            self._keys, self._counts = self._keys[kept], self._counts[kept]


def _added(
    keys: U64Array, counts: npt.NDArray[np.int64], more: U64Array, more_counts: npt.NDArray[np.int64]
) -> tuple[U64Array, npt.NDArray[np.int64]]:
    """Return sorted keys and their counts with more of both added."""
    at = np.searchsorted(keys, more)
    known = at < keys.size
    known[known] = keys[at[known]] == more[known]
    counts = counts.copy()
    counts[at[known]] += more_counts[known]
    fresh = ~known
    return np.insert(keys, at[fresh], more[fresh]), np.insert(counts, at[fresh], more_counts[fresh])

"""The first look at a trace: how long it is, and how many blocks it uses, of each volume, from a spatial sample.

Invariants:
    The keys that are kept are all blocks used so far whose sample hash is below `limit`; there are at most SURVEY_MAX.
"""

from typing import Final

import numpy as np

from forebay_cache.engine.limits import SAMPLED_MAX
from forebay_cache.engine.policy_core import sample_runs_fast
from forebay_cache.engine.policy_lists import SAMPLE_FACTOR, SAMPLE_SEED
from forebay_core.units import LBA_BITS
from forebay_tools.analysis.accesses import REQUEST_BLOCKS_MAX, Batch, U64Array

SURVEY_MAX: Final = 1 << 17
HASHES: Final = 1 << 64
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
        self.writes = 0
        self.last_ms = 0
        self._limit = HASHES
        self._keys = np.zeros(0, np.uint64)
        self._new: list[U64Array] = []
        self._new_count = 0
        self._sampler = Sampler()
        self.volume_accesses: dict[int, int] = {}

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
        parts, blocks = self._sampler.take(batch, self._limit)
        self.accesses += blocks
        if batch.keys.size:
            self.writes += int(batch.counts[batch.writes].sum())
            self.last_ms = max(self.last_ms, int(batch.times_ms.max()))
            volumes = (batch.keys >> np.uint64(LBA_BITS)).astype(np.int64)
            for key in np.unique(volumes).tolist():
                count = int(batch.counts[volumes == key].sum())
                self.volume_accesses[key] = self.volume_accesses.get(key, 0) + count
        self._new += parts
        self._new_count += sum(part.size for part in parts)
        if self._new_count > SURVEY_MAX:
            self._merge()

    @property
    def is_exact(self) -> bool:
        """Whether all blocks are known, not a sample."""
        self._merge()
        return self._limit == HASHES

    @property
    def distinct_blocks(self) -> int:
        """How many different blocks were used, about."""
        self._merge()
        return max(1, round(self._keys.size * HASHES / self._limit))

    def working_sets(self) -> dict[int, int]:
        """Return the different blocks of each volume, about."""
        self._merge()
        volumes, counts = np.unique(self._keys >> np.uint64(LBA_BITS), return_counts=True)
        scale = HASHES / self._limit
        return {int(key): round(count * scale) for key, count in zip(volumes.tolist(), counts.tolist(), strict=True)}

    def _merge(self) -> None:
        self._keys = np.unique(np.concatenate([self._keys, *self._new]))
        self._new, self._new_count = [], 0
        while self._keys.size > SURVEY_MAX:
            self._limit //= 2
            self._keys = self._keys[sample_hashes(self._keys) < np.uint64(self._limit)]


def sample_hashes(keys: U64Array) -> U64Array:
    """Return what is compared with the limit of a sample, for each key."""
    mixed = keys ^ np.uint64(SAMPLE_SEED)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ mixed >> np.uint64(33)) * np.uint64(factor)
    hashes: U64Array = (mixed ^ mixed >> np.uint64(33)) * np.uint64(SAMPLE_FACTOR)
    return hashes

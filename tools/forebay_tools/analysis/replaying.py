"""The whole trace through the daemon's own policy object, one replay for each size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from forebay_cache.engine.policy import PolicySettings, make_replay
from forebay_core.units import BLOCK_SIZE, parse_size
from forebay_tools.analysis.accesses import Batch
from forebay_tools.analysis.hashing import HASHES
from forebay_tools.analysis.survey import Sampler

MERGED_MIN = 1 << 20


class Replayed(NamedTuple):
    """What a cache of this size would have done."""

    size_blocks: int
    hit_ratio: float
    ssd_writes_per_access: float


class DistinctBlocks:
    """Counts different blocks exactly; memory grows with them, 8 bytes each."""

    def __init__(self) -> None:
        self._sampler = Sampler()
        self._keys = np.zeros(0, np.uint64)
        self._new: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
        self._new_count = 0

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
        parts, _ = self._sampler.take(batch, HASHES)
        for part in parts:
            self._new.append(np.unique(part))
            self._new_count += self._new[-1].size
        if self._new_count > max(MERGED_MIN, self._keys.size):
            self._merge()

    @property
    def count(self) -> int:
        """How many there were."""
        self._merge()
        return int(self._keys.size)

    def _merge(self) -> None:
        self._keys = np.unique(np.concatenate([self._keys, *self._new]))
        self._new, self._new_count = [], 0


class WholeReplay:
    """Drives a policy of each size with every access."""

    def __init__(self, sizes: Sequence[int], settings: PolicySettings) -> None:
        self._caches = [(size, make_replay(size, settings=settings)) for size in sizes]

    def add(self, batch: Batch) -> None:
        """Show a batch to all."""
        for _, cache in self._caches:
            cache.feed_requests(batch.keys, batch.counts, batch.writes)

    def results(self) -> list[Replayed]:
        """Return what they did, in the order of the sizes given."""
        found = []
        for size, cache in self._caches:
            figures = cache.figures()
            accesses = max(1, figures["accesses"])
            found.append(Replayed(size, figures["hits"] / accesses, figures["writes"] / accesses))
        return found


def parse_sizes(text: str) -> list[float]:
    """Return what `--sizes` says: shares as they are (up to 1, written with a point), bytes as negative numbers.

    Raises:
        ValueError: one is neither a share nor a size of at least a block.
    """
    found: list[float] = []
    for word in text.split(","):
        word = word.strip()
        if "." in word and word.replace(".", "", 1).isdigit() and 0 < float(word) <= 1:
            found.append(float(word))
        else:
            size = parse_size(word)
            if size < BLOCK_SIZE:
                raise ValueError(f"{word!r} is neither a share from 0.0001 to 1.0 nor a size of at least {BLOCK_SIZE}")
            found.append(-float(size))
    return found


def in_blocks(sizes: Sequence[float], distinct_blocks: int) -> list[int]:
    """Return the blocks of parsed sizes."""
    return [int(-size) // BLOCK_SIZE if size < 0 else max(1, int(distinct_blocks * size)) for size in sizes]

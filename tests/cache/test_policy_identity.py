"""It is an LFU, as a trace drives it and as the engine does: the frequent stay in main, scans and loops pass, and a new
working set takes over."""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from test_policy import VOLUME, in_main, zipf_keys

from forebay_cache.engine.policy import FrequencyPolicy, make_replay, ring_blocks
from forebay_cache.engine.policy_lists import LIST_WINDOW, MAIN, REGION_SHIFT, WINDOW


class Cache(Protocol):
    """A cache of some capacity that reads blocks."""

    def read(self, keys: np.ndarray) -> int:
        """Read blocks one after the other; return how many were hits."""

    def frequent(self) -> set[int]:
        """Return the blocks in main whose count is 2 or more."""

    def main(self) -> set[int]:
        """Return the blocks in main."""


class ByKeys:
    """The policy as a trace drives it."""

    def __init__(self, capacity: int) -> None:
        self.replay = make_replay(capacity)

    def read(self, keys: np.ndarray) -> int:
        before = self.replay.figures()["hits"]
        self.replay.feed(keys)
        return self.replay.figures()["hits"] - before

    def frequent(self) -> set[int]:
        return {key for bucket in self.replay.blocks()[2:LIST_WINDOW] for key in bucket}

    def main(self) -> set[int]:
        return in_main(self.replay)


class ByPlaces:
    """The policy as the engine drives it: what is fetched waits in memory and takes the next place that holds nothing
    worthy; what is not worthy any more stays readable until its place is taken."""

    def __init__(self, capacity: int) -> None:
        self.keys = np.zeros(2 * capacity + 1, np.uint64)
        self.policy = FrequencyPolicy(self.keys, worthy_share=capacity / (2 * capacity + 0.5))
        assert self.policy.capacity == capacity
        self.places: dict[int, int] = {}
        self.ring: dict[int, None] = {}
        self.target = 0

    def read(self, keys: np.ndarray) -> int:
        hits = 0
        for key in keys.tolist():
            place = self.places.get(key)
            if place is not None:
                hits += 1
                self.policy.hit(place)
                continue
            self.policy.missed(key, 1)
            hits += key in self.ring
            self.ring[key] = None
            if len(self.ring) > ring_blocks(self.policy.capacity):
                self._decide(next(iter(self.ring)))
        return hits

    def _decide(self, key: int) -> None:
        del self.ring[key]
        if not self.policy.admits(key):
            return
        place = self._free_place()
        old = int(self.keys[place])
        if old:
            del self.places[old]
            self.policy.removed(np.array([place]), volume_key=1)
        self.keys[place] = key
        self.places[key] = place
        self.policy.inserted(place)

    def _free_place(self) -> int:
        while True:
            self.target = self.target % (self.keys.size - 1) + 1
            if self.policy.states[self.target] < WINDOW << REGION_SHIFT:
                return self.target

    def frequent(self) -> set[int]:
        return {int(self.keys[place]) for bucket in self.policy._core.blocks()[2:LIST_WINDOW] for place in bucket}

    def main(self) -> set[int]:
        return {int(key) for key in self.keys[self.policy.states >> REGION_SHIFT == MAIN]}


Make = Callable[[int], Cache]
either = pytest.mark.parametrize("make", [ByKeys, ByPlaces])


@either
def test_a_stationary_zipf_stream_ends_with_the_most_frequent_blocks_in_main(make: Make) -> None:
    keys = zipf_keys(np.random.default_rng(7), blocks=20_000, count=1_000_000)
    cache = make(2000)
    cache.read(keys)
    main = cache.main()
    often = [key for key, _ in Counter(keys.tolist()).most_common(1000)]
    assert sum(key in main for key in often) >= 0.95 * len(often)


@either
def test_one_scan_evicts_hardly_any_frequent_block(make: Make) -> None:
    cache = make(2000)
    cache.read(zipf_keys(np.random.default_rng(3), blocks=20_000, count=600_000))
    frequent = cache.frequent()
    assert len(frequent) > 500
    cache.read(np.arange(20_000, dtype=np.uint64) + np.uint64(VOLUME + 10_000_000))
    assert len(frequent - cache.main()) < 0.02 * len(frequent)


@either
def test_a_new_working_set_takes_over_within_ten_times_the_cache(make: Make) -> None:
    rng = np.random.default_rng(5)
    cache = make(2000)
    cache.read(zipf_keys(rng, blocks=20_000, count=300_000))
    moved = zipf_keys(rng, blocks=20_000, count=300_000) + np.uint64(50_000_000)
    early = cache.read(moved[:2_000]) / 2_000
    cache.read(moved[2_000:20_000])
    within = cache.read(moved[20_000:24_000]) / 4_000
    cache.read(moved[24_000:60_000])
    steady = cache.read(moved[60_000:]) / 240_000
    assert early < steady
    assert within >= 0.9 * steady


@either
def test_a_loop_that_is_larger_than_the_cache_keeps_what_it_can(make: Make) -> None:
    loop = np.arange(1667, dtype=np.uint64) + np.uint64(VOLUME)
    cache = make(1000)
    cache.read(np.tile(loop, 60))
    assert cache.read(np.tile(loop, 20)) >= 0.58 * 20 * loop.size

"""The policy: counts and histogram stay true, ageing halves, the frequent stay, a scan passes through."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_cache.engine.blockmap import BlockMap, PlaceArray, make_key
from forebay_cache.engine.limits import AGEING_HITS_PER_PLACE, AGEING_SLICE_PLACES, COUNT_MAX
from forebay_cache.engine.policy import AgedFrequency, Policy

PLACES = 256


def places_of(values: list[int]) -> PlaceArray:
    return np.array(values, np.int64)


def keys_of(places: PlaceArray) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.zeros(places.size, np.uint64)


class SmallCache:
    """Map and policy, with zones filled and reclaimed front to back as the engine does, and no contents."""

    def __init__(self, zone_count: int, zone_blocks: int) -> None:
        self.zone_blocks = zone_blocks
        self.size = zone_count * zone_blocks
        self.policy: Policy = AgedFrequency(self.size)
        self.map = BlockMap(self.size, zone_blocks=zone_blocks)
        self.free = list(range(1, zone_count))
        self.full: list[int] = []
        self.open = 0
        self.at = 1  # place 0 holds no block
        self.misses = 0

    def touch(self, lba: int) -> None:
        """Read a block: a hit, or a fill."""
        place = self.map.find(make_key(1, lba))
        if place >= 0:
            self.policy.hit(place)
        else:
            self.misses += 1
            self._put(make_key(1, lba))
            while len(self.free) < 3:
                self._reclaim(self.full.pop(0))
        while self.policy.step():
            pass

    def _put(self, key: int) -> None:
        if self.at == self.zone_blocks:
            self.full.append(self.open)
            self.open = self.free.pop(0)
            self.at = int(self.open == 0)
        place = self.open * self.zone_blocks + self.at
        self.at += 1
        old = self.map.insert(key, 1, 1, place)
        if old < 0:
            self.policy.inserted(place, key)
        else:
            self.policy.moved(old, place)

    def _reclaim(self, zone: int) -> None:
        first = zone * self.zone_blocks
        keep = self.policy.worthy(first, self.zone_blocks) & self.map.linked_mask(first, self.zone_blocks)
        for place in (np.flatnonzero(keep) + first).tolist():
            self._put(self.map.keys[place])
        self.policy.removed(np.arange(first, first + self.zone_blocks))
        self.map.clear_zone(first, self.zone_blocks)
        self.free.append(zone)

    def resident(self, lbas: range) -> int:
        """How many of these blocks are cached."""
        return sum(self.map.find(make_key(1, lba)) >= 0 for lba in lbas)


def zipf_stream(rng: np.random.Generator, *, blocks: int, count: int, skew: float) -> list[int]:
    weights = 1 / np.arange(1, blocks + 1) ** skew
    lbas: list[int] = rng.choice(blocks, count, p=weights / weights.sum()).tolist()
    return lbas


def test_a_stationary_zipf_stream_keeps_the_most_frequent_blocks() -> None:
    cache = SmallCache(64, 64)
    for lba in zipf_stream(np.random.default_rng(7), blocks=10 * cache.size, count=400_000, skew=0.9):
        cache.touch(lba)
    assert cache.resident(range(cache.size // 10)) >= 0.99 * (cache.size // 10)
    assert cache.resident(range(cache.size // 3)) >= 0.9 * (cache.size // 3)


def test_a_scan_does_not_evict_what_is_used_often() -> None:
    cache = SmallCache(64, 64)
    hot = range(cache.size // 3)
    for _ in range(4):
        for lba in hot:
            cache.touch(lba)
    for lba in range(1_000_000, 1_000_000 + 10 * cache.size):
        cache.touch(lba)
    assert cache.resident(hot) == len(hot)


def test_a_new_working_set_takes_over() -> None:
    cache = SmallCache(32, 64)
    rng = np.random.default_rng(3)
    for lba in zipf_stream(rng, blocks=4 * cache.size, count=100_000, skew=1.0):
        cache.touch(lba)
    cache.misses = 0
    moved = zipf_stream(rng, blocks=4 * cache.size, count=20 * cache.size, skew=1.0)
    rates = []
    for part in range(0, len(moved), 2 * cache.size):
        cache.misses = 0
        for lba in moved[part : part + 2 * cache.size]:
            cache.touch(10_000_000 + lba)
        rates.append(1 - cache.misses / (2 * cache.size))
    assert rates[4] >= 0.9 * rates[-1]
    assert all(later >= earlier - 0.05 for earlier, later in pairwise(rates))


def test_ageing_halves_every_count_in_bounded_steps() -> None:
    count = AGEING_SLICE_PLACES * 2 + 5
    policy = AgedFrequency(count)
    policy.restore(0, (np.arange(count) % (COUNT_MAX + 1)).astype(np.uint8))
    before = policy.counts.copy()
    assert policy.step() is False
    everything = np.arange(count)
    for _ in range(AGEING_HITS_PER_PLACE):
        policy.hits(everything)
    raised = np.minimum(before.astype(int) + AGEING_HITS_PER_PLACE, COUNT_MAX)
    assert policy.counts.tolist() == raised.tolist()
    assert [policy.step() for _ in range(4)] == [True, True, False, False]
    assert policy.counts.tolist() == ((raised + 1) // 2).tolist()
    assert policy.histogram == np.bincount(policy.counts, minlength=256).tolist()


def test_a_block_that_was_used_once_is_not_worth_keeping() -> None:
    policy = AgedFrequency(PLACES)
    policy.inserted(3, 1)
    policy.inserted(4, 1)
    policy.hit(4)
    assert np.flatnonzero(policy.worthy(0, PLACES)).tolist() == [4]
    assert policy.worthy(4, 2).tolist() == [True, False]


def test_no_more_than_the_share_is_worth_keeping() -> None:
    policy = AgedFrequency(PLACES, worthy_share=0.25)
    policy.restore(0, (np.arange(PLACES) // 16 + 1).astype(np.uint8))
    assert int(policy.worthy(0, PLACES).sum()) == 64
    policy.restore(0, np.full(PLACES, 9, np.uint8))
    assert not policy.worthy(0, PLACES).any()
    policy.restore(0, np.full(PLACES, COUNT_MAX, np.uint8))
    assert policy.threshold == COUNT_MAX + 1
    assert not policy.worthy(0, PLACES).any()


def test_a_count_stays_at_its_largest() -> None:
    policy = AgedFrequency(PLACES)
    policy.restore(0, np.full(PLACES, COUNT_MAX, np.uint8))
    policy.hit(0)
    policy.hit_run(0, 4)
    policy.hit_run(0, PLACES)
    policy.hits(np.arange(PLACES))
    assert policy.counts.tolist() == [COUNT_MAX] * PLACES


CALLS = st.one_of(
    st.tuples(st.just("hit"), st.integers(0, PLACES - 1)),
    st.tuples(st.just("run"), st.integers(0, PLACES - 100), st.integers(1, 100)),
    st.tuples(st.just("hits"), st.lists(st.integers(0, PLACES - 1), unique=True)),
    st.tuples(st.just("inserted"), st.integers(0, PLACES - 1)),
    st.tuples(st.just("moved"), st.integers(0, PLACES - 1), st.integers(0, PLACES - 1)),
    st.tuples(st.just("written"), st.lists(st.integers(-1, PLACES - 101), max_size=100)),
    st.tuples(st.just("removed"), st.lists(st.integers(0, PLACES - 1), unique=True)),
)


def distinct(olds: list[int]) -> list[int]:
    """A block has one place: of equal ones the first stays, the others were not cached."""
    return [old if old not in olds[:i] else -1 for i, old in enumerate(olds)]


def apply_to_model(model: list[int], call: tuple) -> None:  # type: ignore[type-arg]
    match call:
        case ("hit", place):
            model[place] += 1
        case ("run", first, count):
            for place in range(first, first + count):
                model[place] += 1
        case ("hits", places):
            for place in places:
                model[place] += 1
        case ("inserted", place):
            model[place] = 1
        case ("moved", source, target):
            count, model[source] = model[source], 0
            model[target] = max(count, 1)
        case ("written", olds):
            for place, old in enumerate(distinct(olds), PLACES - 100):
                count = 0
                if old >= 0:
                    count, model[old] = model[old], 0
                model[place] = max(count, 1)
        case ("removed", places):
            for place in places:
                model[place] = 0


def apply_to_policy(policy: AgedFrequency, call: tuple) -> None:  # type: ignore[type-arg]
    match call:
        case ("hit", place):
            policy.hit(place)
        case ("run", first, count):
            policy.hit_run(first, count)
        case ("hits", places):
            policy.hits(places_of(places))
        case ("inserted", place):
            policy.inserted(place, 1)
        case ("moved", source, target):
            policy.moved(source, target)
        case ("written", olds):
            moved = places_of(distinct(olds))
            policy.written(PLACES - 100, moved, keys_of(moved))
        case ("removed", places):
            policy.removed(places_of(places))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(CALLS, max_size=60))
def test_counts_and_histogram_are_those_of_a_plain_list(calls: list[tuple]) -> None:  # type: ignore[type-arg]
    policy = AgedFrequency(PLACES)
    model = [0] * PLACES
    for call in calls:
        apply_to_policy(policy, call)
        apply_to_model(model, call)
    assert policy.counts.tolist() == model
    assert policy.histogram == np.bincount(model, minlength=256).tolist()


def test_a_place_costs_one_byte() -> None:
    assert AgedFrequency(1 << 20).memory_bytes == 1 << 20


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_senseless_share_is_refused(share: float) -> None:
    with pytest.raises(AssertionError):
        AgedFrequency(PLACES, worthy_share=share)

"""The policy: both twins do the same, books stay true, and it is an LFU: the frequent stay, scans and loops pass."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_cache.engine import policy_core
from forebay_cache.engine.policy import WORTHY_FROM, FrequencyPolicy, PolicySettings, make_replay
from forebay_cache.engine.policy_core import Core, Marker, MarkerFast, Replay, sample_runs
from forebay_cache.engine.policy_lists import LIST_PASSING, LIST_RING, LIST_WINDOW, MAIN, OUTSIDE, REGION_SHIFT, WINDOW
from forebay_cache.format.sample_file import PASSES

native = policy_core._policy
needs_native = pytest.mark.skipif(native is None, reason="there is no compiler here")
PLACES = 96
VOLUME = 1 << 40


def zipf_keys(rng: np.random.Generator, *, blocks: int, count: int, skew: float = 0.9) -> np.ndarray:
    weights = 1 / np.arange(1, blocks + 1) ** skew
    return rng.choice(blocks, count, p=weights / weights.sum()).astype(np.uint64) + np.uint64(VOLUME)


def hit_ratio(replay: Replay, keys: np.ndarray) -> float:
    before = replay.figures()
    replay.feed(keys)
    after = replay.figures()
    return (after["hits"] - before["hits"]) / keys.size


def in_main(replay: Replay) -> set[int]:
    return {key for bucket in replay.blocks()[:LIST_WINDOW] for key in bucket}


# --- replays -----------------------------------------------------------------------------------------------


def test_it_beats_an_lru_and_writes_less() -> None:
    keys = zipf_keys(np.random.default_rng(1), blocks=30_000, count=400_000)
    ours, lru = make_replay(1500), make_replay(1500, is_lru=True)
    assert hit_ratio(ours, keys) > hit_ratio(lru, keys) + 0.05
    assert ours.figures()["writes"] < lru.figures()["writes"] / 4
    assert lru.figures()["writes"] == 400_000 - lru.figures()["hits"]


def test_a_volume_below_its_floor_is_passed_over() -> None:
    rng = np.random.default_rng(9)
    large = zipf_keys(rng, blocks=20_000, count=200_000)
    small = rng.integers(0, 300, 4000).astype(np.uint64)
    held = []
    for base in (10_000_000, VOLUME):  # as blocks of the same volume, and of a second one
        replay = make_replay(1000)
        replay.feed(np.insert(large, np.arange(0, 200_000, 50), small + np.uint64(VOLUME + base)))
        first = VOLUME + base
        held.append(sum(first <= key < first + 300 for listed in replay.blocks() for key in listed))
    assert held[1] >= 2 * held[0] > 0, held


def test_a_miniature_has_its_share_of_the_ring_of_the_cache_that_it_stands_for() -> None:
    keys = np.arange(VOLUME, VOLUME + 500, dtype=np.uint64)
    for replay, waiting in (
        (make_replay(10_000), 100),
        (make_replay(20_000, rate=0.5), 100),
        (make_replay(4_096_000, rate=0.005), 20),
    ):
        replay.feed(keys)
        assert len(replay.blocks()[LIST_RING]) == waiting


def test_the_same_trace_gives_the_same_figures() -> None:
    keys = zipf_keys(np.random.default_rng(2), blocks=9000, count=50_000)
    one, other = make_replay(700, seed=5), make_replay(700, seed=5)
    one.feed(keys)
    other.feed(keys)
    assert one.figures() == other.figures()
    assert one.blocks() == other.blocks()


# --- twins ------------------------------------------------------------------------------------------------------


@needs_native
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.integers(0, 1 << 32),
    st.sampled_from([0.0, 0.03, 0.3]),
    st.sampled_from([0.0, 0.2, 0.8]),
    st.integers(3, 40),
    st.booleans(),
)
def test_both_twins_replay_alike(
    capacity: int, seed: int, price: float, window_max: float, entries: int, is_lru: bool
) -> None:
    rng = random.Random(seed)
    keys = [rng.randrange(1, 3) << 40 | int(rng.paretovariate(0.6)) % 300 for _ in range(1500)]
    twins = [
        kind(capacity, max(1, capacity // 10), entries, seed, price, window_max, 6, 16, is_lru)
        for kind in (native.Replay, Replay)
    ]
    passing = [key | PASSES if key % 5 == 0 else key for key in keys[:500]]
    firsts, counts, writes = requests(rng)
    for twin in twins:
        twin.feed(np.array(passing, np.uint64))
        twin.feed_requests(firsts, counts, writes)
        twin.feed(np.array(keys[500:], np.uint64))
    assert twins[0].figures() == twins[1].figures()
    assert twins[0].blocks() == twins[1].blocks()
    assert twins[0].volume_hits() == twins[1].volume_hits()
    assert twins[0].group_misses() == twins[1].group_misses()
    held = {key for listed in twins[0].blocks() for key in listed}
    assert len(twins[0].blocks()[LIST_PASSING]) <= max(1, capacity // 10)
    assert {twin.holds(np.array(keys, np.uint64)) for twin in twins} == {bytes(key in held for key in keys)}
    assert sum(np.frombuffer(twins[0].volume_hits(), np.int64).tolist()) == twins[0].figures()["hits"]


def requests(rng: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some streams of requests of two volumes, which go on, break off and overtake each other."""
    ends, rows = [1 << 40, 2 << 40, 2 << 40 | 150], []
    for _ in range(300):
        which, count = rng.randrange(3), rng.randrange(1, 9)
        start = ends[which] if rng.random() < 0.8 else rng.randrange(1, 3) << 40 | rng.randrange(300)
        ends[which] = start + count
        rows.append((start, count, rng.random() < 0.2))
    firsts, counts, writes = zip(*rows, strict=True)
    return np.array(firsts, np.uint64), np.array(counts, np.uint64), np.array(writes, np.bool_)


@needs_native
@pytest.mark.parametrize("seed", range(5))
def test_both_twins_mark_the_same_requests(seed: int) -> None:
    firsts, counts, writes = requests(random.Random(seed))
    marked = np.frombuffer(Marker(20, 64).mark(firsts, counts, writes), np.uint64)
    assert MarkerFast(20, 64).mark(firsts, counts, writes) == marked.tobytes()
    passing = marked >= np.uint64(PASSES)
    assert 0 < passing.sum() < passing.size
    assert not (passing & writes).any()
    assert ((marked & np.uint64(PASSES - 1)) == firsts).all()
    assert not (np.frombuffer(MarkerFast(0, 64).mark(firsts, counts, writes), np.uint64) != firsts).any()


class Device:
    """Keys by place, as the map keeps them, under a policy."""

    def __init__(self, kind: type, capacity: int, seed: int) -> None:
        self.keys = np.zeros(PLACES, np.uint64)
        self.states = np.zeros(PLACES, np.uint8)
        self.core: Core = kind(PLACES, capacity, self.keys, self.states, 2, 10, seed, 0.03, 0.8)
        self.place_of: dict[int, int] = {}

    def use(self, key: int, place: int, how: int) -> None:
        """Read a block, or write it to a place that may hold another one."""
        found = self.place_of.get(key, -1)
        if how == 0 and found >= 0:
            self.core.hit(found)
        elif how == 1:
            self._empty(place)
            found = self.place_of.get(key, -1)
            if found >= 0:
                self.keys[found] = 0
            self._put(key, place)
            self.core.written(np.array([place]), np.array([found], np.int64), np.array([key], np.uint64), 1)
        elif how == 2 and found >= 0 and self.keys[place] == 0:
            self.keys[found] = 0
            self._put(key, place)
            self.core.moved(np.array([found]), np.array([place]))
        elif how == 3 and found < 0:
            self.core.missed(key, 1, key % 3 == 0)
            if self.core.admits(key) and not (key % 3 == 0 and self.core.passes_over(key)):
                self._empty(place)
                self._put(key, place)
                self.core.entered(place)
        elif how == 4:
            self._empty(place)

    def _put(self, key: int, place: int) -> None:
        self.keys[place] = key
        self.place_of[key] = place

    def _empty(self, place: int) -> None:
        key = int(self.keys[place])
        if key:
            del self.place_of[key]
            self.keys[place] = 0
            self.core.removed(np.array([place], np.int64), key >> 40)

    def check(self, capacity: int) -> None:
        """The lists and the states say the same."""
        listed = self.core.blocks()
        everywhere = [place for places in listed for place in places]
        assert len(everywhere) == len(set(everywhere)) == self.core.figures()["count"] <= capacity
        regions = self.states >> REGION_SHIFT
        assert sorted(listed[LIST_WINDOW]) == np.flatnonzero(regions == WINDOW).tolist()
        assert sorted(place for bucket in listed[:LIST_WINDOW] for place in bucket) == (
            np.flatnonzero(regions == MAIN).tolist()
        )
        assert not listed[LIST_RING]
        assert (self.states == 0).tolist() == (self.keys == 0).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_books_are_true_and_alike_whatever_happens_to_places(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.randrange(1, PLACES)
    devices = [Device(kind, capacity, seed) for kind in ([Core] if native is None else [native.Core, Core])]
    for step in range(1200):
        key = rng.randrange(1, 4) << 40 | int(rng.paretovariate(0.7)) % 150
        place, how = rng.randrange(1, PLACES), rng.choices(range(5), (6, 3, 1, 4, 1))[0]
        for device in devices:
            device.use(key, place, how)
        if step == 500:
            for device in devices:
                device.core.set_floor(capacity // 6, np.array([1, 2, 3], np.int64))
                device.core.take_sample(1 << 63)
        if step % 100 == 0:
            devices[0].check(capacity)
            for device in devices[1:]:
                assert device.states.tolist() == devices[0].states.tolist(), step
                assert device.core.blocks() == devices[0].core.blocks(), step
    assert len({device.core.take_sample(0) for device in devices}) == 1
    assert len({str(device.core.figures()) for device in devices}) == 1


@needs_native
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 30)), max_size=20),
    st.integers(0, (1 << 64) - 1),
    st.integers(10, 200),
)
def test_both_twins_sample_alike(runs: list[tuple[int, int]], limit: int, room: int) -> None:
    firsts, counts = (np.array([run[i] for run in runs], np.uint64) for i in (0, 1))
    left = []
    for sample in (native.sample_runs, sample_runs):
        into = np.zeros(room, np.uint64)
        done, taken, total = sample(firsts, counts, into, limit, 7)
        left.append((done, taken, total, into[:taken].tolist()))
        assert total == sum(count for _, count in runs[:done])
    assert left[0] == left[1]


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    keys, states = np.zeros(8, np.uint64), np.zeros(8, np.uint8)
    for places, capacity in ((9, 4), (8, 9), (8, 0)):
        with pytest.raises(ValueError, match="fit"):
            native.Core(places, capacity, keys, states, 1, 10, 0, 0.0, 0.8)
    with pytest.raises((BufferError, ValueError), match=r"read-only|writable"):
        native.Core(8, 4, keys, np.frombuffer(bytes(8), np.uint8), 1, 10, 0, 0.0, 0.8)
    core = native.Core(8, 4, keys, states, 1, 10, 0, 0.0, 0.8)
    for place in (0, 9, 1 << 63):
        with pytest.raises(ValueError, match="outside"):
            core.hit(place)
    for call in (
        lambda: core.hit_run(5, 9),
        lambda: core.moved(np.array([1]), np.array([9])),
        lambda: core.moved(np.array([1, 0]), np.array([2, 3])),
        lambda: core.written(np.array([7, 8]), np.array([-1, -1]), keys[:2], 2),
        lambda: core.written(np.array([1, 2]), np.array([-1, 8]), keys[:2], 2),
        lambda: core.written(np.array([1, -1]), np.array([-1, -1]), keys[:2], 2),
        lambda: core.restore(5, states),
    ):
        with pytest.raises(ValueError, match="outside"):
            call()
    with pytest.raises(ValueError, match="fit"):
        core.written(np.array([1, 2]), np.array([-1, -1]), keys[:1], 2)
    with pytest.raises(ValueError, match="fit"):
        core.written(np.array([1, 2]), np.array([-1, -1]), keys[:2], 3)
    with pytest.raises(ValueError, match="fit"):
        core.moved(np.array([1]), np.array([2, 3]))
    with pytest.raises(ValueError, match="plan"):
        core.follow(7)
    with pytest.raises(ValueError, match="size"):
        native.Replay(0, 0, 10, 0, 0.0, 0.8, 0, 0, False)
    replay = native.Replay(5, 1, 10, 0, 0.0, 0.8, 0, 0, False)
    for counts, writes in ((keys[:7], states), (keys, states[:7]), (keys, keys)):
        with pytest.raises(ValueError, match="fit"):
            replay.feed_requests(keys, counts, writes)
        with pytest.raises(ValueError, match="fit"):
            native.Marker(5, 5).mark(keys, counts, writes)


# --- over places ------------------------------------------------------------------------------------------------


def full_policy(count: int = 400) -> tuple[FrequencyPolicy, np.ndarray]:
    """A policy over places that hold blocks 1, 2, 3 ...; the first quarter is used often."""
    keys = np.arange(count, dtype=np.uint64) + np.uint64(VOLUME)
    keys[0] = 0
    policy = FrequencyPolicy(keys, worthy_share=0.5)
    policy.written(np.arange(1, count), np.full(count - 1, -1, np.int64), keys[1:], count - 1)
    for _ in range(20):
        policy.hit_run(1, count // 4)
    return policy, keys


def worthy_in(policy: FrequencyPolicy) -> np.ndarray:
    return policy.states >= WORTHY_FROM


def test_no_more_than_the_share_is_worth_keeping_and_the_frequent_are() -> None:
    policy, _ = full_policy()
    worthy = worthy_in(policy)
    assert not worthy[0]
    assert worthy.sum() <= 200
    assert worthy[1:100].mean() >= 0.95


def test_a_restart_keeps_what_was_worth_keeping() -> None:
    policy, keys = full_policy()
    again = FrequencyPolicy(keys, worthy_share=0.5)
    for first in range(0, 400, 50):
        again.restore(first, policy.states[first : first + 50])
    again.restored()
    assert (worthy_in(again) == worthy_in(policy)).mean() >= 0.97
    assert again.frequency(int(keys[5])) > again.frequency(int(keys[390]))
    assert again.figures()["count"] == policy.figures()["count"]


def test_what_came_after_the_checkpoint_counts_as_just_used() -> None:
    _, keys = full_policy()
    again = FrequencyPolicy(keys, worthy_share=0.5)
    states = np.zeros(400, np.uint8)
    states[7] = 1
    states[8] = OUTSIDE << REGION_SHIFT
    again.restore(0, states)
    assert np.flatnonzero(worthy_in(again)).tolist() == [7]


def test_a_block_that_lost_is_back_when_it_is_used_before_its_zone_is_reclaimed() -> None:
    policy, _ = full_policy()
    lost = next(place for place in range(1, 400) if not worthy_in(policy)[place])
    writes = policy.figures()["writes"]
    for _ in range(12):
        policy.hit(lost)
    assert worthy_in(policy)[lost]
    assert policy.figures()["writes"] == writes


def test_a_fetched_block_of_a_full_cache_is_kept_once_it_is_used_often() -> None:
    policy, _ = full_policy(4000)
    policy._core.follow(1)  # no window: frequency decides
    for _ in range(3):
        policy.hit_run(1, 3999)
    assert policy.figures()["count"] == policy.capacity
    cold, warm = VOLUME + 50_000, VOLUME + 60_000
    policy.missed(cold, 1)
    assert not policy.admits(cold)
    for _ in range(15):
        policy.missed(warm, 1)
    assert policy.admits(warm)


def test_the_window_never_grows_beyond_its_setting() -> None:
    keys = zipf_keys(np.random.default_rng(4), blocks=3000, count=60_000)
    replay = make_replay(500, settings=PolicySettings(window_max=0.1))
    for part in np.split(keys, 20):
        replay.feed(part)
        assert replay.figures()["window_max"] <= 50


@needs_native
def test_a_large_native_core_counts_as_its_twin() -> None:
    places = 200_000  # the counters take more than a mebibyte: they lie in memory mapped for them
    cores = [
        core(places, places // 2, np.zeros(places, np.uint64), np.zeros(places, np.uint8), 16, 64, 5, 0.01, 0.8)
        for core in (Core, policy_core.CoreFast)
    ]
    rng = random.Random(4)
    keys = [rng.randrange(1 << 40, 1 << 41) for _ in range(400)]
    for core in cores:
        for key in keys:
            core.missed(key, 1 + key % 3, False)
    asked = [key + more for key in keys for more in range(4)]
    counts, native_counts = ([core.frequency(key) for key in asked] for core in cores)
    assert native_counts == counts
    assert max(counts) > 0


def test_a_place_costs_at_most_17_bytes() -> None:
    policy = FrequencyPolicy(np.zeros(1 << 16, np.uint64))
    assert policy.memory_bytes <= 17 << 16


def test_a_volume_in_use_keeps_as_much_of_an_equal_share_as_is_set() -> None:
    policy = FrequencyPolicy(np.zeros(2001, np.uint64), worthy_share=0.5, core=Core)
    for share, floor in ((0.5, 125), (1.0, 250), (0.0, 0)):
        policy.protect([1, 2, 3, 4], floor_share=share)
        assert policy._core._cache.floor == floor
    policy.protect([1], floor_share=1.0)
    assert policy._core._cache.floor == 0

"""The cache policy at work: `Core` over the places of a device, `Replay` over the keys of a trace.

Which share of the cache the window gets, and how strict admission is, is a *plan*. Miniatures of the whole cache, one
for each plan, see the accesses of a spatially hashed share of all blocks; the plan with the best score is followed. A
score is the moving average of hits less the price of what was written. So one workload gets a small window and
frequent blocks, another nearly an LRU, and a loop keeps what it has.

These classes have native twins (`_policy.c`), which are used where they were built; they do the same to the last bit.
Per access of the engine, 2 cores EPYC in a virtual machine, November 2026: about 60 us here, 0.3 us natively.

Invariants: see `policy_lists`.
Crash: see `policy_lists`. Miniatures start empty, with the plan that the restored window hints at.
"""

import enum
from collections.abc import Iterator
from typing import Final, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import (
    COUNT_MAX,
    SAMPLED_MAX,
    SCORE_DECAY,
    SCORE_LEAD,
    SCORES_PER_CAPACITY,
    SETTLE_STEPS_MAX,
    VOLUME_SLOTS,
)
from forebay_cache.engine.policy_lists import (
    COUNT_MASK,
    LISTS,
    MAIN,
    MINIATURE_FACTOR,
    OUTSIDE,
    PASSING,
    REGION_SHIFT,
    WINDOW,
    Sketch,
    SlotCache,
    sample_hash,
)
from forebay_cache.engine.streams import StreamTable
from forebay_cache.format.sample_file import PASSES
from forebay_core.units import LBA_BITS

try:
    from forebay_cache import _policy
except ImportError:  # no compiler when it was installed
    _policy = None  # type: ignore[assignment]

U64Array = npt.NDArray[np.uint64]
PlaceArray = npt.NDArray[np.int64]
_U64: Final = (1 << 64) - 1


class Plan(NamedTuple):
    """How new blocks come in: share of the window, and the victim's count from which a margin is asked of them."""

    window: float
    margin_from: int


PLANS: Final = (
    Plan(0.0, 0),
    Plan(0.0, 3),
    Plan(0.03, 3),
    Plan(0.1, 3),
    Plan(0.2, 3),
    Plan(0.4, 3),
    Plan(0.8, 3),
)
PLAN_AT_START: Final = 5
MISS_GROUPS: Final = 64


class Figures(TypedDict):
    """What a policy did so far, in blocks; `plan` is the index of the one that is followed."""

    accesses: int
    hits: int
    writes: int
    count: int
    window_count: int
    window_max: int
    plan: int


def share_of(capacity: int, share: float) -> int:
    """Return a share of a number of blocks."""
    return int(capacity * share + 0.5)


class Outcome(enum.Enum):
    """What an access found; HIT_PASSING is in memory, but for a long stream alone: the store had to bring it."""

    MISSED = 0
    HIT = 1
    HIT_PASSING = 2


class _Keyed:
    """A cache that gives slots to keys itself."""

    def __init__(self, capacity: int, ring_max: int, sketch: Sketch) -> None:
        slots = capacity + ring_max + SETTLE_STEPS_MAX + 3
        self.keys: Final = np.zeros(slots, np.uint64).data
        self._slot_of: Final[dict[int, int]] = {}
        self._unused: Final = list(range(slots - 1, 0, -1))
        states = np.zeros(slots, np.uint8).data
        self.cache: Final = SlotCache(slots, capacity, keys=self.keys, states=states, sketch=sketch, on_gone=self._free)
        self.cache.ring_max = ring_max

    def access(self, key: int, *, passes: bool) -> Outcome:
        """Use a block, as part of a long stream or not."""
        cache = self.cache
        cache.accesses += 1
        cache.sweep()
        slot = self._slot_of.get(key, 0)
        cache.hits += slot != 0
        if slot and cache.region(slot) != PASSING:
            cache.touch(slot)
            return Outcome.HIT
        self._bring(slot, key, passes=passes)
        return Outcome.HIT_PASSING if slot else Outcome.MISSED

    def _bring(self, slot: int, key: int, *, passes: bool) -> None:
        """A block is used that is not in the cache, and not in memory unless `slot` holds it as one that passed by."""
        cache = self.cache
        is_new = slot == 0
        is_over = passes and cache.passes_over(cache.frequency(key))
        if is_new:
            slot = self._slot_of[key] = self._unused.pop()
            self.keys[slot] = key
        if is_over:
            if is_new:
                cache.hold_passing(slot)
            return
        if not is_new:
            cache.leave_passing(slot)
        if cache.ring_max > 0:
            cache.put_in(slot, OUTSIDE, 0)
        else:
            cache.writes += 1
            cache.put_in(slot, WINDOW, 0)
        cache.settle()

    def holds(self, key: int) -> bool:
        """Tell whether a block is here."""
        return key in self._slot_of

    def _free(self, slot: int) -> None:
        del self._slot_of[self.keys[slot]]
        self.cache.states[slot] = 0
        self._unused.append(slot)


class _Chooser:
    """The miniatures and the plan that is best by them."""

    def __init__(
        self, sketch: Sketch, capacity: int, ring_max: int, entries: int, price: float, window_max: float
    ) -> None:
        mini = min(capacity, entries)
        self._limit = _U64 if capacity <= entries else int(mini / capacity * 18446744073709551615.0)
        self._price = price
        self._sketch = sketch
        self._until_score = capacity // SCORES_PER_CAPACITY + 1
        self.plan_max = max(i for i, plan in enumerate(PLANS) if i == 0 or plan.window <= window_max)
        self.plan = min(PLAN_AT_START, self.plan_max)
        self._scores: list[float] = []
        ring = max(1, share_of(mini, ring_max / capacity))
        self._minis = [_Keyed(mini, ring, sketch) for _ in range(self.plan_max + 1)]
        for plan, keyed in enumerate(self._minis):
            follow_plan(keyed.cache, plan)

    def observe(self, whole: SlotCache, key: int, hashed: int, *, passes: bool) -> None:
        """Count an access of the whole cache: age, show it to the miniatures, and score them now and then."""
        if self._sketch.count(hashed):
            whole.halve()
            for keyed in self._minis:
                keyed.cache.halve()
        if hashed * MINIATURE_FACTOR & _U64 <= self._limit:
            for keyed in self._minis:
                keyed.access(key, passes=passes)
        self._until_score -= 1
        if self._until_score <= 0:
            self._until_score = whole.capacity // SCORES_PER_CAPACITY + 1
            if self._choose():
                follow_plan(whole, self.plan)

    def _choose(self) -> bool:
        if self._minis[0].cache.accesses == 0:
            return False
        values = [self._value(keyed.cache) for keyed in self._minis]
        if self._scores:
            values = [
                old * SCORE_DECAY + new * (1 - SCORE_DECAY) for old, new in zip(self._scores, values, strict=True)
            ]
        self._scores = values
        best = self.plan
        for plan, score in enumerate(values):
            if score > values[best]:
                best = plan
        if best == self.plan or values[best] <= values[self.plan] + SCORE_LEAD:
            return False
        self.plan = best
        return True

    def _value(self, cache: SlotCache) -> float:
        value = (cache.hits - self._price * cache.writes) / cache.accesses
        cache.hits = cache.writes = cache.accesses = 0
        return value


def follow_plan(cache: SlotCache, plan: int) -> None:
    """Let a cache work as a plan says."""
    cache.window_max = share_of(cache.capacity, PLANS[plan].window)
    cache.margin_from = PLANS[plan].margin_from


def _figures(cache: SlotCache, plan: int, accesses: int) -> Figures:
    return Figures(
        accesses=accesses,
        hits=cache.hits,
        writes=cache.writes,
        count=cache.count,
        window_count=cache.window_count,
        window_max=cache.window_max,
        plan=plan,
    )


class Core:
    """The policy over the places of a device; place 0 holds no block.

    `keys` is the u64 array of the map, `states` a u8 array that this class alone writes to.
    """

    def __init__(
        self,
        places: int,
        capacity: int,
        keys: U64Array,
        states: npt.NDArray[np.uint8],
        ring_max: int,
        entries: int,
        seed: int,
        price: float,
        window_max: float,
        /,
    ) -> None:
        if not (0 < capacity <= places == keys.size == states.size and ring_max <= capacity and entries > 0):
            raise ValueError("the arrays do not fit each other")
        self._sketch = Sketch(capacity, seed)
        self._cache = SlotCache(
            places, capacity, keys=keys.data, states=states.data, sketch=self._sketch, on_gone=self._gone
        )
        self._cache.volume_counts = [0] * VOLUME_SLOTS
        self._chooser = _Chooser(self._sketch, capacity, ring_max, entries, price, window_max)
        follow_plan(self._cache, self._chooser.plan)
        self._sample_limit = 0
        self._sampled: list[int] = []
        self._accesses = 0

    def hit(self, place: int) -> None:
        """A cached block was used."""
        self._check(place, 1)
        self._see(self._cache.keys[place])
        if self._cache.region(place) >= WINDOW:
            self._cache.touch(place)
        else:
            self._cache.enter(place)

    def hit_run(self, first: int, count: int) -> None:
        """Consecutive places were hit."""
        self._check(first, count)
        for place in range(first, first + count):
            self.hit(place)

    def missed(self, key: int, count: int, passes: bool, /) -> None:
        """Consecutive blocks were used that are not cached; as part of a long stream that passes by, or not."""
        for one in range(key, key + count):
            self._see(one, passes=passes)

    def admits(self, key: int) -> bool:
        """Tell whether a block that was fetched is worth a write."""
        return self._cache.admits(self.frequency(key), (key >> LBA_BITS) % VOLUME_SLOTS)

    def passes_over(self, key: int) -> bool:
        """Tell whether a block that passes by is not to come in, now that its use is counted."""
        return self._cache.passes_over(self.frequency(key))

    def frequency(self, key: int) -> int:
        """Return how often a block was used lately."""
        return self._sketch.frequency(self._sketch.hash_of(key))

    def entered(self, place: int) -> None:
        """A fetched block lies here now."""
        self._check(place, 1)
        if self._cache.region(place) < WINDOW:
            self._cache.writes += 1
            self._cache.enter(place)

    def moved(self, sources: PlaceArray, targets: PlaceArray) -> None:
        """Cached blocks have other places now."""
        if sources.size != targets.size:
            raise ValueError("the arrays do not fit each other")
        moves = list(zip(sources.tolist(), targets.tolist(), strict=True))
        for source, target in moves:
            self._check(source, 1)
            self._check(target, 1)
        for source, target in moves:
            if source != target:
                self._cache.replace(source, target)

    def written(self, places: PlaceArray, olds: PlaceArray, keys: U64Array, count: int) -> None:
        """Blocks were written to these places; -1 stands for those that had none before."""
        if count > min(places.size, olds.size, keys.size):
            raise ValueError("the arrays do not fit each other")
        rows = [(int(places[i]), int(olds[i]), int(keys[i])) for i in range(count)]
        for place, old, _ in rows:
            self._check(place, 1)
            self._check(max(old, 1), 1)
        cache = self._cache
        for place, old, key in rows:
            cache.volume_of_zero = key >> LBA_BITS
            self._see(key)
            if old >= 0:
                cache.replace(old, place)
            if cache.region(place) >= WINDOW:
                cache.touch(place)
            else:
                cache.writes += old < 0
                cache.enter(place)

    def removed(self, places: PlaceArray, volume_key: int) -> None:
        """These places are empty now; where the map has no key any more, they were of this volume."""
        cache = self._cache
        cache.volume_of_zero = volume_key
        for place in places.tolist():
            self._check(place, 1)
            if cache.region(place) >= WINDOW:
                cache.take_out(place)
            cache.states[place] = 0

    def restore(self, first: int, states: npt.NDArray[np.uint8]) -> None:
        """Take over states of a checkpoint; those without a region were used since.

        A place whose state is known already keeps it, but its block counts as used that often.
        """
        if first + states.size > self._cache.slots:
            raise ValueError("a place is outside of the device")
        for place in (np.flatnonzero(states) + first).tolist():
            if place > 0:
                self._restore(place, int(states[place - first]))

    def follow(self, plan: int) -> None:
        """Follow a plan until another one is better."""
        if plan > self._chooser.plan_max:
            raise ValueError("there is no such plan")
        self._chooser.plan = plan
        follow_plan(self._cache, plan)

    def set_floor(self, floor: int, volume_keys: PlaceArray) -> None:
        """While one of these volumes holds less than the floor, its blocks are passed over as victims."""
        self._cache.floored = {key % VOLUME_SLOTS for key in volume_keys.tolist()}
        self._cache.floor = floor

    def take_sample(self, limit: int) -> bytes:
        """Return the keys used since the last call whose hash was below the limit then given; set the next limit.

        PASSES is set in those that were missed in a long stream.
        """
        sampled = np.array(self._sampled, np.uint64).tobytes()
        self._sample_limit, self._sampled = limit, []
        return sampled

    def figures(self) -> Figures:
        """Return what was done so far; the hits are counted by others."""
        return _figures(self._cache, self._chooser.plan, self._accesses)

    def blocks(self) -> list[list[int]]:
        """Return the places of each list, the oldest first."""
        return [self._cache.blocks(number) for number in range(LISTS)]

    def _see(self, key: int, *, passes: bool = False) -> None:
        hashed = self._sketch.hash_of(key)
        self._accesses += 1
        if sample_hash(key) < self._sample_limit and len(self._sampled) < SAMPLED_MAX:
            self._sampled.append(key | PASSES if passes else key)
        self._chooser.observe(self._cache, key, hashed, passes=passes)
        self._cache.sweep()

    def _restore(self, place: int, state: int) -> None:
        cache = self._cache
        region, bucket = state >> REGION_SHIFT, min(state & COUNT_MASK, COUNT_MAX)
        is_kept = region != OUTSIDE and cache.count < cache.capacity
        if is_kept:
            self._sketch.raise_to(self._sketch.hash_of(cache.keys[place]), max(bucket, 1))
        if cache.states[place] != 0:
            return
        if is_kept:
            cache.put_in(place, MAIN if region == MAIN else WINDOW, bucket)
        else:
            cache.set_state(place, OUTSIDE, 0)

    def _gone(self, place: int) -> None:
        self._cache.set_state(place, OUTSIDE, 0)

    def _check(self, place: int, count: int) -> None:
        if not 0 < place <= place + count <= self._cache.slots:
            raise ValueError("a place is outside of the device")


class Replay:
    """A whole cache that is driven by the keys of a trace: the policy of the daemon, or an LRU to compare it with."""

    def __init__(
        self,
        capacity: int,
        ring_max: int,
        entries: int,
        seed: int,
        price: float,
        window_max: float,
        bypass: int,
        ahead: int,
        is_lru: bool,
        /,
    ) -> None:
        """`bypass` and `ahead` are the blocks from which on a stream passes by, and that one has read ahead."""
        if not (capacity > 0 and ring_max <= capacity and entries > 0):
            raise ValueError("no cache has this size")
        self._sketch = Sketch(capacity, seed)
        ring_max = 0 if is_lru else max(1, ring_max)
        self._keyed = _Keyed(capacity, ring_max, self._sketch)
        self._streams = StreamTable(bypass, ahead)
        self._accesses = 0
        self._volume_hits = [0] * VOLUME_SLOTS
        self._group_misses = [0] * MISS_GROUPS
        self._chooser = _Chooser(self._sketch, capacity, ring_max, entries, price, window_max)
        self._is_lru = is_lru
        cache = self._keyed.cache
        if is_lru:
            cache.window_max = capacity
            self._chooser.plan = 0
        else:
            cache.volume_counts = [0] * VOLUME_SLOTS
            follow_plan(cache, self._chooser.plan)

    def feed(self, keys: U64Array) -> None:
        """Use blocks one after the other; PASSES may be set in their keys."""
        for key in keys.tolist():
            self._use(key & ~PASSES, passes=key >= PASSES)

    def feed_requests(self, firsts: U64Array, counts: U64Array, writes: npt.NDArray[np.bool_], /) -> None:
        """Serve requests one after the other, as the daemon does: streams of reads are found by what they miss."""
        for first, count, is_write in zip(firsts.tolist(), counts.tolist(), writes.tolist(), strict=True):
            passes = not is_write and self._streams.passes(first, count)
            missed = sum([self._use(key, passes=passes) for key in range(first, first + count)])
            if missed and not is_write:
                self._streams.missed(first, count, missed)

    def _use(self, key: int, *, passes: bool) -> bool:
        """Use a block; tell whether the store had to bring it."""
        cache = self._keyed.cache
        self._accesses += 1
        hashed = self._sketch.hash_of(key)
        volume = (key >> LBA_BITS) % VOLUME_SLOTS
        if not self._is_lru:
            self._chooser.observe(cache, key, hashed, passes=passes)
            if volume not in cache.floored:
                cache.floored.add(volume)
                volumes = len(cache.floored)
                cache.floor = cache.capacity // (2 * volumes) if volumes > 1 else 0
        outcome = self._keyed.access(key, passes=passes and not self._is_lru)
        if outcome is Outcome.MISSED:
            self._group_misses[hashed % MISS_GROUPS] += 1
        else:
            self._volume_hits[volume] += 1
        return outcome is not Outcome.HIT

    def holds(self, keys: U64Array) -> bytes:
        """Return a byte for each block: 1 if it is in the cache or waits in memory."""
        return bytes(self._keyed.holds(key) for key in keys.tolist())

    def volume_hits(self) -> bytes:
        """Return the hits of each volume slot, as i64."""
        return np.array(self._volume_hits, np.int64).tobytes()

    def group_misses(self) -> bytes:
        """Return the misses of each of MISS_GROUPS random groups of blocks, as i64: how much they differ by chance."""
        return np.array(self._group_misses, np.int64).tobytes()

    def figures(self) -> Figures:
        """Return what was done so far."""
        return _figures(self._keyed.cache, self._chooser.plan, self._accesses)

    def blocks(self) -> list[list[int]]:
        """Return the keys of each list, the oldest first."""
        cache = self._keyed.cache
        return [[int(self._keyed.keys[slot]) for slot in cache.blocks(number)] for number in range(LISTS)]


def sample_runs(firsts: U64Array, counts: U64Array, into: U64Array, limit: int, seed: int, /) -> tuple[int, int, int]:
    """Write the keys of runs of blocks to `into` whose sample hash is below the limit.

    Returns how many runs were read (as many as surely fit), how many keys were written, and how many blocks they had.
    """
    done = taken = total = 0
    for first, count in _runs(firsts, counts):
        if count > into.size - taken:
            break
        done += 1
        total += count
        for key in range(first, first + count):
            if sample_hash(key, seed) < limit:
                into[taken] = key
                taken += 1
    return done, taken, total


def _runs(firsts: U64Array, counts: U64Array) -> Iterator[tuple[int, int]]:
    return zip(firsts.tolist(), counts.tolist(), strict=True)


class Marker:
    """Finds the requests that are part of a long stream, as if nothing was cached: for samples, which lose streams."""

    def __init__(self, bypass: int, ahead: int, /) -> None:
        self._streams = StreamTable(bypass, ahead)

    def mark(self, firsts: U64Array, counts: U64Array, writes: npt.NDArray[np.bool_], /) -> bytes:
        """Return the keys of requests, PASSES set in those that pass by, as u64."""
        marked = firsts.copy()
        for at, (first, count, is_write) in enumerate(
            zip(firsts.tolist(), counts.tolist(), writes.tolist(), strict=True)
        ):
            if is_write:
                continue
            if self._streams.passes(first, count):
                marked[at] |= np.uint64(PASSES)
            self._streams.missed(first, count, count)
        return marked.tobytes()


CoreFast: type[Core] = Core if _policy is None else _policy.Core
ReplayFast: type[Replay] = Replay if _policy is None else _policy.Replay
MarkerFast: type[Marker] = Marker if _policy is None else _policy.Marker
sample_runs_fast = sample_runs if _policy is None else _policy.sample_runs

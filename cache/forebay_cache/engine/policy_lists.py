"""What the cache policy is made of: an aged frequency sketch, and a cache as lists over numbered slots.

A block enters at the *window*, a recency list. What leaves that competes with the *main* region: buckets by use count,
whose victim is the oldest block of the lowest bucket that holds any. A miniature keeps new blocks in a *ring* first, as
the daemon keeps fetched ones in memory; only what leaves the ring for window or main counts as written.

All counts age: after so many accesses every one is halved. Buckets are joined at once, counters and states follow a few
at each access: those at and behind `swept` still show twice their value. These classes have native twins
(`_policy_core.h`) that must do the same to the last bit; tests compare them.

State of a slot, one byte: the region in the upper three bits, the use count in the lower five (doubled if not swept).

Invariants:
    A slot is in the list of its region (and bucket), or in none if its state is 0 or, outside of miniatures, OUTSIDE.
    count == window_count + ring_count + blocks in the buckets <= capacity, after `settle`.
    volume_counts[v] == slots in lists whose key is of volume v, modulo VOLUME_SLOTS.
Crash: the states are in the checkpoint; the sketch starts from them.
"""

from collections.abc import Callable
from typing import Final

from forebay_cache.engine.limits import (
    ADMISSION_ATTACK_COUNT,
    ADMISSION_ATTACK_MASK,
    AGEING_ACCESSES,
    COUNT_MAX,
    COUNTERS_PER_BLOCK,
    FAVOURED_COUNT,
    SETTLE_STEPS_MAX,
    SWEEP_STEP,
    VICTIMS_SKIPPED_MAX,
    VOLUME_SLOTS,
)
from forebay_cache.format.sample_file import PASSES
from forebay_core.units import LBA_BITS

BUCKETS: Final = COUNT_MAX + 1
LIST_WINDOW: Final = 16
LIST_RING: Final = 17
LIST_PASSING: Final = 18
LISTS: Final = 19
ROWS: Final = 4
REGION_SHIFT: Final = 5
COUNT_MASK: Final = 31
OUTSIDE: Final = 1  # known, but not worth keeping; in a miniature: in the ring
WINDOW: Final = 2
MAIN: Final = 3
PASSING: Final = 4  # outside of the cache: read in a long stream, in memory for a while

_U64: Final = (1 << 64) - 1
_ROW_FACTORS: Final = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
MINIATURE_FACTOR: Final = 0xA0761D6478BD642F
SAMPLE_FACTOR: Final = 0xE7037ED1A0B428DB
SAMPLE_SEED: Final = 0x5A17  # the same in each life, so that a sample outlives the daemon
_HALVES: Final = bytes(value >> 1 & 0x77 for value in range(256))  # of both counters in a byte
_RANDOM_AT_START: Final = 88172645463325252


def mix(value: int) -> int:
    """Return a 64-bit hash of a 64-bit value (the finalizer of MurmurHash3)."""
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & _U64
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & _U64
    return value ^ value >> 33


def sample_hash(key: int, seed: int = SAMPLE_SEED) -> int:
    """Return what is compared with the limit of a spatial sample."""
    return mix(key & ~PASSES ^ seed) * SAMPLE_FACTOR & _U64


class Sketch:
    """Count-min of 4-bit counters with conservative update: how often each key was used lately, never too little."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.width: Final = (capacity * COUNTERS_PER_BLOCK // ROWS + 15) // 16 * 16
        self.words: Final = self.width * ROWS // 16
        self.period = capacity * AGEING_ACCESSES
        self.seed: Final = seed
        self.swept = self.words  # in words of 16 counters
        self.accesses = 0
        self._counters: Final = bytearray(self.width * ROWS // 2)

    def hash_of(self, key: int) -> int:
        """Return the hash of a key under the seed, which no guest knows."""
        return mix(key ^ self.seed)

    def frequency(self, hashed: int) -> int:
        """Return the count of a hashed key."""
        return min(self._value(at) for at in self._places(hashed))

    def count(self, hashed: int) -> bool:
        """Count an access; tell whether all counts are to be halved now."""
        frequency = self.frequency(hashed)
        if frequency < COUNT_MAX:
            self.raise_to(hashed, frequency + 1)
        end = min(self.swept + SWEEP_STEP, self.words)
        part = slice(8 * self.swept, 8 * end)
        self._counters[part] = self._counters[part].translate(_HALVES)
        self.swept = end
        self.accesses += 1
        if self.accesses < self.period or self.swept < self.words:
            return False
        self.accesses = self.swept = 0
        return True

    def raise_to(self, hashed: int, count: int) -> None:
        """Let the count of a hashed key be at least this."""
        for at in self._places(hashed):
            if self._value(at) < count:
                shift = int(at >> 4 >= self.swept)
                nibble = (at & 1) << 2
                wanted = min(count << shift, 15)
                if wanted > self._counters[at >> 1] >> nibble & 15:
                    self._counters[at >> 1] = self._counters[at >> 1] & ~(15 << nibble) & 255 | wanted << nibble

    def _places(self, hashed: int) -> list[int]:
        width = self.width
        return [
            (((hashed * factor & _U64) >> 32) * width >> 32) + row * width for row, factor in enumerate(_ROW_FACTORS)
        ]

    def _value(self, at: int) -> int:
        return (self._counters[at >> 1] >> ((at & 1) << 2) & 15) >> (at >> 4 >= self.swept)


class SlotCache:
    """The lists over `slots` slots, of which 0 is nobody's. `keys` and `states` are arrays by slot.

    `on_gone(slot)` hears of each block that is evicted.
    """

    def __init__(
        self,
        slots: int,
        capacity: int,
        *,
        keys: memoryview,
        states: memoryview,
        sketch: Sketch,
        on_gone: Callable[[int], None],
    ) -> None:
        self.slots: Final = slots
        self.capacity = capacity
        self.keys: Final = keys
        self.states: Final = states
        self.window_max = self.ring_max = 0
        self.window_count = self.ring_count = self.passing_count = self.count = 0
        self.hits = self.writes = self.accesses = 0
        self.margin_from = 0
        self.volume_counts: list[int] | None = None
        self.floored: set[int] = set()
        self.floor = 0
        self.volume_of_zero = 0  # whose a slot without a key is
        self._sketch: Final = sketch
        self._on_gone: Final = on_gone
        self._swept = slots
        self._random = _RANDOM_AT_START
        self.next: Final = [0] * slots + list(range(slots, slots + LISTS))
        self.prev: Final = self.next.copy()

    # --- what is where ----------------------------------------------------------------------------------------

    def region(self, slot: int) -> int:
        """Return the region of a slot."""
        return int(self.states[slot]) >> REGION_SHIFT

    def bucket(self, slot: int) -> int:
        """Return the use count of a slot of window or main; in the window it is for a restart, which has no sketch."""
        return min((self.states[slot] & COUNT_MASK) >> (slot >= self._swept), COUNT_MAX)

    def oldest(self, number: int) -> int:
        """Return the first slot of a list, or 0."""
        slot = self.next[self.slots + number]
        return 0 if slot == self.slots + number else slot

    def blocks(self, number: int) -> list[int]:
        """Return all slots of a list, the oldest first."""
        found = []
        slot = self.next[self.slots + number]
        while slot < self.slots:
            found.append(slot)
            slot = self.next[slot]
        return found

    @property
    def main_max(self) -> int:
        """Blocks that main may hold."""
        return self.capacity - self.window_max - self.ring_max

    @property
    def main_count(self) -> int:
        """Blocks that main holds."""
        return self.count - self.window_count - self.ring_count

    def count_of(self, slot: int) -> int:
        """Return the frequency of a slot's block."""
        return self.frequency(self.keys[slot])

    def frequency(self, key: int) -> int:
        """Return the frequency of any block."""
        return self._sketch.frequency(self._sketch.hash_of(key))

    # --- changes ----------------------------------------------------------------------------------------------

    def set_state(self, slot: int, region: int, bucket: int) -> None:
        """Set the state alone."""
        self.states[slot] = region << REGION_SHIFT | bucket << (slot >= self._swept)

    def put_in(self, slot: int, region: int, bucket: int) -> None:
        """Let a slot that is in no list be the newest of a region."""
        self.set_state(slot, region, bucket)
        self._link_last(bucket if region == MAIN else LIST_WINDOW if region == WINDOW else LIST_RING, slot)
        self._tally(slot, 1)

    def take_out(self, slot: int) -> None:
        """A slot leaves its list; its state stays."""
        self._unlink(slot)
        self._tally(slot, -1)

    def evict(self, slot: int) -> None:
        """A slot leaves its list, and its block is not worth keeping any more."""
        self.take_out(slot)
        self._on_gone(slot)

    def replace(self, source: int, target: int) -> None:
        """What is known of one slot's block is that of another slot from now on."""
        if self.region(target) >= WINDOW:
            self.take_out(target)
        region = self.region(source)
        self.set_state(target, region or OUTSIDE, self.bucket(source))
        if region >= WINDOW:
            before, after = self.prev[source], self.next[source]
            self.prev[target], self.next[target] = before, after
            self.next[before] = self.prev[after] = target
        self.states[source] = 0

    def touch(self, slot: int) -> None:
        """A block that is in one of the lists was used."""
        region = self.region(slot)
        if region >= WINDOW:
            raised = min(self.bucket(slot) + 1, COUNT_MAX)
            self._unlink(slot)
            self.set_state(slot, region, raised)
            self._link_last(raised if region == MAIN else LIST_WINDOW, slot)
        self.settle()

    def enter(self, slot: int) -> None:
        """A block that was in no list lies in a slot now: `admits` let it in, or it had to be."""
        self.put_in(slot, WINDOW if self.window_max > 0 else MAIN, self.count_of(slot))
        self.settle()

    def admits(self, count: int, volume: int) -> bool:
        """Tell whether a block of this frequency and volume may come in from the ring."""
        if self.window_max > 0 or self.count < self.capacity:
            return True
        victim = self._find_victim()
        return victim == 0 or self._may_replace(count, volume, victim)

    def passes_over(self, count: int) -> bool:
        """Tell whether a block of this count that is read in a long stream is not to come in.

        It would have to beat the victim by more than one, whatever the plan. While there is room nothing is
        passed over.
        """
        if self.count < self.capacity:
            return False
        victim = self._find_victim()
        return count <= 1 + (self.bucket(victim) if victim else 0)

    def hold_passing(self, slot: int) -> None:
        """Hold a block that passes by, in memory; it must be in no list."""
        self.set_state(slot, PASSING, 0)
        self._link_last(LIST_PASSING, slot)
        self.passing_count += 1
        if self.passing_count > self.ring_max:
            first = self.oldest(LIST_PASSING)
            self.leave_passing(first)
            self._on_gone(first)

    def leave_passing(self, slot: int) -> None:
        """A block that passed by is wanted elsewhere, or was held for long enough."""
        self._unlink(slot)
        self.passing_count -= 1

    def settle(self) -> None:
        """Bring the lists back to their bounds, a few steps at a time."""
        for _ in range(SETTLE_STEPS_MAX):
            if self.ring_count > self.ring_max:
                self._leave_ring()
            elif self.window_count > self.window_max:
                self._leave_window()
            elif self.count > self.capacity:
                victim = self._find_victim() if self.main_count > self.main_max else self.oldest(LIST_WINDOW)
                self.evict(victim or self.oldest(LIST_WINDOW))
            else:
                return

    def sweep(self) -> None:
        """Halve the next few states that an ageing left."""
        end = min(self._swept + SWEEP_STEP, self.slots)
        for slot in range(self._swept, end):
            state = self.states[slot]
            self.states[slot] = state & ~COUNT_MASK | (state & COUNT_MASK) >> 1
        self._swept = end

    def halve(self) -> None:
        """All counts are halved: buckets 2i and 2i + 1 become i at once, the states follow step by step."""
        while self._swept < self.slots:  # few, if any: ageing is slower than sweeping
            self.sweep()
        for bucket in range(1, BUCKETS):
            self._splice(self.slots + bucket, self.slots + bucket // 2)
        self._swept = 0

    # --- inside -----------------------------------------------------------------------------------------------

    def _leave_ring(self) -> None:
        slot = self.oldest(LIST_RING)
        count = self.count_of(slot)
        self.take_out(slot)
        if self.window_max == 0 and self.main_count >= self.main_max:
            victim = self._find_victim()
            if victim == 0 or not self._may_replace(count, self._volume_slot(slot), victim):
                self._on_gone(slot)
                return
            self.evict(victim)
        self.writes += 1
        self.put_in(slot, WINDOW if self.window_max > 0 else MAIN, count)

    def _leave_window(self) -> None:
        slot = self.oldest(LIST_WINDOW)
        count = self.count_of(slot)
        if self.main_count >= self.main_max or self.count > self.capacity:
            victim = self._find_victim()
            if victim == 0 or not self._may_replace(count, self._volume_slot(slot), victim):
                self.evict(slot)
                return
            self.evict(victim)
        self.take_out(slot)
        self.put_in(slot, MAIN, count)

    def _find_victim(self) -> int:
        """Return the oldest of the lowest bucket; volumes below their floor are passed over a few times."""
        for bucket in range(BUCKETS):
            slot = self.oldest(bucket)
            if slot == 0:
                continue
            for _ in range(VICTIMS_SKIPPED_MAX):
                if not self._is_floored(slot):
                    break
                self._unlink(slot)
                self._link_last(bucket, slot)
                slot = self.oldest(bucket)
            return slot
        return 0

    def _is_admitted(self, count: int, victim: int) -> bool:
        other = self.bucket(victim)
        if count > other + (other >= self.margin_from):
            return True
        if count < ADMISSION_ATTACK_COUNT:
            return False
        random = self._random
        random ^= random << 13 & _U64
        random ^= random >> 7
        random ^= random << 17 & _U64
        self._random = random
        return random & ADMISSION_ATTACK_MASK == 0

    def _may_replace(self, count: int, volume: int, victim: int) -> bool:
        if count >= FAVOURED_COUNT and self._is_below_floor(volume) and not self._is_floored(victim):
            return True
        return self._is_admitted(count, victim)

    def _is_below_floor(self, volume: int) -> bool:
        if self.volume_counts is None or self.floor == 0:
            return False
        return volume in self.floored and self.volume_counts[volume] < self.floor

    def _is_floored(self, slot: int) -> bool:
        return self._is_below_floor(self._volume_slot(slot))

    def _volume_slot(self, slot: int) -> int:
        key = int(self.keys[slot])
        return (key >> LBA_BITS if key else self.volume_of_zero) % VOLUME_SLOTS

    def _tally(self, slot: int, change: int) -> None:
        region = self.region(slot)
        self.count += change
        if region == WINDOW:
            self.window_count += change
        elif region == OUTSIDE:
            self.ring_count += change
        if self.volume_counts is not None:
            self.volume_counts[self._volume_slot(slot)] += change

    def _link_last(self, number: int, slot: int) -> None:
        end = self.slots + number
        last = self.prev[end]
        self.prev[slot], self.next[slot] = last, end
        self.next[last] = self.prev[end] = slot

    def _unlink(self, slot: int) -> None:
        before, after = self.prev[slot], self.next[slot]
        self.next[before], self.prev[after] = after, before

    def _splice(self, source: int, target: int) -> None:
        first, last = self.next[source], self.prev[source]
        if first == source:
            return
        before = self.prev[target]
        self.next[before], self.prev[first] = first, before
        self.next[last], self.prev[target] = target, last
        self.next[source] = self.prev[source] = source

"""The policy: which clean blocks are worth keeping when their zone is reclaimed.

The engine tells the policy of every hit and of every place that gets, changes or loses its block; the policy answers
for a run of places which of them to keep. It never sees block contents, I/O, volumes or dirty state: what must not be
dropped is the engine's matter. Any policy that keeps what it needs per place or per key fits; keys come with
`inserted`, so one that remembers what left (a ghost list, a frequency sketch) can know a block that returns.

Invariants of AgedFrequency:
    counts[place] is 0 exactly while no block is known there, else 1 to 255.
    histogram[c] == places whose count is c.
Crash: the counts are in the checkpoint; what came after it counts as used once.
"""

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.entering import NEVER_HIT, move_counts_fast
from forebay_cache.engine.limits import AGEING_HITS_PER_PLACE, AGEING_SLICE_PLACES, COUNT_MAX, WORTHY_SHARE

U64Array = npt.NDArray[np.uint64]
U8Array = npt.NDArray[np.uint8]
PlaceArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_ONE: Final = np.uint8(1)
_FEW: Final = 32  # up to so many places one by one is faster than by arrays


class Policy(Protocol):
    """What the engine tells and asks. Every call is bounded by the places it names."""

    @property
    def counts(self) -> U8Array:
        """One byte per place for the checkpoint; only read by others."""

    @property
    def hit(self) -> Callable[[int], None]:
        """`hit(place)`: a block was read or overwritten where it was cached."""

    def hit_run(self, first_place: int, count: int) -> None:
        """Consecutive places were hit."""

    def hits(self, places: PlaceArray) -> None:
        """Distinct places were hit."""

    def inserted(self, place: int, key: int) -> None:
        """A block that was not in the cache lies here now."""

    def moved(self, source: int, target: int) -> None:
        """A cached block has another place now: moved by reclaim, or overwritten (which is a hit as well)."""

    def written(self, first_place: int, olds: PlaceArray, keys: U64Array) -> None:
        """Blocks were written to consecutive places; `olds` are the places they had before, -1 for those not cached.

        What lies at an old place from now on is not the policy's matter.
        """

    def removed(self, places: PlaceArray) -> None:
        """These distinct places are empty now, whatever they were."""

    def worthy(self, first_place: int, count: int) -> Mask:
        """Return for each place of a run whether its block should be kept. A small share of all places is worthy."""

    def restore(self, first_place: int, counts: U8Array) -> None:
        """Take over the counts of a run of places from a checkpoint: 0 for an empty place."""

    def step(self) -> bool:
        """Do one bounded step of upkeep; tell whether more is due now. Called between requests."""


class AgedFrequency:
    """LFU with ageing: a count per place, halved for all places after so many hits per place."""

    def __init__(self, place_count: int, *, worthy_share: float = WORTHY_SHARE) -> None:
        """At most `worthy_share` of all places, those with the highest counts, are worth keeping."""
        assert place_count > 0
        assert 0.0 < worthy_share < 1.0
        self.place_count: Final = place_count
        self.counts: Final[U8Array] = np.zeros(place_count, np.uint8)
        self._view: Final = self.counts.data
        self._histogram: Final = np.zeros(COUNT_MAX + 1, np.int64).data
        self._histogram[0] = place_count
        self._worthy_max: Final = int(place_count * worthy_share)
        self._ageing_hits: Final = AGEING_HITS_PER_PLACE * place_count
        self._tally: Final = [0]  # hits since the last ageing began; in a list for the closure below
        self._ageing_at = place_count  # places below it are halved, the others wait; all are when it is place_count
        self.hit: Final[Callable[[int], None]] = _make_hit(self._view, self._histogram, self._tally)

    @property
    def histogram(self) -> list[int]:
        """Places by count."""
        return self._histogram.tolist()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arrays."""
        return self.counts.nbytes

    def hit_run(self, first_place: int, count: int) -> None:
        """See Policy."""
        if count <= _FEW:
            for place in range(first_place, first_place + count):
                self.hit(place)
            return
        self._raise(slice(first_place, first_place + count), count)

    def hits(self, places: PlaceArray) -> None:
        """See Policy."""
        self._raise(places, places.size)

    def inserted(self, place: int, key: int) -> None:
        """See Policy; a block begins with one use."""
        self._set(place, NEVER_HIT)

    def moved(self, source: int, target: int) -> None:
        """See Policy."""
        view = self._view
        count = view[source]
        if count and not view[target]:  # the usual case: the histogram stays as it is
            view[target] = count
            view[source] = 0
        else:
            self._set(source, 0)
            self._set(target, count or NEVER_HIT)

    def written(self, first_place: int, olds: PlaceArray, keys: U64Array) -> None:
        """See Policy; a block keeps its count."""
        assert olds.size == keys.size
        move_counts_fast(self._view, self._histogram, olds, olds.size, first_place)

    def removed(self, places: PlaceArray) -> None:
        """See Policy."""
        self._set_many(places, np.zeros(places.size, np.uint8))

    def restore(self, first_place: int, counts: U8Array) -> None:
        """See Policy."""
        self._set_many(slice(first_place, first_place + counts.size), counts)

    def worthy(self, first_place: int, count: int) -> Mask:
        """See Policy."""
        mask: Mask = self.counts[first_place : first_place + count] >= self.threshold
        return mask

    @property
    def threshold(self) -> int:
        """The smallest count that is worth keeping: at least one hit, and not more places than the share.

        256 if even the places with the largest count are too many.
        """
        worthy_count = 0
        for count in range(COUNT_MAX, NEVER_HIT, -1):
            worthy_count += self._histogram[count]
            if worthy_count > self._worthy_max:
                return count + 1
        return NEVER_HIT + 1

    def step(self) -> bool:
        """See Policy: halve the counts of one slice while ageing. Halves are rounded up, so a block keeps its 1."""
        if self._ageing_at >= self.place_count:
            if self._tally[0] < self._ageing_hits:
                return False
            self._tally[0] = 0
            self._ageing_at = 0
        at = self._ageing_at
        part = slice(at, min(at + AGEING_SLICE_PLACES, self.place_count))
        counts = self.counts[part]
        self._set_many(part, (counts >> _ONE) + (counts & _ONE))
        self._ageing_at = part.stop
        return self._ageing_at < self.place_count

    def _raise(self, places: PlaceArray | slice, count: int) -> None:
        counts = self.counts[places]
        self._tally[0] += count
        self._set_many(places, counts + (counts < COUNT_MAX))

    def _set(self, place: int, count: int) -> None:
        self._histogram[self._view[place]] -= 1
        self._histogram[count] += 1
        self._view[place] = count

    def _set_many(self, places: PlaceArray | slice, counts: U8Array) -> None:
        before = np.bincount(self.counts[places], minlength=COUNT_MAX + 1)
        after = np.bincount(counts, minlength=COUNT_MAX + 1)
        self.counts[places] = counts
        change = after - before
        for count in np.flatnonzero(change).tolist():
            self._histogram[count] += int(change[count])


def _make_hit(counts: memoryview, histogram: memoryview, tally: list[int]) -> Callable[[int], None]:
    """Return the policy's hottest function; as a closure it looks nothing up on an object."""

    def hit(place: int) -> None:
        tally[0] += 1
        count = counts[place]
        if count < COUNT_MAX:
            counts[place] = count + 1
            histogram[count] -= 1
            histogram[count + 1] += 1

    return hit

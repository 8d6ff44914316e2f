"""The always-on sample: which blocks were used, in their order, for a spatially hashed share of all blocks.

Whoever wants to know what another size of the cache would do replays it (`forebay analyze`). The daemon only notes the
keys whose hash is below `limit`; that costs next to nothing, however large the cache. When there is no room any more
the limit is halved: half of the blocks leave with all that was noted of them, and the rest still tells of the whole
time. With too few blocks for that the oldest accesses go.

Invariants:
    There are at most SAMPLE_SEGMENTS_MAX + SAMPLE_SPARE segments of SAMPLE_SEGMENT_KEYS keys.
    A view that `parts` gave out is never written to again.
    Keys whose hash is not below `limit` may still be listed: who reads leaves them out.
Crash: `service/sample_file` has what was noted until a while ago.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from forebay_cache.engine.limits import (
    SAMPLE_BLOCKS_MIN,
    SAMPLE_SEGMENT_KEYS,
    SAMPLE_SEGMENTS_MAX,
    SAMPLE_SPARE,
    SAMPLE_STEPS_PER_TICK,
    SAMPLED_MAX,
)
from forebay_cache.engine.policy_core import U64Array, sample_runs_fast
from forebay_cache.engine.policy_lists import SAMPLE_SEED
from forebay_cache.format.sample_file import PASSES, volumes_of

HASHES: Final = 1 << 64
_ESTIMATE_SHIFT: Final = 6
"""Different blocks are counted among one in so many of the sample: 64."""

_KEY_MASK: Final = np.uint64(PASSES - 1)
_ONES: Final = np.ones(SAMPLE_SEGMENT_KEYS, np.uint64)


class _Segment:
    """Keys in their order, and how many accesses in how much time they stand for. `few` are some of a full one's."""

    __slots__ = ("accesses", "count", "few", "keys", "span_ns")

    def __init__(self) -> None:
        self.keys: U64Array = np.zeros(SAMPLE_SEGMENT_KEYS, np.uint64)
        self.few: U64Array = self.keys[:0]
        self.count = self.accesses = self.span_ns = 0

    @property
    def used(self) -> U64Array:
        return self.keys[: self.count]

    def pick_few(self, limit: int) -> None:
        """Pick those by which different blocks are counted while the sample has this limit."""
        self.few = _sampled([self.used], limit >> _ESTIMATE_SHIFT)

    def replace(self, keys: U64Array) -> None:
        """Hold these keys instead, in memory of its own: views of the old one may be in use."""
        self.keys = np.zeros(SAMPLE_SEGMENT_KEYS, np.uint64)
        self.keys[: keys.size] = keys
        self.count = keys.size


class AccessSample:
    """What was used lately, as far as it is sampled."""

    def __init__(self) -> None:
        self.limit = HASHES - 1
        self.noted = 0  # keys since the start
        self._accesses_before = 0
        self._segments: list[_Segment] = [_Segment()]
        self._shrinking: Iterator[None] = iter(())

    @property
    def count(self) -> int:
        """Keys that it holds."""
        return sum(segment.count for segment in self._segments)

    @property
    def accesses(self) -> int:
        """Accesses to all blocks, sampled or not, in the time that the sample tells of."""
        return sum(segment.accesses for segment in self._segments)

    @property
    def span_ns(self) -> int:
        """That time."""
        return sum(segment.span_ns for segment in self._segments)

    def parts(self) -> list[U64Array]:
        """Return the keys in their order, in parts that do not change."""
        return [segment.used for segment in self._segments if segment.count]

    def add(self, keys: U64Array, *, accesses: int, span_ns: int) -> None:
        """Note what was used in the time since the last call: at most SAMPLED_MAX keys. `accesses` were made since
        the start."""
        accesses, self._accesses_before = accesses - self._accesses_before, accesses
        if keys.size >= SAMPLED_MAX:  # some were left out: what is here stands for fewer accesses
            accesses = min(accesses, int(keys.size * HASHES / self.limit))
        self.noted += keys.size
        while True:
            last = self._segments[-1]
            part = keys[: SAMPLE_SEGMENT_KEYS - last.count]
            last.keys[last.count : last.count + part.size] = part
            last.count += part.size
            keys = keys[part.size :]
            if not keys.size:
                break
            last.pick_few(self.limit)
            self._segments.append(_Segment())
        last.accesses += accesses
        last.span_ns += span_ns
        self._make_room()

    def forget(self, volume_key: int) -> None:
        """Leave out a volume that is not known any more."""
        for segment in self._segments:
            others = segment.used[volumes_of(segment.used) != volume_key]
            if others.size < segment.count:
                segment.replace(others)

    def restore(self, keys: U64Array, *, limit: int, accesses: int, span_ns: int) -> None:
        """Begin with what an earlier life of the daemon noted."""
        keys = keys[-SAMPLE_SEGMENTS_MAX * SAMPLE_SEGMENT_KEYS :]
        self.limit = min(limit, HASHES - 1)
        self._segments = []
        for at in range(0, keys.size, SAMPLE_SEGMENT_KEYS):
            segment = _Segment()
            segment.replace(keys[at : at + SAMPLE_SEGMENT_KEYS])
            segment.pick_few(self.limit)
            segment.accesses = accesses * segment.count // keys.size
            segment.span_ns = span_ns * segment.count // keys.size
            self._segments.append(segment)
        self._segments.append(_Segment())

    def _make_room(self) -> None:
        if len(self._segments) > SAMPLE_SEGMENTS_MAX + SAMPLE_SPARE:
            del self._segments[0]  # what comes is faster than room is made
        for _ in range(SAMPLE_STEPS_PER_TICK):
            if next(self._shrinking, self) is self:
                break
        else:
            return
        if len(self._segments) <= SAMPLE_SEGMENTS_MAX:
            return
        few = _sampled([segment.few for segment in self._segments], self.limit >> _ESTIMATE_SHIFT)
        if np.unique(few & _KEY_MASK).size << _ESTIMATE_SHIFT >= 2 * SAMPLE_BLOCKS_MIN:
            self.limit >>= 1
            self._shrinking = self._shrink()
        else:
            del self._segments[0]

    def _shrink(self) -> Iterator[None]:
        """Leave out what the limit does not let in any more, two segments at each step, so that one may do for both."""
        at = 0
        while at + 2 < len(self._segments):  # the last one is being filled
            first, second = self._segments[at : at + 2]
            keys = _sampled([first.used, second.used], self.limit)
            first.replace(keys[:SAMPLE_SEGMENT_KEYS])
            second.replace(keys[SAMPLE_SEGMENT_KEYS:])
            first.pick_few(self.limit)
            if second.count:
                at += 1
            else:
                first.accesses += second.accesses
                first.span_ns += second.span_ns
                del self._segments[at + 1]
            yield


def _sampled(parts: Sequence[U64Array], limit: int) -> U64Array:
    """Return the keys whose sample hash is below the limit."""
    found = []
    for keys in parts:
        into = np.zeros(keys.size, np.uint64)
        _, taken, _ = sample_runs_fast(keys, _ONES[: keys.size], into, limit, SAMPLE_SEED)
        found.append(into[:taken])
    return np.concatenate(found)

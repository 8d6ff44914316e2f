"""The policy: which clean blocks are worth keeping when their zone is reclaimed, and which are worth a write at all.

The engine tells the policy of every use of a block and of every place that gets, changes or loses its block; the
policy answers for a run of places which of them to keep, and for a fetched block whether to keep it. It never sees
block contents, I/O or dirty state: what must not be dropped is the engine's matter. So a dirty block that loses
against others stays until it is destaged, and a block that is used again before its zone is reclaimed is back without
a write.

Invariants:
    states[place] is 0 exactly while no block is known there, WORTHY_FROM and more while it is worth keeping.
    At most `capacity` places are worth keeping.
Crash: the states are in the checkpoint; what came after it counts as just used.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import (
    COUNTERS_PER_BLOCK,
    MINIATURE_BLOCKS,
    RING_BLOCKS_MAX,
    RING_PER_CAPACITY,
    WORTHY_SHARE,
)
from forebay_cache.engine.policy_core import PLANS, CoreFast, Figures, Replay, ReplayFast
from forebay_cache.engine.policy_lists import REGION_SHIFT, WINDOW
from forebay_cache.engine.streams import BYPASS_BLOCKS, READ_AHEAD_BLOCKS

U64Array = npt.NDArray[np.uint64]
U8Array = npt.NDArray[np.uint8]
PlaceArray = npt.NDArray[np.int64]

WORTHY_FROM: Final = WINDOW << REGION_SHIFT
_LINK_BYTES: Final = 9  # two links and a state of each place


class PolicySettings(NamedTuple):
    """What an admin may set: the price of a write in hits, and the largest share that the window may get."""

    write_price: float = 0.01
    window_max: float = 0.8


class FrequencyPolicy:
    """LFU with ageing, admission by frequency and a window that sizes itself, over the places of a device.

    `hit(place)` tells that a cached block was read or overwritten where it lies.
    """

    def __init__(
        self,
        keys: U64Array,
        *,
        settings: PolicySettings = PolicySettings(),  # noqa: B008 - immutable
        seed: int = 0,
        worthy_share: float = WORTHY_SHARE,
        core: type = CoreFast,
    ) -> None:
        """`keys` is the map's array of keys by place; at most `worthy_share` of all places are worth keeping."""
        assert 0.0 < worthy_share < 1.0
        self.capacity: Final = max(1, int(keys.size * worthy_share))
        self.states: Final[U8Array] = np.zeros(keys.size, np.uint8)
        self._core: Final = core(
            keys.size,
            self.capacity,
            keys,
            self.states,
            ring_blocks(self.capacity),
            MINIATURE_BLOCKS,
            seed,
            settings.write_price,
            settings.window_max,
        )
        self.hit: Final[Callable[[int], None]] = self._core.hit
        self.admitted_blocks = 0
        self.refused_blocks = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes that grow with the cache; what all miniatures together take is below 2 MiB."""
        return self.states.size * _LINK_BYTES + self.capacity * COUNTERS_PER_BLOCK // 2

    def hit_run(self, first_place: int, count: int) -> None:
        """Consecutive places were hit."""
        self._core.hit_run(first_place, count)

    def missed(self, key: int, count: int, *, passes: bool = False) -> None:
        """Consecutive blocks were read that are not cached; as part of a long stream that passes by, or not."""
        self._core.missed(key, count, passes)

    def admits(self, key: int) -> bool:
        """Tell whether a block that was fetched is worth a write."""
        admitted: bool = self._core.admits(key)
        self.admitted_blocks += admitted
        self.refused_blocks += not admitted
        return admitted

    def passes_over(self, key: int) -> bool:
        """Tell whether a block that passes by is not to come in, now that its use is counted."""
        over: bool = self._core.passes_over(key)
        return over

    def frequency(self, key: int) -> int:
        """Return how often a block was used lately, 0 to 15."""
        frequency: int = self._core.frequency(key)
        return frequency

    def inserted(self, place: int) -> None:
        """A block that was not in the cache was fetched and lies here now."""
        self._core.entered(place)

    def moved(self, sources: PlaceArray, targets: PlaceArray) -> None:
        """Reclaim moved cached blocks; the targets are distinct empty places."""
        self._core.moved(sources, targets)

    def written(self, places: PlaceArray, olds: PlaceArray, keys: U64Array, count: int) -> None:
        """So many blocks were written to distinct places, with which the arrays begin; `olds` are the places they had
        before, -1 for those not cached.

        What lies at an old place from now on is not the policy's matter.
        """
        self._core.written(places, olds, keys, count)

    def removed(self, places: PlaceArray, *, volume_key: int = 0) -> None:
        """These distinct places are empty now; where the map has no key any more, they were of this volume."""
        self._core.removed(places, volume_key)

    def restore(self, first_place: int, states: U8Array) -> None:
        """Take over the states of a run of places from a checkpoint: 0 for an empty place, 1 for one used since."""
        self._core.restore(first_place, states)

    def restored(self) -> None:
        """All was restored: go on with the plan that the share of the window hints at, if there is enough to tell."""
        figures = self.figures()
        if figures["count"] * 2 < self.capacity:
            return
        share = figures["window_count"] / figures["count"]
        plan = min(range(1, len(PLANS)), key=lambda one: abs(PLANS[one].window - share))
        while PLANS[plan].window > PLANS[figures["plan"]].window and plan > figures["plan"]:
            plan -= 1  # more than `window_max` allows
        self._core.follow(plan)

    def protect(self, volume_keys: list[int], *, floor_share: float) -> None:
        """While one of these volumes holds less than that part of an equal share, its blocks are the last to go."""
        floor = int(self.capacity * floor_share / len(volume_keys)) if len(volume_keys) > 1 else 0
        self._core.set_floor(floor, np.array(volume_keys, np.int64))

    def take_sample(self, limit: int) -> U64Array:
        """Return the keys used since the last call whose hash was below the limit given then."""
        return np.frombuffer(self._core.take_sample(limit), np.uint64)

    def figures(self) -> Figures:
        """Return what was done so far."""
        figures: Figures = self._core.figures()
        return figures


def ring_blocks(capacity: int) -> int:
    """Return how many fetched blocks a cache keeps in memory before it decides whether they are worth a write."""
    return max(1, min(RING_BLOCKS_MAX, capacity // RING_PER_CAPACITY))


def make_replay(
    capacity: int,
    *,
    settings: PolicySettings = PolicySettings(),  # noqa: B008 - immutable
    seed: int = 0,
    miniature_blocks: int = MINIATURE_BLOCKS,
    is_lru: bool = False,
    replay: type[Replay] = ReplayFast,
    rate: float = 1.0,
    bypass_blocks: int = BYPASS_BLOCKS,
) -> Replay:
    """Return the policy over so many blocks, to be driven by requests or keys; or an LRU to compare it with.

    With a `rate` it is a miniature, of a cache of `capacity` blocks, that sees so much of the blocks.
    """
    mini = max(1, round(capacity * rate))
    return replay(
        mini,
        max(1, min(mini, round(ring_blocks(capacity) * rate))),
        miniature_blocks,
        seed,
        settings.write_price,
        settings.window_max,
        bypass_blocks,
        READ_AHEAD_BLOCKS,
        is_lru,
    )

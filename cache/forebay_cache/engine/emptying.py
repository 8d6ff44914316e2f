"""Emptying places of the map: which blocks of a zone must be kept before it is emptied, and taking places out.

The functions have native twins, which the engine uses where they were built; these here say what both do and pass the
same tests. A zone of 1024 blocks, 2 cores EPYC in a virtual machine, November 2026: it is emptied in 570 us here, 13 us
natively (numpy: 39); what is kept of it is found in 20 us here, 1.1 us natively.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.entering import NIL, UNLINKED, MapViews
from forebay_core.units import LBA_BITS

try:
    from forebay_cache import _native
except ImportError:  # no compiler when it was installed
    _native = None  # type: ignore[assignment]

NONE_WORTHY: Final = 256  # more than any state of the policy
_DAMAGED: Final = "the map is damaged at place {}"


class HeldViews(NamedTuple):
    """The arrays of a `BlockMap` that its second table consists of."""

    heads: memoryview
    nexts: memoryview
    held: memoryview


def clear_places(views: MapViews, second: HeldViews, zone_blocks: int, places: npt.NDArray[np.int64], /) -> int:
    """Empty places, whether linked, held or empty; return how many were linked.

    It is the place that leaves its chain, whatever else there has its key: while a map is loaded, twins do. A place
    that is not in its chain means that the map is damaged, and is a SystemError.
    """
    heads, nexts, keys, versions, checksums, live = views
    linked_count = 0
    for place in places.tolist():
        key = keys[place]
        if key == 0:
            continue
        if nexts[place] == UNLINKED:
            _unchain(second.heads, second.nexts, key % len(second.heads), place)
            versions[place] = checksums[place] = 0
            second.held[place // zone_blocks] -= 1
        else:
            _unchain(heads, nexts, key % len(heads), place)
            nexts[place] = UNLINKED
            live[place // zone_blocks] -= 1
            linked_count += 1
        keys[place] = 0
    return linked_count


def _unchain(heads: memoryview, nexts: memoryview, bucket: int, target: int) -> None:
    before, place = NIL, heads[bucket]
    for _ in range(len(nexts)):
        if place in (target, NIL) or place >= len(nexts):
            break
        before, place = place, nexts[place]
    if place != target or place == NIL:
        raise SystemError(_DAMAGED.format(target))
    if before == NIL:
        heads[bucket] = nexts[target]
    else:
        nexts[before] = nexts[target]


def find_kept(
    views: MapViews,
    states: npt.NDArray[np.uint8],
    noted: npt.NDArray[np.uint64],
    first_place: int,
    count: int,
    worthy_from: int,
    found: npt.NDArray[np.int64],
    /,
) -> int:
    """Find of a run of places those to be kept: those with a version above what is noted of their volume, by its key,
    and linked ones whose state is `worthy_from` at least. Return how many of them, in order, `found` has now.

    It ends when `found` is full.
    """
    keys, versions, nexts = (
        np.asarray(view)[first_place : first_place + count] for view in (views[2], views[3], views[1])
    )
    used = np.flatnonzero(keys)
    owners = (keys[used] >> np.uint64(LBA_BITS)).astype(np.int64)
    strange = np.flatnonzero(owners >= noted.size)
    if strange.size:
        raise SystemError(_DAMAGED.format(first_place + used[strange[0]]))
    worthy = (states[first_place : first_place + count][used] >= worthy_from) & (nexts[used] != UNLINKED)
    kept = used[worthy | (versions[used] > noted.take(owners))][: found.size]
    found[: kept.size] = kept + first_place
    return int(kept.size)


clear_places_fast = getattr(_native, "clear_places", clear_places)  # it lacks in what was built from an older source
find_kept_fast = getattr(_native, "find_kept", find_kept)

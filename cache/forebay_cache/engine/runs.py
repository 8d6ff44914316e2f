"""Runs: consecutive blocks that lie one behind the other on the device, or that have no place; what a read works with.

`find_runs` has a native twin, which the engine uses where it was built; this one here says what both do and passes the
same tests. 256 blocks in three runs, 2 cores EPYC in a virtual machine, November 2026: 140 us here, 0.9 us natively.
"""

from collections.abc import Iterable

from forebay_cache.engine.entering import NIL, MapViews

try:
    from forebay_cache import _native
except ImportError:  # no compiler when it was installed
    _native = None  # type: ignore[assignment]

Run = tuple[int, int]
"""First place, or -1 for blocks without one, and count."""


def find_runs(views: MapViews, key: int, count: int, /) -> list[Run]:
    """Return the runs that consecutive blocks from `key` on make in a map, each as long as can be; hidden ones too."""
    return join_runs(_find(views, one) for one in range(key, key + count))


def join_runs(places: Iterable[int]) -> list[Run]:
    """Return the runs of consecutive blocks with these places, -1 for one that has none."""
    runs: list[Run] = []
    first = count = 0
    for place in places:
        if count and place == (-1 if first < 0 else first + count):
            count += 1
            continue
        if count:
            runs.append((first, count))
        first, count = place, 1
    if count:
        runs.append((first, count))
    return runs


def _find(views: MapViews, key: int) -> int:
    heads, nexts, keys = views.heads, views.nexts, views.keys
    place: int = heads[key % len(heads)]
    while place != NIL and keys[place] != key:
        place = nexts[place]
    return -1 if place == NIL else place


find_runs_fast = getattr(_native, "find_runs", find_runs)  # it lacks in what was built from an older source

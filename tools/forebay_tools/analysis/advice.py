"""What a curve means: the recommended size, wear, what more machines need, how thin the evidence is.

Without prices the recommended size is the smallest that has 95 % of the hits that any size has and whose next tenth
brings less than a point. With prices it is the cheapest over the life of the SSD.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay_core.units import BLOCK_SIZE, GIB
from forebay_tools.analysis.curve import Point

ATTAINABLE_SHARE: Final = 0.95
NEXT_TENTH_POINTS: Final = 0.01
LIFE_DAYS: Final = 5 * 365
DAY_MS: Final = 86_400_000
THIN_ACCESSES_PER_BLOCK: Final = 2.0
THIN_BLOCKS: Final = 2000
THIN_MS: Final = 3_600_000


class Prices(NamedTuple):
    """What a GiB of SSD costs, and a million misses."""

    ssd_per_gib: float
    million_misses: float


class Load(NamedTuple):
    """What the trace, or the sample, was."""

    accesses: int
    distinct_blocks: int
    duration_ms: int
    volumes: int


def interpolate(points: Sequence[Point], size_blocks: float) -> Point:
    """Return what the curve says of any size."""
    if size_blocks >= points[-1].size_blocks:
        return points[-1]._replace(size_blocks=round(size_blocks))
    before = Point(0, 0.0, 0.0, 0.0, points[0].ssd_writes_per_access)
    for point in points:
        if size_blocks <= point.size_blocks:
            part = (size_blocks - before.size_blocks) / (point.size_blocks - before.size_blocks)
            values = [old + (new - old) * part for old, new in zip(before[1:], point[1:], strict=True)]
            return Point(round(size_blocks), *values)
        before = point
    raise AssertionError("the last point is the largest")


def recommend(points: Sequence[Point], load: Load, prices: Prices | None) -> Point:
    """Return the recommended size."""
    if prices is not None:
        return min(points, key=lambda point: _cost(point, load, prices))
    attainable = max(point.hit_ratio for point in points)
    for point in points:
        tenth = interpolate(points, point.size_blocks * 1.1).hit_ratio - point.hit_ratio
        if point.hit_ratio >= ATTAINABLE_SHARE * attainable and tenth < NEXT_TENTH_POINTS:
            return point
    return points[-1]


def written_per_day(point: Point, load: Load) -> float | None:
    """Return the bytes that the policy writes into a cache of this size each day, None if time is not known."""
    if load.duration_ms < 1000:
        return None
    return point.ssd_writes_per_access * load.accesses * BLOCK_SIZE * DAY_MS / load.duration_ms


def with_more(point: Point, load: Load, machines: int) -> int:
    """Return the blocks that so many more volumes like the average one would need for the same hit ratio."""
    return round(point.size_blocks * (1 + machines / max(1, load.volumes)))


def doubts(load: Load, sampled_blocks: int) -> list[str]:
    """Return why the evidence is thin, if it is."""
    found = []
    if load.accesses < THIN_ACCESSES_PER_BLOCK * load.distinct_blocks:
        found.append(
            f"a block was used {load.accesses / load.distinct_blocks:.1f} times on average, so most of it is cold"
        )
    if sampled_blocks < THIN_BLOCKS:
        found.append(f"only {sampled_blocks} different blocks were seen")
    if 1000 <= load.duration_ms < THIN_MS:
        found.append(f"it covers {load.duration_ms // 60_000} min; a day shows what a day needs")
    return found


def _cost(point: Point, load: Load, prices: Prices) -> float:
    lives = LIFE_DAYS * DAY_MS / max(1, load.duration_ms)
    misses = (1 - point.hit_ratio) * load.accesses * lives
    return point.size_blocks * BLOCK_SIZE / GIB * prices.ssd_per_gib + misses / 1e6 * prices.million_misses

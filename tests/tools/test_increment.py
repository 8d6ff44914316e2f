"""Changes become whole clusters: nothing that changed is missing, and nothing is called a hole that is not one."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from forebay_core.extents import Extent
from forebay_tools.increment import Change, by_clusters


def clusters(changes: Sequence[Change], cluster: int, end: int) -> list[Change]:
    async def run() -> list[Change]:
        async def given() -> AsyncIterator[Change]:
            for change in changes:
                yield change

        return [change async for change in by_clusters(given(), cluster, end)]

    return asyncio.run(run())


def expected(changes: Sequence[Change], cluster: int, end: int) -> list[Change]:
    """Say the same block by block."""
    holes = {lba: hole for extent, hole in changes for lba in range(extent.start, extent.end)}
    found: list[Change] = []
    for start in range(0, end, cluster):
        count = min(cluster, end - start)
        kinds = [holes.get(lba) for lba in range(start, start + count)]
        if all(kind is None for kind in kinds):
            continue
        hole = all(kinds)
        if found and found[-1].hole == hole and found[-1].extent.end == start:
            count += found.pop().extent.count
            start = start + min(cluster, end - start) - count
        found.append(Change(Extent(start, count), hole))
    return found


@pytest.mark.parametrize("cluster", [1, 2, 16])
def test_changes_are_widened_to_clusters(cluster: int) -> None:
    chance = random.Random(cluster)
    for _ in range(500):
        end = chance.randrange(1, 120)
        changes, at = [], chance.randrange(4)
        while at < end:
            count = min(chance.choice([1, 1, 3, 16, 40]), end - at)
            changes.append(Change(Extent(at, count), chance.random() < 0.6))
            at += count + chance.choice([0, 0, 1, 5, 30])
        assert clusters(changes, cluster, end) == expected(changes, cluster, end)


def test_a_cluster_that_is_a_hole_only_in_part_is_data() -> None:
    changes = [Change(Extent(0, 8), True), Change(Extent(9, 7), True), Change(Extent(16, 20), True)]
    assert clusters(changes, 16, 36) == [Change(Extent(0, 16), False), Change(Extent(16, 20), True)]


def test_no_changes_are_no_clusters() -> None:
    assert clusters([], 16, 100) == []

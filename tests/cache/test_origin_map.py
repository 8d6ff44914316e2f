"""The bits of a clone, against a plain set of blocks."""

import random

import numpy as np
import pytest

from forebay_cache.engine.origin_map import PAGE_BLOCKS, OriginMap
from forebay_core.extents import Extent, from_blocks

COUNT = 3 * PAGE_BLOCKS + 777


def random_extent(rng: random.Random) -> Extent:
    start = rng.choice([rng.randrange(COUNT), rng.randrange(4) * PAGE_BLOCKS])
    count = rng.choice([1, 2, 9, rng.randrange(1, 300), PAGE_BLOCKS, rng.randrange(1, COUNT)])
    return Extent(start, count)


@pytest.mark.parametrize("seed", range(6))
def test_a_map_holds_exactly_the_blocks_that_were_added_and_not_removed(seed: int) -> None:
    rng = random.Random(seed)
    known = OriginMap(COUNT)
    model = np.zeros(COUNT, np.bool_)
    for _ in range(300):
        extent = random_extent(rng)
        part = slice(extent.start, extent.end)
        match rng.randrange(4):
            case 0:
                known.add(extent)
                model[part] = True
            case 1:
                known.remove(extent)
                model[part] = False
            case 2:
                lbas = np.array([rng.randrange(COUNT + 9) for _ in range(rng.choice([3, 200]))], np.uint64)
                known.remove_many(lbas)
                model[lbas[lbas < COUNT].astype(np.int64)] = False
            case 3:
                other = OriginMap(COUNT)
                other.load(known.freeze(1 << 20))
                known = rng.choice([known, other])
        looked = random_extent(rng)
        expected = [e for e in from_blocks(np.flatnonzero(model).astype(np.uint64)) if e.intersect(looked)]
        assert known.overlapping(looked) == [e.intersect(looked) for e in expected]
        assert known.has(extent.start) == bool(model[extent.start])


def test_a_frozen_image_stays_as_it_was() -> None:
    known = OriginMap(COUNT)
    known.add(Extent(0, COUNT))
    known.remove(Extent(5, 1))
    image = known.freeze(1 << 20)
    known.remove(Extent(6, 1))
    known.remove_many(np.arange(100, 200, dtype=np.uint64))
    known.add(Extent(5, 1))
    copy = OriginMap(COUNT)
    copy.load(image)
    assert copy.overlapping(Extent(0, COUNT)) == [Extent(0, 5), Extent(6, COUNT - 6)]


def test_an_image_that_has_no_room_leaves_out_what_it_can_not_hold() -> None:
    known = OriginMap(COUNT)
    known.add(Extent(0, COUNT))
    known.asked_to = COUNT
    known.remove(Extent(5, 1))
    known.remove(Extent(PAGE_BLOCKS + 5, 1))
    copy = OriginMap(COUNT)
    copy.load(known.freeze(4 + 4096))
    assert copy.overlapping(Extent(0, COUNT)) == [
        Extent(0, 5),
        Extent(6, PAGE_BLOCKS - 6),
        Extent(2 * PAGE_BLOCKS, COUNT - 2 * PAGE_BLOCKS),
    ]
    assert copy.asked_to == 0
    assert known.freeze(3) is None


def test_nothing_behind_the_end_of_the_origin_is_the_origins() -> None:
    known = OriginMap(10)
    known.add(Extent(0, 1000))
    assert known.overlapping(Extent(0, 1000)) == [Extent(0, 10)]
    assert not known.has(10)
    assert not known.has(1 << 39)


def test_what_is_forgotten_is_asked_again() -> None:
    known = OriginMap(1000)
    known.add(Extent(0, 1000))
    known.asked_to = 1000
    known.remove(Extent(10, 5))
    assert known.asked_to == 1000
    known.forget(Extent(20, 5))
    assert known.asked_to == 20

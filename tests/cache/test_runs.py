"""Runs of blocks: the native function and its twin find the same ones, and what does not fit is refused."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_cache.engine import runs
from forebay_cache.engine.blockmap import BlockMap, make_key
from forebay_cache.engine.runs import find_runs, join_runs
from forebay_cache.engine.sweeping import Hidden

ZONE_BLOCKS = 16
PLACES = 8 * ZONE_BLOCKS

native = runs._native
needs_native = pytest.mark.skipif(native is None, reason="there is no compiler here")


def make_map(placed: dict[int, int], buckets: int = 131) -> BlockMap:
    """A map of blocks of volume 1: places by lba."""
    table = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=buckets)
    for lba, place in placed.items():
        table.insert(make_key(1, lba), 1, 0, place)
    return table


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([5], [(5, 1)]),
        ([-1, -1], [(-1, 2)]),
        ([5, 6, 7], [(5, 3)]),
        ([5, 6, 8, 7], [(5, 2), (8, 1), (7, 1)]),
        ([-1, 0, 1, -1, -1, 2], [(-1, 1), (0, 2), (-1, 2), (2, 1)]),
    ],
)
def test_neighbours_are_joined_as_far_as_they_lie_in_a_row(places: list[int], expected: list[runs.Run]) -> None:
    assert join_runs(places) == expected


@needs_native
@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32), buckets=st.sampled_from([1, 7, 131]), start=st.integers(0, 50))
def test_both_twins_find_the_runs_that_the_places_make(seed: int, buckets: int, start: int) -> None:
    rng = random.Random(seed)
    lbas = sorted(rng.sample(range(60), rng.randrange(60)))
    places = list(range(1, 1 + len(lbas)))
    for _ in range(rng.randrange(4)):  # a few out of their row
        if places:
            places.insert(rng.randrange(len(places)), places.pop())
    table = make_map(dict(zip(lbas, places, strict=True)), buckets)
    for count in (0, 1, 2, 40):
        expected = find_runs(table._views, make_key(1, start), count)
        assert native.find_runs(table._views, make_key(1, start), count) == expected
        found = [first + i if first >= 0 else -1 for first, length in expected for i in range(length)]
        assert found == table.find_run(make_key(1, start), count).tolist()


def test_what_is_hidden_has_no_place() -> None:
    table = make_map({lba: 1 + lba for lba in range(10)})
    assert table.find_runs(make_key(1, 0), 10) == [(1, 10)]
    table.hidden.append(Hidden(make_key(1, 3), block_count=2, below=2))
    assert table.find_runs(make_key(1, 0), 10) == [(1, 3), (-1, 2), (6, 5)]


@needs_native
def test_the_native_twin_refuses_what_does_not_fit_and_follows_no_chain_out_of_the_map() -> None:
    table = make_map({3: 4})
    with pytest.raises(TypeError):
        native.find_runs(table._views, 1)
    with pytest.raises(TypeError):
        native.find_runs(table._views[:5], 1, 1)
    for views in (table._views._replace(heads=memoryview(b"")), table._views._replace(keys=table.keys[:5])):
        with pytest.raises((ValueError, BufferError), match=r"fit|read-only|writable"):
            native.find_runs(views, 1, 1)
    with pytest.raises(OverflowError):
        native.find_runs(table._views, -1, 1)
    table._next_array[4] = PLACES
    with pytest.raises(SystemError, match="damaged"):
        native.find_runs(table._views, make_key(1, 3) + 131, 1)

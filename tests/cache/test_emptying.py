"""Emptying zones: the native functions and their twins find and leave the same, and follow no chain for ever."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blockmap import check_chains
from test_engine_model import run_power_cuts, run_requests

from forebay_cache.engine import blockmap, emptying
from forebay_cache.engine.blockmap import BlockMap, make_key
from forebay_cache.engine.emptying import NONE_WORTHY, clear_places, find_kept
from forebay_cache.engine.entering import Moved
from forebay_cache.format.record import ENTRY, MOVE

ZONE_BLOCKS = 16
PLACES = 8 * ZONE_BLOCKS
WORTHY_FROM = 64

native = emptying._native
needs_native = pytest.mark.skipif(native is None, reason="there is no compiler here")
clearers = [clear_places, pytest.param(getattr(native, "clear_places", None), marks=needs_native)]
finders = [find_kept, pytest.param(getattr(native, "find_kept", None), marks=needs_native)]
Lbas = list[tuple[int, bool]]  # of each place from 1 on; whether it is held


def make_map(lbas: Lbas, buckets: int = 131) -> BlockMap:
    table = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=buckets)
    for place, (lba, is_held) in enumerate(lbas, 1):
        key = make_key(1 + lba % 2, lba)
        if is_held:
            table.hold(key, 100 + place, place * 7, place)
        elif table.find(key) < 0:
            table.insert(key, 100 + place, place * 7, place)
    return table


def state_of(table: BlockMap) -> list[list[int]]:
    arrays = (table.key_array, table.version_array, table.checksum_array, table.live_array, table.held_array)
    chains = (table._head_array, table._next_array, table._held_heads, table._held_nexts)
    return [array.tolist() for array in (*arrays, *chains)]


def check_held(table: BlockMap) -> None:
    """Compare the second table with what is held by the first."""
    found = []
    for head in table._held_heads.tolist():
        while head:
            found.append(head)
            assert len(found) <= PLACES, "a chain runs in a circle"
            head = int(table._held_nexts[head])
    assert sorted(found) == table.held_places().tolist()
    assert table.held_count == len(found)


blocks = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=PLACES - 1)
some_places = st.lists(st.integers(0, PLACES - 1), max_size=PLACES)


@needs_native
@settings(max_examples=300, deadline=None, derandomize=True)
@given(blocks, some_places, st.sampled_from([1, 7, 131]))
def test_both_twins_leave_the_same_map(lbas: Lbas, gone: list[int], buckets: int) -> None:
    """Places that are linked, held or empty, some named twice, in chains as long as they get."""
    twins = [make_map(lbas, buckets) for _ in range(2)]
    linked, held = twins[0].linked_mask(0, PLACES), twins[0].held_places()
    places = np.array(gone, np.int64)
    answers = [
        clear(table._views, table._second, ZONE_BLOCKS, places)
        for clear, table in zip((clear_places, native.clear_places), twins, strict=True)
    ]
    assert answers == [linked[np.unique(places)].sum()] * 2
    assert state_of(twins[0]) == state_of(twins[1])
    check_chains(twins[1])
    check_held(twins[1])
    left = np.setdiff1d(np.arange(PLACES), places)
    assert np.flatnonzero(twins[1].linked_mask(0, PLACES)).tolist() == [place for place in left if linked[place]]
    assert twins[1].held_places().tolist() == np.setdiff1d(held, places).tolist()


@pytest.mark.parametrize("find", finders)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 16), room=st.integers(0, 20), first=st.integers(0, 7))
def test_dirty_and_pinned_blocks_are_kept_and_worthy_ones_that_are_linked(
    find: Callable[..., int], seed: int, room: int, first: int
) -> None:
    rng, start = random.Random(seed), first * ZONE_BLOCKS
    table = make_map([(rng.randrange(200), rng.random() < 0.3) for _ in range(PLACES - 1)])
    states = np.array([rng.choice((0, 1, WORTHY_FROM - 1, WORTHY_FROM, 255)) for _ in range(PLACES)], np.uint8)
    noted = np.array([0, *(100 + start + rng.randrange(ZONE_BLOCKS) for _ in range(2))], np.uint64)
    for worthy_from in (WORTHY_FROM, NONE_WORTHY):
        expected = [
            place
            for place in range(start, start + ZONE_BLOCKS)
            if table.keys[place]
            and (
                table.versions[place] > noted[table.keys[place] >> 40]
                or (states[place] >= worthy_from and table.is_linked(place))
            )
        ]
        found = np.full(room, -1, np.int64)
        count = find(table._views, states, noted, start, ZONE_BLOCKS, worthy_from, found)
        assert found[:count].tolist() == expected[:room]


@pytest.mark.parametrize("clear", clearers)
@pytest.mark.parametrize("after", [0, PLACES, 0xFFFFFFFE])
def test_a_place_that_is_not_in_its_chain_is_an_error_and_no_crash(clear: Callable[..., int], after: int) -> None:
    table = make_map([(3, False), (4, True)])
    table._heads[table.keys[1] % table.bucket_count] = after
    table._held_heads[table.keys[2] % table.bucket_count] = after
    for place in (1, 2):
        with pytest.raises(SystemError, match=f"damaged at place {place}"):
            clear(table._views, table._second, ZONE_BLOCKS, np.array([place]))
        assert table.keys[place], "what was not taken out is not emptied"


@pytest.mark.parametrize("clear", clearers)
def test_a_chain_that_runs_in_a_circle_is_an_error_and_has_an_end(clear: Callable[..., int]) -> None:
    table = make_map([(1, False), (3, False), (5, False), (7, True), (9, True), (11, True)], buckets=1)
    table._nexts[2] = 3  # from 3 to 2 and back, never to 1
    table._held_nexts[5] = 6
    for place in (1, 4):
        with pytest.raises(SystemError, match=f"damaged at place {place}"):
            clear(table._views, table._second, ZONE_BLOCKS, np.array([place]))


@needs_native
def test_native_searches_in_a_chain_that_runs_in_a_circle_have_an_end() -> None:
    table = make_map([(1, False), (3, False), (5, False)], buckets=1)
    table._nexts[2] = 3
    with pytest.raises(SystemError, match="damaged"):
        table.find_runs(make_key(2, 77), 1)
    packed = ENTRY.pack(1, table.versions[1], 7, 2, MOVE, 0, 0xFF, 0)
    with pytest.raises(SystemError, match="damaged"):
        table.enter_moves(packed, 0, np.array([1]), 40, found=Moved.make())


@pytest.mark.parametrize("find", finders)
def test_a_key_of_no_volume_is_an_error(find: Callable[..., int]) -> None:
    table = make_map([(3, False)])
    with pytest.raises(SystemError, match="damaged at place 1"):
        find(table._views, np.zeros(PLACES, np.uint8), np.zeros(2, np.uint64), 0, ZONE_BLOCKS, 1, np.zeros(9, np.int64))


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    table = make_map([(3, False)])
    views, second, one = table._views, table._second, np.array([1])
    states, noted, found = np.zeros(PLACES, np.uint8), np.zeros(9, np.uint64), np.zeros(9, np.int64)
    for place in (PLACES, -1):
        with pytest.raises(ValueError, match="fit"):
            native.clear_places(views, second, ZONE_BLOCKS, np.array([place]))
    for zone_blocks, other in ((0, second), (1, second), (ZONE_BLOCKS, second._replace(nexts=second.nexts[1:]))):
        with pytest.raises(ValueError, match="fit"):
            native.clear_places(views, other, zone_blocks, one)
    with pytest.raises(TypeError):
        native.clear_places(views, second[:2], ZONE_BLOCKS, one)
    assert table.find(make_key(2, 3)) == 1
    for first, count, short in ((0, PLACES + 1, 0), (PLACES, 1, 0), (1 << 63, 1 << 63, 0), (0, 1, 1)):
        with pytest.raises(ValueError, match="fit"):
            native.find_kept(views, states[short:], noted, first, count, 1, found)
    with pytest.raises(TypeError):
        native.find_kept(views[:5], states, noted, 0, 1, 1, found)


@pytest.mark.parametrize("seed", range(2))
def test_the_engine_holds_with_the_twins(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockmap, "clear_places_fast", clear_places)
    monkeypatch.setattr(blockmap, "find_kept_fast", find_kept)
    run_requests(random.Random(seed).randrange(1000))
    run_power_cuts(random.Random(seed).randrange(1000))

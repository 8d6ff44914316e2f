"""Entering written blocks: the native functions and their twins leave the same arrays, and refuse what does not fit."""

import random
import shutil
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blockmap import check_chains
from test_engine_model import run_power_cuts, run_requests

from forebay_cache.engine import blockmap, cache, entering
from forebay_cache.engine.blockmap import BlockMap, make_key
from forebay_cache.engine.entering import Entered, Moved, enter_moves, enter_writes
from forebay_cache.engine.policy import FrequencyPolicy
from forebay_cache.engine.policy_core import Core
from forebay_cache.format import record
from forebay_cache.format.record import ENTRIES_OFFSET, ENTRY, MOVE, RECORD_ENTRIES_MAX, WRITE
from forebay_core.units import BLOCK_SIZE

ZONE_BLOCKS = 16
PLACES = 16 * ZONE_BLOCKS

native = entering._native


def test_the_native_part_was_built_where_there_is_a_compiler() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: the twins do the work")
    assert native is not None, "install again: .venv/bin/pip install --editable ."


needs_native = pytest.mark.skipif(native is None, reason="there is no compiler here")


def pack(lbas: list[int], version: int) -> bytes:
    return b"".join(ENTRY.pack(lba, version + i, lba * 7, 1 + lba % 2, WRITE, 0, 0xFF, 0) for i, lba in enumerate(lbas))


def records(entries: bytes, *, index: int = 0, record_blocks: int = RECORD_ENTRIES_MAX) -> list[bytearray]:
    """Header blocks that hold the entries from an index of the first one on, full but for the last one."""
    packed = bytes(index * ENTRY.size) + entries
    size = record_blocks * ENTRY.size
    parts = [packed[at : at + size] for at in range(0, len(packed), size)]
    return [bytearray((bytes(ENTRIES_OFFSET) + part).ljust(BLOCK_SIZE, b"x")) for part in parts]


def state_of(table: BlockMap, found: Entered | Moved) -> list[list[int]]:
    arrays = (table._head_array, table._next_array, table.key_array, table.version_array, table.checksum_array)
    return [array.tolist() for array in (*arrays, table.live_array, *found)]


@needs_native
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=20), min_size=1, max_size=6),
    st.sampled_from([1, 7, 131]),
    st.sampled_from([1, 3, 125]),
    st.integers(0, 120),
    st.integers(0, 120),
)
def test_both_twins_leave_the_same_map(
    writes: list[list[int]], buckets: int, record_blocks: int, one: int, other: int
) -> None:
    """Also where a write goes on in further records, between whose blocks a place is left for a header."""
    acknowledged, closed = sorted((one, other))
    twins = [(BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=buckets), Entered.make()) for _ in range(2)]
    first, version = 1, 1
    for lbas in writes:
        index = len(lbas) % record_blocks  # entries of something else stand before them
        headers = [bytearray(), *records(pack(lbas, version), index=index, record_blocks=record_blocks)]
        run = headers, record_blocks, 1, index, len(lbas), first
        answers = [
            enter(table._views, ZONE_BLOCKS, *run, acknowledged, closed, found)
            for enter, (table, found) in zip((native.enter_writes, enter_writes), twins, strict=True)
        ]
        assert answers[0] == answers[1]
        assert state_of(*twins[0]) == state_of(*twins[1])
        places = [first + i + (index + i) // record_blocks for i in range(len(lbas))]
        assert twins[0][1].places[: len(lbas)].tolist() == places
        first = places[-1] + 1
        version += len(lbas)
    check_chains(twins[0][0])


@needs_native
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=40, unique=True),
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30, unique_by=lambda one: one[0]),
    st.sets(st.integers(0, 40), max_size=10),
    st.sampled_from([1, 7, 131]),
)
def test_both_twins_move_the_same_blocks(
    lbas: list[int], moves: list[tuple[int, bool]], unlinked: set[int], buckets: int
) -> None:
    """From places that hold the block, or another version, or nothing, or a pinned version."""
    twins = [(BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=buckets), Moved.make()) for _ in range(2)]
    for table, _ in twins:
        for place, lba in enumerate(lbas, 1):
            table.insert(make_key(1 + lba % 2, lba), 100 + place, lba * 7, place)
        for lba in sorted(unlinked):
            table.unlink(make_key(1 + lba % 2, lba))
    table = twins[0][0]
    keys, versions = table.keys, table.versions
    rows = [(keys[place] & 0xFF, versions[place] + stale, max(1, keys[place] >> 40)) for place, stale in moves]
    packed = b"x" * ENTRY.size + b"".join(ENTRY.pack(lba, v, lba * 7, key, MOVE, 0, 0xFF, 0) for lba, v, key in rows)
    sources = np.array([place for place, _ in moves])
    answers = [
        move(table._views, ZONE_BLOCKS, packed, 1, sources, 64, found)
        for move, (table, found) in zip((native.enter_moves, enter_moves), twins, strict=True)
    ]
    assert answers[0] == answers[1]
    assert state_of(*twins[0]) == state_of(*twins[1])
    check_chains(table)
    held = {lba for lba in unlinked if lba in lbas}
    moved = {lbas[place - 1] for place, stale in moves if place <= len(lbas) and not stale} - held
    assert moved == {lba for lba in lbas if table.find(make_key(1 + lba % 2, lba)) >= 64}


@needs_native
def test_moves_that_do_not_fit_are_refused() -> None:
    table, found = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS), Moved.make()
    packed = pack([1, 2], 1)
    for index, sources, first in (
        (1, [1, 2], 3),
        (0, [0], 3),
        (0, [-1], 3),
        (0, [PLACES], 3),
        (0, [1], 0),
        (0, [1], PLACES),
    ):
        with pytest.raises(ValueError, match="fit"):
            native.enter_moves(table._views, ZONE_BLOCKS, packed, index, np.array(sources), first, found)
    with pytest.raises(TypeError):
        native.enter_moves(table._views, ZONE_BLOCKS, packed, 0, np.array([1]), 3, found[:2])
    table.insert(make_key(2, 1), 1, 7, 5)
    table._heads[make_key(2, 1) % table.bucket_count] = PLACES + 5
    with pytest.raises(SystemError, match="damaged"):
        native.enter_moves(table._views, ZONE_BLOCKS, packed, 0, np.array([5]), 7, found)


def test_dirty_and_pinned_are_told_by_the_version_that_was_overwritten() -> None:
    table, found = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS), Entered.make()
    for lba, version in ((0, 10), (2, 20), (4, 30)):
        table.insert(make_key(1, lba), version, 1, 1 + lba)
    headers = records(pack([0, 2, 4, 6, 6], 40))
    counts = table.enter_writes(headers, 125, 0, 0, 5, 50, acknowledged=10, closed=20, found=found)
    assert counts == (3, 1)
    assert found.olds[:5].tolist() == [1, 3, 5, -1, 53]
    assert found.dirty_lbas[:3].tolist() == [0, 2, 6]  # clean, in the closed cut, new; not the two that were dirty
    assert (found.pinned_lbas[0], found.pinned_places[0]) == (2, 3)
    assert table.keys[3] == make_key(1, 2)
    assert not table.is_linked(3)
    assert table.keys[1] == table.keys[5] == table.keys[53] == 0
    assert table.find(make_key(1, 6)) == 54
    check_chains(table)


@needs_native
@pytest.mark.parametrize(
    ("record_blocks", "number", "index", "count", "first"),
    [
        (2, 0, 0, 5, 1),
        (2, 1, 0, 3, 1),
        (2, 2, 0, 1, 1),
        (2, 0, 2, 1, 1),
        (0, 0, 0, 1, 1),
        (126, 0, 0, 1, 1),
        (2, 0, 1 << 63, 1, 1),
        (2, 1 << 63, 0, 1, 1),
        (2, 0, 0, 1 << 63, 1),
        (2, 0, 0, 1, 0),
        (2, 0, 0, 1, PLACES),
        (2, 0, 0, 2, PLACES - 1),
        (2, 0, 0, 3, PLACES - 3),  # three blocks, and a header between them
    ],
)
def test_entries_that_do_not_fit_are_refused(
    record_blocks: int, number: int, index: int, count: int, first: int
) -> None:
    table, headers = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS), records(pack([1, 2, 3, 4], 1), record_blocks=2)
    run = headers, record_blocks, number, index, count, first
    with pytest.raises(ValueError, match="fit"):
        native.enter_writes(table._views, ZONE_BLOCKS, *run, 0, 0, Entered.make())
    assert table.linked_count == 0


@needs_native
def test_more_entries_than_a_batch_has_are_refused() -> None:
    table, found = BlockMap(8 * 125, zone_blocks=125), Entered.make()
    count = found.keys.size + 1
    headers = records(pack(list(range(count)), 1))
    with pytest.raises(ValueError, match="fit"):
        native.enter_writes(table._views, 125, headers, 125, 0, 0, count, 1, 0, 0, found)
    assert table.linked_count == 0


@needs_native
def test_a_damaged_map_is_an_error_and_no_crash() -> None:
    table = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=1)
    table._heads[0] = PLACES + 5
    with pytest.raises(SystemError, match="damaged"):
        native.enter_writes(table._views, ZONE_BLOCKS, records(pack([1], 1)), 125, 0, 0, 1, 1, 0, 0, Entered.make())
    table._heads[0], table._nexts[3], table._nexts[4] = 3, 4, 3  # a chain in a circle
    table.keys[3] = table.keys[4] = make_key(1, 77)
    with pytest.raises(SystemError, match="damaged"):
        native.enter_writes(table._views, ZONE_BLOCKS, records(pack([1], 1)), 125, 0, 0, 1, 1, 0, 0, Entered.make())


@needs_native
def test_arguments_of_another_kind_are_refused() -> None:
    table, found = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS), Entered.make()
    run = 125, 0, 0, 1, 1, 0, 0
    for views in (table._views[:5], list(table._views), None):
        with pytest.raises(TypeError):
            native.enter_writes(views, ZONE_BLOCKS, [], *run, found)
    for headers in (b"", tuple(records(pack([1], 1))), [1]):
        with pytest.raises(TypeError):
            native.enter_writes(table._views, ZONE_BLOCKS, headers, *run, found)
    with pytest.raises(ValueError, match="one block"):
        native.enter_writes(table._views, ZONE_BLOCKS, [b"123"], *run, found)
    assert table.linked_count == 0
    frozen = found._replace(keys=np.frombuffer(bytes(8 * 8), np.uint64))
    with pytest.raises((BufferError, ValueError), match=r"read-only|writable"):
        native.enter_writes(table._views, ZONE_BLOCKS, records(pack([1], 1)), *run, frozen)


@pytest.mark.parametrize("seed", range(3))
def test_the_engine_holds_with_the_twins(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockmap, "enter_writes_fast", enter_writes)
    monkeypatch.setattr(blockmap, "enter_moves_fast", enter_moves)
    monkeypatch.setattr(record, "mark_written_fast", record.mark_written)
    monkeypatch.setattr(cache, "FrequencyPolicy", partial(FrequencyPolicy, core=Core))
    run_requests(random.Random(seed).randrange(1000))
    run_power_cuts(random.Random(seed).randrange(1000))

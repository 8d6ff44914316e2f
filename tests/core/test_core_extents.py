"""Extents against sets of blocks, and the packed form against what a peer may send."""

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_core.errors import ProtocolError
from forebay_core.extents import (
    EXTENT_COUNT_MAX,
    EXTENT_DTYPE,
    Extent,
    from_blocks,
    merge,
    pack,
    split,
    subtract,
    unpack,
)
from forebay_core.units import LBA_MAX

EXTENTS = st.builds(Extent, st.integers(0, 60), st.integers(1, 20))
BLOCKS = st.sets(st.integers(0, 80))


def blocks(extents: list[Extent]) -> list[int]:
    return [lba for extent in extents for lba in range(extent.start, extent.end)]


def assert_well_formed(extents: list[Extent]) -> None:
    assert all(extent.count > 0 for extent in extents)
    assert all(left.end <= right.start for left, right in itertools.pairwise(extents))


@given(EXTENTS, EXTENTS)
def test_intersection_holds_the_common_blocks(one: Extent, other: Extent) -> None:
    common = one.intersect(other)
    assert set(blocks([common] if common else [])) == set(blocks([one])) & set(blocks([other]))
    assert one.intersect(other) == other.intersect(one)


@given(EXTENTS, BLOCKS)
def test_subtraction_leaves_the_other_blocks(extent: Extent, holes: set[int]) -> None:
    rest = subtract(extent, from_blocks(sorted(holes)))
    assert_well_formed(rest)
    assert blocks(rest) == [lba for lba in range(extent.start, extent.end) if lba not in holes]


@given(BLOCKS)
def test_blocks_become_the_fewest_extents(lbas: set[int]) -> None:
    for given_as in (sorted(lbas), np.array(sorted(lbas), np.uint64)):
        extents = from_blocks(given_as)
        assert blocks(extents) == sorted(lbas)
        assert all(left.end < right.start for left, right in itertools.pairwise(extents))


@given(st.lists(EXTENTS))
def test_merging_holds_the_blocks_of_all(extents: list[Extent]) -> None:
    merged = merge(extents)
    assert_well_formed(merged)
    assert blocks(merged) == sorted(set(blocks(extents)))


@given(EXTENTS, st.integers(1, 30))
def test_splitting_keeps_blocks_and_order(extent: Extent, count_max: int) -> None:
    pieces = split(extent, count_max)
    assert blocks(pieces) == blocks([extent])
    assert all(piece.count <= count_max for piece in pieces)


@given(BLOCKS)
def test_what_was_packed_is_unpacked(lbas: set[int]) -> None:
    extents = from_blocks(sorted(lbas))
    assert unpack(pack(extents), count_max=100) == extents


def test_the_packed_form_is_what_it_always_was() -> None:
    assert EXTENT_DTYPE.itemsize == 12
    assert pack([Extent(1, 2), Extent(LBA_MAX, 1)]).hex() == "010000000000000002000000" + "ffffffffff00000001000000"


def test_extents_beyond_u32_are_packed_in_pieces() -> None:
    whole = Extent(5, 2 * EXTENT_COUNT_MAX + 7)
    pieces = unpack(pack([whole]), count_max=3)
    assert [piece.count for piece in pieces] == [EXTENT_COUNT_MAX, EXTENT_COUNT_MAX, 7]
    assert merge(pieces) == [whole]


def test_the_last_block_of_the_largest_volume_is_allowed() -> None:
    assert unpack(pack([Extent(LBA_MAX - 1, 2)]), count_max=1) == [Extent(LBA_MAX - 1, 2)]


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0)],
        [(0, 4), (3, 1)],
        [(5, 1), (0, 1)],
        [(5, 1), (5, 1)],
        [(LBA_MAX + 1, 1)],
        [(LBA_MAX, 2)],
        [(2**64 - 1, 2**32 - 1)],
        [(0, 1), (2**64 - 1, 1)],
        [(1, 1)] * 4,
    ],
)
def test_a_list_a_peer_may_not_send_is_a_protocol_error(rows: list[tuple[int, int]]) -> None:
    with pytest.raises(ProtocolError):
        unpack(b"".join(struct.pack("<QI", *row) for row in rows), count_max=3)


@pytest.mark.parametrize("size", [1, 11, 13, 48])
def test_a_list_of_odd_or_excessive_size_is_a_protocol_error(size: int) -> None:
    with pytest.raises(ProtocolError, match="malformed or longer"):
        unpack(bytes(size), count_max=3)


@given(st.binary(max_size=60))
def test_random_bytes_are_extents_or_a_protocol_error(packed: bytes) -> None:
    try:
        extents = unpack(packed, count_max=4)
    except ProtocolError:
        return
    assert_well_formed(extents)
    assert pack(extents) == packed

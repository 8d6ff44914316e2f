"""The head index against a plain dictionary, under random cuts of data, holes and overlaps; over dict and LMDB."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_twins import DictIndex

from forebay_store.engine.head import Delta, make_hole, narrow, overlapping, replace, stored_share
from forebay_store.engine.head_batch import replace_rows
from forebay_store.engine.ports import Index, IndexWriter
from forebay_store.format.head_rows import HeadRows, pack_rows
from forebay_store.format.part import PART_ENTRY, unpack_entries
from forebay_store.format.rows import HeadEntry, StagedPart, Table, encode_entry
from forebay_store.format.segment import SegmentName
from forebay_store.service.lmdb_index import LmdbIndex

VOLUME = b"volume-in-middle"
BLOCKS = 200


class Piece(NamedTuple):
    start: int
    length: int
    is_data: bool


pieces = st.builds(
    Piece,
    st.integers(0, BLOCKS - 20),
    st.integers(1, 16),
    st.booleans(),
)
cuts = st.lists(st.lists(pieces, min_size=1, max_size=8), min_size=1, max_size=8)


def entry_of(piece: Piece, version: int, number: int) -> HeadEntry:
    if not piece.is_data:
        return make_hole(piece.start, piece.length, version)
    return HeadEntry(piece.start, piece.length, True, version, SegmentName(1, number), 64, 1000 + number, 16, 0)


@contextmanager
def lmdb_index() -> Iterator[Index]:
    with TemporaryDirectory() as folder:
        index = LmdbIndex(Path(folder), lasting=False)
        try:
            yield index
        finally:
            index.close()


@contextmanager
def dict_index() -> Iterator[Index]:
    yield DictIndex()


def check_against_model(index: Index, made: list[list[Piece]]) -> None:
    model: dict[int, HeadEntry] = {}
    stored_size = data_blocks = number = 0
    for version, cut in enumerate(made, 1):
        entries = []
        for piece in cut:
            number += 1
            entries.append(entry_of(piece, version, number))
        delta = index.update(lambda writer, entries=entries: replace(writer, VOLUME, entries))  # type: ignore[misc]
        stored_size += delta.stored_size
        data_blocks += delta.data_blocks
        for entry in entries:
            model |= {lba: narrow(entry, lba, lba + 1) for lba in range(entry.start, entry.end)}
    with index.view() as reader:
        found = list(overlapping(reader, VOLUME, 0, BLOCKS))
    assert {lba: narrow(entry, lba, lba + 1) for entry in found for lba in range(entry.start, entry.end)} == model
    assert all(left.end <= right.start for left, right in pairwise(found))
    assert not [
        (left, right)
        for left, right in pairwise(found)
        if not left.is_data and not right.is_data and left.end == right.start and left.version == right.version
    ]
    assert stored_size == sum(stored_share(entry) for entry in found)
    assert data_blocks == sum(entry.length for entry in found if entry.is_data)


@settings(deadline=None, max_examples=200)
@given(cuts)
def test_the_head_holds_what_a_dictionary_would(made: list[list[Piece]]) -> None:
    check_against_model(DictIndex(), made)


@settings(deadline=None, max_examples=25)
@given(cuts)
def test_the_head_in_lmdb_holds_what_a_dictionary_would(made: list[list[Piece]]) -> None:
    with lmdb_index() as index:
        check_against_model(index, made)


@pytest.mark.parametrize("kind", [dict_index, lmdb_index])
def test_neighbouring_volumes_do_not_touch_each_other(kind: object) -> None:
    others = (bytes(16), b"volume-in-middld", b"volume-in-middlf", b"\xff" * 16)
    with kind() as index:  # type: ignore[operator]
        for volume in others:
            index.update(lambda writer, volume=volume: replace(writer, volume, [make_hole(0, 1 << 31, 1)]))
        index.update(lambda writer: replace(writer, VOLUME, [make_hole(5, 10, 2)]))
        with index.view() as reader:
            assert list(overlapping(reader, VOLUME, 0, 1 << 40)) == [make_hole(5, 10, 2)]
            for volume in others:
                assert list(overlapping(reader, volume, 100, 200)) == [make_hole(0, 1 << 31, 1)]


def test_holes_never_grow_beyond_what_an_entry_can_say() -> None:
    index = DictIndex()
    largest = (1 << 32) - 1
    index.update(lambda writer: replace(writer, VOLUME, [make_hole(0, largest, 1)]))
    index.update(lambda writer: replace(writer, VOLUME, [make_hole(largest, 10, 1)]))
    with index.view() as reader:
        assert [entry.length for entry in overlapping(reader, VOLUME, 0, 1 << 40)] == [largest, 10]


def part_of(pieces: list[Piece], number: int) -> StagedPart:
    """Return a part with a frame for each of the pieces that hold data; their other fields tell them apart."""
    entries = b"".join(
        PART_ENTRY.pack(piece.start, piece.length, 4096 * at, 1000 + 17 * at, at % 16, 16, 0)
        for at, piece in enumerate(pieces)
    )
    return StagedPart(SegmentName(1, number), 640, 4096 * len(pieces), b"", entries)


def entries_of(part: StagedPart, version: int) -> list[HeadEntry]:
    return [
        HeadEntry(start, length, True, version, part.segment, part.payload_offset + offset, size, blocks, block)
        for start, length, offset, size, block, blocks in unpack_entries(part.entries)
    ]


def put_one_by_one(writer: IndexWriter, part: StagedPart, version: int) -> Delta:
    """Put each entry alone: none can know of another."""
    deltas = [replace(writer, VOLUME, [entry]) for entry in entries_of(part, version)]
    return Delta(sum(one.stored_size for one in deltas), sum(one.data_blocks for one in deltas))


def put_at_once(writer: IndexWriter, part: StagedPart, version: int) -> Delta:
    rows = pack_rows(VOLUME, part, version)
    return put_one_by_one(writer, part, version) if rows is None else replace_rows(writer, VOLUME, rows)


def disjoint(pieces: list[Piece]) -> list[Piece]:
    """Drop those that share a block with one before; the others keep their order."""
    taken: set[int] = set()
    kept = []
    for piece in pieces:
        blocks = set(range(piece.start, piece.start + piece.length))
        if not blocks & taken:
            kept.append(piece)
            taken |= blocks
    return kept


def check_batches(slow: Index, fast: Index, made: list[list[Piece]]) -> None:
    others = (bytes(16), b"volume-in-middld", b"volume-in-middlf", b"\xff" * 16)
    for index in (slow, fast):
        for volume in others:
            index.update(lambda writer, volume=volume: replace(writer, volume, [make_hole(0, 1 << 31, 1)]))  # type: ignore[misc]
    for number, cut in enumerate(made, 1):
        holes = [make_hole(piece.start, piece.length, number) for piece in cut if not piece.is_data]
        part = part_of([piece for piece in cut if piece.is_data], number)
        for index in (slow, fast):
            index.update(lambda writer, holes=holes: replace(writer, VOLUME, holes))  # type: ignore[misc]
        one = slow.update(lambda writer, part=part, number=number: put_one_by_one(writer, part, number))  # type: ignore[misc]
        other = fast.update(lambda writer, part=part, number=number: put_at_once(writer, part, number))  # type: ignore[misc]
        assert one == other
        with slow.view() as expected, fast.view() as found:
            assert list(found.scan(Table.HEAD, b"")) == list(expected.scan(Table.HEAD, b""))


@settings(deadline=None, max_examples=300)
@given(cuts, st.booleans())
def test_a_part_put_at_once_gives_the_same_rows_as_entry_by_entry(made: list[list[Piece]], overlaps: bool) -> None:
    check_batches(DictIndex(), DictIndex(), made if overlaps else [disjoint(cut) for cut in made])


@settings(deadline=None, max_examples=40)
@given(cuts)
def test_a_part_put_at_once_gives_the_same_rows_in_lmdb(made: list[list[Piece]]) -> None:
    with lmdb_index() as index:
        check_batches(DictIndex(), index, [disjoint(cut) for cut in made])


def test_a_part_of_thousands_of_scattered_blocks_gives_the_same_rows() -> None:
    choose = random.Random(5)
    slow, index = DictIndex(), DictIndex()
    for number in range(1, 5):
        part = part_of([Piece(lba, 1, True) for lba in choose.sample(range(9000), 3000)], number)
        one = slow.update(lambda writer, part=part, number=number: put_one_by_one(writer, part, number))  # type: ignore[misc]
        other = index.update(lambda writer, part=part, number=number: put_at_once(writer, part, number))  # type: ignore[misc]
        assert one == other
    assert index.rows() == slow.rows()


def test_the_rows_of_a_part_are_those_of_its_entries() -> None:
    part = part_of([Piece(90, 3, True), Piece(5, 2, True), Piece(7, 1, True), Piece((1 << 40) - 1, 1, True)], 1 << 40)
    version = 7 << 44 | 9
    packed = pack_rows(VOLUME, part, version)
    assert packed is not None
    expected = sorted(entries_of(part, version))
    assert packed.rows == [encode_entry(VOLUME, entry) for entry in expected]
    assert [run[:2] for run in packed.runs] == [(5, 8), (90, 93), ((1 << 40) - 1, 1 << 40)]
    assert packed.stored_size == sum(stored_share(entry) for entry in expected)
    assert packed.data_blocks == 7


def test_entries_that_share_a_block_are_no_batch_and_none_is_an_empty_one() -> None:
    assert pack_rows(VOLUME, part_of([Piece(5, 3, True), Piece(7, 1, True)], 1), 1) is None
    assert pack_rows(VOLUME, part_of([], 1), 1) == HeadRows([], [], 0, 0)

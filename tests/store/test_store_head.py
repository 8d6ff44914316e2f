"""The head index against a plain dictionary, under random cuts of data, holes and overlaps; over dict and LMDB."""

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

from forebay_store.engine.head import make_hole, narrow, overlapping, replace, stored_share
from forebay_store.engine.ports import Index
from forebay_store.format.rows import HeadEntry
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

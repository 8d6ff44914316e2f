"""The head and history against a plain dictionary, under random cuts of data, trims and overlaps; dict and LMDB."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_twins import DictIndex

from forebay_core.extents import Extent
from forebay_store.engine.head import overlapping, replace
from forebay_store.engine.head import trim as trim_some
from forebay_store.engine.head_batch import replace_rows
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.live import LiveBytes, find_segment, note_segment
from forebay_store.engine.ports import Index, IndexReader, IndexWriter
from forebay_store.format.entries import (
    DATA,
    HeadEntry,
    decode_history,
    encode_entry,
    make_hole,
    narrow,
    stored_share,
)
from forebay_store.format.head_rows import HeadRows, pack_rows
from forebay_store.format.part import PART_ENTRY, unpack_entries
from forebay_store.format.rows import StagedPart, Table, VolumeState
from forebay_store.format.segment import SegmentName
from forebay_store.service.lmdb_index import LmdbIndex

NUMBER = 500
BLOCKS = 200
SEGMENTS = [SegmentName(1, number) for number in range(70)]


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


def volume(number: int = NUMBER, *, newest_snapshot: int = 0, origin: bytes = b"") -> VolumeState:
    return VolumeState(
        number.to_bytes(16, "big"), "vm", 1 << 40, 1, 0, 0, 0, 0, 0, 0, 0, b"", origin, number, newest_snapshot
    )


def change(index: Index, row: VolumeState, version: int, work: Callable[[HeadChange], None]) -> VolumeState:
    """Do a change in a transaction of its own; return the volume's row after it."""

    def run(writer: IndexWriter) -> VolumeState:
        live = LiveBytes()
        made = HeadChange(writer, live, row, version)
        work(made)
        after = made.end()
        live.write(writer)
        return after

    return index.update(run)


def with_segments(index: Index) -> Index:
    def note_all(writer: IndexWriter) -> None:
        for name in SEGMENTS:
            note_segment(writer, name, 1 << 20)

    index.update(note_all)
    return index


def trim(change: HeadChange, extents: list[Extent]) -> None:
    """Trim all of it at once."""
    for extent in extents:
        trim_some(change, extent.start, extent.end, entries_max=1 << 40)


def put(piece: Piece, number: int) -> Callable[[HeadChange], None]:
    if not piece.is_data:
        return lambda made: trim(made, [Extent(piece.start, piece.length)])
    return lambda made: replace(made, [data_entry(piece, made.version, number)])


def data_entry(piece: Piece, version: int, number: int) -> HeadEntry:
    return HeadEntry(piece.start, piece.length, DATA, version, SEGMENTS[number], 64, 1000 + number, 16, 0)


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


def check_against_model(index: Index, made: list[list[Piece]], origin: bytes = b"") -> None:
    model: dict[int, HeadEntry] = {}
    row = volume(origin=origin)
    number = 0
    for version, cut in enumerate(made, 1):
        for piece in cut:
            number += 1
            row = change(index, row, version, put(piece, number))
            for lba in range(piece.start, piece.start + piece.length):
                if piece.is_data:
                    model[lba] = narrow(data_entry(piece, version, number), lba, lba + 1)
                elif (lba in model and model[lba].is_data and model[lba].version < version) or (
                    lba not in model and origin
                ):
                    model[lba] = make_hole(lba, 1, version)
    with index.view() as reader:
        found = list(overlapping(reader, NUMBER, 0, BLOCKS))
        live = {name: one.live for name in SEGMENTS if (one := find_segment(reader, name)) is not None}
    assert {lba: narrow(entry, lba, lba + 1) for entry in found for lba in range(entry.start, entry.end)} == model
    assert all(left.end <= right.start for left, right in pairwise(found))
    assert not [
        (left, right)
        for left, right in pairwise(found)
        if not left.is_data and not right.is_data and left.end == right.start and left.version == right.version
    ]
    assert row.stored_size == sum(stored_share(entry) for entry in found)
    assert row.data_blocks == sum(entry.length for entry in found if entry.is_data)
    for name in SEGMENTS:
        assert live[name] == sum(stored_share(entry) for entry in found if entry.segment == name)


@settings(deadline=None, max_examples=200)
@given(cuts)
def test_the_head_holds_what_a_dictionary_would(made: list[list[Piece]]) -> None:
    check_against_model(with_segments(DictIndex()), made)


@settings(deadline=None, max_examples=100)
@given(cuts)
def test_a_trim_of_a_clone_hides_its_origin(made: list[list[Piece]]) -> None:
    check_against_model(with_segments(DictIndex()), made, origin=b"o" * 16)


@settings(deadline=None, max_examples=25)
@given(cuts)
def test_the_head_in_lmdb_holds_what_a_dictionary_would(made: list[list[Piece]]) -> None:
    with lmdb_index() as index:
        check_against_model(with_segments(index), made)


@pytest.mark.parametrize("kind", [dict_index, lmdb_index])
def test_neighbouring_volumes_do_not_touch_each_other(kind: object) -> None:
    others = (1, NUMBER - 1, NUMBER + 1, (1 << 24) - 2)
    whole = Extent(0, 1 << 31)
    with kind() as index:  # type: ignore[operator]
        for other in others:
            change(index, volume(other, origin=b"o" * 16), 1, lambda made: trim(made, [whole]))
        change(index, volume(origin=b"o" * 16), 2, lambda made: trim(made, [Extent(5, 10)]))
        with index.view() as reader:
            assert list(overlapping(reader, NUMBER, 0, 1 << 40)) == [make_hole(5, 10, 2)]
            for other in others:
                assert list(overlapping(reader, other, 100, 200)) == [make_hole(0, 1 << 31, 1)]


def test_holes_never_grow_beyond_what_an_entry_can_say() -> None:
    index = DictIndex()
    largest = (1 << 32) - 1
    row = volume(origin=b"o" * 16)
    change(index, row, 1, lambda made: trim(made, [Extent(0, largest), Extent(largest, 10)]))
    with index.view() as reader:
        assert [entry.length for entry in overlapping(reader, NUMBER, 0, 1 << 40)] == [largest, 10]


def test_what_a_snapshot_shows_goes_to_the_history_and_the_rest_dies() -> None:
    index = with_segments(DictIndex())
    row = volume()
    for version, piece in ((1, Piece(0, 8, True)), (2, Piece(8, 8, True))):
        row = change(index, row, version, put(piece, version))
    row = change(index, row._replace(newest_snapshot=1), 3, put(Piece(4, 8, True), 3))
    history = [decode_history(*item) for item in index.rows()[Table.HISTORY].items()]
    assert history == [(narrow(data_entry(Piece(0, 8, True), 1, 1), 4, 8), 1)]
    assert len(index.rows()[Table.DISPLACED]) == 1
    with index.view() as reader:
        rows = [find_segment(reader, SEGMENTS[number]) for number in (1, 2, 3)]
    assert [found.live for found in rows if found is not None] == [8 * 62, 4 * 62, 8 * 62]


def test_a_trim_of_everything_is_one_entry_and_looks_at_each_once() -> None:
    index = with_segments(DictIndex())
    row = volume()
    for at in range(5):
        part = part_of([Piece(lba, 1, True) for lba in range(at, 9000, 5)], 1)
        row = change(index, row, at + 1, lambda made, part=part: put_at_once(made, part))  # type: ignore[misc]
    assert len(index.rows()[Table.HEAD]) == 9000
    row = change(index, row, 6, lambda made: trim(made, [Extent(0, 1 << 28)]))
    with index.view() as reader:
        assert list(overlapping(reader, NUMBER, 0, 1 << 40)) == [make_hole(0, 9000, 6)]
    assert (row.stored_size, row.data_blocks) == (0, 0)


def part_of(pieces: list[Piece], number: int) -> StagedPart:
    """Return a part with a frame for each of the pieces that hold data; their other fields tell them apart."""
    entries = b"".join(
        PART_ENTRY.pack(piece.start, piece.length, 4096 * at % (1 << 24), 1000 + at, 0, 16, 0)
        for at, piece in enumerate(pieces)
    )
    return StagedPart(SegmentName(1, number), 640, 4096 * len(pieces), b"", entries)


def entries_of(part: StagedPart, version: int) -> list[HeadEntry]:
    return [
        HeadEntry(start, length, DATA, version, part.segment, part.payload_offset + offset, size, blocks, block)
        for start, length, offset, size, block, blocks in unpack_entries(part.entries)
    ]


def put_one_by_one(made: HeadChange, part: StagedPart) -> None:
    """Put each entry alone: none can know of another."""
    for entry in entries_of(part, made.version):
        replace(made, [entry])


def put_at_once(made: HeadChange, part: StagedPart) -> None:
    rows = pack_rows(NUMBER, part, made.version)
    if rows is None:
        put_one_by_one(made, part)
    else:
        replace_rows(made, rows, part.segment)


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


def check_batches(slow: Index, fast: Index, made: list[list[Piece]], newest_snapshot: int = 0) -> None:
    one = other = volume()
    for index in (with_segments(slow), with_segments(fast)):
        for neighbour in (1, NUMBER - 1, NUMBER + 1, (1 << 24) - 2):
            change(index, volume(neighbour, origin=b"o" * 16), 1, lambda made: trim(made, [Extent(0, 1 << 31)]))
    for number, cut in enumerate(made, 1):
        if number == newest_snapshot + 1:
            one, other = (row._replace(newest_snapshot=newest_snapshot) for row in (one, other))
        holes = [Extent(piece.start, piece.length) for piece in cut if not piece.is_data]
        part = part_of([piece for piece in cut if piece.is_data], number)
        one = change(
            slow, one, number, lambda made, part=part, holes=holes: (trim(made, holes), put_one_by_one(made, part))
        )  # type: ignore[misc, func-returns-value]
        other = change(
            fast, other, number, lambda made, part=part, holes=holes: (trim(made, holes), put_at_once(made, part))
        )  # type: ignore[misc, func-returns-value]
        assert one == other
        with slow.view() as expected, fast.view() as found:
            for table in (Table.HEAD, Table.SEGMENTS):
                assert list(found.scan(table, b"")) == list(expected.scan(table, b""))
            assert history_of(found) == history_of(expected)


def history_of(reader: IndexReader) -> set[tuple[HeadEntry, int]]:
    """Return entry and last version of each block: what is displaced at once may lie in fewer entries."""
    found = (decode_history(*row) for row in reader.scan(Table.HISTORY, b""))
    return {(narrow(entry, lba, lba + 1), last) for entry, last in found for lba in range(entry.start, entry.end)}


@settings(deadline=None, max_examples=300)
@given(cuts, st.booleans(), st.integers(0, 6))
def test_a_part_put_at_once_gives_the_same_rows_as_entry_by_entry(
    made: list[list[Piece]], overlaps: bool, newest_snapshot: int
) -> None:
    check_batches(DictIndex(), DictIndex(), made if overlaps else [disjoint(cut) for cut in made], newest_snapshot)


@settings(deadline=None, max_examples=40)
@given(cuts)
def test_a_part_put_at_once_gives_the_same_rows_in_lmdb(made: list[list[Piece]]) -> None:
    with lmdb_index() as index:
        check_batches(DictIndex(), index, [disjoint(cut) for cut in made])


def test_a_part_of_thousands_of_scattered_blocks_gives_the_same_rows() -> None:
    choose = random.Random(5)
    slow, index = with_segments(DictIndex()), with_segments(DictIndex())
    one = other = volume()
    for number in range(1, 5):
        if number == 3:
            one, other = (row._replace(newest_snapshot=2) for row in (one, other))
        part = part_of([Piece(lba, 1, True) for lba in choose.sample(range(9000), 3000)], number)
        one = change(slow, one, number, lambda made, part=part: put_one_by_one(made, part))  # type: ignore[misc]
        other = change(index, other, number, lambda made, part=part: put_at_once(made, part))  # type: ignore[misc]
        assert one == other
    kept = [table for table in Table if table is not Table.DISPLACED]  # whose order is that of the writes
    assert [index.rows()[table] for table in kept] == [slow.rows()[table] for table in kept]


def test_the_rows_of_a_part_are_those_of_its_entries() -> None:
    part = part_of([Piece(90, 3, True), Piece(5, 2, True), Piece(7, 1, True), Piece((1 << 40) - 1, 1, True)], 1 << 31)
    version = 7 << 44 | 9
    packed = pack_rows(NUMBER, part, version)
    assert packed is not None
    expected = sorted(entries_of(part, version))
    assert packed.rows == [encode_entry(NUMBER, entry) for entry in expected]
    assert [run[:2] for run in packed.runs] == [(5, 8), (90, 93), ((1 << 40) - 1, 1 << 40)]
    assert packed.stored_size == sum(stored_share(entry) for entry in expected)
    assert packed.data_blocks == 7


def test_entries_that_share_a_block_are_no_batch_and_none_is_an_empty_one() -> None:
    assert pack_rows(NUMBER, part_of([Piece(5, 3, True), Piece(7, 1, True)], 1), 1) is None
    assert pack_rows(NUMBER, part_of([], 1), 1) == HeadRows([], [], 0, 0)

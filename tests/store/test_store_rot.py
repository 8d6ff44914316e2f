"""Bits that flip in the pages of the index, of which LMDB has no checksums: never a wrong answer where keys are hit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_store_head import volume

from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent, pack
from forebay_store.engine.head import replace
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.live import LiveBytes, note_segment
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.engine.reading import plan_read
from forebay_store.engine.snapshots import take_snapshot
from forebay_store.engine.volumes import put_volume
from forebay_store.format.entries import DATA, HeadEntry, head_key, history_key
from forebay_store.format.rows import Table, VolumeState
from forebay_store.format.segment import SegmentName
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_wire import messages

BLOCKS = 400
SEGMENT = SegmentName(1, 7)
VOLUME, SNAPSHOT = b"v" * 16, b"s" * 16
STARTS = tuple(range(0, BLOCKS, 10))


def write(writer: IndexWriter, row: VolumeState, version: int) -> VolumeState:
    live = LiveBytes()
    change = HeadChange(writer, live, row, version)
    replace(change, [HeadEntry(at, 4, DATA, version, SEGMENT, 4096, 4000, 16, 2) for at in STARTS])
    live.write(writer)
    return change.end()._replace(version=version)


def fill(writer: IndexWriter) -> None:
    """Make three volumes; the one in the middle has a snapshot, and was written anew behind it."""
    note_segment(writer, SEGMENT, 1 << 20)
    for number in range(3):
        row = volume(number)._replace(id=VOLUME if number == 1 else bytes([number]) * 16, name=f"vm{number}")
        row = write(writer, row, 5)
        if number == 1:
            row = take_snapshot(writer, row, snapshot=SNAPSHOT, name="s", created_ns=0, version=6)
            row = write(writer, row, 7)
        put_volume(writer, row)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("index")
    index = LmdbIndex(folder)
    index.update(fill)
    index.close()
    return (folder / "data.mdb").read_bytes()


def answers(reader: IndexReader, view: bytes) -> Iterator[object]:
    """Yield what each block reads as: a plan, or None for an error that says so."""
    for lba in range(BLOCKS):
        try:
            yield plan_read(reader, messages.Read(view, pack([Extent(lba, 1)])))
        except CorruptionError:
            yield None


@pytest.mark.parametrize("start", [0, 150, BLOCKS - 10])
@pytest.mark.parametrize("view", [VOLUME, SNAPSHOT])
def test_an_entry_whose_key_lost_a_bit_is_an_error_and_never_zeros(
    whole: bytes, tmp_path: Path, start: int, view: bytes
) -> None:
    table, key = (Table.HEAD, head_key(1, start)) if view == VOLUME else (Table.HISTORY, history_key(1, 0, start, 6))
    (tmp_path / "data.mdb").write_bytes(whole)
    index = LmdbIndex(tmp_path)
    with index.view() as reader:
        value = reader.get(table, key)
        right = list(answers(reader, view))
    index.close()
    assert value is not None
    assert None not in right
    for bit in range(8 * len(key)):
        flipped = (int.from_bytes(key, "big") ^ 1 << bit).to_bytes(len(key), "big")
        damaged = whole.replace(key + value, flipped + value)  # in pages that are out of use as well
        assert damaged != whole
        (tmp_path / "data.mdb").write_bytes(damaged)
        index = LmdbIndex(tmp_path)
        with index.view() as reader:
            found = list(answers(reader, view))
        index.close()
        assert found[start : start + 4] == [None] * 4, f"bit {bit}"
        assert all(one in (None, expected) for one, expected in zip(found, right, strict=True)), f"bit {bit}"

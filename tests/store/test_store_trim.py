"""Trims of many entries: by column or one by one, in one step or in many, the rows are the same."""

import random

import pytest
from sim_index import DictIndex
from test_store_head import volume

from forebay_store.engine.head import replace, trim
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.live import LiveBytes, note_segment
from forebay_store.engine.ports import IndexWriter
from forebay_store.engine.trim_batch import ROWS_MIN
from forebay_store.format.entries import DATA, HeadEntry
from forebay_store.format.rows import Table, VolumeState
from forebay_store.format.segment import SegmentName

SEGMENT = SegmentName(1, 7)
BLOCKS = 2000
ALL = 1 << 40


class Volume:
    """A volume that is written and trimmed, a trim `step` entries at a time."""

    def __init__(self, row: VolumeState, *, step: int) -> None:
        self.index = DictIndex()
        self.row = row
        self.step = step
        self.index.update(lambda writer: note_segment(writer, SEGMENT, 1 << 20))

    def write(self, version: int, extents: list[tuple[int, int]]) -> None:
        entries = [HeadEntry(at, count, DATA, version, SEGMENT, 4096, 4000, 16, 1) for at, count in extents]
        self.index.update(lambda writer: self._change(writer, version, entries, []))

    def trim(self, version: int, extents: list[tuple[int, int]]) -> None:
        self.index.update(lambda writer: self._change(writer, version, [], extents))

    def _change(
        self, writer: IndexWriter, version: int, entries: list[HeadEntry], trims: list[tuple[int, int]]
    ) -> None:
        live = LiveBytes()
        change = HeadChange(writer, live, self.row, version)
        for start, count in trims:
            at = start
            while at < start + count:
                at, _ = trim(change, at, start + count, entries_max=self.step)
        replace(change, entries)
        self.row = change.end()
        live.write(writer)


@pytest.mark.parametrize("is_clone", [False, True])
@pytest.mark.parametrize("newest_snapshot", [0, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_rows_do_not_tell_how_many_entries_were_trimmed_at_once(
    seed: int, newest_snapshot: int, is_clone: bool
) -> None:
    chance = random.Random(seed)
    gaps = (0, 0, 1, 3) if seed % 2 else (1, 2)
    row = volume(3, newest_snapshot=newest_snapshot, origin=b"o" * 16 if is_clone else b"")
    volumes = [Volume(row, step=step) for step in (1, ROWS_MIN - 1, ROWS_MIN + 9, ALL)]
    for version in range(1, 9):
        extents: list[tuple[int, int]] = []
        at = chance.randrange(50)
        while at < BLOCKS - 20:
            extents.append((at, chance.randrange(1, 9)))
            at += extents[-1][1] + chance.choice(gaps)
        trims = [(chance.randrange(BLOCKS // 2), chance.randrange(1, BLOCKS // 2)) for _ in range(2)]
        for one in volumes:
            if version % 2:
                one.write(version, extents)
            else:
                one.trim(version, trims)
    for one in volumes[1:]:
        assert one.row == volumes[0].row
        for table in (Table.HEAD, Table.HISTORY, Table.SEGMENTS):
            assert one.index.rows()[table] == volumes[0].index.rows()[table]

"""Answers that change nothing, each from one view of the index.

Invariant: a view shows whole cuts only, and its volume row is that of its head.
"""

from collections.abc import Iterator

import numpy as np

from forebay_core.errors import RefusedError
from forebay_core.names import NAME_SIZE_MAX
from forebay_core.units import BLOCK_SIZE
from forebay_store.engine.changes import expect_epoch, expect_name, expect_volume
from forebay_store.engine.head import overlapping
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.rows import volume_row
from forebay_store.engine.volumes import find_volume
from forebay_store.format.rows import HeadEntry, Table, VolumeState
from forebay_store.limits import ROWS_PER_PAGE_MAX, SCAN_ENTRIES_MAX
from forebay_wire import messages
from forebay_wire.limits import PIECES_MAX
from forebay_wire.messages import HOLE_FRAME, PIECE_DTYPE

Query = messages.GetVolume | messages.ListVolumes | messages.MapExtents | messages.Changed
_COUNT_MAX = (1 << 32) - 1


class Pieces:
    """A list of pieces without data; neighbours that are alike become one."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, start: int, end: int, frame: int, version: int) -> None:
        """Add blocks behind those already there."""
        if self._rows:
            last_start, last_count, last_frame, _, last_version = self._rows[-1]
            alike = last_start + last_count == start and (last_frame, last_version) == (frame, version)
            if alike and end - last_start <= _COUNT_MAX:
                self._rows[-1] = (last_start, end - last_start, frame, 0, version)
                return
        while start < end:
            count = min(end - start, _COUNT_MAX)
            self._rows.append((start, count, frame, 0, version))
            start += count

    def packed(self) -> bytes:
        """Return the piece table."""
        return np.array(self._rows, PIECE_DTYPE).tobytes()


def answer_query(reader: IndexReader, message: Query) -> messages.AnyMessage:
    """Return the answer.

    Raises:
        RefusedError: with the code that says why.
    """
    match message:
        case messages.GetVolume():
            return messages.Volume(volume_row(expect_name(reader, message.name)))
        case messages.ListVolumes():
            return list_volumes(reader, message)
        case messages.MapExtents():
            return map_extents(reader, message)
        case messages.Changed():
            return changed(reader, message)


def list_volumes(reader: IndexReader, message: messages.ListVolumes) -> messages.Volumes:
    """Return a page of volumes in the order of their names' bytes."""
    if message.count_max < 1:
        raise RefusedError(messages.BAD_REQUEST, f"count_max is {message.count_max}, 1 or more is needed")
    count_max = min(message.count_max, ROWS_PER_PAGE_MAX)
    rows: list[messages.VolumeRow] = []
    after = message.after.encode(errors="replace")[: NAME_SIZE_MAX + 1]
    for name, volume in reader.scan(Table.NAMES, after + b"\0" if after else b""):
        if len(rows) == count_max:
            return messages.Volumes(tuple(rows), True)
        row = find_volume(reader, volume)
        if row is None or row.name.encode() != name:
            raise RefusedError(messages.CORRUPT, f"index names {name.decode()}: its volume is missing; run store fsck")
        rows.append(volume_row(row))
    return messages.Volumes(tuple(rows), False)


def map_extents(reader: IndexReader, message: messages.MapExtents) -> messages.Mapped:
    """Return which blocks of an extent hold data."""
    row = expect_volume(reader, message.volume)
    if message.epoch:
        expect_epoch(row, message.epoch)
    end = message.start + message.count
    check_blocks(row, message.start, end)
    pieces = Pieces()
    at = message.start
    for scanned, entry in enumerate(overlapping(reader, row.id, message.start, end)):
        if len(pieces) + 2 > PIECES_MAX or scanned == SCAN_ENTRIES_MAX:
            return messages.Mapped(pieces.packed())
        at = _add_entry(pieces, at, entry, end)
    if at < end:
        pieces.add(at, end, HOLE_FRAME, 0)
    return messages.Mapped(pieces.packed())


def _add_entry(pieces: Pieces, at: int, entry: HeadEntry, end: int) -> int:
    """Add what lies between `at` and the end of an entry; return where it ends."""
    start, stop = max(at, entry.start), min(entry.end, end)
    if at < start:
        pieces.add(at, start, HOLE_FRAME, 0)
    pieces.add(start, stop, 0 if entry.is_data else HOLE_FRAME, entry.version)
    return stop


def changed(reader: IndexReader, message: messages.Changed) -> messages.Changes:
    """Return what was written or trimmed since a version."""
    row = expect_volume(reader, message.volume)
    if message.since < row.floor:
        raise RefusedError(
            messages.HISTORY_GONE,
            f"changes of volume {row.name} since {message.since:#x} are no longer known, only since "
            f"{row.floor:#x}: copy everything",
        )
    end = row.size // BLOCK_SIZE
    if not 0 <= message.start <= end:
        raise RefusedError(messages.BAD_REQUEST, f"block {message.start} lies behind the end of volume {row.name}")
    pieces = Pieces()
    for scanned, entry in enumerate(_entries(reader, row.id, message.start, end)):
        start = max(message.start, entry.start)
        if len(pieces) == PIECES_MAX or scanned == SCAN_ENTRIES_MAX:
            return messages.Changes(pieces.packed(), start, row.version)
        if entry.version > message.since:
            pieces.add(start, entry.end, 0 if entry.is_data else HOLE_FRAME, entry.version)
    return messages.Changes(pieces.packed(), -1, row.version)


def _entries(reader: IndexReader, volume: bytes, start: int, end: int) -> Iterator[HeadEntry]:
    return overlapping(reader, volume, start, end) if start < end else iter(())


def check_blocks(row: VolumeState, start: int, end: int) -> None:
    """Check that blocks lie inside a volume.

    Raises:
        RefusedError: they don't, or there are none.
    """
    if not 0 <= start < end <= row.size // BLOCK_SIZE:
        raise RefusedError(
            messages.BAD_REQUEST,
            f"blocks {start} to {end} are none or lie behind the {row.size // BLOCK_SIZE} blocks of volume {row.name}",
        )

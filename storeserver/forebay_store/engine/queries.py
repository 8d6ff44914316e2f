"""Answers that change nothing, each from one view of the index.

Invariant: a view shows whole changes only, and its volume row is that of its head.
"""

from collections.abc import Mapping

import numpy as np

from forebay_core.errors import RefusedError
from forebay_core.names import NAME_SIZE_MAX
from forebay_core.units import ID_SIZE
from forebay_store.engine.changes import expect_epoch, expect_name, expect_snapshot
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.rows import snapshot_row, volume_row
from forebay_store.engine.snapshots import find_snapshot_id, snapshots_after
from forebay_store.engine.unique import unique_size
from forebay_store.engine.views import View, expect_view, walk
from forebay_store.engine.volumes import find_volume
from forebay_store.format.entries import DATA, HOLE, HeadEntry
from forebay_store.format.rows import Table
from forebay_store.limits import ROWS_PER_PAGE_MAX, SCAN_ENTRIES_MAX
from forebay_wire import messages
from forebay_wire.limits import PIECES_MAX
from forebay_wire.messages import HOLE_FRAME, ORIGIN_FRAME, PIECE_DTYPE

Query = (
    messages.GetVolume
    | messages.ListVolumes
    | messages.MapExtents
    | messages.Changed
    | messages.ListSnapshots
    | messages.GetSnapshot
)
_COUNT_MAX = (1 << 32) - 1
_FRAMES = {HOLE: HOLE_FRAME, DATA: 0}  # any other entry shows the origin


class Pieces:
    """A list of pieces without data; neighbours that are alike become one."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def has_room(self, entry: HeadEntry | None) -> bool:
        """Tell whether an entry fits into one answer."""
        return entry is None or len(self._rows) + 1 + entry.length // _COUNT_MAX <= PIECES_MAX

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


def answer_query(reader: IndexReader, message: Query, controls: Mapping[bytes, str]) -> messages.AnyMessage:
    """Return the answer; `controls` says by volume where its holder takes commands.

    Raises:
        RefusedError: with the code that says why.
    """
    match message:
        case messages.GetVolume():
            return messages.Volume(volume_row(reader, expect_name(reader, message.name), controls))
        case messages.ListVolumes():
            return list_volumes(reader, message, controls)
        case messages.MapExtents():
            return map_extents(reader, message)
        case messages.Changed():
            return changed(reader, message)
        case messages.ListSnapshots():
            return list_snapshots(reader, message)
        case messages.GetSnapshot():
            return get_snapshot(reader, message)


def list_volumes(reader: IndexReader, message: messages.ListVolumes, controls: Mapping[bytes, str]) -> messages.Volumes:
    """Return a page of volumes in the order of their names' bytes."""
    count_max = _page(message.count_max)
    rows: list[messages.VolumeRow] = []
    after = message.after.encode(errors="replace")[: NAME_SIZE_MAX + 1]
    for name, volume in reader.scan(Table.NAMES, after + b"\0" if after else b""):
        if len(rows) == count_max:
            return messages.Volumes(tuple(rows), True)
        row = find_volume(reader, volume)
        if row is None or row.name.encode() != name:
            raise RefusedError(messages.CORRUPT, f"index names {name.decode()}: its volume is missing; run store fsck")
        rows.append(volume_row(reader, row, controls))
    return messages.Volumes(tuple(rows), False)


def list_snapshots(reader: IndexReader, message: messages.ListSnapshots) -> messages.Snapshots:
    """Return a page of snapshots in the order in which they were taken."""
    count_max = _page(message.count_max)
    row = expect_name(reader, message.volume)
    rows: list[messages.SnapshotRow] = []
    scanned = 0
    for state in snapshots_after(reader, row.number, max(0, min(message.after, (1 << 64) - 2))):
        if len(rows) == count_max or scanned >= SCAN_ENTRIES_MAX:
            return messages.Snapshots(tuple(rows), True)
        size, looked_at = unique_size(reader, state)
        scanned += looked_at
        rows.append(snapshot_row(reader, row, state, size))
    return messages.Snapshots(tuple(rows), False)


def get_snapshot(reader: IndexReader, message: messages.GetSnapshot) -> messages.Snapshot:
    """Return one snapshot, by its id or by names."""
    if message.id:
        found = find_snapshot_id(reader, message.id) if len(message.id) == ID_SIZE else None
        if found is None:
            text = f"no snapshot of id {message.id[:ID_SIZE].hex()} in this store"
            raise RefusedError(messages.NO_SUCH_SNAPSHOT, text)
        return messages.Snapshot(snapshot_row(reader, *found))
    row = expect_name(reader, message.volume)
    return messages.Snapshot(snapshot_row(reader, row, expect_snapshot(reader, row, message.snapshot)))


def map_extents(reader: IndexReader, message: messages.MapExtents) -> messages.Mapped:
    """Return which blocks of an extent hold data."""
    view = expect_view(reader, message.volume)
    if message.epoch and view.snapshot is None:
        expect_epoch(view.row, message.epoch)
    end = message.start + message.count
    check_blocks(view, message.start, end)
    pieces = Pieces()
    for scanned, entry in enumerate(walk(reader, view, message.start, end, through=message.through)):
        if len(pieces) and (scanned >= SCAN_ENTRIES_MAX or not pieces.has_room(entry)):
            break
        if entry is not None:
            _add(pieces, entry)
    return messages.Mapped(pieces.packed())


def changed(reader: IndexReader, message: messages.Changed) -> messages.Changes:
    """Return what was written or trimmed since a version."""
    view = expect_view(reader, message.volume)
    since = _since(reader, view, message)
    if since < view.row.floor:
        raise RefusedError(
            messages.HISTORY_GONE,
            f"changes of volume {view.name} since {since:#x} are no longer known, only since "
            f"{view.row.floor:#x}: copy everything",
        )
    end = view.blocks
    if not 0 <= message.start <= end:
        raise RefusedError(messages.BAD_REQUEST, f"block {message.start} lies behind the end of volume {view.name}")
    pieces = Pieces()
    at = message.start
    for scanned, entry in enumerate(walk(reader, view, at, end) if at < end else ()):
        if at > message.start and (scanned >= SCAN_ENTRIES_MAX or not pieces.has_room(entry)):
            return messages.Changes(pieces.packed(), at, view.version)
        if entry is not None:
            at = entry.end
            if entry.version > since:
                _add(pieces, entry)
    return messages.Changes(pieces.packed(), -1, view.version)


def _since(reader: IndexReader, view: View, message: messages.Changed) -> int:
    if not message.since_snapshot:
        return message.since
    found = find_snapshot_id(reader, message.since_snapshot) if len(message.since_snapshot) == ID_SIZE else None
    if found is None or found[0].id != view.row.id:
        text = f"volume {view.row.name} has no snapshot of id {message.since_snapshot[:ID_SIZE].hex()}"
        raise RefusedError(messages.NO_SUCH_SNAPSHOT, text)
    return found[1].version


def _add(pieces: Pieces, entry: HeadEntry) -> None:
    pieces.add(entry.start, entry.end, _FRAMES.get(entry.kind, ORIGIN_FRAME), entry.version)


def _page(count_max: int) -> int:
    if count_max < 1:
        raise RefusedError(messages.BAD_REQUEST, f"count_max is {count_max}, 1 or more is needed")
    return min(count_max, ROWS_PER_PAGE_MAX)


def check_blocks(view: View, start: int, end: int) -> None:
    """Check that blocks lie inside a volume or snapshot.

    Raises:
        RefusedError: they don't, or there are none.
    """
    if not 0 <= start < end <= view.blocks:
        raise RefusedError(
            messages.BAD_REQUEST,
            f"blocks {start} to {end} are none or lie behind the {view.blocks} blocks of volume {view.name}",
        )

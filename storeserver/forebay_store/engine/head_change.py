"""One change of a volume's head: what it displaces goes to the history if a snapshot shows it, and dies if none does.

Only the version of the newest snapshot is asked, so the number of snapshots costs nothing: an entry that is younger
than it was shown by none, and of one that is not, it is the newest to show it.

Invariants:
    an entry of the history has a row in `displaced`, and the other way round.
    `stored_size` and `data_blocks` are what the change adds to the volume's, so far.
"""

from collections.abc import Iterator
from typing import Final

from forebay_core.frame import FRAME_BLOCKS_MAX
from forebay_store.engine.live import LiveBytes
from forebay_store.engine.ports import IndexWriter
from forebay_store.format.entries import (
    DATA,
    DISPLACED_KEY,
    LEVEL_BITS,
    LEVEL_SHIFT,
    HeadEntry,
    encode_history,
    narrow,
    stored_share,
)
from forebay_store.format.entry_columns import Totals
from forebay_store.format.head_rows import HeadRows
from forebay_store.format.rows import Table, VolumeState
from forebay_store.format.segment import SegmentName
from forebay_store.limits import DISPLACED_PER_ROW_MAX

_KEPT_MAX: Final = 16 * DISPLACED_PER_ROW_MAX
"""Entries of the history that are gathered before they are written, sorted."""


class HeadChange:
    """Gathers what a change at one version does beside the head itself; call `end` when the head is as it shall be."""

    def __init__(self, writer: IndexWriter, live: LiveBytes, row: VolumeState, version: int) -> None:
        self.writer = writer
        self.volume = row.id
        self.number = row.number
        self.version = version
        self.newest_snapshot = row.newest_snapshot
        self.is_clone = bool(row.origin)
        self.stored_size = 0
        self.data_blocks = 0
        self._live = live
        self._row = row
        self._kept: list[tuple[bytes, bytes]] = []
        self._starts: list[int] = []
        self._chunk: int | None = None

    def add(self, entry: HeadEntry) -> None:
        """An entry is in the head now."""
        if entry.kind == DATA:
            share = stored_share(entry)
            self.stored_size += share
            self.data_blocks += entry.length
            self._live.add(entry.segment, share)

    def add_rows(self, rows: HeadRows, segment: SegmentName) -> None:
        """The rows of a part are in the head now."""
        self.stored_size += rows.stored_size
        self.data_blocks += rows.data_blocks
        self._live.add(segment, rows.stored_size)

    def displace(self, entry: HeadEntry) -> None:
        """An entry, or this piece of one, is in the head no more."""
        if entry.kind == DATA:
            share = stored_share(entry)
            self.stored_size -= share
            self.data_blocks -= entry.length
            if entry.version > self.newest_snapshot:
                self._live.add(entry.segment, -share)
        if entry.version <= self.newest_snapshot:
            self._keep(entry)

    def displace_dead(self, totals: Totals) -> None:
        """Entries are in the head no more that no snapshot shows."""
        for segment, (share, _) in totals.segments.items():
            self._live.add(segment, -share)
        for share, blocks in totals.volumes.values():
            self.stored_size -= share
            self.data_blocks -= blocks

    def end(self) -> VolumeState:
        """Write what was kept; return the volume's row with its counters changed."""
        while self._starts:
            self._write()
        return self._row._replace(
            stored_size=self._row.stored_size + self.stored_size, data_blocks=self._row.data_blocks + self.data_blocks
        )

    def _keep(self, entry: HeadEntry) -> None:
        pieces = ((0, entry),) if entry.length <= FRAME_BLOCKS_MAX else split_levels(entry)
        for level, piece in pieces:
            self._kept.append(encode_history(self.number, level, piece, self.newest_snapshot))
            self._starts.append(level << LEVEL_SHIFT | piece.start)
        if len(self._starts) >= _KEPT_MAX:
            self._write()

    def _write(self) -> None:
        self.writer.put_many(Table.HISTORY, sorted(self._kept))
        self._kept.clear()
        chunk = self._next_chunk() if self._chunk is None else self._chunk
        for at in range(0, len(self._starts), DISPLACED_PER_ROW_MAX):
            key = DISPLACED_KEY.pack(self.number, self.newest_snapshot, self.version, chunk)
            self.writer.put(Table.DISPLACED, key, pack_starts(self._starts[at : at + DISPLACED_PER_ROW_MAX]))
            chunk += 1
        self._starts.clear()
        self._chunk = chunk

    def _next_chunk(self) -> int:
        """Return the chunk behind those that the change has already: it may be done in steps."""
        prefix = (self.number, self.newest_snapshot, self.version)
        found = self.writer.before(Table.DISPLACED, DISPLACED_KEY.pack(*prefix[:2], self.version + 1, 0))
        if found is None:
            return 0
        *last, chunk = DISPLACED_KEY.unpack(found[0])
        return int(chunk) + 1 if tuple(last) == prefix else 0


def split_levels(entry: HeadEntry) -> Iterator[tuple[int, HeadEntry]]:
    """Yield the pieces in which the history keeps an entry, and their levels."""
    at = entry.start
    while at < entry.end:
        level, length = _level_at(at, entry.end - at)
        yield level, narrow(entry, at, at + length)
        at += length


def _level_at(start: int, rest: int) -> tuple[int, int]:
    """Return the level of the longest piece that may begin at a block, and its blocks."""
    if rest > FRAME_BLOCKS_MAX:
        for level in range(len(LEVEL_BITS) - 1, 0, -1):
            span = 1 << LEVEL_BITS[level]
            if start % span == 0 and (level == 1 or rest > 1 << LEVEL_BITS[level - 1]):
                return level, min(rest, span)
    span = 1 << LEVEL_BITS[1]
    return 0, min(rest, FRAME_BLOCKS_MAX, span - start % span) if rest > FRAME_BLOCKS_MAX else rest


def pack_starts(starts: list[int]) -> bytes:
    """Return the value of `displaced`."""
    return b"".join(start.to_bytes(8, "little") for start in starts)


def unpack_starts(value: bytes) -> list[int]:
    """Return level and start of each entry in a value of `displaced`, as they are packed."""
    return [int.from_bytes(value[at : at + 8], "little") for at in range(0, len(value), 8)]

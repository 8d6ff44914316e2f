"""Whether an index is whole, found out from its rows alone.

LMDB has no checksums of its pages: a flipped bit may change a row, which its own checksum tells, or let rows vanish, a
page of them at a time. Those are missed in the sums, because rows tell of each other: each segment counts the bytes
that all entries in it are for, each volume those of its head, and `displaced` lists the history. Rows without a
checksum, as names, repeat what others say. An audit compares them at each start and with each scrub, and a checkpoint
on its way: one with fewer rows than there were would be the end of them, for the segments that could bring them back go
next.

Invariant: what is added comes from one view.
"""

import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from operator import lt
from typing import Final

import numpy as np

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import ID_SIZE
from forebay_store.engine.ports import IndexReader
from forebay_store.format.entries import DISPLACED_KEY, HISTORY_KEY, LEVEL_SHIFT
from forebay_store.format.entry_columns import totals
from forebay_store.format.head_rows import stored_share_of
from forebay_store.format.index_chunk import IndexRow
from forebay_store.format.rows import (
    DELETED_KEY,
    SEGMENT_KEY,
    STORE_KEY,
    SegmentState,
    Table,
    VolumeState,
    decode_segment_row,
    decode_staged,
    decode_volume,
)
from forebay_store.format.segment import SegmentName
from forebay_store.format.snapshot_rows import (
    CLONE_COUNT,
    SNAPSHOT_NAME_PREFIX,
    SNAPSHOT_PLACE,
    SNAPSHOT_VERSION,
    decode_snapshot,
    name_key,
)
from forebay_store.format.sweep_rows import SWEEP_PREFIX, decode_sweep

_LAST_FACTOR: Final = 0x9E3779B97F4A7C15
_NO_SEGMENT: Final = SegmentState(0, 0, 0)


def all_rows(reader: IndexReader) -> Iterator[IndexRow]:
    """Yield all rows; those of `meta` last, so that a half loaded index bears no applied mark."""
    for table in sorted(Table, key=lambda table: (table is Table.META, table.value)):
        for key, value in reader.scan(table, b""):
            if not (table is Table.META and key == STORE_KEY):
                yield table, key, value


def is_of_index(error: BaseException | None) -> bool:
    """Tell whether an error is damage to the index."""
    return isinstance(error, CorruptionError) and error.place.startswith("index ")


class Audit:
    """Looks at all rows of a view, some at a time: call `step` until it returns False."""

    def __init__(self, reader: IndexReader) -> None:
        self._rows = all_rows(reader)
        self._books = Books()
        self.row_count = 0

    def step(self, rows_max: int) -> bool:
        """Look at some more rows; False: that was all, and they are right.

        Raises:
            CorruptionError: rows are damaged, are missing, or are too many.
        """
        rows = list(islice(self._rows, rows_max))
        self._books.add(rows)
        self.row_count += len(rows)
        if len(rows) < rows_max:
            self._books.close()
        return len(rows) == rows_max


class Books:
    """Add all rows, then `close`."""

    def __init__(self) -> None:
        self._shown: defaultdict[SegmentName, int] = defaultdict(int)
        self._ends: defaultdict[SegmentName, int] = defaultdict(int)
        self._segments: dict[SegmentName, SegmentState] = {}
        self._heads: dict[int, tuple[int, int]] = {}
        self._volumes: dict[int, VolumeState] = {}
        self._snapshots: Counter[int] = Counter()
        self._history: defaultdict[int, int] = defaultdict(int)  # sum of the keys less those that are listed
        self._told: defaultdict[bytes, int] = defaultdict(int)  # by volume: what names, ids of snapshots, clones say
        self._owned: defaultdict[int, int] = defaultdict(int)  # what they should, but for the volume's own name, origin
        self._snapshot_names: defaultdict[int, int] = defaultdict(int)  # sum of those of the snapshots less the rows
        self._deleted: set[int] = set()
        self._counts: Counter[Table] = Counter()
        self._last: IndexRow | None = None

    def add(self, rows: Iterable[IndexRow]) -> None:
        """Add some rows, all of a table in a row, in their order.

        Raises:
            CorruptionError: one of them is damaged.
        """
        for table, group in groupby(rows, lambda row: row[0]):
            try:
                self._add_table(table, [(key, value) for _, key, value in group])
            except (struct.error, ValueError) as error:
                raise _wrong(f"table {table.value}", "rows", "such as can be read", str(error)) from error

    def _add_table(self, table: Table, rows: list[tuple[bytes, bytes]]) -> None:
        self._check_order(table, rows)
        self._counts[table] += len(rows)
        match table:
            case Table.HEAD | Table.HISTORY:
                self._add_entries(table, rows)
            case Table.DISPLACED:
                self._add_displaced(rows)
            case Table.STAGED:
                for _, value in rows:
                    part = decode_staged(value)
                    self._shown[part.segment] += stored_share_of(part)
            case Table.SEGMENTS:
                for key, value in rows:
                    self._segments[SegmentName(*SEGMENT_KEY.unpack(key))] = decode_segment_row(value)
            case Table.VOLUMES:
                for key, value in rows:
                    row = decode_volume(key, value)
                    self._volumes[row.number] = row
            case Table.SNAPSHOTS:
                self._add_snapshots(rows)
            case Table.NAMES | Table.SNAPSHOT_IDS | Table.SNAPSHOT_NAMES | Table.CLONES:
                self._add_tellers(table, rows)
            case Table.DELETED:
                for number, version in (DELETED_KEY.unpack(key) for key, _ in rows):
                    self._deleted |= set() if version else {number}
            case Table.META:
                for key, value in rows:
                    if key.startswith(SWEEP_PREFIX):
                        decode_sweep(key, value)

    def _check_order(self, table: Table, rows: list[tuple[bytes, bytes]]) -> None:
        keys = [key for key, _ in rows]
        if self._last is not None and self._last[0] is table:
            keys.insert(0, self._last[1])
        if not all(map(lt, keys, keys[1:])):
            before, key = next(pair for pair in pairwise(keys) if pair[0] >= pair[1])
            raise _wrong(f"{table.value} {key.hex()}", "order of keys", f"one behind {before.hex()}", key.hex())
        self._last = (table, *rows[-1])

    def _add_entries(self, table: Table, rows: list[tuple[bytes, bytes]]) -> None:
        found = totals(table.value, rows)
        for segment, (size, end) in found.segments.items():
            self._shown[segment] += size
            self._ends[segment] = max(self._ends[segment], end)
        if table is Table.HEAD:
            for number, (size, blocks) in found.volumes.items():
                before = self._heads.get(number, (0, 0))
                self._heads[number] = before[0] + size, before[1] + blocks
            return
        for prefix, start, last in HISTORY_KEY.iter_unpack(b"".join(key for key, _ in rows)):
            self._history[prefix >> 8] += 1 + ((prefix & 255) << LEVEL_SHIFT | start) + last * _LAST_FACTOR

    def _add_displaced(self, rows: list[tuple[bytes, bytes]]) -> None:
        for key, value in rows:
            if len(value) % 8:
                raise _wrong(f"displaced {key.hex()}", "row size", "a multiple of 8", len(value))
            number, last, _, _ = DISPLACED_KEY.unpack(key)
            count = len(value) // 8
            self._history[number] -= sum(np.frombuffer(value, "<u8").tolist()) + count * (1 + last * _LAST_FACTOR)

    def _add_snapshots(self, rows: list[tuple[bytes, bytes]]) -> None:
        for key, value in rows:
            row = decode_snapshot(key, value)
            version = SNAPSHOT_VERSION.pack(row.version)
            self._snapshots[row.number] += 1
            self._owned[row.number] += checksum(row.id + version) + (checksum(row.origin) if row.origin else 0)
            self._snapshot_names[row.number] += checksum(name_key(row.number, row.name) + version)

    def _add_tellers(self, table: Table, rows: list[tuple[bytes, bytes]]) -> None:
        """Add rows without a checksum, which say what those of volumes and snapshots do."""
        for key, value in rows:
            match table:
                case Table.NAMES:
                    self._told[value] += checksum(key)
                case Table.SNAPSHOT_IDS:
                    volume, version = SNAPSHOT_PLACE.unpack(value)
                    self._told[volume] += checksum(key + SNAPSHOT_VERSION.pack(version))
                case Table.CLONES:
                    self._told[key[ID_SIZE:]] += CLONE_COUNT.unpack(value)[0] * checksum(key[:ID_SIZE])
                case _:
                    self._snapshot_names[SNAPSHOT_NAME_PREFIX.unpack_from(key)[0]] -= checksum(key + value)

    def close(self) -> None:
        """Compare what rows count with what there is.

        Raises:
            CorruptionError: rows are missing, or there are too many.
        """
        for segment in sorted({*self._shown, *self._segments}):
            row, found = self._segments.get(segment, _NO_SEGMENT), self._shown.get(segment, 0)
            if row.live != found:
                raise _wrong(f"segments {segment.text}", "live bytes", row.live, found)
            if self._ends.get(segment, 0) > row.size:
                raise _wrong(f"segments {segment.text}", "end of a frame", f"up to {row.size}", self._ends[segment])
        numbers = {*self._heads, *self._history, *self._volumes, *self._snapshots, *self._snapshot_names}
        for number in sorted(numbers - self._deleted):
            self._close_volume(number)
        if self._told:
            strangers = ", ".join(volume.hex() for volume in sorted(self._told)[:3])
            raise _wrong("names, snapshot_ids and clones", "volumes", "those that there are", f"{strangers} as well")
        for one, other in (
            (Table.VOLUMES, Table.NAMES),
            (Table.SNAPSHOTS, Table.SNAPSHOT_IDS),
            (Table.SNAPSHOTS, Table.SNAPSHOT_NAMES),
        ):
            if self._counts[one] != self._counts[other]:
                raise _wrong(other.value, "rows", self._counts[one], self._counts[other])

    def _close_volume(self, number: int) -> None:
        row = self._volumes.get(number)
        if row is None:
            raise _wrong(f"volumes number {number}", "volume", "a row", "entries or snapshots alone")
        counted = row.stored_size, row.data_blocks
        if self._heads.get(number, (0, 0)) != counted:
            raise _wrong(f"volume {row.name}", "stored bytes and blocks", counted, self._heads.get(number, (0, 0)))
        if self._history.get(number, 0):
            raise _wrong(f"volume {row.name}", "history", "the entries that are listed", "others")
        if self._snapshots[number] != row.snapshots:
            raise _wrong(f"volume {row.name}", "snapshots", row.snapshots, self._snapshots[number])
        own = checksum(row.name.encode()) + (checksum(row.origin) if row.origin else 0)
        if self._told.pop(row.id, 0) != own + self._owned[number]:
            what = "its name, and ids and origins of its snapshots"
            raise _wrong(f"volume {row.name}", what, "the same in names, snapshot_ids and clones", "others")
        if self._snapshot_names[number]:
            raise _wrong(f"volume {row.name}", "names of its snapshots", "the same in snapshot_names", "others")


def _wrong(place: str, what: str, expected: object, found: object) -> CorruptionError:
    return CorruptionError(
        place=f"index {place}", what=what, expected=f"{expected}; run store rebuild-index", found=found
    )

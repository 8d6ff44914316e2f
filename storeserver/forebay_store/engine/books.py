"""Whether an index is whole, found out from its rows alone, while they are on their way into a checkpoint.

LMDB has no checksums of its pages: a flipped bit may change a row, which its own checksum tells, or let rows vanish.
Those are missed in the sums, because each segment has a row with the bytes that all entries in it count for. A
checkpoint with fewer rows than there were would be the end of them: the segments that could bring them back go next.

Invariant: what is added comes from one view.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby

from forebay_core.errors import CorruptionError
from forebay_store.format.entry_columns import stored_shares
from forebay_store.format.head_rows import stored_share_of
from forebay_store.format.index_chunk import IndexRow
from forebay_store.format.rows import SEGMENT_KEY, Table, decode_segment_row, decode_staged, decode_volume
from forebay_store.format.segment import SegmentName
from forebay_store.format.snapshot_rows import decode_snapshot


class Books:
    """Add all rows, then `close`."""

    def __init__(self) -> None:
        self._shown: defaultdict[SegmentName, int] = defaultdict(int)
        self._live: dict[SegmentName, int] = {}

    def add(self, rows: Iterable[IndexRow]) -> None:
        """Add some rows, all of a table in a row.

        Raises:
            CorruptionError: one of them is damaged.
        """
        for table, group in groupby(rows, lambda row: row[0]):
            self._add_table(table, [(key, value) for _, key, value in group])

    def _add_table(self, table: Table, rows: list[tuple[bytes, bytes]]) -> None:
        match table:
            case Table.HEAD | Table.HISTORY:
                for segment, size in stored_shares(table.value, rows):
                    self._shown[segment] += size
            case Table.STAGED:
                for _, value in rows:
                    part = decode_staged(value)
                    self._shown[part.segment] += stored_share_of(part)
            case Table.SEGMENTS:
                for key, value in rows:
                    self._live[SegmentName(*SEGMENT_KEY.unpack(key))] = decode_segment_row(value).live
            case Table.VOLUMES:
                for key, value in rows:
                    decode_volume(key, value)
            case Table.SNAPSHOTS:
                for key, value in rows:
                    decode_snapshot(key, value)

    def close(self) -> None:
        """Compare what segments count with what the rest of the rows refers to.

        Raises:
            CorruptionError: rows are missing, or there are too many.
        """
        for segment in sorted({*self._shown, *self._live}):
            expected, found = self._live.get(segment, 0), self._shown.get(segment, 0)
            if expected != found:
                raise CorruptionError(
                    place=f"index segments {segment.text}",
                    what="live bytes",
                    expected=f"{expected}; run store rebuild-index",
                    found=found,
                )

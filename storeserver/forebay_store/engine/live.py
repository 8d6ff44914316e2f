"""The rows of segments: how many of a segment's bytes something refers to.

Invariants:
    `live` of a segment is the sum of `stored_share` over the entries of head and history and the staged parts in it.
    it is written in the transaction that changes those, once for each segment and transaction.
"""

from collections import defaultdict

from forebay_core.errors import CorruptionError
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.format.rows import (
    WRITTEN_KEY,
    WRITTEN_MARK,
    SegmentState,
    Table,
    decode_segment_row,
    encode_segment,
    segment_key,
)
from forebay_store.format.segment import SegmentName


class LiveBytes:
    """What one transaction adds to the live bytes of segments; call `write` at its end."""

    def __init__(self) -> None:
        self._changes: defaultdict[SegmentName, int] = defaultdict(int)

    def add(self, segment: SegmentName, size: int) -> None:
        """Add bytes, or take them with a negative size."""
        self._changes[segment] += size

    def write(self, writer: IndexWriter) -> None:
        """Change the rows.

        Raises:
            CorruptionError: a segment has no row, or fewer live bytes than are taken.
        """
        for segment, change in sorted(self._changes.items()):
            if change == 0:
                continue
            row = find_segment(writer, segment)
            if row is None or row.live + change < 0:
                found = "no row" if row is None else f"{row.live} bytes"
                raise CorruptionError(
                    place=f"index segments {segment.text}", what="live bytes", expected=f"{-change} more", found=found
                )
            put_segment(writer, segment, row._replace(live=row.live + change))
        self._changes.clear()


def note_segment(writer: IndexWriter, segment: SegmentName, size: int) -> None:
    """Make the row of a segment that is applied now."""
    mark = writer.get(Table.META, WRITTEN_KEY)
    written = 0 if mark is None else WRITTEN_MARK.unpack(mark)[0]
    put_segment(writer, segment, SegmentState(size, 0, written))
    writer.put(Table.META, WRITTEN_KEY, WRITTEN_MARK.pack(written + size))


def find_segment(reader: IndexReader, segment: SegmentName) -> SegmentState | None:
    """Return the row of a segment."""
    value = reader.get(Table.SEGMENTS, segment_key(segment))
    return None if value is None else decode_segment_row(value)


def put_segment(writer: IndexWriter, segment: SegmentName, row: SegmentState) -> None:
    """Set the row of a segment."""
    writer.put(Table.SEGMENTS, segment_key(segment), encode_segment(row))

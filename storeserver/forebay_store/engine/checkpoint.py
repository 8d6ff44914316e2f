"""Checkpoints of the index in the log: making one from a view, finding the newest whole one, loading it.

Invariants:
    a checkpoint holds every row that its view showed but the mark of the store; its chunks lie behind the segment
    that the view showed, so no segment that it makes dispensable holds a part of it.
    a damaged index is never put into one.
    what is loaded is compared by checksums, chunk by chunk and as a whole: a damaged one is an error, never a guess.
Crash: chunks without the record that completes them are nothing; the next checkpoint has another number.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import Buffer
from forebay_store.engine.books import Books, all_rows
from forebay_store.engine.ports import Index, IndexReader, IndexWriter, SegmentBackend
from forebay_store.engine.volumes import read_applied
from forebay_store.format.index_chunk import IndexRow, pack_chunk, unpack_chunk
from forebay_store.format.records import RECORD_HEADER, Kind, Record, RecordHeader, decode_body, decode_record_header
from forebay_store.format.segment import SEGMENT_FOOTER, SEGMENT_HEADER, SegmentName
from forebay_store.format.space_records import CheckpointComplete, IndexChunk
from forebay_store.limits import CHUNK_PLAIN_MAX, CHUNK_SIZE

_ROW_OVERHEAD: Final = 16
_SUM_SIZE: Final = 8


class CheckpointDamagedError(CorruptionError):
    """A checkpoint that must be there can't be read as it was written."""


class PlacedHeader(NamedTuple):
    """The header of a record in a segment."""

    header: RecordHeader
    offset: int  # of the record in its segment


class FoundCheckpoint(NamedTuple):
    """A complete checkpoint, and the segment with the record that completes it."""

    record: CheckpointComplete
    segment: SegmentName


def checkpoint_records(
    reader: IndexReader, checkpoint: int, *, chunk_size: int = CHUNK_SIZE
) -> Iterator[tuple[Record, bytes]]:
    """Yield the records of a checkpoint of what a view shows, and their payloads; the last one completes it.

    Raises:
        CorruptionError: the index is damaged; the segments give it anew as long as no checkpoint says otherwise.
    """
    books = Books()
    sums: list[int] = []
    row_count = stored_size = 0
    for rows in _portions(all_rows(reader), chunk_size):
        books.add(rows)
        payload, plain_size = pack_chunk(rows)
        found = checksum(payload)
        yield IndexChunk(checkpoint, len(sums), len(rows), plain_size, found), payload
        sums.append(found)
        row_count += len(rows)
        stored_size += len(payload)
    books.close()
    shows = read_applied(reader)
    yield CheckpointComplete(checkpoint, len(sums), shows, row_count, _sum_of(sums), stored_size), b""


def newest_checkpoint(
    backend: SegmentBackend, names: Sequence[SegmentName], *, until: SegmentName | None = None
) -> FoundCheckpoint | None:
    """Return the newest complete checkpoint in these segments, none behind `until`; None if there is none.

    Raises:
        CorruptionError: a segment on the way is damaged.
    """
    for name in reversed(names):
        if until is not None and name > until:
            continue
        for placed in reversed(list(record_headers(backend, name))):
            if placed.header.kind == Kind.CHECKPOINT_COMPLETE:
                record, _ = read_record(backend, name, placed)
                assert isinstance(record, CheckpointComplete)
                return FoundCheckpoint(record, name)
    return None


def load_checkpoint(
    backend: SegmentBackend, index: Index, names: Sequence[SegmentName], found: FoundCheckpoint
) -> None:
    """Put the rows of a checkpoint into an index that is empty but for the mark of the store.

    Raises:
        CheckpointDamagedError: a chunk is missing or is not as it was written.
        CorruptionError: a segment is damaged.
    """
    record = found.record
    place = f"checkpoint in segment {found.segment.text}"
    sums: list[int] = []
    row_count = 0
    between = [name for name in names if record.shows < name <= found.segment]
    for chunk, payload, chunk_place in _chunks(backend, between, record.checkpoint):
        if chunk.chunk_index != len(sums) or checksum(payload) != chunk.payload_xxh3:
            raise CheckpointDamagedError(
                place=chunk_place, what="index-chunk", expected=(len(sums), chunk.payload_xxh3), found=checksum(payload)
            )
        rows = list(unpack_chunk(payload, plain_size=chunk.plain_size, place=chunk_place))
        sums.append(chunk.payload_xxh3)
        row_count += len(rows)
        index.update(lambda writer, rows=rows: _put_rows(writer, rows))  # type: ignore[misc]
    expected = (record.chunk_count, record.row_count, record.chunks_xxh3)
    if (len(sums), row_count, _sum_of(sums)) != expected:
        raise CheckpointDamagedError(
            place=place, what="chunks and rows", expected=expected, found=(len(sums), row_count, _sum_of(sums))
        )
    with index.view() as reader:
        applied = read_applied(reader)
    if applied != record.shows:
        raise CheckpointDamagedError(place=place, what="applied mark", expected=record.shows.text, found=applied.text)


def record_headers(backend: SegmentBackend, name: SegmentName) -> Iterator[PlacedHeader]:
    """Yield the headers of a segment's records; neither bodies nor payloads are read.

    Raises:
        CorruptionError: a header is damaged.
    """
    end = backend.stat(name.text) - SEGMENT_FOOTER.size
    offset = SEGMENT_HEADER.size
    while offset < end:
        place = f"segment {name.text} offset {offset}"
        view = memoryview(backend.read_range(name.text, offset, min(RECORD_HEADER.size, end - offset)))
        header = decode_record_header(view, place=place, room=end - offset)
        yield PlacedHeader(header, offset)
        offset += header.size


def read_record(backend: SegmentBackend, name: SegmentName, placed: PlacedHeader) -> tuple[Record, Buffer]:
    """Return a record and its payload.

    Raises:
        CorruptionError: its body is damaged.
    """
    header, place = placed.header, f"segment {name.text} offset {placed.offset}"
    size = header.body_size + header.payload_size
    view = memoryview(backend.read_range(name.text, placed.offset + RECORD_HEADER.size, size)) if size else b""
    return decode_body(header, view[: header.body_size], place=place), view[header.body_size :]


def _chunks(
    backend: SegmentBackend, names: Sequence[SegmentName], checkpoint: int
) -> Iterator[tuple[IndexChunk, Buffer, str]]:
    for name in names:
        for placed in record_headers(backend, name):
            if placed.header.kind == Kind.INDEX_CHUNK:
                record, payload = read_record(backend, name, placed)
                assert isinstance(record, IndexChunk)
                if record.checkpoint == checkpoint:
                    yield record, payload, f"segment {name.text} offset {placed.offset}"


def _portions(rows: Iterable[IndexRow], size_max: int) -> Iterator[list[IndexRow]]:
    portion: list[IndexRow] = []
    size = 0
    for row in rows:
        row_size = len(row[1]) + len(row[2]) + _ROW_OVERHEAD
        assert row_size <= CHUNK_PLAIN_MAX
        if portion and size + row_size > size_max:
            yield portion
            portion, size = [], 0
        portion.append(row)
        size += row_size
    if portion:
        yield portion


def _put_rows(writer: IndexWriter, rows: Sequence[IndexRow]) -> None:
    start = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at][0] is not rows[start][0]:
            writer.put_many(rows[start][0], [(key, value) for _, key, value in rows[start:at]])
            start = at


def _sum_of(sums: Sequence[int]) -> int:
    return checksum(b"".join(one.to_bytes(_SUM_SIZE, "little") for one in sums))

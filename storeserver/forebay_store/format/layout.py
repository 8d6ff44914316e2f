"""Segments as a whole: building one as a gather list, and taking one apart.

Invariant: what `decode_segment` returns was checked by header, footer and record checksums; frames are checked by
whoever opens them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from forebay_core.errors import CorruptionError
from forebay_core.units import Buffer
from forebay_store.format.records import (
    RECORD_HEADER,
    Record,
    StoreClaimed,
    decode_body,
    decode_record_header,
    encode_record,
)
from forebay_store.format.segment import (
    SEGMENT_FOOTER,
    SEGMENT_HEADER,
    HeadersChecksum,
    SegmentFooter,
    SegmentHeader,
    decode_footer,
    decode_header,
    encode_footer,
    encode_header,
)


class PlacedRecord(NamedTuple):
    """A record and where its payload lies in the segment."""

    record: Record
    payload_offset: int
    payload_size: int


class BuiltSegment(NamedTuple):
    """A segment ready to be written: the buffers in order, and the records' places."""

    buffers: list[Buffer]
    size: int
    placed: list[PlacedRecord]


class DecodedSegment(NamedTuple):
    """A segment taken apart."""

    header: SegmentHeader
    placed: list[PlacedRecord]


def build_segment(header: SegmentHeader, records: Sequence[tuple[Record, Sequence[Buffer]]]) -> BuiltSegment:
    """Return the gather list of a segment; payloads are referred to, never copied."""
    head = encode_header(header)
    sums = HeadersChecksum(head)
    buffers: list[Buffer] = [head]
    placed: list[PlacedRecord] = []
    offset = len(head)
    for record, payload in records:
        payload_size = sum(memoryview(buffer).nbytes for buffer in payload)
        record_header, body = encode_record(record, payload_size)
        sums.add(record_header)
        offset += len(record_header) + len(body)
        placed.append(PlacedRecord(record, offset, payload_size))
        offset += payload_size
        buffers += (record_header, body, *payload)
    size = offset + SEGMENT_FOOTER.size
    buffers.append(encode_footer(SegmentFooter(len(placed), size, sums.value())))
    return BuiltSegment(buffers, size, placed)


def decode_segment(buffer: Buffer, *, place: str) -> DecodedSegment:
    """Return the records of a whole segment.

    Raises:
        CorruptionError: anything but the frames is not as it was written.
    """
    view = memoryview(buffer)
    header = decode_header(view, place=place)
    footer = decode_footer(view, place=place)
    sums = HeadersChecksum(view[: SEGMENT_HEADER.size])
    body = view[: view.nbytes - SEGMENT_FOOTER.size]
    placed: list[PlacedRecord] = []
    offset = SEGMENT_HEADER.size
    while offset < body.nbytes:
        one, offset = _decode_record(body, offset, sums, f"{place} offset {offset}")
        placed.append(one)
    if len(placed) != footer.record_count:
        raise CorruptionError(place=place, what="record count", expected=footer.record_count, found=len(placed))
    if sums.value() != footer.headers_xxh3:
        raise CorruptionError(place=place, what="headers checksum", expected=footer.headers_xxh3, found=sums.value())
    _check_claim(header, placed, place)
    return DecodedSegment(header, placed)


def _decode_record(view: memoryview, offset: int, sums: HeadersChecksum, place: str) -> tuple[PlacedRecord, int]:
    header = decode_record_header(view[offset:], place=place)
    sums.add(view[offset : offset + RECORD_HEADER.size])
    body_offset = offset + RECORD_HEADER.size
    payload_offset = body_offset + header.body_size
    record = decode_body(header, view[body_offset:payload_offset], place=place)
    return PlacedRecord(record, payload_offset, header.payload_size), offset + header.size


def _check_claim(header: SegmentHeader, placed: Sequence[PlacedRecord], place: str) -> None:
    """The first segment of an incarnation, and no other, begins with the store's claim."""
    claims = [index for index, one in enumerate(placed) if isinstance(one.record, StoreClaimed)]
    expected = [0] if header.name.number == 0 else []
    if claims != expected:
        raise CorruptionError(place=place, what="store-claimed records", expected=expected, found=claims)


def payload_of(buffer: Buffer, placed: PlacedRecord) -> memoryview:
    """Return the payload of a record within its segment: a part's frames, or rows of the index."""
    return memoryview(buffer)[placed.payload_offset : placed.payload_offset + placed.payload_size]

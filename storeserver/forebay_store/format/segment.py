"""The segment: header, records, footer; written once by one `create`, never changed.

A segment is whole or absent: the backend gives it its name only after its bytes are durable. The footer tells a
cut-off segment from a whole one, and the header names the segment before it, so a missing one is noticed.

Segment header, 64 bytes, little-endian:

    offset  size  type  field                 meaning
    ------  ----  ----  --------------------  --------------------------------------------------------
         0     8  8s    magic                 "FBSEGMNT"
         8     4  u32   format                1
        12     4  u32   reserved              0
        16    16  16s   store                 UUID of the store
        32     4  u32   incarnation           which start of the store wrote it, from 1
        36     4  u32   previous_incarnation  of the segment before this one; 0 for the first
        40     8  u64   number                counts within the incarnation, from 0
        48     8  u64   previous_number       of the segment before this one
        56     8  u64   header_xxh3           over the 56 bytes before it

Segment footer, 32 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   magic         0x46534246, "FBSF"
         4     4  u32   record_count  records between header and footer
         8     8  u64   size          bytes of the whole segment
        16     8  u64   headers_xxh3  over the segment header and every record header, in order
        24     8  u64   footer_xxh3   over the 24 bytes before it

Record bodies carry a checksum in their header, frames carry their own: so every byte is covered, and the payload is
summed once, when it arrives.
"""

import re
import struct
from typing import Final, NamedTuple

from xxhash import xxh3_64

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import ID_SIZE, Buffer
from forebay_store.limits import INCARNATION_MAX, SEGMENT_NUMBER_MAX

SEGMENT_MAGIC: Final = b"FBSEGMNT"
SEGMENT_FORMAT: Final = 1
SEGMENT_HEADER: Final = struct.Struct("<8sII16sIIQQQ")
FOOTER_MAGIC: Final = 0x46534246
SEGMENT_FOOTER: Final = struct.Struct("<IIQQQ")
assert SEGMENT_HEADER.size == 64
assert SEGMENT_FOOTER.size == 32

_HEADER_PREFIX: Final = 56
_FOOTER_PREFIX: Final = 24
_U64: Final = struct.Struct("<Q")
_NAME: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{12})\Z", re.ASCII)


class SegmentName(NamedTuple):
    """Names sort in the order in which the segments were written, as tuples and as text."""

    incarnation: int
    number: int

    @property
    def text(self) -> str:
        """The name in the backend."""
        return f"{self.incarnation:08x}-{self.number:012x}"


NO_SEGMENT: Final = SegmentName(0, 0)


class SegmentHeader(NamedTuple):
    """Who wrote the segment, and what came before it."""

    store: bytes
    name: SegmentName
    previous: SegmentName


class SegmentFooter(NamedTuple):
    """What lies before the footer."""

    record_count: int
    size: int
    headers_xxh3: int


class HeadersChecksum:
    """The running checksum over a segment's header and record headers."""

    def __init__(self, header: Buffer) -> None:
        self._state = xxh3_64(bytes(header))

    def add(self, record_header: Buffer) -> None:
        """Add the next record header."""
        self._state.update(bytes(record_header))

    def value(self) -> int:
        """Return the sum so far."""
        return self._state.intdigest()


def parse_name(text: str) -> SegmentName | None:
    """Return the segment that a name in the backend means, or None if it is no segment's name."""
    match = _NAME.match(text)
    return None if match is None else SegmentName(int(match[1], 16), int(match[2], 16))


def encode_header(header: SegmentHeader) -> bytes:
    """Return the 64 bytes."""
    assert len(header.store) == ID_SIZE
    assert 0 < header.name.incarnation <= INCARNATION_MAX
    assert 0 <= header.name.number <= SEGMENT_NUMBER_MAX
    assert header.previous < header.name
    prefix = SEGMENT_HEADER.pack(
        SEGMENT_MAGIC,
        SEGMENT_FORMAT,
        0,
        header.store,
        header.name.incarnation,
        header.previous.incarnation,
        header.name.number,
        header.previous.number,
        0,
    )[:_HEADER_PREFIX]
    return prefix + _U64.pack(checksum(prefix))


def decode_header(buffer: Buffer, *, place: str) -> SegmentHeader:
    """Return the header at the start of a segment.

    Raises:
        CorruptionError: cut short, foreign, of another format, or damaged.
    """
    view = memoryview(buffer)[: SEGMENT_HEADER.size]
    if view.nbytes < SEGMENT_HEADER.size:
        raise CorruptionError(place=place, what="segment header size", expected=SEGMENT_HEADER.size, found=view.nbytes)
    fields = SEGMENT_HEADER.unpack(view)
    magic, version, reserved, store, incarnation, previous_incarnation, number, previous_number, expected = fields
    if magic != SEGMENT_MAGIC:
        raise CorruptionError(place=place, what="segment magic", expected=SEGMENT_MAGIC, found=magic)
    found = checksum(view[:_HEADER_PREFIX])
    if found != expected:
        raise CorruptionError(place=place, what="segment header checksum", expected=expected, found=found)
    if version != SEGMENT_FORMAT or reserved != 0:
        raise CorruptionError(place=place, what="segment format", expected=SEGMENT_FORMAT, found=version)
    name = SegmentName(incarnation, number)
    previous = SegmentName(previous_incarnation, previous_number)
    if not previous < name or incarnation == 0:
        raise CorruptionError(place=place, what="previous segment", expected=f"before {name.text}", found=previous.text)
    return SegmentHeader(store, name, previous)


def encode_footer(footer: SegmentFooter) -> bytes:
    """Return the 32 bytes."""
    prefix = SEGMENT_FOOTER.pack(FOOTER_MAGIC, footer.record_count, footer.size, footer.headers_xxh3, 0)
    prefix = prefix[:_FOOTER_PREFIX]
    return prefix + _U64.pack(checksum(prefix))


def decode_footer(buffer: Buffer, *, place: str) -> SegmentFooter:
    """Return the footer at the end of a whole segment.

    Raises:
        CorruptionError: cut short, damaged, or of another size than the segment has.
    """
    view = memoryview(buffer)
    if view.nbytes < SEGMENT_HEADER.size + SEGMENT_FOOTER.size:
        least = SEGMENT_HEADER.size + SEGMENT_FOOTER.size
        raise CorruptionError(place=place, what="segment size", expected=f"at least {least}", found=view.nbytes)
    tail = view[view.nbytes - SEGMENT_FOOTER.size :]
    magic, record_count, size, headers_xxh3, expected = SEGMENT_FOOTER.unpack(tail)
    if magic != FOOTER_MAGIC:
        raise CorruptionError(place=place, what="segment footer magic", expected=FOOTER_MAGIC, found=magic)
    found = checksum(tail[:_FOOTER_PREFIX])
    if found != expected:
        raise CorruptionError(place=place, what="segment footer checksum", expected=expected, found=found)
    if size != view.nbytes:
        raise CorruptionError(place=place, what="segment size", expected=size, found=view.nbytes)
    return SegmentFooter(record_count, size, headers_xxh3)

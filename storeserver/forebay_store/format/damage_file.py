"""The file of what is known to be damaged, and how far the scrub is: a header, then damaged extents.

Damage file, 88 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     8  8s    magic         b"FBDAMAGE"
         8     4  u32   format        1
        12    16  16s   store         UUID of the store
        28     4  u32   row_count     damaged extents that follow
        32     4  u32   incarnation   of the newest segment that the pass under way has checked; 0 before the first
        36     8  u64   number        of that segment
        44     8  u64   checked_size  bytes of segments that the pass has checked, or that the last one has
        52     8  u64   total_size    bytes of segments when it began
        60     8  u64   started_ns    when it began, Unix nanoseconds; 0: never
        68     8  u64   finished_ns   when the last whole pass ended; 0: never
        76     4  u32   is_running    1: a pass is under way
        80     8  u64   file_xxh3     over the file with zeros here

Damaged extent, 32 bytes, then the name and the text in UTF-8:

    offset  size  type  field        meaning
    ------  ----  ----  -----------  --------------------------------------------------------
         0     8  u64   start        first block
         8     4  u32   count        blocks; 0 if nothing shows what is damaged
        12     4  u32   incarnation  of the segment; 0 for a damaged row of the index
        16     8  u64   number       of the segment
        24     4  u32   offset       of the frame in it
        28     2  u16   name_size    bytes of the name: volume, or `volume@snapshot`, or nothing
        30     2  u16   text_size    bytes of the text

The file is no part of the truth: without it the next scrub begins anew and finds the damage again.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_store.format.segment import NO_SEGMENT, SegmentName
from forebay_store.limits import DAMAGE_ROWS_MAX, DAMAGE_TEXT_MAX

DAMAGE_MAGIC: Final = b"FBDAMAGE"
DAMAGE_FORMAT: Final = 1
DAMAGE_HEADER: Final = struct.Struct("<8sI16sIIQQQQQIQ")
DAMAGED_EXTENT: Final = struct.Struct("<QIIQIHH")
DAMAGE_SIZE_MAX: Final = DAMAGE_HEADER.size + DAMAGE_ROWS_MAX * (DAMAGED_EXTENT.size + 2 * DAMAGE_TEXT_MAX)
assert DAMAGE_HEADER.size == 88
assert DAMAGED_EXTENT.size == 32

_U64: Final = struct.Struct("<Q")


class Shown(NamedTuple):
    """Blocks that can't be given back; `name` is the volume, or `volume@snapshot`, or empty if nothing shows them."""

    name: str
    start: int
    count: int  # type: ignore[assignment]
    segment: SegmentName
    offset: int
    text: str


class ScrubState(NamedTuple):
    """All of the file; fields as in the tables above."""

    position: SegmentName = NO_SEGMENT
    checked_size: int = 0
    total_size: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    is_running: bool = False
    rows: tuple[Shown, ...] = ()


def encode_damage(store: bytes, state: ScrubState) -> bytes:
    """Return the file's bytes."""
    header = DAMAGE_HEADER.pack(
        DAMAGE_MAGIC,
        DAMAGE_FORMAT,
        store,
        len(state.rows),
        *state.position,
        state.checked_size,
        state.total_size,
        state.started_ns,
        state.finished_ns,
        state.is_running,
        0,
    )
    body = b"".join(map(_encode_row, state.rows))
    return header[: -_U64.size] + _U64.pack(checksum(header + body)) + body


def decode_damage(content: bytes, *, store: bytes, place: str) -> ScrubState:
    """Return what the file says.

    Raises:
        CorruptionError: it is damaged, of another format or of another store.
    """
    size = len(content)
    if size < DAMAGE_HEADER.size:
        raise CorruptionError(place=place, what="size", expected=f"at least {DAMAGE_HEADER.size}", found=size)
    magic, file_format, owner, row_count, incarnation, number, *rest = DAMAGE_HEADER.unpack_from(content)
    checked_size, total_size, started_ns, finished_ns, is_running, expected = rest
    found = checksum(content[: DAMAGE_HEADER.size - _U64.size] + bytes(_U64.size) + content[DAMAGE_HEADER.size :])
    if found != expected:
        raise CorruptionError(place=place, what="checksum", expected=expected, found=found)
    wanted = (DAMAGE_MAGIC, DAMAGE_FORMAT, store)
    if (magic, file_format, owner) != wanted:
        raise CorruptionError(
            place=place, what="magic, format and store", expected=wanted, found=(magic, file_format, owner)
        )
    rows = tuple(_decode_rows(content, row_count))
    return ScrubState(
        SegmentName(incarnation, number), checked_size, total_size, started_ns, finished_ns, bool(is_running), rows
    )


def _encode_row(row: Shown) -> bytes:
    name, text = row.name.encode()[:DAMAGE_TEXT_MAX], row.text.encode()[:DAMAGE_TEXT_MAX]
    fixed = DAMAGED_EXTENT.pack(row.start, row.count, *row.segment, row.offset, len(name), len(text))
    return fixed + name + text


def _decode_rows(content: bytes, row_count: int) -> Sequence[Shown]:
    rows: list[Shown] = []
    at = DAMAGE_HEADER.size
    for _ in range(row_count):
        start, count, incarnation, number, offset, name_size, text_size = DAMAGED_EXTENT.unpack_from(content, at)
        at += DAMAGED_EXTENT.size
        name = content[at : at + name_size].decode(errors="replace")
        text = content[at + name_size : at + name_size + text_size].decode(errors="replace")
        rows.append(Shown(name, start, count, SegmentName(incarnation, number), offset, text))
        at += name_size + text_size
    return rows

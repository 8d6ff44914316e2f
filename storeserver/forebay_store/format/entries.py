"""Entries: what an extent of a volume is, in the head and in the history.

Table `head`, key: u64 (big-endian), the volume's number in the upper 24 bits, the first block in the lower 40. Entries
never overlap. A block without one was never written: it reads as zeros, or in a clone as its origin does.

Entry, 24 bytes, little-endian:

    offset  size  type  field    meaning
    ------  ----  ----  -------  --------------------------------------------------------------
         0     8  u64   version  last version of the cut that made it so
         8     8  u64   place    bits 0-19 incarnation and 20-51 number of the segment, 52-53 kind, 54-57 plain blocks
                                 of the frame less 1, 58-61 index of the first block among them; without data the
                                 kind only
        16     8  u64   extent   bits 0-45: with data 0-24 offset of the frame in the segment, 25-41 bytes of the
                                 frame, 42-45 blocks less 1; without data blocks. Bits 46-63: lower bits of the xxh3-64
                                 over the key and this value with zeros here

Kinds: 0 hole, reads as zeros; 1 data; 2 origin: reads as the clone's origin does again, since a rollback.

Table `history`, key: u32 volume's number * 256 + level, u64 start, u64 last (big-endian), value as in `head`: an entry
that the snapshot with version `last` is the newest to show, `version` is since when it was so. Level 0 are entries of
at most 16 blocks. Longer ones, all without data, are split where a level asks for it: what lies on level 1, 2 or 3 does
not cross a multiple of 2**12, 2**21 or 2**30 blocks and begins at one, so that who looks for a block knows where.

Table `displaced`, key: u32 volume's number, u64 last, u64 version of the change that displaced, u32 chunk (big-endian);
value: u64 for each entry of `history` (little-endian), its level in the upper 8 bits and its start: so the entries that
a snapshot is the newest to show are found without looking at the others.
"""

import struct
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.extents import EXTENT_COUNT_MAX
from forebay_core.frame import FRAME_BLOCKS_MAX, FRAME_SIZE_MAX
from forebay_core.units import LBA_BITS, LBA_MAX
from forebay_store.format.segment import NO_SEGMENT, SegmentName
from forebay_store.limits import INCARNATION_MAX, SEGMENT_NUMBER_MAX, SEGMENT_SIZE_MAX, VOLUME_NUMBER_MAX

HEAD_KEY: Final = struct.Struct(">Q")
HISTORY_KEY: Final = struct.Struct(">IQQ")
DISPLACED_KEY: Final = struct.Struct(">IQQI")
ENTRY: Final = struct.Struct("<QQQ")
assert ENTRY.size == 24

HOLE: Final = 0
DATA: Final = 1
ORIGIN: Final = 2

LEVEL_BITS: Final = (0, 12, 21, 30)
"""By level of the history, the power of two that its entries keep to."""
LEVEL_SHIFT: Final = 56

NUMBER_SHIFT: Final = LBA_BITS
KIND_SHIFT: Final = 52
SEGMENT_NUMBER_SHIFT: Final = 20
FRAME_BLOCKS_SHIFT: Final = 54
BLOCK_SHIFT: Final = 58
FRAME_SIZE_SHIFT: Final = 25
LENGTH_SHIFT: Final = 42
CHECK_SHIFT: Final = 46
CHECK_MASK: Final = (1 << 18) - 1
_EXTENT_MASK: Final = (1 << CHECK_SHIFT) - 1
_SEGMENT_AND_KIND_MASK: Final = (1 << FRAME_BLOCKS_SHIFT) - 1
_LOW_20: Final = INCARNATION_MAX
_LOW_32: Final = SEGMENT_NUMBER_MAX
assert INCARNATION_MAX < 1 << 20
assert SEGMENT_NUMBER_MAX < 1 << 32
assert SEGMENT_SIZE_MAX <= 1 << FRAME_SIZE_SHIFT
assert FRAME_SIZE_MAX < 1 << LENGTH_SHIFT - FRAME_SIZE_SHIFT
assert FRAME_BLOCKS_MAX <= 16
assert EXTENT_COUNT_MAX <= _EXTENT_MASK
assert (VOLUME_NUMBER_MAX + 1) << NUMBER_SHIFT | LBA_MAX < 1 << 64


class HeadEntry(NamedTuple):
    """What an extent is: data in a frame, a hole, or the origin's again."""

    start: int
    length: int  # blocks
    kind: int
    version: int
    segment: SegmentName
    frame_offset: int
    frame_size: int
    frame_blocks: int
    block: int

    @property
    def end(self) -> int:
        """First block behind it."""
        return self.start + self.length

    @property
    def is_data(self) -> bool:
        """Whether it is stored."""
        return self.kind == DATA


def make_hole(start: int, length: int, version: int) -> HeadEntry:
    """Return a tombstone."""
    return HeadEntry(start, length, HOLE, version, NO_SEGMENT, 0, 0, 0, 0)


def make_origin(start: int, length: int, version: int) -> HeadEntry:
    """Return an entry that shows the origin again."""
    return HeadEntry(start, length, ORIGIN, version, NO_SEGMENT, 0, 0, 0, 0)


def narrow(entry: HeadEntry, start: int, end: int) -> HeadEntry:
    """Return the part of an entry between two blocks that it holds."""
    assert entry.start <= start < end <= entry.end
    if entry.start == start and entry.end == end:
        return entry
    block = entry.block + start - entry.start if entry.kind == DATA else 0
    return entry._replace(start=start, length=end - start, block=block)


def stored_share(entry: HeadEntry) -> int:
    """Return the bytes that an entry counts for: per block its frame's bytes by its frame's blocks, rounded down."""
    return entry.length * (entry.frame_size // entry.frame_blocks) if entry.kind == DATA else 0


def head_key(number: int, start: int) -> bytes:
    """Return the key of `head`; of the block behind the last one it is the next volume's first."""
    return HEAD_KEY.pack((number << NUMBER_SHIFT) + start)


def number_of(key: bytes) -> int:
    """Return the volume's number in a key of `head`."""
    return int.from_bytes(key[:3], "big")


def start_of(key: bytes) -> int:
    """Return the first block in a key of `head`."""
    return int.from_bytes(key[3:], "big")


def encode_entry(number: int, entry: HeadEntry) -> tuple[bytes, bytes]:
    """Return key and value of `head`."""
    key = HEAD_KEY.pack(number << NUMBER_SHIFT | entry.start)
    return key, _encode_value(key, entry)


def decode_entry(key: bytes, value: bytes) -> HeadEntry:
    """Return the entry of a key and value of `head`.

    Raises:
        CorruptionError: the entry was damaged.
    """
    return _decode_value("head", key, int.from_bytes(key[3:], "big"), value)


def history_key(number: int, level: int, start: int, last: int) -> bytes:
    """Return the key of `history`."""
    return HISTORY_KEY.pack(number << 8 | level, start, last)


def encode_history(number: int, level: int, entry: HeadEntry, last: int) -> tuple[bytes, bytes]:
    """Return key and value of `history`."""
    key = HISTORY_KEY.pack(number << 8 | level, entry.start, last)
    return key, _encode_value(key, entry)


def decode_history(key: bytes, value: bytes) -> tuple[HeadEntry, int]:
    """Return entry and last version of a key and value of `history`.

    Raises:
        CorruptionError: the entry was damaged.
    """
    if len(key) != HISTORY_KEY.size:
        raise CorruptionError(
            place=f"index history {key.hex()}", what="key size", expected=HISTORY_KEY.size, found=len(key)
        )
    _, start, last = HISTORY_KEY.unpack(key)
    return _decode_value("history", key, start, value), last


def check_neighbours(table: str, before: bytes | None, sought: bytes, found: bytes | None) -> None:
    """Compare the keys that a table has before and at or behind the one that was sought.

    Raises:
        CorruptionError: they can't be its neighbours: the table is not sorted any more, or was entered at a wrong page.
    """
    if (before is not None and before >= sought) or (found is not None and found < sought):
        raise CorruptionError(
            place=f"index {table} {sought.hex()}",
            what="neighbours of a key",
            expected="one below and one not below it; run store rebuild-index",
            found=f"{before.hex() if before else 'none'} and {found.hex() if found else 'none'}",
        )


def is_data_in(value: bytes, segment: SegmentName) -> bool:
    """Tell whether a value of `head` or `history` is data in a segment, without decoding it."""
    place = int.from_bytes(value[8:16], "little")
    return place & _SEGMENT_AND_KIND_MASK == (
        segment.incarnation | segment.number << SEGMENT_NUMBER_SHIFT | DATA << KIND_SHIFT
    )


def _encode_value(key: bytes, entry: HeadEntry) -> bytes:
    place = entry.kind << KIND_SHIFT
    extent = entry.length
    if entry.kind == DATA:
        assert 0 < entry.length <= FRAME_BLOCKS_MAX
        place |= (
            entry.segment.incarnation
            | entry.segment.number << SEGMENT_NUMBER_SHIFT
            | entry.frame_blocks - 1 << FRAME_BLOCKS_SHIFT
            | entry.block << BLOCK_SHIFT
        )
        extent = entry.frame_offset | entry.frame_size << FRAME_SIZE_SHIFT | entry.length - 1 << LENGTH_SHIFT
    check = checksum(key + ENTRY.pack(entry.version, place, extent)) & CHECK_MASK
    return ENTRY.pack(entry.version, place, extent | check << CHECK_SHIFT)


def _decode_value(table: str, key: bytes, start: int, value: bytes) -> HeadEntry:
    if len(value) != ENTRY.size:
        raise CorruptionError(
            place=f"index {table} {key.hex()}", what="entry size", expected=ENTRY.size, found=len(value)
        )
    version, place, extent = ENTRY.unpack(value)
    expected = extent >> CHECK_SHIFT
    extent &= _EXTENT_MASK
    found = checksum(key + ENTRY.pack(version, place, extent)) & CHECK_MASK
    if found != expected:
        raise CorruptionError(place=f"index {table} {key.hex()}", what="entry checksum", expected=expected, found=found)
    kind = place >> KIND_SHIFT & 3
    if kind != DATA:
        return HeadEntry(start, extent, kind, version, NO_SEGMENT, 0, 0, 0, 0)
    return HeadEntry(
        start,
        (extent >> LENGTH_SHIFT) + 1,
        DATA,
        version,
        SegmentName(place & _LOW_20, place >> SEGMENT_NUMBER_SHIFT & _LOW_32),
        extent & SEGMENT_SIZE_MAX - 1,
        extent >> FRAME_SIZE_SHIFT & 0x1FFFF,
        (place >> FRAME_BLOCKS_SHIFT & 15) + 1,
        place >> BLOCK_SHIFT & 15,
    )

"""The rows of the index: keys sort as bytes, so their numbers are big-endian; values are little-endian.

Table `volumes`, key: volume id.

Volume row, 114 bytes, then the name in UTF-8:

    offset  size  type  field            meaning
    ------  ----  ----  ---------------  --------------------------------------------------------
         0     8  u64   size             bytes
         8     4  u32   epoch            of the newest writer; 0 before the first
        12     4  u32   reserved         0
        16     8  u64   version          of the newest committed cut
        24     8  u64   committed_ns     wall clock of the cache at that cut
        32     8  u64   created_ns       Unix nanoseconds
        40     8  u64   stored_size      bytes of frames that the head refers to: per live block its frame's bytes
                                         divided by its frame's blocks, rounded down
        48     8  u64   data_blocks      blocks of the head that are not holes
        56     8  u64   floor            changes since an older version can't be listed
        64     8  u64   in_sync_version  of the newest committed cut
        72    16  16s   writer           device that holds it; zeros: nobody
        88    16  16s   origin           zeros; reserved for clones
       104     2  u16   name_size        bytes of the name
       106     8  u64   row_xxh3         over the row with zeros here, and the name

Table `names`, key: name in UTF-8, value: volume id.

Table `head`, key: volume id, u64 start (big-endian). Entries never overlap.

Head entry, 40 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   count         blocks
         4     1  u8    kind          0 hole, 1 data
         5     1  u8    frame_blocks  plain blocks of the frame; 0 for a hole, as all below but version
         6     1  u8    block         index of the first block among the frame's plain blocks
         7     1  u8    reserved      0
         8     8  u64   version       last version of the cut that wrote or trimmed it
        16     4  u32   incarnation   of the segment
        20     8  u64   number        of the segment
        28     4  u32   frame_offset  of the frame in the segment
        32     4  u32   frame_size    bytes of the frame
        36     4  u32   entry_check   lower half of the xxh3-64 over the key and the 36 bytes before it

Table `attempts`, key: volume id, u32 epoch, u64 attempt (big-endian).

Attempt row, 28 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   incarnation   of the segment of its first part: with the next two fields the order of attempts
         4     8  u64   number        of that segment
        12     4  u32   offset        of that part's payload
        16     4  u32   part_count    parts staged
        20     8  u64   stored_size   bytes of their frames

Table `staged`, key: volume id, u32 epoch, u64 attempt, u32 index (big-endian).

Staged part, 24 bytes, then hole_count times (u64 start, u32 count), then the part entries of
`forebay_store.format.part`:

    offset  size  type  field           meaning
    ------  ----  ----  --------------  --------------------------------------------------------
         0     4  u32   incarnation     of the segment
         4     8  u64   number          of the segment
        12     4  u32   payload_offset  of the first frame in the segment
        16     4  u32   payload_size    bytes of the frames
        20     4  u32   hole_count      extents

Table `deleted`, key: volume id, value empty: its head entries are being removed.

Table `meta`, key `store`: to which store the index belongs.

Store mark, 20 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   format        1
         4    16  16s   store         UUID of the store

Table `meta`, key `applied`: the newest segment whose records the index shows.

Applied mark, 12 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   incarnation   of the segment
         4     8  u64   number        of the segment
"""

import enum
import struct
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.extents import EXTENT_DTYPE
from forebay_core.units import ID_SIZE
from forebay_store.format.part import PART_ENTRY
from forebay_store.format.segment import SegmentName

INDEX_FORMAT: Final = 1
VOLUME_ROW: Final = struct.Struct("<QIIQQQQQQQ16s16sHQ")
HEAD_KEY: Final = struct.Struct(">16sQ")
HEAD_ENTRY: Final = struct.Struct("<IBBBBQIQIII")
ATTEMPT_KEY: Final = struct.Struct(">16sIQ")
ATTEMPT_ROW: Final = struct.Struct("<IQIIQ")
STAGED_KEY: Final = struct.Struct(">16sIQI")
STAGED_PART: Final = struct.Struct("<IQIII")
STORE_MARK: Final = struct.Struct("<I16s")
APPLIED_MARK: Final = struct.Struct("<IQ")
STORE_KEY: Final = b"store"
APPLIED_KEY: Final = b"applied"
NOBODY: Final = bytes(ID_SIZE)
assert VOLUME_ROW.size == 114
assert HEAD_ENTRY.size == 40

_U64: Final = struct.Struct("<Q")
_U32: Final = struct.Struct("<I")
_ENTRY_PREFIX: Final = struct.Struct("<IBBBBQIQII")
_LOW: Final = (1 << 32) - 1
assert _ENTRY_PREFIX.size + _U32.size == HEAD_ENTRY.size


class Table(enum.StrEnum):
    """The tables of the index. A string, because its hash costs a tenth of an Enum's."""

    VOLUMES = "volumes"
    NAMES = "names"
    HEAD = "head"
    ATTEMPTS = "attempts"
    STAGED = "staged"
    DELETED = "deleted"
    META = "meta"


class VolumeState(NamedTuple):
    """One volume as the index shows it; fields as in the table above."""

    id: bytes
    name: str
    size: int
    epoch: int
    version: int
    committed_ns: int
    created_ns: int
    stored_size: int
    data_blocks: int
    floor: int
    in_sync_version: int
    writer: bytes
    origin: bytes


class HeadEntry(NamedTuple):
    """What an extent of the head is: data in a frame, or a hole with the version that made it."""

    start: int
    length: int  # blocks
    is_data: bool
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


class Attempt(NamedTuple):
    """One unfinished cut. Attempts sort by their first part's place in the log."""

    segment: SegmentName
    offset: int
    epoch: int
    attempt: int
    part_count: int
    stored_size: int


class StagedPart(NamedTuple):
    """One staged part: where its frames lie, its holes, and its packed part entries."""

    segment: SegmentName
    payload_offset: int
    payload_size: int
    holes: bytes
    entries: bytes

    @property
    def entry_count(self) -> int:
        """How many entries of the head it makes."""
        return len(self.entries) // PART_ENTRY.size + len(self.holes) // EXTENT_DTYPE.itemsize


def encode_volume(row: VolumeState) -> bytes:
    """Return the value of `volumes`."""
    name = row.name.encode()
    fixed = VOLUME_ROW.pack(
        row.size,
        row.epoch,
        0,
        row.version,
        row.committed_ns,
        row.created_ns,
        row.stored_size,
        row.data_blocks,
        row.floor,
        row.in_sync_version,
        row.writer or NOBODY,
        row.origin or NOBODY,
        len(name),
        0,
    )
    prefix = fixed[: -_U64.size]
    return prefix + _U64.pack(checksum(prefix + name)) + name


def decode_volume(volume: bytes, value: bytes) -> VolumeState:
    """Return the volume of a value of `volumes`.

    Raises:
        CorruptionError: the row was damaged.
    """
    place = f"index volumes {volume.hex()}"
    if len(value) < VOLUME_ROW.size:
        raise CorruptionError(place=place, what="volume row size", expected=VOLUME_ROW.size, found=len(value))
    fields = VOLUME_ROW.unpack_from(value)
    name = value[VOLUME_ROW.size :]
    found = checksum(value[: VOLUME_ROW.size - _U64.size] + name)
    if found != fields[-1]:
        raise CorruptionError(place=place, what="volume row checksum", expected=fields[-1], found=found)
    size, epoch, _, version, committed_ns, created_ns, stored_size, data_blocks, floor, in_sync, writer, origin = (
        fields[:12]
    )
    return VolumeState(
        volume,
        name.decode(),
        size,
        epoch,
        version,
        committed_ns,
        created_ns,
        stored_size,
        data_blocks,
        floor,
        in_sync,
        b"" if writer == NOBODY else writer,
        b"" if origin == NOBODY else origin,
    )


def head_key(volume: bytes, start: int) -> bytes:
    """Return the key of `head`."""
    return HEAD_KEY.pack(volume, start)


def encode_entry(volume: bytes, entry: HeadEntry) -> tuple[bytes, bytes]:
    """Return key and value of `head`."""
    key = HEAD_KEY.pack(volume, entry.start)
    prefix = _ENTRY_PREFIX.pack(
        entry.length,
        entry.is_data,
        entry.frame_blocks,
        entry.block,
        0,
        entry.version,
        entry.segment.incarnation,
        entry.segment.number,
        entry.frame_offset,
        entry.frame_size,
    )
    return key, prefix + _U32.pack(checksum(key + prefix) & _LOW)


def decode_entry(key: bytes, value: bytes) -> HeadEntry:
    """Return the entry of a key and value of `head`.

    Raises:
        CorruptionError: the entry was damaged.
    """
    if len(value) != HEAD_ENTRY.size:
        raise CorruptionError(
            place=f"index head {key.hex()}", what="head entry size", expected=HEAD_ENTRY.size, found=len(value)
        )
    start = HEAD_KEY.unpack(key)[1]
    length, kind, blocks, block, _, version, incarnation, number, offset, size, expected = HEAD_ENTRY.unpack(value)
    found = checksum(key + value[:-4]) & _LOW
    if found != expected:
        raise CorruptionError(
            place=f"index head {key.hex()}", what="head entry checksum", expected=expected, found=found
        )
    return HeadEntry(start, length, kind != 0, version, SegmentName(incarnation, number), offset, size, blocks, block)


def encode_attempt(attempt: Attempt) -> bytes:
    """Return the value of `attempts`."""
    return ATTEMPT_ROW.pack(*attempt.segment, attempt.offset, attempt.part_count, attempt.stored_size)


def decode_attempt(key: bytes, value: bytes) -> Attempt:
    """Return the attempt of a key and value of `attempts`."""
    _, epoch, attempt = ATTEMPT_KEY.unpack(key)
    incarnation, number, offset, part_count, stored_size = ATTEMPT_ROW.unpack(value)
    return Attempt(SegmentName(incarnation, number), offset, epoch, attempt, part_count, stored_size)


def encode_staged(part: StagedPart) -> bytes:
    """Return the value of `staged`."""
    hole_count = len(part.holes) // EXTENT_DTYPE.itemsize
    fixed = STAGED_PART.pack(*part.segment, part.payload_offset, part.payload_size, hole_count)
    return fixed + part.holes + part.entries


def decode_staged(value: bytes) -> StagedPart:
    """Return the part of a value of `staged`."""
    incarnation, number, payload_offset, payload_size, hole_count = STAGED_PART.unpack_from(value)
    holes_end = STAGED_PART.size + hole_count * EXTENT_DTYPE.itemsize
    holes = value[STAGED_PART.size : holes_end]
    return StagedPart(SegmentName(incarnation, number), payload_offset, payload_size, holes, value[holes_end:])

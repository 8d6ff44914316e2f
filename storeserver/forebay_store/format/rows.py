"""The rows of the index: keys sort as bytes, so their numbers are big-endian; values are little-endian.

Table `volumes`, key: volume id.

Volume row, 134 bytes, then the name in UTF-8:

    offset  size  type  field            meaning
    ------  ----  ----  ---------------  --------------------------------------------------------
         0     8  u64   size             bytes
         8     4  u32   epoch            of the newest writer; 0 before the first
        12     4  u32   flags            1: the tie to the origin is being cut; 2: something of the head is hidden,
                                         see `forebay_store.format.sweep_rows`
        16     8  u64   version          of the newest change
        24     8  u64   committed_ns     wall clock of the cache at the newest cut
        32     8  u64   created_ns       Unix nanoseconds
        40     8  u64   stored_size      bytes of frames that the head refers to: per live block its frame's bytes
                                         divided by its frame's blocks, rounded down
        48     8  u64   data_blocks      blocks of the head that hold data
        56     8  u64   floor            changes since an older version can't be listed
        64     8  u64   in_sync_version  of the newest committed cut
        72     8  u64   newest_snapshot  version of it; 0: there is none
        80     4  u32   number           stands for the id in the keys of other tables; never used again
        84     4  u32   snapshots        how many it has
        88     4  u32   clones           volumes that read through to one of its snapshots
        92    16  16s   writer           device that holds it; zeros: nobody
       108    16  16s   origin           snapshot that a clone reads through to; zeros: none
       124     2  u16   name_size        bytes of the name
       126     8  u64   row_xxh3         over the row with zeros here, and the name

Table `names`, key: name in UTF-8, value: volume id.

Tables `head`, `history` and `displaced`: see `forebay_store.format.entries`. Tables `snapshots`, `snapshot_ids`,
`snapshot_names` and `clones`: see `forebay_store.format.snapshot_rows`.

Table `segments`, key: u32 incarnation, u64 number (big-endian).

Segment row, 24 bytes:

    offset  size  type  field    meaning
    ------  ----  ----  -------  --------------------------------------------------------
         0     8  u64   size     bytes of the segment
         8     8  u64   live     of them, bytes that entries of head and history and staged parts refer to, counted as
                                 in stored_size
        16     8  u64   written  bytes of all segments before it: by this what is in it has its age

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

Table `deleted`, key: u32 volume's number, u64 version (big-endian), value empty: the entries of this snapshot, or
with version 0 of the whole volume, are being removed.

Table `flattening`, key: volume id, value empty: clones whose tie to the origin is being cut.

Table `leaving` and the key `checkpoint` of `meta`: see `forebay_store.format.space_rows`; keys of `meta` that begin
with `sweep/`: see `forebay_store.format.sweep_rows`.

Table `meta`, key `store`: to which store the index belongs.

Store mark, 20 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   format        2
         4    16  16s   store         UUID of the store

Table `meta`, key `volumes`: u32 (little-endian), how many volumes were ever made: the newest one's number.

Table `meta`, key `written`: u64 (little-endian), bytes of all segments that the index shows or has shown.

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

INDEX_FORMAT: Final = 2
VOLUME_ROW: Final = struct.Struct("<QIIQQQQQQQQIII16s16sHQ")
SEGMENT_KEY: Final = struct.Struct(">IQ")
SEGMENT_ROW: Final = struct.Struct("<QQQ")
DELETED_KEY: Final = struct.Struct(">IQ")
DELETED_PREFIX: Final = struct.Struct(">I")
ATTEMPT_KEY: Final = struct.Struct(">16sIQ")
ATTEMPT_ROW: Final = struct.Struct("<IQIIQ")
STAGED_KEY: Final = struct.Struct(">16sIQI")
STAGED_PART: Final = struct.Struct("<IQIII")
STORE_MARK: Final = struct.Struct("<I16s")
APPLIED_MARK: Final = struct.Struct("<IQ")
STORE_KEY: Final = b"store"
APPLIED_KEY: Final = b"applied"
VOLUMES_KEY: Final = b"volumes"
WRITTEN_KEY: Final = b"written"
VOLUMES_MARK: Final = struct.Struct("<I")
WRITTEN_MARK: Final = struct.Struct("<Q")
NOBODY: Final = bytes(ID_SIZE)
FLATTENING: Final = 1
SWEEPING: Final = 2
assert VOLUME_ROW.size == 134
assert SEGMENT_ROW.size == 24

_U64: Final = struct.Struct("<Q")


class Table(enum.StrEnum):
    """The tables of the index. A string, because its hash costs a tenth of an Enum's."""

    VOLUMES = "volumes"
    NAMES = "names"
    HEAD = "head"
    HISTORY = "history"
    DISPLACED = "displaced"
    SNAPSHOTS = "snapshots"
    SNAPSHOT_IDS = "snapshot_ids"
    SNAPSHOT_NAMES = "snapshot_names"
    CLONES = "clones"
    SEGMENTS = "segments"
    ATTEMPTS = "attempts"
    STAGED = "staged"
    DELETED = "deleted"
    FLATTENING = "flattening"
    LEAVING = "leaving"
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
    number: int = 0
    newest_snapshot: int = 0
    snapshots: int = 0
    clones: int = 0
    flattening: bool = False
    sweeping: bool = False


class SegmentState(NamedTuple):
    """One segment as the index shows it; fields as in the table above."""

    size: int
    live: int
    written: int


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
        (FLATTENING if row.flattening else 0) | (SWEEPING if row.sweeping else 0),
        row.version,
        row.committed_ns,
        row.created_ns,
        row.stored_size,
        row.data_blocks,
        row.floor,
        row.in_sync_version,
        row.newest_snapshot,
        row.number,
        row.snapshots,
        row.clones,
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
    size, epoch, flags, version, committed_ns, created_ns, stored_size, data_blocks, floor, in_sync = fields[:10]
    newest_snapshot, number, snapshots, clones, writer, origin = fields[10:16]
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
        number,
        newest_snapshot,
        snapshots,
        clones,
        bool(flags & FLATTENING),
        bool(flags & SWEEPING),
    )


def lost_row(table: Table, key: bytes) -> CorruptionError:
    """Return the error about a row that others tell of and that is not there, or not as they tell."""
    place = f"index {table.value} {key.hex()}"
    return CorruptionError(
        place=place, what="row", expected="one as others tell; run store rebuild-index", found="none"
    )


def segment_key(segment: SegmentName) -> bytes:
    """Return the key of `segments`."""
    return SEGMENT_KEY.pack(*segment)


def encode_segment(row: SegmentState) -> bytes:
    """Return the value of `segments`."""
    return SEGMENT_ROW.pack(*row)


def decode_segment_row(value: bytes) -> SegmentState:
    """Return the segment of a value of `segments`."""
    return SegmentState(*SEGMENT_ROW.unpack(value))


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

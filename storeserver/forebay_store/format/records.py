"""The records of a segment: every change of the store's state, as facts that were checked before they were written.

A record is a header, a body, and for the kinds that hold blocks a payload of whole frames (`forebay_core.frame`).
Records of snapshots, clones and purging have their bodies in `forebay_store.format.snapshot_records`, those of
checkpoints and cleaning in `forebay_store.format.space_records`.

Record header, 32 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   magic         0x43524246, "FBRC"
         4     2  u16   kind          see Kind
         6     2  u16   version       0
         8     4  u32   body_size     bytes of the body
        12     4  u32   payload_size  bytes behind the body: frames, or rows of an index-chunk; 0 but for those
        16     8  u64   body_xxh3     over the body
        24     8  u64   header_xxh3   over the 24 bytes before it

Bodies, little-endian:

store-claimed, 8 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0     8  u64   claimed_ns  when the store started, Unix nanoseconds

volume-created, 50 bytes, then the name in UTF-8:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     8  u64   size        bytes, a multiple of 4096
        24     8  u64   created_ns  Unix nanoseconds
        32    16  16s   origin      zeros; reserved for the origin of a clone
        48     2  u16   name_size   bytes of the name

volume-resized, 24 bytes; a smaller size is a change with the next sequence, and trims what lies behind it:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     8  u64   size        the new bytes

volume-deleted, 16 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id

writer-taken, 36 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     4  u32   epoch       the new epoch; parts of older ones are forgotten
        20    16  16s   device      the cache device that holds the volume now

writer-released, 20 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     4  u32   epoch       the epoch that ends

cut-part, 36 bytes, then hole_count times (u64 start, u32 count); the payload is the frames:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     4  u32   epoch       of the writer
        20     8  u64   attempt     random number of this try at the cut
        28     4  u32   part_index  from 0
        32     4  u32   hole_count  extents that read as zeros from this cut on

cut-committed, 68 bytes, then the closing change if the cut ends with one:

    offset  size  type  field            meaning
    ------  ----  ----  ---------------  --------------------------------------------------------
         0    16  16s   volume           its id
        16     4  u32   epoch            of the writer
        20     8  u64   attempt          which parts
        28     4  u32   part_count       parts 0 to part_count - 1 were staged before
        32     4  u32   reserved         0
        36     8  u64   first            sequence that follows the volume's last
        44     8  u64   last             sequence of the volume from now on
        52     8  u64   committed_ns     wall clock of the cache, Unix nanoseconds
        60     8  u64   in_sync_version  of the in-sync set it was sent under

closing change, 34 bytes, then the snapshot's name in UTF-8:

    offset  size  type  field        meaning
    ------  ----  ----  -----------  --------------------------------------------------------
         0    16  16s   snapshot     id of the snapshot that the change `last` is; zeros: it is none
        16     8  u64   snapshot_ns  when that was taken, Unix nanoseconds
        24     8  u64   size         bytes of the volume since the change `last`; 0: it is no resize
        32     2  u16   name_size    bytes of the name

attempt-forgotten, 28 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     4  u32   epoch       of the attempt
        20     8  u64   attempt     whose parts are forgotten
"""

import enum
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError, ProtocolError
from forebay_core.extents import EXTENT_DTYPE, unpack
from forebay_core.units import ID_SIZE, Buffer
from forebay_store.format.snapshot_records import (
    FLATTEN_BEGUN_BODY,
    FLATTENED_BODY,
    ORIGIN_PART_BODY,
    PURGED_BODY,
    ROLLED_BACK_BODY,
    SNAPSHOT_DELETED_BODY,
    SWEPT_BODY,
    CloneCreated,
    FlattenBegun,
    Flattened,
    OriginPart,
    Purged,
    RolledBack,
    SnapshotDeleted,
    SnapshotRecord,
    SnapshotTaken,
    Swept,
    decode_clone,
    decode_taken,
    encode_snapshot_body,
)
from forebay_store.format.space_records import (
    CLEANED_PART_BODY,
    MOVE,
    NAME,
    OLDS_MAX,
    CheckpointComplete,
    CleanedPart,
    IndexChunk,
    SegmentsDeleted,
    SpaceRecord,
    decode_cleaned,
    decode_complete,
    decode_deleted,
    decode_index_chunk,
    encode_space_body,
)
from forebay_store.limits import DELETED_NAMES_MAX, MOVES_MAX
from forebay_wire.limits import HOLES_PER_PART_MAX

RECORD_MAGIC: Final = 0x43524246
RECORD_HEADER: Final = struct.Struct("<IHHIIQQ")
assert RECORD_HEADER.size == 32

STORE_CLAIMED_BODY: Final = struct.Struct("<Q")
VOLUME_CREATED_BODY: Final = struct.Struct("<16sQQ16sH")
VOLUME_RESIZED_BODY: Final = struct.Struct("<16sQ")
VOLUME_DELETED_BODY: Final = struct.Struct("<16s")
WRITER_TAKEN_BODY: Final = struct.Struct("<16sI16s")
WRITER_RELEASED_BODY: Final = struct.Struct("<16sI")
CUT_PART_BODY: Final = struct.Struct("<16sIQII")
CUT_COMMITTED_BODY: Final = struct.Struct("<16sIQIIQQQQ")
CLOSING_CHANGE: Final = struct.Struct("<16sQQH")
ATTEMPT_FORGOTTEN_BODY: Final = struct.Struct("<16sIQ")

BODY_SIZE_MAX: Final = CUT_PART_BODY.size + HOLES_PER_PART_MAX * EXTENT_DTYPE.itemsize
assert CLEANED_PART_BODY.size + OLDS_MAX * NAME.size + MOVES_MAX * MOVE.size <= BODY_SIZE_MAX
assert DELETED_NAMES_MAX * NAME.size < BODY_SIZE_MAX
NO_ORIGIN: Final = bytes(ID_SIZE)
_PREFIX_SIZE: Final = 24
_U64: Final = struct.Struct("<Q")


class Kind(enum.IntEnum):
    """Numbers of the kinds. 20 in-sync-set is reserved."""

    STORE_CLAIMED = 1
    VOLUME_CREATED = 2
    VOLUME_RESIZED = 3
    VOLUME_DELETED = 4
    WRITER_TAKEN = 5
    WRITER_RELEASED = 6
    CUT_PART = 7
    CUT_COMMITTED = 8
    ATTEMPT_FORGOTTEN = 9
    SNAPSHOT_TAKEN = 16
    SNAPSHOT_DELETED = 17
    ROLLED_BACK = 18
    CLONE_CREATED = 19
    FLATTEN_BEGUN = 21
    ORIGIN_PART = 22
    FLATTENED = 23
    PURGED = 24
    SWEPT = 25
    INDEX_CHUNK = 32
    CHECKPOINT_COMPLETE = 33
    CLEANED_PART = 34
    SEGMENTS_DELETED = 35


PAYLOAD_KINDS: Final = frozenset((Kind.CUT_PART, Kind.ORIGIN_PART, Kind.CLEANED_PART, Kind.INDEX_CHUNK))
"""Kinds whose records hold something behind their bodies."""

_KINDS: Final = frozenset(int(kind) for kind in Kind)
SPACE_KINDS: Final[dict[type[SpaceRecord], Kind]] = {
    IndexChunk: Kind.INDEX_CHUNK,
    CheckpointComplete: Kind.CHECKPOINT_COMPLETE,
    CleanedPart: Kind.CLEANED_PART,
    SegmentsDeleted: Kind.SEGMENTS_DELETED,
}
SNAPSHOT_KINDS: Final[dict[type[SnapshotRecord], Kind]] = {
    SnapshotTaken: Kind.SNAPSHOT_TAKEN,
    SnapshotDeleted: Kind.SNAPSHOT_DELETED,
    RolledBack: Kind.ROLLED_BACK,
    CloneCreated: Kind.CLONE_CREATED,
    FlattenBegun: Kind.FLATTEN_BEGUN,
    OriginPart: Kind.ORIGIN_PART,
    Flattened: Kind.FLATTENED,
    Purged: Kind.PURGED,
    Swept: Kind.SWEPT,
}
_SNAPSHOT_DECODERS: Final[dict[Kind, Callable[[bytes], SnapshotRecord]]] = {
    Kind.SNAPSHOT_TAKEN: decode_taken,
    Kind.SNAPSHOT_DELETED: lambda body: SnapshotDeleted(*SNAPSHOT_DELETED_BODY.unpack(body)),
    Kind.ROLLED_BACK: lambda body: RolledBack(*ROLLED_BACK_BODY.unpack(body)),
    Kind.CLONE_CREATED: decode_clone,
    Kind.FLATTEN_BEGUN: lambda body: FlattenBegun(*FLATTEN_BEGUN_BODY.unpack(body)),
    Kind.ORIGIN_PART: lambda body: OriginPart(*ORIGIN_PART_BODY.unpack(body)),
    Kind.FLATTENED: lambda body: Flattened(*FLATTENED_BODY.unpack(body)),
    Kind.PURGED: lambda body: Purged(*PURGED_BODY.unpack(body)),
    Kind.SWEPT: lambda body: Swept(*SWEPT_BODY.unpack(body)),
}


class StoreClaimed(NamedTuple):
    """A start of the store: the first record of each incarnation."""

    claimed_ns: int


class VolumeCreated(NamedTuple):
    """An empty volume exists."""

    volume: bytes
    size: int
    created_ns: int
    name: str


class VolumeResized(NamedTuple):
    """The volume has another size."""

    volume: bytes
    size: int


class VolumeDeleted(NamedTuple):
    """The volume is gone; its id is never used again."""

    volume: bytes


class WriterTaken(NamedTuple):
    """A device holds the volume under a new epoch."""

    volume: bytes
    epoch: int
    device: bytes


class WriterReleased(NamedTuple):
    """Nobody holds the volume."""

    volume: bytes
    epoch: int


class CutPart(NamedTuple):
    """A part of a cut is staged; `holes` is a packed extent list."""

    volume: bytes
    epoch: int
    attempt: int
    part_index: int
    holes: bytes


class CutCommitted(NamedTuple):
    """All parts of the attempt are the volume's state now."""

    volume: bytes
    epoch: int
    attempt: int
    part_count: int
    first: int
    last: int
    committed_ns: int
    in_sync_version: int
    snapshot: bytes = NO_ORIGIN
    snapshot_ns: int = 0
    size: int = 0
    snapshot_name: str = ""


class AttemptForgotten(NamedTuple):
    """The parts of an unfinished cut are no longer staged."""

    volume: bytes
    epoch: int
    attempt: int


PartRecord = CutPart | OriginPart
PART_RECORDS: Final = (CutPart, OriginPart)
"""The records that put frames into the store; each of them names the volume whose blocks they are."""

FrameRecord = PartRecord | CleanedPart
FRAME_RECORDS: Final = (*PART_RECORDS, CleanedPart)
"""The records that hold frames."""

Record = (
    StoreClaimed
    | VolumeCreated
    | VolumeResized
    | VolumeDeleted
    | WriterTaken
    | WriterReleased
    | CutPart
    | CutCommitted
    | AttemptForgotten
    | SnapshotRecord
    | IndexChunk
    | CheckpointComplete
    | CleanedPart
    | SegmentsDeleted
)


class RecordHeader(NamedTuple):
    """The checked header of one record."""

    kind: Kind
    body_size: int
    payload_size: int
    body_xxh3: int

    @property
    def size(self) -> int:
        """Bytes of header, body and payload."""
        return RECORD_HEADER.size + self.body_size + self.payload_size


def encode_record(record: Record, payload_size: int = 0) -> tuple[bytes, bytes]:
    """Return header and body; the payload of a part follows them unchanged."""
    kind, body = _encode_body(record)
    assert payload_size == 0 or kind in PAYLOAD_KINDS
    assert len(body) <= BODY_SIZE_MAX
    header = RECORD_HEADER.pack(RECORD_MAGIC, kind, 0, len(body), payload_size, checksum(body), 0)[:_PREFIX_SIZE]
    return header + _U64.pack(checksum(header)), body


def decode_record_header(view: memoryview, *, place: str, room: int | None = None) -> RecordHeader:
    """Return the header at the start of `view`, which reaches to the end of the records unless `room` says how far.

    Raises:
        CorruptionError: cut short, damaged, of an unknown kind, or longer than what is there.
    """
    if view.nbytes < RECORD_HEADER.size:
        raise CorruptionError(place=place, what="record header size", expected=RECORD_HEADER.size, found=view.nbytes)
    magic, kind, version, body_size, payload_size, body_xxh3, expected = RECORD_HEADER.unpack_from(view)
    if magic != RECORD_MAGIC:
        raise CorruptionError(place=place, what="record magic", expected=RECORD_MAGIC, found=magic)
    found = checksum(view[:_PREFIX_SIZE])
    if found != expected:
        raise CorruptionError(place=place, what="record header checksum", expected=expected, found=found)
    if kind not in _KINDS or version != 0:
        raise CorruptionError(place=place, what="record kind", expected="a known kind", found=(kind, version))
    header = RecordHeader(Kind(kind), body_size, payload_size, body_xxh3)
    room = view.nbytes if room is None else room
    if header.size > room or body_size > BODY_SIZE_MAX or (payload_size and kind not in PAYLOAD_KINDS):
        raise CorruptionError(place=place, what="record size", expected=f"at most {room}", found=header.size)
    return header


def decode_body(header: RecordHeader, body: Buffer, *, place: str) -> Record:
    """Return the record of a body after comparing its checksum.

    Raises:
        CorruptionError: damaged, or not as the tables say.
    """
    found = checksum(body)
    if found != header.body_xxh3:
        raise CorruptionError(place=place, what="record body checksum", expected=header.body_xxh3, found=found)
    try:
        record = _decode_body(header.kind, bytes(body))
    except (struct.error, UnicodeDecodeError, ProtocolError) as error:
        raise CorruptionError(
            place=place, what=f"{header.kind.name} body", expected="as in its table", found=str(error)
        ) from error
    if _encode_body(record)[1] != body:
        raise CorruptionError(place=place, what=f"{header.kind.name} body", expected="reserved zeros", found=len(body))
    return record


def _encode_body(record: Record) -> tuple[Kind, bytes]:
    match record:
        case StoreClaimed():
            return Kind.STORE_CLAIMED, STORE_CLAIMED_BODY.pack(*record)
        case VolumeCreated():
            name = record.name.encode()
            fixed = VOLUME_CREATED_BODY.pack(record.volume, record.size, record.created_ns, NO_ORIGIN, len(name))
            return Kind.VOLUME_CREATED, fixed + name
        case VolumeResized():
            return Kind.VOLUME_RESIZED, VOLUME_RESIZED_BODY.pack(*record)
        case VolumeDeleted():
            return Kind.VOLUME_DELETED, VOLUME_DELETED_BODY.pack(*record)
        case WriterTaken():
            return Kind.WRITER_TAKEN, WRITER_TAKEN_BODY.pack(*record)
        case WriterReleased():
            return Kind.WRITER_RELEASED, WRITER_RELEASED_BODY.pack(*record)
        case CutPart():
            return Kind.CUT_PART, _encode_part(record)
        case CutCommitted():
            return Kind.CUT_COMMITTED, _encode_commit(record)
        case AttemptForgotten():
            return Kind.ATTEMPT_FORGOTTEN, ATTEMPT_FORGOTTEN_BODY.pack(*record)
        case IndexChunk() | CheckpointComplete() | CleanedPart() | SegmentsDeleted():
            return SPACE_KINDS[type(record)], encode_space_body(record)
        case _:
            return SNAPSHOT_KINDS[type(record)], encode_snapshot_body(record)


def _encode_part(part: CutPart) -> bytes:
    assert len(part.holes) % EXTENT_DTYPE.itemsize == 0
    hole_count = len(part.holes) // EXTENT_DTYPE.itemsize
    return CUT_PART_BODY.pack(part.volume, part.epoch, part.attempt, part.part_index, hole_count) + part.holes


def _encode_commit(commit: CutCommitted) -> bytes:
    fixed = CUT_COMMITTED_BODY.pack(*commit[:4], 0, *commit[4:8])
    if commit.snapshot == NO_ORIGIN and commit.size == 0:
        return fixed
    name = commit.snapshot_name.encode()
    return fixed + CLOSING_CHANGE.pack(commit.snapshot, commit.snapshot_ns, commit.size, len(name)) + name


def _decode_body(kind: Kind, body: bytes) -> Record:
    match kind:
        case Kind.STORE_CLAIMED:
            return StoreClaimed(*STORE_CLAIMED_BODY.unpack(body))
        case Kind.VOLUME_CREATED:
            volume, size, created_ns, _, _ = VOLUME_CREATED_BODY.unpack_from(body)
            return VolumeCreated(volume, size, created_ns, body[VOLUME_CREATED_BODY.size :].decode())
        case Kind.VOLUME_RESIZED:
            return VolumeResized(*VOLUME_RESIZED_BODY.unpack(body))
        case Kind.VOLUME_DELETED:
            return VolumeDeleted(*VOLUME_DELETED_BODY.unpack(body))
        case Kind.WRITER_TAKEN:
            return WriterTaken(*WRITER_TAKEN_BODY.unpack(body))
        case Kind.WRITER_RELEASED:
            return WriterReleased(*WRITER_RELEASED_BODY.unpack(body))
        case Kind.CUT_PART:
            return _decode_part(body)
        case Kind.CUT_COMMITTED:
            return _decode_commit(body)
        case Kind.ATTEMPT_FORGOTTEN:
            return AttemptForgotten(*ATTEMPT_FORGOTTEN_BODY.unpack(body))
        case Kind.INDEX_CHUNK:
            return decode_index_chunk(body)
        case Kind.CHECKPOINT_COMPLETE:
            return decode_complete(body)
        case Kind.CLEANED_PART:
            return decode_cleaned(body)
        case Kind.SEGMENTS_DELETED:
            return decode_deleted(body)
        case _:
            return _SNAPSHOT_DECODERS[kind](body)


def _decode_commit(body: bytes) -> CutCommitted:
    fields = CUT_COMMITTED_BODY.unpack_from(body)
    commit = CutCommitted(*fields[:4], *fields[5:])
    if len(body) == CUT_COMMITTED_BODY.size:
        return commit
    snapshot, snapshot_ns, size, _ = CLOSING_CHANGE.unpack_from(body, CUT_COMMITTED_BODY.size)
    name = body[CUT_COMMITTED_BODY.size + CLOSING_CHANGE.size :].decode()
    return commit._replace(snapshot=snapshot, snapshot_ns=snapshot_ns, size=size, snapshot_name=name)


def _decode_part(body: bytes) -> CutPart:
    volume, epoch, attempt, part_index, _ = CUT_PART_BODY.unpack_from(body)
    holes = body[CUT_PART_BODY.size :]
    unpack(holes, count_max=HOLES_PER_PART_MAX)
    return CutPart(volume, epoch, attempt, part_index, holes)

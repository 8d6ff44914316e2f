"""The records of snapshots, clones and of giving back what was deleted: bodies of `forebay_store.format.records`.

Little-endian.

snapshot-taken, 42 bytes, then the name in UTF-8; a change with the next sequence of a volume that nobody holds:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16    16  16s   snapshot    id of the snapshot
        32     8  u64   created_ns  Unix nanoseconds
        40     2  u16   name_size   bytes of the name

snapshot-deleted, 32 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16    16  16s   snapshot    id of the snapshot

rolled-back, 32 bytes; a change with the next sequence of a volume that nobody holds:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16    16  16s   snapshot    id of the snapshot that the head is like from now on

clone-created, 42 bytes, then the name in UTF-8; the clone's version is 1:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      id of the clone
        16    16  16s   origin      id of the snapshot
        32     8  u64   created_ns  Unix nanoseconds
        40     2  u16   name_size   bytes of the name

flatten-begun, 16 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      id of the clone

origin-part, 16 bytes; the payload is frames with blocks of the origin, which the clone has as its own now unless it has
others:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      id of the clone

flattened, 16 bytes:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      id of the volume, which has no origin from now on

purged, 16 bytes; a step of removing what a deletion left:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0     4  u32   number      of the volume
         4     8  u64   version     of the deleted snapshot; 0: the whole volume
        12     4  u32   entries     looked at in this step, about

swept, 20 bytes; a step of removing what a trim or a rollback hid:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     4  u32   entries     changed in this step, about
"""

import struct
from typing import Final, NamedTuple

SNAPSHOT_TAKEN_BODY: Final = struct.Struct("<16s16sQH")
SNAPSHOT_DELETED_BODY: Final = struct.Struct("<16s16s")
ROLLED_BACK_BODY: Final = struct.Struct("<16s16s")
CLONE_CREATED_BODY: Final = struct.Struct("<16s16sQH")
FLATTEN_BEGUN_BODY: Final = struct.Struct("<16s")
ORIGIN_PART_BODY: Final = struct.Struct("<16s")
FLATTENED_BODY: Final = struct.Struct("<16s")
PURGED_BODY: Final = struct.Struct("<IQI")
SWEPT_BODY: Final = struct.Struct("<16sI")


class SnapshotTaken(NamedTuple):
    """A volume that nobody holds has a snapshot of what it is."""

    volume: bytes
    snapshot: bytes
    created_ns: int
    name: str


class SnapshotDeleted(NamedTuple):
    """The snapshot is gone; its id is never used again."""

    volume: bytes
    snapshot: bytes


class RolledBack(NamedTuple):
    """The volume is what it was when the snapshot was taken."""

    volume: bytes
    snapshot: bytes


class CloneCreated(NamedTuple):
    """A volume exists that reads through to a snapshot."""

    volume: bytes
    origin: bytes
    created_ns: int
    name: str


class FlattenBegun(NamedTuple):
    """A clone is being given the blocks of its origin."""

    volume: bytes


class OriginPart(NamedTuple):
    """Some blocks of its origin are the clone's own."""

    volume: bytes


class Flattened(NamedTuple):
    """All are: it is no clone any more."""

    volume: bytes


class Purged(NamedTuple):
    """A step of removing the entries of a deleted volume or snapshot."""

    number: int
    version: int
    entries: int


class Swept(NamedTuple):
    """A step of removing the entries of a head that a trim or a rollback hid."""

    volume: bytes
    entries: int


SnapshotRecord = (
    SnapshotTaken | SnapshotDeleted | RolledBack | CloneCreated | FlattenBegun | OriginPart | Flattened | Purged | Swept
)


def encode_snapshot_body(record: SnapshotRecord) -> bytes:
    """Return the body of a record."""
    match record:
        case SnapshotTaken():
            name = record.name.encode()
            return SNAPSHOT_TAKEN_BODY.pack(*record[:-1], len(name)) + name
        case SnapshotDeleted():
            return SNAPSHOT_DELETED_BODY.pack(*record)
        case RolledBack():
            return ROLLED_BACK_BODY.pack(*record)
        case CloneCreated():
            name = record.name.encode()
            return CLONE_CREATED_BODY.pack(*record[:-1], len(name)) + name
        case FlattenBegun():
            return FLATTEN_BEGUN_BODY.pack(*record)
        case OriginPart():
            return ORIGIN_PART_BODY.pack(*record)
        case Flattened():
            return FLATTENED_BODY.pack(*record)
        case Purged():
            return PURGED_BODY.pack(*record)
        case Swept():
            return SWEPT_BODY.pack(*record)


def decode_taken(body: bytes) -> SnapshotTaken:
    """Return the record of a body; struct.error if it is none."""
    volume, snapshot, created_ns, _ = SNAPSHOT_TAKEN_BODY.unpack_from(body)
    return SnapshotTaken(volume, snapshot, created_ns, body[SNAPSHOT_TAKEN_BODY.size :].decode())


def decode_clone(body: bytes) -> CloneCreated:
    """Return the record of a body; struct.error if it is none."""
    volume, origin, created_ns, _ = CLONE_CREATED_BODY.unpack_from(body)
    return CloneCreated(volume, origin, created_ns, body[CLONE_CREATED_BODY.size :].decode())

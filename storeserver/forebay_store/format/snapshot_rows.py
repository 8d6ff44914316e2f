"""The rows of snapshots and clones in the index; keys sort as bytes, so their numbers are big-endian.

Table `snapshots`, key: u32 volume's number, u64 version of the change that it is.

Snapshot row, 62 bytes, little-endian, then the name in UTF-8:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   id          random; never used again
        16    16  16s   origin      snapshot that it reads through to; zeros: none
        32     8  u64   size        bytes of the volume then
        40     8  u64   created_ns  when it was taken, Unix nanoseconds
        48     4  u32   clones      volumes that read through to it, themselves or in one of their snapshots
        52     2  u16   name_size   bytes of the name
        54     8  u64   row_xxh3    over the key, the row with zeros here, and the name

Table `snapshot_ids`, key: id, value: id of the volume, u64 version (little-endian).

Table `snapshot_names`, key: u32 volume's number, name in UTF-8, value: u64 version (little-endian).

Table `clones`, key: id of a snapshot, id of a volume; value: u32 (little-endian), how often the volume reads through to
it: once itself if it is its origin, and once for each of its snapshots whose origin it is.
"""

import struct
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import ID_SIZE

SNAPSHOT_KEY: Final = struct.Struct(">IQ")
SNAPSHOT_ROW: Final = struct.Struct("<16s16sQQIHQ")
SNAPSHOT_PLACE: Final = struct.Struct("<16sQ")
SNAPSHOT_NAME_PREFIX: Final = struct.Struct(">I")
SNAPSHOT_VERSION: Final = struct.Struct("<Q")
CLONE_COUNT: Final = struct.Struct("<I")
_NOTHING: Final = bytes(ID_SIZE)
_U64: Final = struct.Struct("<Q")
assert SNAPSHOT_ROW.size == 62


class SnapshotState(NamedTuple):
    """One snapshot as the index shows it; fields as in the table above."""

    id: bytes
    number: int  # of its volume
    version: int
    name: str
    size: int
    created_ns: int
    origin: bytes
    clones: int


def snapshot_key(number: int, version: int) -> bytes:
    """Return the key of `snapshots`."""
    return SNAPSHOT_KEY.pack(number, version)


def name_key(number: int, name: str) -> bytes:
    """Return the key of `snapshot_names`."""
    return SNAPSHOT_NAME_PREFIX.pack(number) + name.encode()


def encode_snapshot(row: SnapshotState) -> tuple[bytes, bytes]:
    """Return key and value of `snapshots`."""
    key = SNAPSHOT_KEY.pack(row.number, row.version)
    name = row.name.encode()
    fixed = SNAPSHOT_ROW.pack(row.id, row.origin or _NOTHING, row.size, row.created_ns, row.clones, len(name), 0)
    prefix = fixed[: -_U64.size]
    return key, prefix + _U64.pack(checksum(key + prefix + name)) + name


def decode_snapshot(key: bytes, value: bytes) -> SnapshotState:
    """Return the snapshot of a key and value of `snapshots`.

    Raises:
        CorruptionError: the row was damaged.
    """
    place = f"index snapshots {key.hex()}"
    if len(value) < SNAPSHOT_ROW.size:
        raise CorruptionError(place=place, what="snapshot row size", expected=SNAPSHOT_ROW.size, found=len(value))
    snapshot, origin, size, created_ns, clones, _, expected = SNAPSHOT_ROW.unpack_from(value)
    name = value[SNAPSHOT_ROW.size :]
    found = checksum(key + value[: SNAPSHOT_ROW.size - _U64.size] + name)
    if found != expected:
        raise CorruptionError(place=place, what="snapshot row checksum", expected=expected, found=found)
    number, version = SNAPSHOT_KEY.unpack(key)
    return SnapshotState(
        snapshot, number, version, name.decode(), size, created_ns, b"" if origin == _NOTHING else origin, clones
    )

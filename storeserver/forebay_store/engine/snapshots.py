"""Snapshots and clones in the index: reading and writing single rows, and what taking and deleting one changes.

Invariants:
    `snapshots`, `snapshot_ids` and `snapshot_names` name each other.
    a volume's `newest_snapshot` and `snapshots` are those of its rows in `snapshots`.
    a snapshot's `clones` counts the rows of `clones` that begin with its id; a volume's adds up those of its snapshots.
"""

from collections.abc import Iterator

from forebay_core.units import ID_SIZE
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.engine.volumes import find_volume, put_volume
from forebay_store.format.rows import DELETED_KEY, Table, VolumeState, lost_row
from forebay_store.format.snapshot_rows import (
    CLONE_COUNT,
    SNAPSHOT_KEY,
    SNAPSHOT_PLACE,
    SNAPSHOT_VERSION,
    SnapshotState,
    decode_snapshot,
    encode_snapshot,
    name_key,
    snapshot_key,
)


def find_snapshot(reader: IndexReader, number: int, version: int) -> SnapshotState | None:
    """Return the snapshot of a volume's number and a version."""
    key = snapshot_key(number, version)
    value = reader.get(Table.SNAPSHOTS, key)
    return None if value is None else decode_snapshot(key, value)


def find_snapshot_id(reader: IndexReader, snapshot: bytes) -> tuple[VolumeState, SnapshotState] | None:
    """Return the snapshot of an id, and its volume."""
    place = reader.get(Table.SNAPSHOT_IDS, snapshot)
    if place is None:
        return None
    volume, version = SNAPSHOT_PLACE.unpack(place)
    row = find_volume(reader, volume)
    found = None if row is None else find_snapshot(reader, row.number, version)
    return None if row is None or found is None else (row, found)


def find_snapshot_name(reader: IndexReader, number: int, name: str) -> SnapshotState | None:
    """Return the snapshot of a volume's number and a name."""
    version = reader.get(Table.SNAPSHOT_NAMES, name_key(number, name))
    return None if version is None else find_snapshot(reader, number, SNAPSHOT_VERSION.unpack(version)[0])


def snapshots_after(reader: IndexReader, number: int, after: int) -> Iterator[SnapshotState]:
    """Yield a volume's snapshots with a version above `after`, in their order."""
    for key, value in reader.scan(Table.SNAPSHOTS, snapshot_key(number, after + 1)):
        if SNAPSHOT_KEY.unpack(key)[0] != number:
            return
        yield decode_snapshot(key, value)


def version_before(reader: IndexReader, number: int, version: int) -> int:
    """Return the version of a volume's newest snapshot that is older than a version; 0 if there is none."""
    found = reader.before(Table.SNAPSHOTS, snapshot_key(number, version))
    if found is None:
        return 0
    found_number, found_version = SNAPSHOT_KEY.unpack(found[0])
    return int(found_version) if found_number == number else 0


def clones_of(reader: IndexReader, snapshot: bytes) -> Iterator[bytes]:
    """Yield the ids of the volumes that read through to a snapshot."""
    for key, _ in reader.scan(Table.CLONES, snapshot):
        if not key.startswith(snapshot):
            return
        yield key[ID_SIZE:]


def take_snapshot(
    writer: IndexWriter, row: VolumeState, *, snapshot: bytes, name: str, created_ns: int, version: int
) -> VolumeState:
    """Make the rows of a snapshot of what a volume is at a version; return the volume's row, which is to be set."""
    state = SnapshotState(snapshot, row.number, version, name, row.size, created_ns, row.origin, 0)
    _put_snapshot(writer, state)
    writer.put(Table.SNAPSHOT_IDS, snapshot, SNAPSHOT_PLACE.pack(row.id, version))
    writer.put(Table.SNAPSHOT_NAMES, name_key(row.number, name), SNAPSHOT_VERSION.pack(version))
    if row.origin:
        count_clone(writer, row.origin, row.id, 1)
    return row._replace(newest_snapshot=version, snapshots=row.snapshots + 1, version=version)


def delete_snapshot(writer: IndexWriter, row: VolumeState, state: SnapshotState) -> VolumeState:
    """Remove the rows of a snapshot; its entries go in steps. Return the volume's row, which is to be set."""
    assert state.clones == 0
    writer.delete(Table.SNAPSHOTS, snapshot_key(row.number, state.version))
    writer.delete(Table.SNAPSHOT_IDS, state.id)
    writer.delete(Table.SNAPSHOT_NAMES, name_key(row.number, state.name))
    writer.put(Table.DELETED, DELETED_KEY.pack(row.number, state.version), b"")
    if state.origin:
        count_clone(writer, state.origin, row.id, -1)
    newest = row.newest_snapshot
    if newest == state.version:
        newest = version_before(writer, row.number, state.version)
    return row._replace(newest_snapshot=newest, snapshots=row.snapshots - 1)


def count_clone(writer: IndexWriter, origin: bytes, volume: bytes, change: int) -> None:
    """A volume, or one of its snapshots, reads through to a snapshot (1) or does not any more (-1).

    Raises:
        CorruptionError: the snapshot is not there, or nobody is known to read through to it.
    """
    key = origin + volume
    value = writer.get(Table.CLONES, key)
    before = 0 if value is None else CLONE_COUNT.unpack(value)[0]
    after = before + change
    if after < 0:
        raise lost_row(Table.CLONES, key)
    if after:
        writer.put(Table.CLONES, key, CLONE_COUNT.pack(after))
    else:
        writer.delete(Table.CLONES, key)
    if (before == 0) == (after == 0):
        return
    found = find_snapshot_id(writer, origin)
    if found is None:
        raise lost_row(Table.SNAPSHOT_IDS, origin)
    parent, state = found
    _put_snapshot(writer, state._replace(clones=state.clones + change))
    put_volume(writer, parent._replace(clones=parent.clones + change))


def _put_snapshot(writer: IndexWriter, state: SnapshotState) -> None:
    writer.put(Table.SNAPSHOTS, *encode_snapshot(state))

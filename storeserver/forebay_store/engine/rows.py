"""Volumes and snapshots as the wire shows them."""

from collections.abc import Mapping

from forebay_store.engine.ports import IndexReader
from forebay_store.engine.snapshots import clones_of, find_snapshot_id
from forebay_store.engine.volumes import find_volume
from forebay_store.format.rows import VolumeState
from forebay_store.format.snapshot_rows import SnapshotState
from forebay_store.limits import CLONE_NAMES_MAX
from forebay_wire.messages import SnapshotRow, VolumeRow


def volume_row(reader: IndexReader, row: VolumeState, controls: Mapping[bytes, str]) -> VolumeRow:
    """Return the wire's row of a volume; `controls` says by volume where its holder takes commands."""
    return VolumeRow(
        id=row.id,
        name=row.name,
        size=row.size,
        epoch=row.epoch,
        version=row.version,
        committed_ns=row.committed_ns,
        created_ns=row.created_ns,
        writer=row.writer,
        stored_size=row.stored_size,
        data_blocks=row.data_blocks,
        origin=row.origin,
        origin_name=_snapshot_name(reader, row.origin),
        snapshots=row.snapshots,
        clones=row.clones,
        flattening=row.flattening,
        control=controls.get(row.id, "") if row.writer else "",
    )


def snapshot_row(reader: IndexReader, row: VolumeState, state: SnapshotState, unique_size: int = 0) -> SnapshotRow:
    """Return the wire's row of a snapshot of a volume."""
    return SnapshotRow(
        id=state.id,
        volume=row.id,
        volume_name=row.name,
        name=state.name,
        version=state.version,
        size=state.size,
        created_ns=state.created_ns,
        unique_size=unique_size,
        origin=state.origin,
        clones=clone_names(reader, state),
    )


def clone_names(reader: IndexReader, state: SnapshotState) -> tuple[str, ...]:
    """Return the names of the first volumes that read through to a snapshot."""
    names: list[str] = []
    if state.clones:
        for volume in clones_of(reader, state.id):
            row = find_volume(reader, volume)
            names.append(volume.hex() if row is None else row.name)
            if len(names) == CLONE_NAMES_MAX:
                break
    return tuple(sorted(names))


def _snapshot_name(reader: IndexReader, snapshot: bytes) -> str:
    found = find_snapshot_id(reader, snapshot) if snapshot else None
    return "" if found is None else f"{found[0].name}@{found[1].name}"

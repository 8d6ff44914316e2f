"""A volume as the wire shows it."""

from forebay_store.format.rows import VolumeState
from forebay_wire.messages import VolumeRow


def volume_row(row: VolumeState) -> VolumeRow:
    """Return the wire's row of a volume."""
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
    )

"""A volume's row as JSON and as text."""

from datetime import UTC, datetime

from forebay_core.units import BLOCK_SIZE, epoch_of, format_size, sequence_of
from forebay_tools.printing import Json
from forebay_wire.messages import VolumeRow


def row_json(row: VolumeRow) -> dict[str, Json]:
    """Return what --json prints of a volume: sizes in bytes, times in Unix nanoseconds, null for what is not."""
    return {
        "name": row.name,
        "id": row.id.hex(),
        "size": row.size,
        "data_size": row.data_blocks * BLOCK_SIZE,
        "stored_size": row.stored_size,
        "epoch": row.epoch,
        "committed_epoch": epoch_of(row.version),
        "committed_sequence": sequence_of(row.version),
        "committed_ns": row.committed_ns or None,
        "created_ns": row.created_ns,
        "writer": row.writer.hex() or None,
        "origin": row.origin.hex() or None,
    }


def row_fields(row: VolumeRow) -> dict[str, str]:
    """Return names and values for people."""
    data_size = row.data_blocks * BLOCK_SIZE
    ratio = f", {data_size / row.stored_size:.2f} times smaller than its data" if row.stored_size else ""
    return {
        "name": row.name,
        "id": row.id.hex(),
        "size": format_size(row.size),
        "data": format_size(data_size),
        "stored": format_size(row.stored_size) + ratio,
        "created": show_time(row.created_ns),
        "newest cut": f"sequence {sequence_of(row.version)} of epoch {epoch_of(row.version)}, "
        f"{show_time(row.committed_ns)}"
        if row.version
        else "none",
        "writer": f"{row.writer.hex()} in epoch {row.epoch}" if row.writer else "none",
    }


def show_time(unix_ns: int) -> str:
    """Return a wall-clock time in UTC, to the second."""
    try:
        return datetime.fromtimestamp(unix_ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "unknown"

"""A volume's row as JSON and as text."""

from datetime import UTC, datetime

from forebay_core.units import BLOCK_SIZE, epoch_of, format_size, sequence_of
from forebay_tools.printing import Json
from forebay_wire.messages import Held, HeldReport, VolumeRow


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


def held_json(report: HeldReport, since: int) -> dict[str, Json] | None:
    """Return what --json prints of a cache's report: by how many changes and seconds, at least, it was ahead of a
    version of the store; null if the store has heard none since it started."""
    if not report.reported_ns:
        return None
    changes = sequence_of(report.version) - sequence_of(since) if report.version > since else 0
    ahead_ns = report.reported_ns - report.oldest_ns if changes and report.oldest_ns else 0
    return {
        "changes": changes,
        "seconds": round(max(0, ahead_ns) / 1e9, 1),
        "epoch": report.epoch,
        "sequence": sequence_of(report.version),
        "reported_ns": report.reported_ns,
    }


def held_fields(row: VolumeRow, held: Held) -> dict[str, str]:
    """Return names and values about what the store does not have."""
    fields = {"not here": "unknown, no cache has reported since the store started"}
    who = "the cache that holds it" if row.writer else "the cache that held it"
    told = held_json(held.report, row.version)
    if told is not None:
        fields["not here"] = f"{who} reported {_ahead(told)} at {show_time(held.report.reported_ns)}"
    lost = held_json(held.lost, held.lost_from)
    if lost is not None:
        fields["taken over"] = (
            f"from a cache that reported {_ahead(lost)} at {show_time(held.lost.reported_ns)}, in epoch {lost['epoch']}"
        )
    return fields


def _ahead(told: dict[str, Json]) -> str:
    return f"{told['changes']} changes, {told['seconds']} seconds newer" if told["changes"] else "nothing newer"


def show_time(unix_ns: int) -> str:
    """Return a wall-clock time in UTC, to the second."""
    try:
        return datetime.fromtimestamp(unix_ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "unknown"

"""A volume's row, and how the store is, as JSON and as text."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from forebay_core.units import BLOCK_SIZE, epoch_of, format_size, sequence_of
from forebay_tools.printing import Json
from forebay_wire.messages import CleanStatus, Held, HeldReport, ScrubStatus, SnapshotRow, VolumeRow

NAMES_SHOWN_MAX: Final = 20
"""Names on one line for people; --json has them all."""


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
        "control": row.control or None,
        "origin": row.origin.hex() or None,
        "origin_name": row.origin_name or None,
        "flattening": row.flattening,
        "snapshot_count": row.snapshots,
        "clone_count": row.clones,
    }


def _show_newest(row: VolumeRow) -> str:
    """Tell the newest version and when its cut came; snapshots and rollbacks of a volume without cuts have no time."""
    if not row.version:
        return "none"
    text = f"sequence {sequence_of(row.version)} of epoch {epoch_of(row.version)}"
    return f"{text}, {show_time(row.committed_ns)}" if row.committed_ns else text


def row_fields(row: VolumeRow) -> dict[str, str]:
    """Return names and values for people."""
    data_size = row.data_blocks * BLOCK_SIZE
    control = f", takes commands at {row.control}" if row.control else ""
    ratio = f", {data_size / row.stored_size:.2f} times smaller than its data" if row.stored_size else ""
    return {
        "name": row.name,
        "id": row.id.hex(),
        "size": format_size(row.size),
        "data": format_size(data_size),
        "stored": format_size(row.stored_size) + ratio,
        "created": show_time(row.created_ns),
        "newest cut": _show_newest(row),
        "writer": f"{row.writer.hex()} in epoch {row.epoch}{control}" if row.writer else "none",
    }


def family_json(snapshots: Sequence[SnapshotRow]) -> dict[str, Json]:
    """Return what --json prints of a volume's snapshots and the clones made of them."""
    clones = [{"name": name, "snapshot": row.name} for row in snapshots for name in row.clones]
    return {"snapshots": [row.name for row in snapshots], "clones": clones}


def family_fields(row: VolumeRow, snapshots: Sequence[SnapshotRow]) -> dict[str, str]:
    """Return names and values about where a volume comes from and what was made of it; only what there is."""
    fields: dict[str, str] = {}
    if row.origin:
        flattening = ", being flattened" if row.flattening else ""
        fields["clone of"] = f"{row.origin_name}{flattening}"
    if snapshots:
        fields["snapshots"] = _listed([one.name for one in snapshots])
    clones = [f"{name} of {one.name}" for one in snapshots for name in one.clones]
    if clones:
        fields["clones"] = _listed(clones)
    return fields


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN_MAX])
    return shown if len(names) <= NAMES_SHOWN_MAX else f"{shown} and {len(names) - NAMES_SHOWN_MAX} more"


def clean_json(status: CleanStatus) -> dict[str, Json]:
    """Return what --json prints of the cleaner."""
    return {
        "running": status.running,
        "passes": status.passes,
        "segments_freed": status.segments_freed,
        "bytes_freed": status.bytes_freed,
        "bytes_copied": status.bytes_copied,
        "error": status.error or None,
    }


def scrub_json(status: ScrubStatus) -> dict[str, Json]:
    """Return what --json prints of the scrub; times in Unix nanoseconds."""
    return {
        "running": status.running,
        "checked_size": status.checked_size,
        "total_size": status.total_size,
        "damaged": status.damaged,
        "started_ns": status.started_ns or None,
        "finished_ns": status.finished_ns or None,
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

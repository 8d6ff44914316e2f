"""A volume's snapshots: asked for page by page, and as JSON and text."""

from collections.abc import Sequence
from typing import Final

from forebay_core.errors import ProtocolError
from forebay_core.units import epoch_of, format_size, sequence_of
from forebay_tools.printing import Json
from forebay_tools.rows import show_time
from forebay_wire.client import WireClient
from forebay_wire.messages import ListSnapshots, SnapshotRow, Snapshots

HEAD: Final = ("SNAPSHOT", "TAKEN", "SIZE", "UNIQUE", "CLONES", "STATE")


async def all_snapshots(client: WireClient, volume: str) -> list[SnapshotRow]:
    """Return all that the store has, in the order they were taken.

    Raises:
        ForebayError: there is no such volume, or the pages do not go on.
    """
    rows: list[SnapshotRow] = []
    more = True
    while more:
        after = rows[-1].version if rows else 0
        page, _ = await client.ask(ListSnapshots(volume, after), Snapshots)
        if page.more and not (page.rows and page.rows[-1].version > after):
            raise ProtocolError(f"the list of snapshots does not go on behind version {after}")
        rows.extend(page.rows)
        more = page.more
    return rows


def snapshot_json(row: SnapshotRow) -> dict[str, Json]:
    """Return what --json prints of a snapshot: sizes in bytes, times in Unix nanoseconds, null for what is not."""
    return {
        "name": row.name,
        "volume": row.volume_name,
        "id": row.id.hex(),
        "epoch": epoch_of(row.version),
        "sequence": sequence_of(row.version),
        "size": row.size,
        "created_ns": row.created_ns,
        "unique_size": row.unique_size,
        "origin": row.origin.hex() or None,
        "clones": list(row.clones),
        "pending": row.pending,
    }


def pending_json(volume: str, names: Sequence[str]) -> list[dict[str, Json]]:
    """Return the same of snapshots of which only a cache knows, and we only the names."""
    unknown = ("id", "epoch", "sequence", "size", "created_ns", "unique_size", "origin")
    rest: dict[str, Json] = dict.fromkeys(unknown)
    return [{"name": name, "volume": volume, **rest, "clones": [], "pending": True} for name in names]


def snapshot_cells(row: SnapshotRow) -> tuple[str, ...]:
    """Return the cells of a snapshot below HEAD."""
    return (
        row.name,
        show_time(row.created_ns),
        format_size(row.size),
        format_size(row.unique_size),
        ", ".join(row.clones) or "-",
        "pending" if row.pending else "stored",
    )


def pending_cells(name: str) -> tuple[str, ...]:
    """Return the cells of a snapshot of which only a cache knows."""
    return (name, "-", "-", "-", "-", "pending")

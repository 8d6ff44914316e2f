"""What can be read from a store: the newest state of a volume, or a snapshot, a clone's origin included.

A snapshot stays as it is. A volume may change while it is read: whoever needs one state of it compares the version of
every piece with the view's, and asks `check_unchanged` at the end.
"""

from collections.abc import AsyncIterator
from typing import NamedTuple

from forebay_core.errors import ForebayError, ProtocolError
from forebay_core.extents import EXTENT_COUNT_MAX, Extent
from forebay_core.names import parse_snapshot_name
from forebay_core.units import BLOCK_SIZE
from forebay_wire.client import WireClient
from forebay_wire.messages import GetSnapshot, GetVolume, MapExtents, Mapped, Snapshot, SnapshotRow, Volume, VolumeRow
from forebay_wire.pieces import mapped_pieces


class View(NamedTuple):
    """A volume or snapshot as it was when it was asked for. `writer`: a cache holds the volume."""

    id: bytes
    name: str
    size: int
    version: int
    is_snapshot: bool
    writer: bool = False

    @property
    def whole(self) -> Extent:
        """All its blocks."""
        return Extent(0, self.size // BLOCK_SIZE)

    def changed_error(self) -> ForebayError:
        """Return what to raise when the volume changed while it was read."""
        return ForebayError(
            f"volume {self.name} was changed while it was exported; detach it, or take a snapshot and export that"
        )


def view_of_volume(row: VolumeRow) -> View:
    """Return the newest state of a volume."""
    return View(row.id, row.name, row.size, row.version, is_snapshot=False, writer=bool(row.writer))


def view_of_snapshot(row: SnapshotRow) -> View:
    """Return a snapshot."""
    return View(row.id, f"{row.volume_name}@{row.name}", row.size, row.version, is_snapshot=True)


async def find_view(client: WireClient, name: str) -> View:
    """Return the volume `name`, or the snapshot if the name is `volume@snapshot`."""
    if "@" in name:
        snapshot, _ = await client.ask(GetSnapshot(*parse_snapshot_name(name)), Snapshot)
        return view_of_snapshot(snapshot.row)
    volume, _ = await client.ask(GetVolume(name), Volume)
    return view_of_volume(volume.row)


async def check_unchanged(client: WireClient, view: View) -> None:
    """Ask whether the volume is still as it was.

    Raises:
        ForebayError: it is not.
    """
    if not view.is_snapshot:
        answer, _ = await client.ask(GetVolume(view.name), Volume)
        if (answer.row.id, answer.row.version) != (view.id, view.version):
            raise view.changed_error()


async def mapped(client: WireClient, view: View, extent: Extent) -> AsyncIterator[tuple[Extent, bool]]:
    """Yield the pieces of an extent in order, each with whether it is a hole."""
    at = extent.start
    while at < extent.end:
        count = min(extent.end - at, EXTENT_COUNT_MAX)
        answer, _ = await client.ask(MapExtents(view.id, at, count, through=True), Mapped)
        for piece in mapped_pieces(answer.pieces, Extent(at, count)):
            if piece.origin:
                raise origin_error(piece.extent)
            yield piece.extent, piece.hole
            at = piece.extent.end


def origin_error(extent: Extent) -> ProtocolError:
    """Return what to raise when a store leaves blocks to a clone's origin though it was asked to look there itself."""
    return ProtocolError(
        f"the store says of block {extent.start} only that it is its origin's, though it was asked for"
    )

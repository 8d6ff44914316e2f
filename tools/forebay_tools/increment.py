"""Incremental export: what changed since a snapshot becomes a qcow2 image that is laid over the older state.

The image holds the changed blocks; trimmed ones are explicit zeros, and what did not change is not in it. Over the
snapshot's raw image, or over the chain of images up to it, it shows the newer state byte for byte. It is one state of
the volume, as in a whole export, and appears under its name only when it is whole and durable.
"""

import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.memory import keep_freed_memory
from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.exporter import Wanted, copy_wanted, speed, warn_of_writer
from forebay_tools.progress import Progress
from forebay_tools.qcow2_writer import Qcow2Writer
from forebay_tools.target import open_target
from forebay_tools.view import View, find_view, mapped
from forebay_wire.client import WireClient
from forebay_wire.messages import HOLE_FRAME, ORIGIN_FRAME, Changed, Changes, GetSnapshot, Snapshot, SnapshotRow
from forebay_wire.pieces import changed_pieces


class Change(NamedTuple):
    """Blocks that changed, and whether they read as zeros now without being stored."""

    extent: Extent
    hole: bool


async def export_increment(client: WireClient, name: str, since: str, path: Path, *, force: bool) -> str:
    """Write what changed in a volume, or up to a `volume@snapshot`, since its snapshot `since`; return a line about it.

    Raises:
        ForebayError: one of them does not exist or is older, the volume changed meanwhile, or `path` can't be used.
    """
    keep_freed_memory()
    _check_is_no_device(path)
    view = await find_view(client, name)
    base = (await client.ask(GetSnapshot(name.partition("@")[0], since), Snapshot))[0].row
    if base.version > view.version:
        raise ForebayError(f"snapshot {base.volume_name}@{base.name} is newer than {view.name}; give an older one")
    warn_of_writer(view)
    progress = Progress("exporting", view.size, sys.stderr)
    try:
        with open_target(path, 0, force=force) as target:
            image = _Increment(client, view, base, Qcow2Writer(target.descriptor, view.size))
            done = await copy_wanted(
                client, view, image.wanted(), target, lambda _blocks, last: progress.reach(last.end * BLOCK_SIZE)
            )
            image.writer.finish()
    finally:
        progress.close()
    return (
        f"{format_size(done)} of data and {format_size(image.zeroed_blocks * BLOCK_SIZE)} of zeros, changed since "
        f"{base.volume_name}@{base.name}, exported {speed(done, progress)}"
    )


class _Increment:
    """Plans the image: every change becomes clusters, in the order of the disk."""

    def __init__(self, client: WireClient, view: View, base: SnapshotRow, writer: Qcow2Writer) -> None:
        self._client = client
        self._view = view
        self._base = base
        self.writer = writer
        self.zeroed_blocks = 0

    async def wanted(self) -> AsyncIterator[Wanted]:
        """Yield the blocks to copy and where they go; trimmed ones are added to the image on the way."""
        changes = by_clusters(self._changes(), self.writer.cluster_blocks, self._view.whole.end)
        async for extent, hole in changes:
            if hole:
                self.writer.add_zeros(extent)
                self.zeroed_blocks += extent.count
            else:
                for piece, offset in self.writer.add_data(extent):
                    yield Wanted(piece, offset)

    async def _changes(self) -> AsyncIterator[Change]:
        """Yield what changed, within the disk as it is now, in order."""
        start = 0
        while 0 <= start < self._view.whole.end:
            message = Changed(self._view.id, 0, start, self._base.id)
            page, _ = await self._client.ask(message, Changes)
            if page.version != self._view.version:
                raise self._view.changed_error()
            for piece in changed_pieces(page.pieces, start, page.next_start):
                inside = piece.extent.intersect(self._view.whole)
                if inside is None:
                    continue
                if piece.frame == ORIGIN_FRAME:  # a rollback undid the clone's own writes: as its origin has it
                    async for extent, hole in mapped(self._client, self._view, inside):
                        yield Change(extent, hole)
                else:
                    yield Change(inside, piece.frame == HOLE_FRAME)
            start = page.next_start


async def by_clusters(changes: AsyncIterator[Change], cluster: int, end: int) -> AsyncIterator[Change]:
    """Yield sorted changes as whole clusters of so many blocks, touching ones of a kind joined.

    A cluster that changed only in part, or is a hole only in part, is data: it holds the rest as well. The last one
    ends with the disk, at block `end`.
    """
    last: Change | None = None
    async for change in _widened(changes, cluster, end):
        if last is not None and last.hole == change.hole and last.extent.end == change.extent.start:
            last = Change(Extent(last.extent.start, last.extent.count + change.extent.count), last.hole)
            continue
        if last is not None:
            yield last
        last = change
    if last is not None:
        yield last


async def _widened(changes: AsyncIterator[Change], cluster: int, end: int) -> AsyncIterator[Change]:
    begun: Extent | None = None  # a cluster of which not all was seen
    holes = 0  # blocks of it that are holes
    async for extent, hole in changes:
        at = extent.start
        while at < extent.end:
            if begun is not None and at >= begun.end:
                yield Change(begun, holes == begun.count)
                begun = None
            if begun is None:
                first = at // cluster * cluster
                whole = extent.end // cluster * cluster if extent.end < end else end
                if at == first and whole > at:
                    yield Change(Extent(at, whole - at), hole)
                    at = whole
                    continue
                begun, holes = Extent(first, min(cluster, end - first)), 0
            taken = min(extent.end, begun.end) - at
            holes += taken if hole else 0
            at += taken
    if begun is not None:
        yield Change(begun, holes == begun.count)


def _check_is_no_device(path: Path) -> None:
    if path.exists() and stat.S_ISBLK(path.stat().st_mode):
        raise ForebayError(f"{path}: is a block device; what changed since a snapshot goes to a file")

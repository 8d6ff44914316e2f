"""Export: what the store has of a volume becomes a sparse raw file, or fills a block device.

Every block is compared with its checksum before it is written. The result is one version of the volume: if a writer
commits meanwhile, the export fails instead of mixing two. A file appears under its name only when it is whole and
durable; a crash leaves at most a file with a name that ends in `.part`.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError
from forebay_core.extents import EXTENT_COUNT_MAX, Extent, overlapping, pack, subtract
from forebay_core.memory import keep_freed_memory
from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.in_flight import InFlight
from forebay_tools.printing import note
from forebay_tools.progress import Progress
from forebay_tools.target import Target, open_target
from forebay_wire.client import WireClient
from forebay_wire.limits import READ_BLOCKS_MAX
from forebay_wire.messages import Blocks, GetVolume, MapExtents, Mapped, Read, Volume, VolumeRow
from forebay_wire.pieces import mapped_pieces, plain_pieces

READS_IN_FLIGHT_MAX: Final = 8


async def export_volume(client: WireClient, name: str, path: Path, *, force: bool) -> str:
    """Write the volume `name` to `path` and return a line about it.

    Raises:
        ForebayError: there is no such volume, it changed meanwhile, a block is damaged, or `path` can't be used.
    """
    keep_freed_memory()
    answer, _ = await client.ask(GetVolume(name), Volume)
    row = answer.row
    if row.writer:
        note(f"volume {name} is in use; exporting what the store has, which may lack the newest writes: drain it first")
    progress = Progress("exporting", row.data_blocks * BLOCK_SIZE, sys.stderr)
    try:
        with open_target(path, row.size, force=force) as target:
            done = await copy_volume(client, row, target, progress)
    finally:
        progress.close()
    elapsed_s = max(progress.elapsed_s, 1e-3)
    rate = format_size(int(done / elapsed_s))
    return f"{format_size(row.size)}, {format_size(done)} of it data, exported in {elapsed_s:.1f} s ({rate}/s)"


async def copy_volume(
    client: WireClient, row: VolumeRow, target: Target, progress: Progress, *, skip: Sequence[Extent] = ()
) -> int:
    """Write what the store has of a volume to an open target, but for some sorted extents; return bytes of data.

    Raises:
        ForebayError: the volume changed meanwhile, or a block is damaged.
    """
    done = await _Export(client, row, target, progress, skip).run()
    await _check_unchanged(client, row)
    return done


class _Export:
    """One export: reads in flight, and the thread that checks and writes what they bring."""

    def __init__(
        self, client: WireClient, row: VolumeRow, target: Target, progress: Progress, skip: Sequence[Extent]
    ) -> None:
        self._client = client
        self._row = row
        self._target = target
        self._progress = progress
        self._place = f"volume {row.name}"
        self._skip = skip
        self._done_blocks = 0
        self._in_flight = InFlight(READS_IN_FLIGHT_MAX)

    async def run(self) -> int:
        """Copy all and return the bytes that are not holes."""
        with ThreadPoolExecutor(1, "export") as executor:
            try:
                async for batch in self._batches(executor):
                    await self._in_flight.start(self._copy(batch, executor))
                await self._in_flight.finish()
            finally:
                await self._in_flight.close()
        return self._done_blocks * BLOCK_SIZE

    async def _batches(self, executor: ThreadPoolExecutor) -> AsyncIterator[list[Extent]]:
        """Return lists of data extents that one Read may ask for."""
        loop = asyncio.get_running_loop()
        batch: list[Extent] = []
        room = READ_BLOCKS_MAX
        async for extent, hole in self._map():
            if hole:
                if self._target.zero_holes:
                    await loop.run_in_executor(executor, self._target.leave_hole, extent)
                continue
            for wanted in subtract(extent, overlapping(self._skip, extent)):
                rest: Extent | None = wanted
                while rest is not None:
                    taken = Extent(rest.start, min(rest.count, room))
                    rest = Extent(taken.end, rest.count - taken.count) if taken.count < rest.count else None
                    batch.append(taken)
                    room -= taken.count
                    if room == 0:
                        yield batch
                        batch, room = [], READ_BLOCKS_MAX
        if batch:
            yield batch

    async def _map(self) -> AsyncIterator[tuple[Extent, bool]]:
        at, end = 0, self._row.size // BLOCK_SIZE
        while at < end:
            count = min(end - at, EXTENT_COUNT_MAX)
            answer, _ = await self._client.ask(MapExtents(self._row.id, at, count), Mapped)
            for piece in mapped_pieces(answer.pieces, Extent(at, count)):
                yield piece.extent, piece.hole
                at = piece.extent.end

    async def _copy(self, extents: list[Extent], executor: ThreadPoolExecutor) -> None:
        message = Read(self._row.id, pack(extents), self._row.version)
        answer, payload = await self._client.ask(message, Blocks)
        loop = asyncio.get_running_loop()
        blocks = await loop.run_in_executor(executor, self._write, answer.pieces, payload, extents)
        self._done_blocks += blocks
        self._progress.reach(self._done_blocks * BLOCK_SIZE)

    def _write(self, pieces: bytes, payload: memoryview, extents: list[Extent]) -> int:
        blocks = 0
        for piece in plain_pieces(pieces, payload, extents, place=self._place):
            if piece.version > self._row.version:
                raise _changed_error(self._row.name)
            if piece.plain is None:
                self._target.leave_hole(piece.extent)
            else:
                self._target.write(piece.extent, piece.plain)
                blocks += piece.extent.count
        return blocks


async def _check_unchanged(client: WireClient, before: VolumeRow) -> None:
    answer, _ = await client.ask(GetVolume(before.name), Volume)
    if (answer.row.id, answer.row.version) != (before.id, before.version):
        raise _changed_error(before.name)


def _changed_error(name: str) -> ForebayError:
    return ForebayError(f"volume {name} was changed while it was exported; detach it, then export again")

"""Export: what the store has of a volume or snapshot becomes a sparse raw file, or fills a block device.

Every block is compared with its checksum before it is written. The result is one state of the volume: if a writer
commits meanwhile, the export fails instead of mixing two; a snapshot stays as it is. A file appears under its name only
when it is whole and durable; a crash leaves at most a file with a name that ends in `.part`.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from forebay_core.extents import Extent, overlapping, pack, subtract
from forebay_core.memory import keep_freed_memory
from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.in_flight import InFlight
from forebay_tools.printing import note
from forebay_tools.progress import Progress
from forebay_tools.target import Target, open_target
from forebay_tools.view import View, check_unchanged, find_view, mapped, origin_error
from forebay_wire.client import WireClient
from forebay_wire.limits import READ_BLOCKS_MAX
from forebay_wire.messages import Blocks, Read
from forebay_wire.pieces import plain_pieces

READS_IN_FLIGHT_MAX: Final = 8


class Wanted(NamedTuple):
    """Blocks to copy, and the byte of the target where they go."""

    extent: Extent
    offset: int


Reached: TypeAlias = Callable[[int, Extent], None]
"""Told how many blocks were copied so far, and the last extent of what was copied just now."""


async def export_view(client: WireClient, name: str, path: Path, *, force: bool) -> str:
    """Write the volume `name`, or the snapshot if it is `volume@snapshot`, to `path` and return a line about it.

    Raises:
        ForebayError: there is no such volume, it changed meanwhile, a block is damaged, or `path` can't be used.
    """
    keep_freed_memory()
    view = await find_view(client, name)
    warn_of_writer(view)
    data_size = await _data_size(client, view)
    progress = Progress("exporting", data_size, sys.stderr)
    try:
        with open_target(path, view.size, force=force) as target:
            done = await copy_view(client, view, target, progress)
    finally:
        progress.close()
    return f"{format_size(view.size)}, {format_size(done)} of it data, exported {speed(done, progress)}"


def warn_of_writer(view: View) -> None:
    """Tell the user that a cache may hold newer writes."""
    if view.writer:
        note(
            f"volume {view.name} is in use; exporting what the store has, which may lack the newest writes: "
            "drain it first"
        )


def speed(done: int, progress: Progress) -> str:
    """Return in what time, and how fast, so many bytes were transferred."""
    elapsed_s = max(progress.elapsed_s, 1e-3)
    return f"in {elapsed_s:.1f} s ({format_size(int(done / elapsed_s))}/s)"


async def copy_view(
    client: WireClient, view: View, target: Target, progress: Progress, *, skip: Sequence[Extent] = ()
) -> int:
    """Write what the store has to an open target, but for some sorted extents; return bytes of data.

    Raises:
        ForebayError: the volume changed meanwhile, or a block is damaged.
    """
    wanted = _wanted(client, view, target, skip)
    return await copy_wanted(client, view, wanted, target, lambda blocks, _last: progress.reach(blocks * BLOCK_SIZE))


async def copy_wanted(
    client: WireClient, view: View, wanted: AsyncIterator[Wanted], target: Target, reached: Reached
) -> int:
    """Write the wanted blocks where they go in an open target; return bytes of data. Raises as `copy_view`."""
    done = await _Copy(client, view, target, reached).run(wanted)
    await check_unchanged(client, view)
    return done


async def _data_size(client: WireClient, view: View) -> int:
    size = 0
    async for extent, hole in mapped(client, view, view.whole):
        size += 0 if hole else extent.count * BLOCK_SIZE
    return size


async def _wanted(client: WireClient, view: View, target: Target, skip: Sequence[Extent]) -> AsyncIterator[Wanted]:
    """Yield what holds data, each block where it lies in a raw image; make holes on the way where that is needed."""
    async for extent, hole in mapped(client, view, view.whole):
        if not hole:
            for piece in subtract(extent, overlapping(skip, extent)):
                yield Wanted(piece, piece.start * BLOCK_SIZE)
        elif target.zero_holes:
            await asyncio.to_thread(target.leave_hole, extent)


class _Copy:
    """One export: reads in flight, and the thread that checks and writes what they bring."""

    def __init__(self, client: WireClient, view: View, target: Target, reached: Reached) -> None:
        self._client = client
        self._view = view
        self._target = target
        self._reached = reached
        self._place = f"{'snapshot' if view.is_snapshot else 'volume'} {view.name}"
        self._done_blocks = 0
        self._in_flight = InFlight(READS_IN_FLIGHT_MAX)

    async def run(self, wanted: AsyncIterator[Wanted]) -> int:
        """Copy all and return the bytes that are not holes."""
        with ThreadPoolExecutor(1, "export") as executor:
            try:
                async for batch in _batches(wanted):
                    await self._in_flight.start(self._copy(batch, executor))
                await self._in_flight.finish()
            finally:
                await self._in_flight.close()
        return self._done_blocks * BLOCK_SIZE

    async def _copy(self, batch: list[Wanted], executor: ThreadPoolExecutor) -> None:
        extents = pack(one.extent for one in batch)
        message = Read(self._view.id, extents, 0 if self._view.is_snapshot else self._view.version, through=True)
        answer, payload = await self._client.ask(message, Blocks)
        loop = asyncio.get_running_loop()
        # Not `+= await`: that would add to the count as it was before others of these tasks added theirs.
        blocks = await loop.run_in_executor(executor, self._write, answer.pieces, payload, batch)
        self._done_blocks += blocks
        self._reached(self._done_blocks, batch[-1].extent)

    def _write(self, pieces: bytes, payload: memoryview, batch: list[Wanted]) -> int:
        blocks = 0
        following = iter(batch)
        at = next(following)
        for piece in plain_pieces(pieces, payload, [one.extent for one in batch], place=self._place):
            if piece.origin:
                raise origin_error(piece.extent)
            if piece.version > self._view.version:
                raise self._view.changed_error()
            while piece.extent.start >= at.extent.end:  # pieces are in the order of what was asked for
                at = next(following)
            if piece.plain is None:
                self._target.leave_hole(piece.extent)
            else:
                self._target.write_at(at.offset + (piece.extent.start - at.extent.start) * BLOCK_SIZE, piece.plain)
                blocks += piece.extent.count
        return blocks


async def _batches(wanted: AsyncIterator[Wanted]) -> AsyncIterator[list[Wanted]]:
    """Yield lists of what one Read may ask for."""
    batch: list[Wanted] = []
    room = READ_BLOCKS_MAX
    async for extent, offset in wanted:
        at = extent.start
        while at < extent.end:
            taken = Extent(at, min(extent.end - at, room))
            batch.append(Wanted(taken, offset + (at - extent.start) * BLOCK_SIZE))
            at = taken.end
            room -= taken.count
            if room == 0:
                yield batch
                batch, room = [], READ_BLOCKS_MAX
    if batch:
        yield batch

"""Sends the parts of an image to the store as cuts of a volume that we hold.

Frames are built in a thread while the event loop sends; a few parts are in flight. What is staged shows only when its
cut is committed, so a cut that is given up changes nothing.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from forebay_core.extents import pack
from forebay_core.units import BLOCK_SIZE, GIB, sequence_of
from forebay_tools.in_flight import InFlight
from forebay_tools.progress import Progress
from forebay_tools.source import Part
from forebay_wire.client import WireClient
from forebay_wire.limits import PARTS_PER_CUT_MAX
from forebay_wire.messages import CommitCut, Committed, Done, Opened, ReleaseVolume, StagePart

PARTS_IN_FLIGHT_MAX: Final = 4
CUT_SIZE: Final = 1 * GIB


class Sent(NamedTuple):
    """What was sent: blocks of data, blocks of holes, and how many cuts that were committed."""

    blocks: int
    hole_blocks: int
    cuts: int


async def send_all(sender: "CutSender", parts: Iterator[Part], progress: Progress) -> Sent:
    """Send all parts and commit them."""
    blocks = hole_blocks = 0
    try:
        async with contextlib.aclosing(_built_ahead(parts)) as built:
            async for part in built:
                await sender.put(part)
                blocks += part.blocks
                hole_blocks += sum(hole.count for hole in part.holes)
                progress.reach(part.done)
        await sender.commit()
    finally:
        await sender.close()
    return Sent(blocks, hole_blocks, sender.committed_cuts)


async def release(client: WireClient, opened: Opened) -> None:
    """Give the right to write back."""
    await client.ask(ReleaseVolume(opened.row.id, opened.epoch, opened.session), Done)


async def _built_ahead(parts: Iterator[Part]) -> AsyncGenerator[Part, None]:
    """Return the parts; the next one is built in a thread while the caller sends the last."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, "frames") as executor:
        following = loop.run_in_executor(executor, next, parts, None)
        try:
            while (part := await following) is not None:
                following = loop.run_in_executor(executor, next, parts, None)
                yield part
        finally:
            following.cancel()


class CutSender:
    """Stages parts, a few at once, and commits a cut whenever it holds `cut_size` bytes of data."""

    def __init__(self, client: WireClient, opened: Opened, *, cut_size: int = CUT_SIZE) -> None:
        self._client = client
        self._opened = opened
        self._cut_size = cut_size
        self.committed_cuts = 0
        self._sequence = int(sequence_of(opened.row.version))
        self._attempt = secrets.randbits(63)
        self._part_count = 0
        self._blocks = 0
        self._in_flight = InFlight(PARTS_IN_FLIGHT_MAX)

    async def put(self, part: Part) -> None:
        """Send a part; waits while too many are in flight. Raises what failed of those before."""
        message = StagePart(
            self._opened.row.id,
            self._opened.epoch,
            self._opened.session,
            self._attempt,
            self._part_count,
            pack(part.holes),
        )
        await self._in_flight.start(self._client.ask(message, Done, part.frames))
        self._part_count += 1
        self._blocks += part.blocks
        if self._blocks * BLOCK_SIZE >= self._cut_size or self._part_count == PARTS_PER_CUT_MAX:
            await self.commit()

    async def commit(self) -> None:
        """Make what was put visible and durable; each part counts as one change."""
        await self._in_flight.finish()
        if self._part_count == 0:
            return
        message = CommitCut(
            self._opened.row.id,
            self._opened.epoch,
            self._opened.session,
            self._attempt,
            self._part_count,
            first=self._sequence + 1,
            last=self._sequence + self._part_count,
            committed_ns=time.time_ns(),
        )
        await self._client.ask(message, Committed)
        self.committed_cuts += 1
        self._sequence = message.last
        self._attempt = secrets.randbits(63)
        self._part_count = self._blocks = 0

    async def close(self) -> None:
        """Give up what is still in flight."""
        await self._in_flight.close()

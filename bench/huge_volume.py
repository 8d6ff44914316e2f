"""A store with a volume of 1 TiB in ten million extents, and beside it one of 1 GiB that is filled alike.

    python bench/huge_volume.py FOLDER      makes it, in two to four minutes

Every 26th block is written, by itself, so each is an entry of the index. The blocks are alike, so that the segments
are small: what is measured on it are the index and what goes along it.
"""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from clean_rows import DEVICE, connected
from forebay_core.checksums import block_checksums
from forebay_core.extents import Extent
from forebay_core.frame import CODEC_ZSTD, FRAME_BLOCKS_MAX, FrameBuilder, decode_header, encode_frame
from forebay_core.units import BLOCK_SIZE, GIB
from forebay_wire import messages
from forebay_wire.client import WireClient
from servers import Store

HUGE, HUGE_SIZE = "huge", 1024 * GIB
SMALL, SMALL_SIZE = "small", GIB
STRIDE = 26
HUGE_EXTENTS = 10_000_000
SMALL_EXTENTS = SMALL_SIZE // BLOCK_SIZE // STRIDE
PART_EXTENTS = 4096
PARTS_PER_CUT = 32
assert HUGE_EXTENTS * STRIDE <= HUGE_SIZE // BLOCK_SIZE


class AlikeFrames:
    """Makes frames whose blocks are always the same ones."""

    def __init__(self) -> None:
        self._plain = b"".join(bytes([1 + index]) * BLOCK_SIZE for index in range(FRAME_BLOCKS_MAX))
        self._checksums = block_checksums(memoryview(self._plain)).tolist()
        whole = FrameBuilder().build([Extent(0, FRAME_BLOCKS_MAX)], self._plain, self._checksums)
        self._stored = whole[decode_header(whole, place="frame").stored_offset :]

    def of(self, blocks: Sequence[int]) -> list[bytes]:
        """Return frames of single blocks; their number is a multiple of a frame's."""
        assert len(blocks) % FRAME_BLOCKS_MAX == 0
        return [
            encode_frame(
                CODEC_ZSTD,
                [Extent(block, 1) for block in blocks[at : at + FRAME_BLOCKS_MAX]],
                self._checksums,
                self._stored,
            )
            for at in range(0, len(blocks), FRAME_BLOCKS_MAX)
        ]


class Holder:
    """Holds a volume and sends cuts of it, as a cache does."""

    def __init__(self, client: WireClient, opened: messages.Opened) -> None:
        self.id = opened.row.id
        self._client = client
        self._opened = opened
        self._last = opened.row.version & ((1 << 44) - 1)

    @classmethod
    async def open(cls, client: WireClient, name: str) -> "Holder":
        """Open a volume."""
        opened, _ = await client.ask(messages.OpenVolume(name, DEVICE), messages.Opened)
        return cls(client, opened)

    async def send(self, parts: Sequence[Sequence[bytes]]) -> None:
        """Send a cut of parts."""
        self._last += 1
        key = (self.id, self._opened.epoch, self._opened.session, self._last)
        for index, frames in enumerate(parts):
            await self._client.ask(messages.StagePart(*key, index), messages.Done, frames)
        commit = messages.CommitCut(*key, len(parts), self._last, self._last, self._last)
        await self._client.ask(commit, messages.Committed)

    async def release(self) -> None:
        """Let the volume go."""
        message = messages.ReleaseVolume(self.id, self._opened.epoch, self._opened.session)
        await self._client.ask(message, messages.Done)


async def fill(address: str) -> None:
    """Make both volumes."""
    frames = AlikeFrames()
    async with connected(address) as client:
        for name, size, extents in ((SMALL, SMALL_SIZE, SMALL_EXTENTS), (HUGE, HUGE_SIZE, HUGE_EXTENTS)):
            await client.ask(messages.CreateVolume(name, size), messages.Volume)
            holder = await Holder.open(client, name)
            for cut in _cuts(extents - extents % FRAME_BLOCKS_MAX):
                await holder.send([frames.of(part) for part in cut])
            await holder.release()


def _cuts(extents: int) -> Iterator[list[range]]:
    """Yield the blocks of the parts of each cut."""
    parts = [
        range(at * STRIDE, min(at + PART_EXTENTS, extents) * STRIDE, STRIDE) for at in range(0, extents, PART_EXTENTS)
    ]
    for at in range(0, len(parts), PARTS_PER_CUT):
        yield parts[at : at + PARTS_PER_CUT]


def make(folder: Path) -> None:
    """Make the store in a folder that does not exist yet."""
    store = Store(folder)
    try:
        asyncio.run(fill(store.address))
    finally:
        store.stop()


if __name__ == "__main__":
    began_s = time.monotonic()
    make(Path(sys.argv[1]))
    print(f"made in {time.monotonic() - began_s:.0f} s")

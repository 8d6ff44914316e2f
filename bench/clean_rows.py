"""Space and the price of it: what the store takes, what it writes for that, and what clients feel of the cleaner.

Cuts of 4 MiB of random blocks in frames of 16 are sent over the wire, as a cache would. Disk use is held: a writer
waits
while the segments take more than HELD times what lives. What is counted are segments; NOTE tells what comes on top.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fio import BenchError
from forebay_core.extents import Extent, from_blocks, pack
from forebay_core.frame import FRAME_BLOCKS_MAX, FrameBuilder
from forebay_core.units import BLOCK_SIZE
from forebay_wire import messages
from forebay_wire.address import parse_address
from forebay_wire.client import WireClient
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Store

Blocks = npt.NDArray[np.int64]
BLOCKS = 32768
STILL_BLOCKS = 8192
CUT_BLOCKS = 1024
PASSES = 10
UNIFORM_PASSES = 6
HELD = 1.37
DEVICE = b"device of bench!"
YIELD_S = 3.0
SLOWEST = "512KiB/s"
NOTE = "128 MiB of blocks that do not compress; segments only: LMDB writes about as much again for scattered blocks"


class Outcome(NamedTuple):
    """What a run took."""

    rest: float  # bytes of segments over live ones when the cleaner rests
    peak: float  # the highest during the passes
    written: float  # bytes of segments written over bytes received


def measure(plan: Plan) -> list[Row]:
    """Return the rows; one run of each is enough, because it counts bytes."""
    rows: list[Row] = []
    if "clean" in plan.keys:
        rows += _space_rows(plan.folder)
    if "yield" in plan.keys:
        rows += _yield_rows(plan)
    return rows


def _space_rows(folder: Path) -> list[Row]:
    rows = [
        Row("clean", f"segments over live bytes, {PASSES} permutation passes", "ratio", Goal(1.25, None, True), NOTE),
        Row("clean", "the same at its highest, clients wait at 1.37", "ratio", Goal(1.4, None, True), NOTE),
        Row("clean", "bytes written for each received", "ratio", Goal(1.6, 1.3, True), NOTE),
        Row("clean", "bytes written for each received, uniform overwrites", "ratio", Goal(), NOTE),
    ]
    permuted = _run(folder, lambda chance: _permutations(chance))
    uniform = _run(folder, lambda chance: _uniform(chance))
    for row, value in zip(rows, (permuted.rest, permuted.peak, permuted.written, uniform.written), strict=True):
        row.add(OURS, Sample(value))
    return rows


def _permutations(chance: np.random.Generator) -> Iterator[Blocks]:
    for _ in range(PASSES):
        order = chance.permutation(BLOCKS)
        yield from (np.sort(order[at : at + CUT_BLOCKS]) for at in range(0, BLOCKS, CUT_BLOCKS))


def _uniform(chance: np.random.Generator) -> Iterator[Blocks]:
    yield from (np.arange(at, at + CUT_BLOCKS) for at in range(0, BLOCKS, CUT_BLOCKS))
    for _ in range(UNIFORM_PASSES * BLOCKS // CUT_BLOCKS):
        yield np.unique(chance.integers(0, BLOCKS, CUT_BLOCKS))


def _run(folder: Path, blocks: Callable[[np.random.Generator], Iterator[Blocks]]) -> Outcome:
    store = Store(folder / "store")
    try:
        return asyncio.run(_passes(store.address, blocks(np.random.default_rng(1))))
    finally:
        store.stop()
        _remove(folder / "store")


async def _passes(address: str, cuts: Iterator[Blocks]) -> Outcome:
    async with connected(address) as client:
        writer = await Writer.create(client, "vm")
        received = count = 0
        peak = 0.0
        for blocks in cuts:
            received += await writer.cut(blocks)
            count += len(blocks)
            status = await _status(client)
            while count > BLOCKS and status.segment_bytes > HELD * status.live_bytes:
                await asyncio.sleep(0.02)
                status = await _status(client)
            if count > BLOCKS:
                peak = max(peak, status.segment_bytes / status.live_bytes)
        status = await clean(client)
        written = (status.segment_bytes + status.clean.bytes_freed) / received
        return Outcome(status.segment_bytes / status.live_bytes, peak, written)


class Writer:
    """Sends cuts, as a cache does."""

    def __init__(self, client: WireClient, opened: messages.Opened) -> None:
        self.id = opened.row.id
        self._client = client
        self._opened = opened
        self._last = opened.row.version & ((1 << 44) - 1)
        self._builder = FrameBuilder()
        self._chance = np.random.default_rng(2)

    @classmethod
    async def create(cls, client: WireClient, name: str) -> "Writer":
        """Make a volume and open it."""
        await client.ask(messages.CreateVolume(name, BLOCKS * BLOCK_SIZE), messages.Volume)
        return await cls.open(client, name)

    @classmethod
    async def open(cls, client: WireClient, name: str) -> "Writer":
        """Open a volume."""
        opened, _ = await client.ask(messages.OpenVolume(name, DEVICE), messages.Opened)
        return cls(client, opened)

    def frames(self, blocks: Blocks) -> list[bytes]:
        """Return frames of random content."""
        plain = self._chance.bytes(len(blocks) * BLOCK_SIZE)
        frames = []
        for at in range(0, len(blocks), FRAME_BLOCKS_MAX):
            some = blocks[at : at + FRAME_BLOCKS_MAX]
            frames.append(
                self._builder.build(from_blocks(some), plain[at * BLOCK_SIZE : (at + len(some)) * BLOCK_SIZE])
            )
        return frames

    async def cut(self, blocks: Blocks) -> int:
        """Send a cut; return its bytes."""
        return await self.send(self.frames(blocks))

    async def send(self, frames: list[bytes]) -> int:
        """Send a cut of these frames; return its bytes."""
        self._last += 1
        key = (self.id, self._opened.epoch, self._opened.session, self._last)
        await self._client.ask(messages.StagePart(*key, 0), messages.Done, frames)
        await self._client.ask(messages.CommitCut(*key, 1, self._last, self._last, self._last), messages.Committed)
        return sum(map(len, frames))


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[WireClient]:
    """Lend a client of the store."""
    client = await WireClient.connect(parse_address(address), key=None, node=DEVICE, timeout_s=30)
    try:
        yield client
    finally:
        await client.close()


async def _status(client: WireClient) -> messages.StoreStatus:
    status, _ = await client.ask(messages.GetStoreStatus(), messages.StoreStatus)
    return status


async def clean(client: WireClient) -> messages.StoreStatus:
    """Let the store clean until it rests."""
    before = await _status(client)
    await client.ask(messages.CleanStore(), messages.Done)
    status = before
    while status.clean.passes == before.clean.passes:
        await asyncio.sleep(0.1)
        status = await _status(client)
    return status


def _yield_rows(plan: Plan) -> list[Row]:
    note = "of volumes that are not cleaned, over the same at rest; the cleaner copies at its default rate meanwhile"
    rows = {
        "cuts": Row("yield", "cuts of 1 MiB while cleaning", "ratio", Goal(0.85, 0.98), note),
        "reads": Row("yield", "reads of 16 KiB while cleaning", "ratio", Goal(0.85, 0.98), note),
    }
    for _ in range(min(3, plan.rounds)):
        for key, ratio in _yield_round(plan.folder).items():
            rows[key].add(OURS, Sample(ratio))
    return list(rows.values())


def _yield_round(folder: Path) -> dict[str, float]:
    """Make garbage with a cleaner that hardly moves, then measure with one that does, and after it."""
    try:
        slow = Store(folder / "store", "--clean-rate", SLOWEST)
        try:
            asyncio.run(_make_garbage(slow.address))
        finally:
            slow.stop()
        store = Store(folder / "store")
        try:
            return asyncio.run(_compare(store.address))
        finally:
            store.stop()
    finally:
        _remove(folder / "store")


async def _make_garbage(address: str) -> None:
    """Overwrite blocks faster than the cleaner copies, but not to where it stops being patient."""
    chance = np.random.default_rng(3)
    async with connected(address) as client:
        writer = await Writer.create(client, "vm")
        for at in range(0, BLOCKS, CUT_BLOCKS):
            await writer.cut(np.arange(at, at + CUT_BLOCKS))
        for _ in range(10):
            await writer.cut(np.unique(chance.integers(0, BLOCKS, CUT_BLOCKS)))
        await Writer.create(client, "fresh")
        still = await Writer.create(client, "still")
        for at in range(0, STILL_BLOCKS, CUT_BLOCKS):
            await still.cut(np.arange(at, at + CUT_BLOCKS))


async def _compare(address: str) -> dict[str, float]:
    """Cuts write blocks for the first time and reads are of blocks that stay where they are, so that neither has
    another layout, or leaves garbage, when the cleaner rests."""
    async with connected(address) as client, connected(address) as operator:
        reader = await Writer.open(client, "still")
        writer = await Writer.open(client, "fresh")
        cuts = [writer.frames(np.arange(at, at + 256)) for at in range(0, BLOCKS, 256)]
        half = len(cuts) // 2
        await operator.ask(messages.CleanStore(), messages.Done)
        busy = await _rates(client, reader, writer, cuts[:half])
        cleaning = (await _status(operator)).clean
        if not cleaning.running or not cleaning.bytes_copied:
            raise BenchError("the cleaner was through before the measurement was")
        await clean(operator)
        idle = await _rates(client, reader, writer, cuts[half:])
    return {key: busy[key] / idle[key] for key in busy}


async def _rates(client: WireClient, reader: Writer, writer: Writer, cuts: list[list[bytes]]) -> dict[str, float]:
    chance = np.random.default_rng(4)
    waiting = iter(cuts)

    async def cut() -> bool:
        frames = next(waiting, None)
        if frames is not None:
            await writer.send(frames)
        return frames is not None

    async def read() -> bool:
        extent = Extent(int(chance.integers(0, STILL_BLOCKS - 4)), 4)
        await client.ask(messages.Read(reader.id, pack([extent])), messages.Blocks)
        return True

    return {"reads": await _rate(read), "cuts": await _rate(cut)}


async def _rate(step: Callable[[], Awaitable[bool]]) -> float:
    began_s = time.monotonic()
    count = 0
    while time.monotonic() - began_s < YIELD_S / 2 and await step():
        count += 1
    return count / (time.monotonic() - began_s)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)

"""A real store daemon in a process of its own, and what a cache would send to it."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from forebay_core.extents import Extent, pack
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE
from forebay_wire import messages
from forebay_wire.address import Address, parse_address
from forebay_wire.client import WireClient

DEVICE = b"device-of-a-test"
_PROGRAM = """
import sys
from pathlib import Path
from forebay_core.config import StoreSettings
from forebay_core.errors import ForebayError
from forebay_store.service.daemon import run
data, listen, key_file = sys.argv[1:]
try:
    sys.exit(run(StoreSettings(data=Path(data), listen=listen, key_file=Path(key_file) if key_file else None)))
except ForebayError as error:
    print(f"forebay: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


class StoreDaemon:
    """Runs until `kill` or `stop`; use it as a context manager."""

    def __init__(
        self, data: Path, *, key_file: Path | None = None, listen: str = "127.0.0.1:0", files_max: int | None = None
    ) -> None:
        self.data = data
        limit = [] if files_max is None else ["prlimit", f"--nofile={files_max}:{files_max}"]
        self.process = subprocess.Popen(
            [*limit, sys.executable, "-c", _PROGRAM, str(data), listen, str(key_file or "")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.address: Address | None = None
        if line.startswith("store listening on "):
            self.address = parse_address(line.split()[-1])

    def __enter__(self) -> "StoreDaemon":
        assert self.address is not None, self.end()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self.end()

    def kill(self) -> None:
        """As the OOM killer would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> int:
        """End it cleanly; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def end(self) -> str:
        """Return what it said on stderr, after its end."""
        _, errors = self.process.communicate(timeout=30)
        return errors

    async def connect(self, key: bytes | None = None, *, node: bytes = b"") -> WireClient:
        """Return a client, somebody new unless `node` says who."""
        assert self.address is not None
        return await WireClient.connect(self.address, key=key, node=node or os.urandom(16), timeout_s=10)

    @asynccontextmanager
    async def client(self, key: bytes | None = None) -> AsyncIterator[WireClient]:
        """Lend a client."""
        client = await self.connect(key)
        try:
            yield client
        finally:
            await client.close()


def plain(seed: object, count: int = 1) -> bytes:
    """Return blocks that compress badly and tell their seed."""
    return random.Random(str(seed)).randbytes(count * BLOCK_SIZE)


def frame(start: int, seed: object, count: int = 1) -> bytes:
    """Return a frame of one extent."""
    return FrameBuilder().build([Extent(start, count)], plain(seed, count))


class Writer:
    """Writes cuts to an open volume, as a cache does."""

    def __init__(self, client: WireClient, opened: messages.Opened) -> None:
        self.client = client
        self.opened = opened
        self.last = opened.row.version & ((1 << 44) - 1)
        self.attempt = random.Random(opened.session).getrandbits(63)

    @classmethod
    async def open(cls, client: WireClient, name: str, **options: object) -> "Writer":
        """Open a volume."""
        request = messages.OpenVolume(name, options.pop("device", DEVICE), **options)  # type: ignore[arg-type]
        opened, _ = await client.ask(request, messages.Opened)
        return cls(client, opened)

    async def stage(
        self, index: int, frames: Sequence[bytes], holes: Sequence[Extent] = (), *, attempt: int | None = None
    ) -> None:
        """Stage one part."""
        part = messages.StagePart(
            self.opened.row.id,
            self.opened.epoch,
            self.opened.session,
            self.attempt if attempt is None else attempt,
            index,
            pack(holes),
        )
        await self.client.ask(part, messages.Done, frames)

    async def commit(
        self,
        part_count: int,
        *,
        first: int | None = None,
        last: int | None = None,
        attempt: int | None = None,
        **closing: object,
    ) -> messages.Committed:
        """Commit the parts of the present attempt; `closing` are the fields of a change that closes the cut."""
        first = self.last + 1 if first is None else first
        last = first if last is None else last
        request = messages.CommitCut(
            self.opened.row.id,
            self.opened.epoch,
            self.opened.session,
            self.attempt if attempt is None else attempt,
            part_count,
            first,
            last,
            committed_ns=last * 1000,
            **closing,  # type: ignore[arg-type]
        )
        committed, _ = await self.client.ask(request, messages.Committed)
        self.last = last
        self.attempt += 1
        return committed

    async def write(self, start: int, seed: object, count: int = 1) -> messages.Committed:
        """Write one extent as a cut of its own."""
        await self.stage(0, [frame(start, seed, count)])
        return await self.commit(1)

    async def release(self) -> None:
        """Give the volume back."""
        request = messages.ReleaseVolume(self.opened.row.id, self.opened.epoch, self.opened.session)
        await self.client.ask(request, messages.Done)


async def create(client: WireClient, name: str, blocks: int) -> messages.VolumeRow:
    """Create a volume."""
    reply, _ = await client.ask(messages.CreateVolume(name, blocks * BLOCK_SIZE), messages.Volume)
    return reply.row


def run(coroutine: object) -> None:
    """Run a test's coroutine, with a deadline."""
    asyncio.run(asyncio.wait_for(coroutine, 120))  # type: ignore[arg-type]

"""Answers commands over the socket in the run directory, and over TCP with a key.

A command that a client no longer waits for goes on. Every command may be repeated; a snapshot that was taken already
is refused then.
"""

from collections.abc import Sequence
from typing import Protocol

from forebay_cache.engine.limits import RECORDING_SIZE_MAX, SAMPLE_SIZE_MAX
from forebay_core.errors import RefusedError
from forebay_core.units import Buffer
from forebay_wire import messages
from forebay_wire.address import Address, UnixPath
from forebay_wire.messages import (
    AnyMessage,
    Attach,
    Attached,
    CacheStatus,
    CreateSnapshot,
    Detach,
    Done,
    Drain,
    GetCacheStatus,
    GetSample,
    RecordTrace,
    ResizeVolume,
    Sample,
    SetLimit,
    SnapshotRow,
    SnapshotTaken,
    TakeTrace,
    TraceRows,
    Volume,
    VolumeRow,
)
from forebay_wire.peer import Peer
from forebay_wire.server import WireServer


class Commands(Protocol):
    """What the daemon can be told. Everything may raise a ForebayError."""

    async def attach(self, name: str, *, read_only: bool, take_over: bool, front: str, block_size: int) -> Attached:
        """Open a volume and serve it; return where."""

    async def detach(self, name: str, *, leave_dirty: bool, timeout_ms: int) -> None:
        """Destage (unless told to leave it), stop serving, give back."""

    async def drain(self, name: str) -> None:
        """Destage all that was acknowledged before."""

    async def limit(self, name: str, *, average: int, peak: int, reset: bool) -> None:
        """Limit the destaging of a volume, or with an empty name of all together."""

    async def snapshot(self, volume: str, name: str, *, stored: bool) -> SnapshotRow:
        """Take a snapshot of an attached volume; with `stored` wait for the store."""

    async def resize(self, name: str, size: int) -> VolumeRow:
        """Make an attached volume larger."""

    async def status(self) -> CacheStatus:
        """Tell how everything is."""

    def sample(self) -> tuple[Sample, Sequence[Buffer]]:
        """Tell which blocks were used lately, of those that are sampled."""

    def record(self, who: object, name: str) -> None:
        """Record for a connection what is asked of a volume, or with an empty name of all."""

    async def take_trace(self, who: object, *, last: bool) -> tuple[TraceRows, Sequence[Buffer]]:
        """Return what was recorded for a connection since the last time."""

    def lost_connection(self, who: object) -> None:
        """A connection is gone."""


class ControlServer:
    """The servers over the local socket and TCP; the local one needs no key, its folder's mode guards it."""

    def __init__(self, commands: Commands, *, key: bytes | None, device: bytes) -> None:
        self._commands = commands
        self._local = WireServer(self._answer, key=None, node=device, on_disconnect=commands.lost_connection)
        self._remote = WireServer(self._answer, key=key, node=device, on_disconnect=commands.lost_connection)

    async def listen_unix(self, path: str) -> None:
        """Listen in the run directory. Raises what WireServer.listen_unix does."""
        await self._local.listen_unix(UnixPath(path))

    async def listen_tcp(self, address: Address) -> Address:
        """Listen on TCP and return the real port; beyond loopback only with a key (WrongUsageError)."""
        return await self._remote.listen_tcp(address)

    async def close(self, grace_s: float) -> None:
        """Let commands end for `grace_s`, then cancel them."""
        await self._local.close(grace_s)
        await self._remote.close(grace_s)

    async def _answer(
        self, peer: Peer, message: AnyMessage, _payload: memoryview
    ) -> tuple[AnyMessage, Sequence[Buffer]]:
        match message:
            case Attach():
                attached = await self._commands.attach(
                    message.name,
                    read_only=message.read_only,
                    take_over=message.take_over,
                    front=message.front,
                    block_size=message.block_size,
                )
                return attached, ()
            case Detach():
                await self._commands.detach(
                    message.name, leave_dirty=message.leave_dirty, timeout_ms=message.timeout_ms
                )
            case Drain():
                await self._commands.drain(message.name)
            case SetLimit():
                await self._commands.limit(
                    message.name, average=message.average, peak=message.peak, reset=message.reset
                )
            case CreateSnapshot():
                if len(message.volumes) != 1:
                    text = f"a snapshot of {len(message.volumes)} volumes was asked for: one at a time"
                    raise RefusedError(messages.BAD_REQUEST, text)
                row = await self._commands.snapshot(message.volumes[0], message.snapshot, stored=message.stored)
                return SnapshotTaken(row), ()
            case ResizeVolume():
                return Volume(await self._commands.resize(message.name, message.size)), ()
            case GetCacheStatus():
                return await self._commands.status(), ()
            case GetSample():
                await peer.reserve(SAMPLE_SIZE_MAX)
                return self._commands.sample()
            case RecordTrace():
                if not peer.closed:  # else nobody would end it
                    self._commands.record(peer, message.name)
            case TakeTrace():
                await peer.reserve(RECORDING_SIZE_MAX)
                return await self._commands.take_trace(peer, last=message.last)
            case _:
                raise RefusedError(
                    messages.BAD_REQUEST,
                    f"{type(message).__name__} is for a store; this is a cache daemon",
                )
        return Done(), ()

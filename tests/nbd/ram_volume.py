"""Volumes in memory with real holes: the twin of the cache for tests and benchmarks of the NBD front."""

import asyncio
import mmap
import random
from collections.abc import Callable, Sequence

from forebay_cache.engine.front import (
    Allocation,
    AllocationReply,
    Change,
    ChangesReply,
    Chunk,
    IoError,
    ReadReply,
    Reply,
)
from forebay_core.units import BLOCK_SIZE, Buffer

OK = IoError.OK


class RamVolume:
    """An in-memory FrontVolume. Blocks never written, trimmed or zeroed are holes."""

    def __init__(self, name: str, size: int, *, read_only: bool = False) -> None:
        self.name = name
        self.size = size
        self.read_only = read_only
        self.memory = mmap.mmap(-1, size)  # zeros that cost nothing until they are written
        self.view = memoryview(self.memory)
        self.written = bytearray(-(-size // BLOCK_SIZE))  # 1: holds data
        self.calls: list[str] = []
        self.clients = 0
        self.kicks = 0
        self.failure = OK
        self.dirty: dict[str, list[tuple[int, int]]] = {}  # by snapshot: bytes from here to there changed since

    def read(self, offset: int, length: int, reply: ReadReply) -> None:
        if self.failure:
            reply(self.failure, ())
            return
        if self.written.find(0, offset >> 12, (offset + length + 4095) >> 12) < 0:
            reply(OK, (Chunk(length, self.view[offset : offset + length]),))
            return
        chunks = []
        for piece, hole in self._extents(offset, length):
            chunks.append(Chunk(piece, None if hole else self.view[offset : offset + piece]))
            offset += piece
        reply(OK, chunks)

    def write(self, offset: int, payload: Buffer, fua: bool, reply: Reply) -> None:
        if self.failure:
            reply(self.failure)
            return
        length = len(payload)
        self.view[offset : offset + length] = payload
        first, last = offset >> 12, (offset + length + 4095) >> 12
        if last - first == 1:
            self.written[first] = 1
        else:
            self.written[first:last] = b"\1" * (last - first)
        reply(OK)

    def flush(self, reply: Reply) -> None:
        self.calls.append("flush")
        reply(self.failure)

    def trim(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        self.calls.append(f"trim {offset} {length} {fua}")
        first, last = -(-offset // BLOCK_SIZE), (offset + length) // BLOCK_SIZE
        if offset + length == self.size:
            last = len(self.written)
        self._drop(first, last)
        reply(self.failure)

    def write_zeroes(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        self.calls.append(f"zero {offset} {length} {fua}")
        end = offset + length
        first, last = -(-offset // BLOCK_SIZE), end // BLOCK_SIZE
        if first <= last:
            self.view[offset : first * BLOCK_SIZE] = bytes(first * BLOCK_SIZE - offset)
            self._drop(first, last)
            self.view[last * BLOCK_SIZE : end] = bytes(end - last * BLOCK_SIZE)
        else:
            self.view[offset:end] = bytes(length)
        reply(self.failure)

    def prefetch(self, offset: int, length: int, reply: Reply) -> None:
        self.calls.append(f"prefetch {offset} {length}")
        reply(self.failure)

    def allocation(self, offset: int, length: int, reply: AllocationReply) -> None:
        if self.failure:
            reply(self.failure, ())
        else:
            reply(OK, [Allocation(piece, hole) for piece, hole in self._extents(offset, length)])

    def tracked(self) -> Sequence[str]:
        return sorted(self.dirty)

    def changes(self, snapshot: str, offset: int, length: int, reply: ChangesReply) -> None:
        runs, at = [], offset
        for start, end in self.dirty[snapshot]:
            start, end = max(start, at), min(end, offset + length)
            if start < end:
                runs += [Change(start - at, False)] * (start > at) + [Change(end - start, True)]
                at = end
        runs += [Change(offset + length - at, False)] * (at < offset + length)
        reply(self.failure, runs)

    def kick(self) -> None:
        self.kicks += 1

    def connected(self) -> None:
        self.clients += 1

    def disconnected(self) -> None:
        self.clients -= 1

    def _drop(self, first: int, last: int) -> None:
        """Make whole blocks holes; only what was written costs time."""
        at = self.written.find(1, first, last)
        while at >= 0:
            end = self.written.find(0, at, last)
            end = last if end < 0 else end
            stop = min(end * BLOCK_SIZE, self.size)
            self.view[at * BLOCK_SIZE : stop] = bytes(stop - at * BLOCK_SIZE)
            self.written[at:end] = bytes(end - at)
            at = self.written.find(1, end, last)

    def _extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        extents = []
        end = offset + length
        while offset < end:
            block = offset >> 12
            state = self.written[block]
            stop = self.written.find(1 - state, block)
            stop = end if stop < 0 else min(end, stop << 12)
            extents.append((stop - offset, state == 0))
            offset = stop
        return extents


class LateVolume(RamVolume):
    """Answers later and out of order: between 0 and `delay_s` after the call, or when `release` is called."""

    def __init__(self, name: str, size: int, *, delay_s: float | None, seed: int = 1) -> None:
        super().__init__(name, size)
        self._delay_s = delay_s
        self._random = random.Random(seed)
        self.parked: list[Callable[[], None]] = []

    def _later(self, answer: Callable[[], None]) -> None:
        if self._delay_s is None:
            self.parked.append(answer)
        else:
            asyncio.get_running_loop().call_later(self._random.random() * self._delay_s, answer)

    def release(self, order: Callable[[list[Callable[[], None]]], None] | None = None) -> int:
        """Answer all that is parked, in the order that `order` brings it into; return how many."""
        parked, self.parked = self.parked, []
        if order is not None:
            order(parked)
        for answer in parked:
            answer()
        return len(parked)

    def read(self, offset: int, length: int, reply: ReadReply) -> None:
        """The bytes are those at the time of the call, as from a log that is never overwritten."""
        found: list[tuple[IoError, list[Chunk]]] = []

        def keep(error: IoError, chunks: Sequence[Chunk]) -> None:
            copies = [Chunk(n, None if buffer is None else bytes(buffer)) for n, buffer in chunks]
            found.append((error, copies))

        super().read(offset, length, keep)
        self._later(lambda: reply(*found[0]))

    def write(self, offset: int, payload: Buffer, fua: bool, reply: Reply) -> None:
        """The payload is only read when the answer comes: it must still be there, unchanged."""
        self._later(lambda: RamVolume.write(self, offset, payload, fua, reply))

    def flush(self, reply: Reply) -> None:
        self._later(lambda: RamVolume.flush(self, reply))

    def trim(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        self._later(lambda: RamVolume.trim(self, offset, length, fua, reply))

    def write_zeroes(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        self._later(lambda: RamVolume.write_zeroes(self, offset, length, fua, reply))

    def prefetch(self, offset: int, length: int, reply: Reply) -> None:
        self._later(lambda: RamVolume.prefetch(self, offset, length, reply))

    def allocation(self, offset: int, length: int, reply: AllocationReply) -> None:
        self._later(lambda: RamVolume.allocation(self, offset, length, reply))


class RamExports:
    """The Exports twin."""

    def __init__(self, *volumes: RamVolume) -> None:
        self.volumes = {volume.name: volume for volume in volumes}

    def find(self, name: str) -> RamVolume | None:
        if name == "" and len(self.volumes) == 1:
            return next(iter(self.volumes.values()))
        return self.volumes.get(name)

    def names(self) -> Sequence[str]:
        return sorted(self.volumes)

"""The cache's SSD: bytes that programs see, bytes that a power cut leaves, and the writes in between.

`SimDevice` stands for `service/device.py`: one writer thread that carries writes out in order, one thread that syncs,
reads beside them, and refusal of everything after a failed write or sync.

Invariants:
    A sync makes durable what was written when it began; what was written meanwhile may be.
    A power cut keeps any subset, in sectors of 512 bytes, of the writes that no sync covers and of those in flight.
    A kill loses nothing that was written; the write in flight may be there up to some page.
"""

import mmap
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sim_world import SimLoop, World

from forebay_core.units import BLOCK_SIZE, Buffer

SECTOR = 512
Tap = Callable[[int, bytes], None]


class _Written(NamedTuple):
    offset: int
    content: bytes
    before: bytes


class _Queued(NamedTuple):
    offset: int
    buffers: Sequence[Buffer]
    done: Callable[[bool], None]


class SimDisk:
    """The medium and the page cache over it. `fd` reads what programs see."""

    def __init__(self, world: World, name: str, size: int) -> None:
        self.world = world
        self.name = name
        self.size = size
        self.random = world.rng(f"{name} disk")
        self.durable = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.unsynced: list[_Written] = []
        self.history: deque[tuple[int, _Written]] = deque(maxlen=64)  # number of the sync that covered it
        self.syncs = 0
        self.in_flight: _Written | None = None
        self.fail_write = False  # the next write meets EIO
        self.fail_sync = False  # the next sync does
        self.sync_failed = False
        self.unreadable: set[int] = set()  # offsets of blocks that a running daemon can't read
        self.slow = False
        self.outcome = (
            ""  # of the next power cut, unless chance decides: "loss" of all unsynced, or of all but the "newest"
        )
        self._map()

    def _map(self) -> None:
        self.fd = os.memfd_create("forebay-sim", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self.bytes = mmap.mmap(self.fd, self.size)

    def close(self) -> None:
        """Give the memory back."""
        self.bytes.close()
        self.durable.close()
        os.close(self.fd)

    def part_from_parent(self) -> None:
        """After a fork: have a page cache of our own; `durable` is one already."""
        shared, content = self.fd, self.bytes
        self._map()
        end = 0
        while (start := _next_content(shared, end)) >= 0:
            end = os.lseek(shared, start, os.SEEK_HOLE)
            self.bytes[start:end] = content[start:end]

    def read(self, offset: int, size: int) -> bytes:
        """Return what a program sees."""
        return self.bytes[offset : offset + size]

    def is_unreadable(self, offset: int, size: int) -> bool:
        """Tell whether a read meets a block that can't be read."""
        first = offset - offset % BLOCK_SIZE
        return bool(self.unreadable) and any(at in self.unreadable for at in range(first, offset + size, BLOCK_SIZE))

    def write(self, offset: int, content: bytes) -> None:
        """Put bytes into the page cache."""
        before = self.bytes[offset : offset + len(content)]
        self.bytes[offset : offset + len(content)] = content
        self.unsynced.append(_Written(offset, content, before))

    def sync(self, count: int) -> None:
        """Make the oldest unsynced writes durable."""
        if count:
            self.syncs += 1
        for one in self.unsynced[:count]:
            self.durable[one.offset : one.offset + len(one.content)] = one.content
            self.history.append((self.syncs, one))
        del self.unsynced[:count]

    def kill(self) -> None:
        """The program died: of the write in flight some pages are there."""
        one, self.in_flight = self.in_flight, None
        if one is not None:
            pages = self.random.randrange(len(one.content) // BLOCK_SIZE + 1)
            if pages:
                self.write(one.offset, one.content[: pages * BLOCK_SIZE])

    def cut_power(self) -> None:
        """What no sync covered survives in any subset, torn at sectors, what was in flight included."""
        if self.in_flight is not None:
            self.unsynced.append(self.in_flight)
            self.in_flight = None
        outcome, self.outcome = self.outcome, ""
        if outcome:
            for one in self._survivors(outcome):
                self.durable[one.offset : one.offset + len(one.content)] = one.content
        else:
            self._survive_by_chance()
        for one in self.unsynced:  # everywhere else both are the same
            part = slice(one.offset, one.offset + len(one.content))
            self.bytes[part] = self.durable[part]
        self.unsynced.clear()
        self.sync_failed = False

    def _survivors(self, outcome: str) -> list[_Written]:
        match outcome:
            case "newest":
                return self.unsynced[-1:]
            case "checkpoint":
                return [one for one in self.unsynced if one.offset < self.zones_offset]
        return []

    def _survive_by_chance(self) -> None:
        kept = self.random.choice((0.0, 0.1, 0.5, 0.9, 0.99, 1.0))
        whole = self.random.random() < 0.5
        for one in self.unsynced:
            if whole:
                if self.random.random() < kept:
                    self.durable[one.offset : one.offset + len(one.content)] = one.content
                continue
            for at in range(0, len(one.content), SECTOR):
                if self.random.random() < kept:
                    self.durable[one.offset + at : one.offset + at + SECTOR] = one.content[at : at + SECTOR]

    # --- damage -----------------------------------------------------------------------------------------------

    def _provable(self) -> list[_Written]:
        """Writes behind which so much was synced that their loss can be proven from what follows."""
        return [one for sync, one in self.history if sync + 4 <= self.syncs]

    def rot(self) -> str:
        """Flip a bit of something that lasted for a while."""
        candidates = self._provable()
        if not candidates:
            return ""
        one = self.random.choice(candidates)
        at = one.offset + self.random.choice((self.random.randrange(64), self.random.randrange(len(one.content))))
        flipped = self.durable[at] ^ 1 << self.random.randrange(8)
        self.durable[at] = flipped
        self.bytes[at] = flipped
        return f"bit rot at offset {at}"

    def lose_write(self, *, misdirect: bool) -> str:
        """Make a write that was acknowledged and synced have never been there, or have gone elsewhere."""
        candidates = [one for one in self._provable() if self._is_there(one)]
        if not candidates:
            return ""
        one = self.random.choice(candidates)
        self._put(one.offset, one.before)
        if not misdirect:
            return f"lost write of {len(one.content)} bytes at offset {one.offset}"
        other = self.random.choice(candidates)  # of which it hides no more than was provable
        self._put(other.offset, one.content[: len(other.content)])
        return f"write of {len(one.content)} bytes for offset {one.offset} went to {other.offset}"

    def _is_there(self, one: _Written) -> bool:
        return self.bytes[one.offset : one.offset + len(one.content)] == one.content

    def _put(self, offset: int, content: bytes) -> None:
        self.bytes[offset : offset + len(content)] = content
        self.durable[offset : offset + len(content)] = content


def _next_content(fd: int, offset: int) -> int:
    """Return where a sparse file holds something again, -1 if nowhere."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        return -1


class SimDevice:
    """The engine's `Device` port over a disk, for one life of the daemon."""

    def __init__(
        self, disk: SimDisk, loop: SimLoop, *, submitted: Tap, completed: Tap, synced: Callable[[int], None]
    ) -> None:
        self._disk = disk
        self._loop = loop
        self._submitted = submitted
        self._completed = completed
        self._synced = synced
        self._random: random.Random = disk.random
        self._queue: deque[_Queued] = deque()
        self._syncing = False
        self.failed = False
        self.on_failure: Callable[[str], None] = lambda reason: None
        self.writes_max = 0

    def read_now(self, offset: int, size: int) -> Buffer | None:
        """See Device."""
        absent = self.failed or self._random.random() < 0.4 or self._disk.is_unreadable(offset, size)
        return None if absent else self._disk.read(offset, size)

    def read_into_now(self, offset: int, view: memoryview) -> bool:
        """See Device."""
        view[:] = self._disk.read(offset, view.nbytes)
        return not (self.failed or self._random.random() >= 0.6 or self._disk.is_unreadable(offset, view.nbytes))

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        """See Device: the bytes are those of some moment between now and then."""
        late = self._random.random() < 0.5
        early = None if late else self._disk.read(offset, size)

        def answer() -> None:
            content = self._disk.read(offset, size) if early is None else early
            done(None if self.failed or self._disk.is_unreadable(offset, size) else content)

        self._loop.after(self._delay(), answer)

    def write(self, offset: int, buffers: Sequence[Buffer], done: Callable[[bool], None]) -> None:
        """See Device."""
        if self.failed:
            self._loop.after(0, done, False)
            return
        self._submitted(offset, b"".join(buffers))
        self._queue.append(_Queued(offset, buffers, done))
        self.writes_max = max(self.writes_max, len(self._queue))
        if len(self._queue) == 1:
            self._begin()

    def sync(self, done: Callable[[bool], None]) -> None:
        """See Device."""
        assert not self._syncing, "two syncs at a time"
        if self.failed:
            self._loop.after(0, done, False)
            return
        self._syncing = True
        covered = len(self._disk.unsynced)
        self._disk.world.point(f"{self._disk.name} sync begins")
        self._loop.after(self._delay() * 2, self._end_sync, covered, done)

    def _begin(self) -> None:
        one = self._queue[0]
        content = b"".join(one.buffers)
        self._disk.in_flight = _Written(one.offset, content, b"")
        self._disk.world.point(f"{self._disk.name} write begins")
        self._loop.after(self._delay(), self._end_write, one, content)

    def _end_write(self, one: _Queued, content: bytes) -> None:
        disk = self._disk
        disk.in_flight = None
        self._queue.popleft()
        if disk.fail_write and not self.failed:
            disk.fail_write = False
            disk.write(one.offset, content[: self._random.randrange(len(content) // BLOCK_SIZE + 1) * BLOCK_SIZE])
            self._fail("write failed: Input/output error")
        if self.failed:
            one.done(False)
        else:
            assert b"".join(one.buffers) == content, "a buffer changed while it was written"
            disk.write(one.offset, content)
            disk.world.note(f"{disk.name} written {one.offset} {len(content)}", content)
            self._completed(one.offset, content)
            disk.world.point(f"{disk.name} write ends")
            self._loop.after(self._random.randrange(30_000), one.done, True)
        if self._queue:
            self._begin()

    def _end_sync(self, covered: int, done: Callable[[bool], None]) -> None:
        disk = self._disk
        self._syncing = False
        if disk.fail_sync and not self.failed:
            # The kernel marks the pages clean: only power off and on tells what of them is on the medium.
            disk.fail_sync = False
            disk.sync_failed = True
            self._fail("sync failed: Input/output error")
        if self.failed:
            done(False)
            return
        disk.sync(covered if self._random.random() < 0.7 else len(disk.unsynced))
        self._synced(len(disk.unsynced))
        disk.world.note(f"{disk.name} synced {covered}")
        disk.world.point(f"{disk.name} sync ends")
        self._loop.after(self._random.randrange(30_000), done, True)

    def _fail(self, reason: str) -> None:
        self.failed = True
        self._disk.world.note(f"{self._disk.name} {reason}")
        self.on_failure(reason)

    def _delay(self) -> int:
        if self._disk.slow or self._random.random() < 0.01:
            return self._random.randrange(60_000_000)
        return self._random.randrange(5_000, 300_000)

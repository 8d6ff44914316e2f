"""A virtual machine: random requests to one volume, many at a time, never two that change what another one touches.

It remembers every byte that it wrote and was told of, and compares every byte that it reads.

Invariants:
    `model` is what the volume reads as, except in the extents of changes that are under way.
    An error is accepted only where something excuses it: damaged media, a failed device, a lost epoch.
"""

from collections.abc import Callable
from typing import NamedTuple

from sim_cache import CacheHost
from sim_judges import ZEROS, Branch
from sim_world import SimLoop, Violation, World

from forebay_cache.engine.front import IoError
from forebay_cache.engine.volume import CacheVolume
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE

SECTOR = 512
KINDS = {"write": 40, "read": 25, "trim": 8, "zero": 5, "flush": 12, "fua": 4, "prefetch": 1}
COUNTS = (1, 1, 1, 1, 2, 3, 8, 8, 20, 48)
"""How often what is requested, as weights, and of how many blocks."""


class Request(NamedTuple):
    """What is under way."""

    kind: str
    offset: int
    length: int
    serial: int

    @property
    def extent(self) -> Extent:
        """The blocks that it touches."""
        first = self.offset // BLOCK_SIZE
        return Extent(first, (self.offset + self.length - 1) // BLOCK_SIZE + 1 - first)

    @property
    def changes(self) -> bool:
        """Whether the volume may be another one after it."""
        return self.kind not in ("read", "prefetch", "flush")

    def overlaps(self, other: "Request") -> bool:
        """Whether both touch a block."""
        return self.extent.intersect(other.extent) is not None


class Guest:
    """One virtual machine. `depth` is how much it has under way."""

    def __init__(self, world: World, name: str, volume_id: bytes, size: int, *, depth: int, pause_ns: int) -> None:
        self.world = world
        self.name = name
        self.id = volume_id
        self.size = size
        self.depth = depth
        self.pause_ns = pause_ns
        self.random = world.rng(f"guest {name}")
        self.host: CacheHost | None = None
        self.volume: CacheVolume | None = None
        self.branch: Branch
        self.model = bytearray(size)
        self.busy: dict[int, Request] = {}
        self.writing = True
        self.broken = ""
        self.requests = 0
        self.kinds = dict(KINDS)
        self.counts: tuple[int, ...] = COUNTS
        self.unaligned = 0.2  # share of requests that begin and end at any sector
        self.left: SimLoop | None = None  # the daemon that may still carry out what it was not waited for
        self._plugged = 0
        world.at(0, self._turn)

    # --- plugging ---------------------------------------------------------------------------------------------

    def plug(self, host: CacheHost, volume: CacheVolume) -> None:
        """The volume is served there; the machine sees what its history says."""
        self.unplug()
        self.host, self.volume = host, volume
        self.branch = host.tap.branches[volume.id]
        self.size = volume.size
        self.model = bytearray(self.size)
        for lba, content in self.branch.live.items():
            self.model[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE] = content
        self.broken = ""

    def unplug(self) -> None:
        """The machine stops; what it waited for it will never hear of."""
        self._plugged += 1
        if self.busy and self.host is not None:
            self.left = self.host.loop
        self.host = self.volume = None
        self.busy.clear()

    def recovered(self, host: CacheHost, volume: CacheVolume, branch: Branch, power: bool) -> None:
        """The daemon came back: unless the power went, all that was acknowledged is there."""
        if self.host is not host or self.branch is not branch:
            return
        if not (power or self.broken or self.world.excuses):
            under_way = {lba for one in self.busy.values() for lba in range(one.extent.start, one.extent.end)}
            for lba in range(self.size // BLOCK_SIZE):
                if lba not in under_way and branch.live.get(lba, ZEROS) != self._block(lba):
                    raise Violation(f"{branch.name}: block {lba} was acknowledged and did not come back")
        self.plug(host, volume)

    async def closing(self) -> None:
        """The export is being closed: what is under way is finished, nothing new begins."""
        self.writing = False
        loop = self.host.loop if self.host is not None else None
        for _ in range(60):
            if not self.busy or loop is None:
                break
            future = loop.create_future()
            loop.call_later(0.05, future.set_result, None)
            await future
        self.unplug()
        self.writing = True

    def grow(self, size: int) -> None:
        """The volume is larger now; what is behind its old end reads as zeros."""
        self.model.extend(bytes(max(0, size - len(self.model))))
        self.size = max(self.size, size)

    # --- requests ---------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self.busy

    def _turn(self) -> None:
        if self.volume is not None and self.host is not None and self.host.running and self.writing:
            while len(self.busy) < self.depth and self.random.random() < 0.6 and not self.broken:
                self.issue()
        self.world.at(self.random.randrange(self.pause_ns), self._turn)

    def issue(self) -> None:
        """Begin a random request, unless it would touch what is being changed."""
        kind = self.random.choices(*zip(*self.kinds.items(), strict=True))[0]
        offset, length = self._pick()
        if kind == "flush":
            self._start(Request(kind, 0, 1, self.requests))
        else:
            self._start(Request(kind, offset, length, self.requests))

    def read_all(self) -> None:
        """Read everything."""
        step = 24 * BLOCK_SIZE
        for at in range(0, self.size, step):
            self._start(Request("read", at, min(step, self.size - at), self.requests))

    def flush(self) -> None:
        """Flush."""
        self._start(Request("flush", 0, 1, self.requests))

    def _pick(self) -> tuple[int, int]:
        blocks = self.size // BLOCK_SIZE
        if self.random.random() < self.unaligned:
            offset = self.random.randrange(self.size // SECTOR) * SECTOR
            length = min(self.random.choice((1, 1, 3, 9, 40)) * SECTOR, self.size - offset)
            return offset, length
        start = int(blocks * self.random.random() ** 2)
        count = min(self.random.choice(self.counts), blocks - start)
        return start * BLOCK_SIZE, count * BLOCK_SIZE

    def _start(self, one: Request) -> None:
        for other in self.busy.values():
            if "flush" not in (one.kind, other.kind) and (one.changes or other.changes) and one.overlaps(other):
                return
        self.requests += 1
        self.busy[one.serial] = one
        self.world.note(f"{self.name} {one.kind} {one.offset} {one.length}")
        assert self.host is not None and self.host.loop is not None
        self.host.loop.enter(self._submit, one)

    def _submit(self, one: Request) -> None:
        volume = self.volume
        assert volume is not None
        match one.kind:
            case "read":
                volume.read(one.offset, one.length, self._reader(one))
            case "prefetch":
                volume.prefetch(one.offset, one.length, self._settler(one, lambda: None))
            case "flush":
                seen = self.branch.acknowledged
                volume.flush(self._settler(one, lambda: self.branch.flushed(seen)))
            case "write" | "fua":
                payload = self._payload(one)
                fua = one.kind == "fua"
                volume.write(one.offset, payload, fua, self._settler(one, lambda: self._changed(one, payload, fua=fua)))
            case "zero":
                zeros = bytes(one.length)
                volume.write_zeroes(
                    one.offset, one.length, False, self._settler(one, lambda: self._changed(one, zeros))
                )
            case _:
                start, end = -(-one.offset // BLOCK_SIZE), (one.offset + one.length) // BLOCK_SIZE
                inside = one._replace(offset=start * BLOCK_SIZE, length=max(0, end - start) * BLOCK_SIZE)
                zeros = bytes(inside.length)
                volume.trim(one.offset, one.length, False, self._settler(one, lambda: self._changed(inside, zeros)))
        if self.random.random() < 0.7:
            volume.kick()

    def _payload(self, one: Request) -> bytes:
        if self.random.random() < 0.05:
            return bytes(one.length)
        tag = (one.serial + 1).to_bytes(8, "little")
        sectors = range(one.offset // SECTOR, (one.offset + one.length) // SECTOR)
        return b"".join([(tag + sector.to_bytes(8, "little")) * (SECTOR // 16) for sector in sectors])

    # --- answers ----------------------------------------------------------------------------------------------

    def _settler(self, one: Request, done: Callable[[], None]) -> Callable[[IoError], None]:
        plugged = self._plugged

        def reply(error: IoError) -> None:
            if plugged != self._plugged:
                return
            assert self.busy.pop(one.serial) is one
            self.world.note(f"{self.name} {one.kind} {one.offset} {one.length} answered {error.name}")
            if error == IoError.OK:
                done()
            else:
                self._excuse(error)

        return reply

    def _reader(self, one: Request) -> Callable[..., None]:
        chunks_of: list[bytes] = []
        settle = self._settler(one, lambda: self._compare(one, b"".join(chunks_of)))

        def reply(error: IoError, chunks) -> None:
            chunks_of.extend(bytes(c.length) if c.buffer is None else bytes(c.buffer) for c in chunks)
            settle(error)

        return reply

    def _compare(self, one: Request, found: bytes) -> None:
        expected = self.model[one.offset : one.offset + one.length]
        # A host that lost the volume and was not told yet serves what it held, and nothing of what the new one wrote.
        if found != expected:
            wrong = [at for at in range(0, one.length, SECTOR) if found[at : at + SECTOR] != expected[at : at + SECTOR]]
            raise Violation(f"{self.branch.name}: a read at {one.offset} brought wrong bytes at +{wrong[:8]}")
        self.world.note(f"{self.name} has read", found)

    def _changed(self, one: Request, content: bytes, *, fua: bool = False) -> None:
        self.model[one.offset : one.offset + one.length] = content
        if one.length == 0:
            return
        extent = one.extent
        blocks = bytes(self.model[extent.start * BLOCK_SIZE : extent.end * BLOCK_SIZE])
        version = self.branch.acknowledge(extent, blocks)
        if fua:
            self.branch.flushed(version)

    def _excuse(self, error: IoError) -> None:
        volume, host = self.volume, self.host
        assert volume is not None and host is not None
        if not (self.world.excuses or host.device.failed or volume.error or (error == IoError.SHUTDOWN)):
            raise Violation(
                f"{self.branch.name}: a request was answered {error.name} for no reason; {host.reports[-3:]}"
            )
        self.broken = self.broken or f"{error.name} {volume.error}"

    def _block(self, lba: int) -> bytes:
        return bytes(self.model[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE])


class LeftBehind(Guest):
    """A machine that only reads, or does nothing, at a host from which its volume is being taken over.

    Until the host refuses, each read must bring what the host held when the machine came.
    """

    def __init__(self, guest: Guest, *, idle: bool) -> None:
        super().__init__(guest.world, f"{guest.name} left behind", guest.id, guest.size, depth=8, pause_ns=20_000_000)
        self.volume_name = guest.name
        self.kinds = {"read": 1}
        self.writing = not idle
        assert guest.host is not None and guest.volume is not None
        self.loop = guest.host.loop
        self.plug(guest.host, guest.volume)

    @property
    def gone(self) -> bool:
        """Whether its host has died, or has opened the volume anew."""
        return self.host is None or self.host.loop is not self.loop

    @property
    def lost(self) -> bool:
        """Whether another host holds the volume now."""
        assert self.host is not None and self.volume is not None
        return self.host.officials[self.id].epoch > self.volume.epoch

    @property
    def told(self) -> bool:
        """Whether its host refuses it by now, or it is gone."""
        return self.gone or bool(self.broken or self.volume is None or self.volume.error)

    def _pick(self) -> tuple[int, int]:
        """Anywhere, and little at a time: most of what is not cached is where guests seldom are."""
        return self.random.randrange(self.size // BLOCK_SIZE) * BLOCK_SIZE, BLOCK_SIZE

    def _turn(self) -> None:
        if self.gone:
            self.unplug()
        else:
            super()._turn()

"""A hypervisor: the cache daemon's own shell, store session, upstream and engine over a simulated SSD and network.

`CacheHost` stands for `service/daemon.py` and `service/opening.py` (open, sync, recover, serve, tick), `_Builder` for
the builder's process, which really builds, `_Fronts` for the NBD server: before an export closes, what its clients
have in flight is finished.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sim_disk import SimDevice, SimDisk
from sim_judges import Branch, LogTap, Official
from sim_net import Network
from sim_store import KEY, StoreHost
from sim_world import SimLoop, Violation, World

from forebay_cache.engine.cache import CacheEngine, EngineSettings
from forebay_cache.engine.front import Chunk, IoError
from forebay_cache.engine.ports import BuildRequest, BuiltPart
from forebay_cache.engine.recovery import blank_device, recover
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.superblock import Superblock, choose, plan_geometry
from forebay_cache.service.builder_worker import build_part
from forebay_cache.service.exports import AttachedExports
from forebay_cache.service.shell import Shell
from forebay_cache.service.store_session import StoreSession
from forebay_cache.service.upstream import StoreUpstream
from forebay_core.errors import CorruptionError, ForebayError, StoreUnreachableError
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE, DeviceId, VolumeId
from forebay_wire import messages
from forebay_wire.address import Address
from forebay_wire.client import WireClient
from forebay_wire.connection import Connection
from forebay_wire.greeting import Role
from forebay_wire.link import Link

TICK_NS = 50_000_000
TURN_NS = 200_000  # what anything else takes until a turn comes
ADDRESS = Address("store", 1)
T = TypeVar("T")


class CacheHost:
    """One cache device and its daemon, over all lives."""

    def __init__(
        self, world: World, name: str, network: Network, store: StoreHost, *, size: int, settings: EngineSettings
    ) -> None:
        self.world = world
        self.name = name
        self.network = network
        self.store = store
        self.size = size
        self.settings = settings
        self.random = world.rng(f"{name} host")
        self.officials: dict[bytes, Official] = {}
        self.wall_skew_ns = 0
        self.clock_skew_ns = 0
        self.reports: list[str] = []
        self.refused = ""  # why the device can't be used any more
        self.loop: SimLoop | None = None
        self.recovered: Callable[[CacheVolume, Branch, bool], None] = lambda volume, branch, power: None
        self.closing: Callable[[str], Awaitable[None]] | None = None
        self.fenced: Callable[[CacheVolume, str], None] = lambda volume, text: None
        self.power_goes = False  # the next death is one of the whole host
        self.died: Callable[[], None] = lambda: None
        self._power = False
        self._alarms = 0  # asked for so far: only the last one counts
        self._make_disk()

    def _make_disk(self) -> None:
        self.disk = SimDisk(self.world, self.name, self.size)
        geometry = plan_geometry(self.size, 64)
        superblock = Superblock(self.random.randbytes(16), 1, *geometry, 0)
        for offset, content in blank_device(superblock):
            self.disk.write(offset, content)
        self.disk.sync(len(self.disk.unsynced))
        self.disk.history.clear()
        self.disk.zones_offset = geometry.zones_offset
        self.tap = LogTap(geometry.zones_offset)

    def replace_disk(self) -> None:
        """The SSD is lost; a new one takes its place."""
        assert self.loop is None
        self.world.note(f"{self.name} loses its SSD")
        self.disk.close()
        self._make_disk()
        self.refused = ""

    # --- lives ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin a life: sync, recover, serve what was attached."""
        assert self.loop is None
        loop = self.loop = SimLoop(self.world, self.name, self._died)
        self.world.note(f"{self.name} starts")
        loop.enter(self._begin, loop)

    def _begin(self, loop: SimLoop) -> None:
        disk = self.disk
        disk.sync(len(disk.unsynced))
        self.tap.restart()
        try:
            superblock = choose(disk.read(0, BLOCK_SIZE), disk.read(BLOCK_SIZE, BLOCK_SIZE), place=self.name)
            recovered = recover(disk.read, superblock)
        except (CorruptionError, ForebayError) as error:
            if not self.world.excuses:
                raise
            self.refused = str(error)
            self.world.note(f"{self.name} refuses to start: {error}")
            return
        self.device = SimDevice(
            disk, loop, submitted=self.tap.submitted, completed=self.tap.completed, synced=self.tap.synced
        )
        self.session = StoreSession(
            [ADDRESS],
            key=KEY,
            device=DeviceId(superblock.device),
            jitter=self.random.random,
            on_reopened=lambda volume, opened: self.shell.on_reopened(volume, opened),
            on_refused=self._refused,
            ping_interval_s=1.0,
            ping_timeout_s=4.0,
            held=lambda store: self.shell.held(store, self.world.now_ns + self.wall_skew_ns),
            connect=self._connect,
        )
        self.upstream = StoreUpstream(self.session)
        self.engine = CacheEngine(
            recovered,
            device=self.device,
            upstream=self.upstream,
            builder=_Builder(disk, loop),
            settings=self.settings,
            life=self.random.getrandbits(64),
            report=self._report,
            alarm=self._alarm,
        )
        self.device.on_failure = self.engine.fail
        self.exports = AttachedExports()
        self.shell = Shell(
            engine=self.engine,
            session=self.session,
            upstream=self.upstream,
            nbd=_Fronts(self),  # type: ignore[arg-type]
            exports=self.exports,
            folder=_Fronts(self),  # type: ignore[arg-type]
            device=self.name,
            device_size=self.size,
            draw=self.random.randbytes,
            wall_ns=lambda: self.world.now_ns + self.wall_skew_ns,
        )
        for volume in self.engine.volumes.values():
            self._came_back(volume)
        self._power = False
        self.engine.start()
        self._tick()
        self.shell.resume()
        self.session.start()

    def _came_back(self, volume: CacheVolume) -> None:
        if volume.snapshot:
            return  # it has no history
        self.tap.ids[volume.key] = volume.id
        official = self.officials[volume.id]
        branch = self.tap.branches.get(volume.id)
        if branch is None or official.branches.get(volume.epoch) is not branch:
            # The daemon died between the store's grant and its own answer to whoever asked it to attach.
            if volume.attached and volume.epoch == official.epoch and volume.acknowledged == official.version:
                self.begin_branch(volume)
        elif volume.attached or volume.acknowledged <= branch.submitted:  # else it was just being attached anew
            # Damaged media are no excuse: what is damaged was durable, and later records prove it.
            branch.recover(volume.version, power=self._power)
            branch.check_pending(volume.pending_snapshots, volume.acknowledged)
            self.recovered(volume, branch, self._power)

    def kill(self) -> None:
        """kill -9."""
        if self.loop is not None:
            self.loop.die()

    def cut_power(self) -> None:
        """Take the power from the host."""
        self.power_goes = True
        if self.loop is not None:
            self.loop.die()
        else:
            self._died()

    def _died(self) -> None:
        self.world.note(f"{self.name} {'loses power' if self.power_goes else 'is killed'}")
        if self.loop is not None:
            self.network.cut(self.loop)
        if self.power_goes:
            self.disk.cut_power()
            self._power = True
            self.power_goes = False
        else:
            self.disk.kill()
        self.loop = None
        self.died()

    @property
    def running(self) -> bool:
        """Whether the daemon serves."""
        return self.loop is not None and not self.refused

    # --- commands ---------------------------------------------------------------------------------------------

    def command(self, work: Callable[[], Awaitable[T]], *, limit_s: float = 120) -> T | ForebayError | None:
        """Run a control command to its end; None if the daemon died meanwhile, or the store will never answer."""
        got: list[T | ForebayError] = []

        async def run() -> None:
            try:
                got.append(await work())
            except ForebayError as error:
                got.append(error)

        loop = self.loop
        assert loop is not None
        loop.enter(lambda: loop.create_task(run()))
        self.world.run(lambda: bool(got) or not loop.alive or self.world.store_refuses, limit_s=limit_s)
        return got[0] if got else None

    def attach(self, name: str, *, take_over: bool = False) -> CacheVolume | ForebayError | None:
        """Attach a volume and begin or go on with its branch."""
        answer = self.command(lambda: self.shell.attach(name, read_only=False, take_over=take_over))
        if answer is None or isinstance(answer, ForebayError):
            return answer
        volume = self.shell._find(name)
        assert volume is not None
        official = self.officials[volume.id]
        self.tap.ids[volume.key] = volume.id
        branch = self.tap.branches.get(volume.id)
        if branch is None or official.branches.get(volume.epoch) is not branch:
            self.begin_branch(volume)
        return volume

    def attach_snapshot(self, name: str) -> CacheVolume | ForebayError | None:
        """Serve a snapshot."""
        answer = self.command(lambda: self.shell.attach(name, read_only=False, take_over=False))
        return answer if answer is None or isinstance(answer, ForebayError) else self.shell._find(name)

    def read(self, volume: CacheVolume, offset: int, length: int) -> bytes | IoError | None:
        """Read, and wait for the answer; None if the daemon died meanwhile."""
        got: list[bytes | IoError] = []

        def reply(error: IoError, chunks: Sequence[Chunk]) -> None:
            content = b"".join(bytes(c.length) if c.buffer is None else bytes(c.buffer) for c in chunks)
            got.append(content if error == IoError.OK else error)

        loop = self.loop
        assert loop is not None
        loop.enter(lambda: volume.read(offset, length, reply))
        self.world.run(lambda: bool(got) or not loop.alive, limit_s=120)
        return got[0] if got else None

    def begin_branch(self, volume: CacheVolume) -> None:
        """The volume is ours under a new epoch: its history here begins with what the store shows."""
        official = self.officials[volume.id]
        if volume.acknowledged != official.version or volume.has_changes:
            raise Violation(
                f"{volume.name} is at {volume.acknowledged:#x} on {self.name}, the store at {official.version:#x}"
            )
        branch = Branch(f"{volume.name} on {self.name}", official.version, dict(official.state))
        self.tap.branches[volume.id] = branch
        official.begin(volume.epoch, branch)

    # --- inside -----------------------------------------------------------------------------------------------

    def _refused(self, volume_id: VolumeId, code: str, text: str) -> None:
        volume = self.engine.by_id(volume_id)
        if code == messages.FENCED and volume is not None and self.loop is not None:
            self.loop.call_soon(self.fenced, volume, text)
        self.shell.on_refused(volume_id, code, text)

    def _report(self, text: str) -> None:
        self.world.note(f"{self.name} reports: {text}")
        self.reports.append(text)

    def _tick(self) -> None:
        assert self.loop is not None
        now_ns = self.world.now_ns + self.clock_skew_ns
        self.engine.tick(now_ns, self.world.now_ns + self.wall_skew_ns)
        self.loop.after(TICK_NS, self._tick)

    def _alarm(self, due_ns: int) -> None:
        assert self.loop is not None
        self._alarms += 1
        delay_ns = due_ns - self.world.now_ns - self.clock_skew_ns
        self.loop.after(max(delay_ns, TURN_NS), self._pace, self._alarms)

    def _pace(self, number: int) -> None:
        if number == self._alarms:
            self.engine.pace(self.world.now_ns + self.clock_skew_ns)

    async def _connect(self, address: Address, key: bytes | None, device: DeviceId) -> WireClient:
        loop, store, network = self.loop, self.store, self.network
        assert loop is not None
        await asyncio.sleep(network.delay() / 1e9)
        if not store.running or network.down_ns > self.world.now_ns:
            raise StoreUnreachableError(f"{address}: no answer")
        assert store.loop is not None
        ours, theirs = network.connect(loop, store.loop, (self.name, "store"))
        connection = Connection(Role.CLIENT, key=key, node=device, nonce=self.random.randbytes(32))
        client = WireClient(str(address), connection)
        client._link = Link(ours, connection, client)  # type: ignore[arg-type]
        client._link.start()
        store.accept(theirs)
        try:
            async with asyncio.timeout(5.0):
                await client._ready
        except TimeoutError as error:
            await client.close()
            raise StoreUnreachableError(f"{address}: no answer within 5 s") from error
        return client


class _Builder:
    """The engine's `Builder` port: builds at one moment, answers later, one request at a time."""

    def __init__(self, disk: SimDisk, loop: SimLoop) -> None:
        self._disk = disk
        self._loop = loop
        self._builder = FrameBuilder(1)
        self._random = disk.random

    def build(self, request: BuildRequest, done: Callable[[BuiltPart | None], None]) -> None:
        """See Builder."""

        def work() -> None:
            part = build_part(self._disk.fd, request, self._builder)
            self._disk.world.point(f"{self._disk.name} built a part")
            self._loop.after(self._random.randrange(500_000), done, part)

        self._loop.after(self._random.randrange(2_000_000), work)


class _Fronts:
    """What the shell asks of NBD server and run folder."""

    def __init__(self, host: CacheHost) -> None:
        self._host = host

    async def close_export(self, name: str, grace_s: float = 0) -> None:
        if self._host.closing is not None:
            await self._host.closing(name)

    def connection_count(self, name: str) -> int:
        return 0

    def resized(self, name: str) -> None:
        pass

    def uri(self, name: str) -> str:
        return f"sim:{name}"

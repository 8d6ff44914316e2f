"""The storage server: the store's own shell, engine and wire code over a simulated disk and index.

`SimFolder` stands for a file system and `SimBackend` for `service/dir_backend.py` with the same steps: write a
temporary file, sync it, link it to its name, sync the folder. `SimIndex` stands for LMDB without metasync: a power cut
may take the newest transaction back. `StoreHost` stands for `service/daemon.py` and the accepting part of the wire's
server.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sim_index import DictIndex, Result
from sim_net import Network, SimSocket
from sim_world import Died, SimLoop, World

from forebay_core.config import StoreSettings
from forebay_core.errors import CorruptionError, ForebayError, NoSpaceError
from forebay_core.units import Buffer
from forebay_store.engine import background, sweeping
from forebay_store.engine.cleaner import delete_leaving
from forebay_store.engine.ports import BackendError, IndexWriter, SegmentExistsError, SegmentMissingError
from forebay_store.engine.replay import replay
from forebay_store.engine.space import DiskRoom
from forebay_store.format.damage_file import ScrubState, decode_damage, encode_damage
from forebay_store.format.reports import Reports, decode_reports, encode_reports
from forebay_store.format.segment import parse_name
from forebay_store.service.opening import claim
from forebay_store.service.shell import StoreShell
from forebay_wire import messages
from forebay_wire.connection import Connection
from forebay_wire.greeting import Role
from forebay_wire.link import Link
from forebay_wire.peer import Peer

STORE = b"store-simulated!"
KEY = b"a key of the simulator, 32 bytes"
SECTOR = 512


TRIM_ENTRIES, SWEEP_ENTRIES = 4, 3


@contextmanager
def small_steps() -> Iterator[None]:
    """Let stores take trims and rollbacks in steps of a few entries, as large ones do with large volumes."""
    usual = sweeping.TRIM_ENTRIES_MAX, background.SWEEP_ENTRIES_MAX
    sweeping.TRIM_ENTRIES_MAX, background.SWEEP_ENTRIES_MAX = TRIM_ENTRIES, SWEEP_ENTRIES  # type: ignore[misc]
    try:
        yield
    finally:
        sweeping.TRIM_ENTRIES_MAX, background.SWEEP_ENTRIES_MAX = usual  # type: ignore[misc]


class SimFolder:
    """Files of one folder: what programs see, and what a power cut leaves."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.rng("store disk")
        self.files: dict[str, bytes] = {}
        self.names: set[str] = set()  # whose entry in the folder is durable
        self.synced: set[str] = set()  # whose content is
        self.full = False
        self.broken = False  # the next sync fails
        self.outcome = ""  # of the next power cut unless chance decides: "loss" of all that is unsynced; else names
        # survive and their contents do not

    def cut_power(self) -> None:
        """Lose entries and contents that no sync covers."""
        outcome, self.outcome = self.outcome, ""
        for name in sorted(self.files):
            content = self.files[name]
            if name not in self.names and (self.random.random() < 0.5 if not outcome else outcome == "loss"):
                del self.files[name]
            elif name not in self.synced:
                kept = 0.0 if outcome else self.random.random()
                self.files[name] = b"".join(
                    content[at : at + SECTOR] if self.random.random() < kept else bytes(len(content[at : at + SECTOR]))
                    for at in range(0, len(content), SECTOR)
                )
        self.names = set(self.files)
        self.synced = set(self.files)
        self.broken = False

    def rot(self) -> str:
        """Flip a bit of a segment."""
        names = sorted(name for name in self.files if parse_name(name) is not None)
        if not names:
            return ""
        name = self.random.choice(names)
        content = bytearray(self.files[name])
        at = self.random.randrange(len(content))
        content[at] ^= 1 << self.random.randrange(8)
        self.files[name] = bytes(content)
        return f"bit rot at offset {at} of segment {name}"


class SimBackend:
    """The six verbs, for one life of the store."""

    def __init__(self, folder: SimFolder, loop: SimLoop) -> None:
        self._folder = folder
        self._loop = loop
        self._error = ""

    def recover(self) -> None:
        """See DirBackend: throw temporary files away, make names durable."""
        folder = self._folder
        for name in [name for name in folder.files if name.endswith(".tmp")]:
            self._unlink(name)
        folder.names = set(folder.files)

    def create(self, name: str, buffers: Sequence[Buffer]) -> None:
        """See SegmentBackend."""
        folder = self._folder
        if self._error:
            raise BackendError(self._error)
        temporary = name + ".tmp"
        self._point("segment is written")
        content = b"".join(buffers)
        folder.files[temporary] = content
        self._point("segment is synced")
        if folder.full:
            self._unlink(temporary)
            raise NoSpaceError("the disk is full; nothing was kept")
        if folder.broken:
            folder.broken = False
            self._fail(name)
        self.sync_file(temporary)
        self._point("segment is linked")
        if name in folder.files:
            self._unlink(temporary)
            raise SegmentExistsError(f"segment {name} exists already")
        folder.files[name] = folder.files[temporary]
        if temporary in folder.synced:
            folder.synced.add(name)
        self._unlink(temporary)
        self._point("folder is synced")
        self.sync_folder()
        folder.world.note(f"store has segment {name} of {len(content)} bytes", content)
        self._point("segment is durable")

    def sync_file(self, name: str) -> None:
        """Make a file's content durable."""
        self._folder.synced.add(name)

    def sync_folder(self) -> None:
        """Make the entries durable."""
        self._folder.names = set(self._folder.files)

    def read_range(self, name: str, offset: int, size: int) -> Buffer:
        """See SegmentBackend."""
        found = self.read(name)[offset : offset + size]
        if len(found) != size:
            raise CorruptionError(place=name, what="size", expected=size, found=len(found))
        return found

    def read_now(self, name: str, offset: int, size: int) -> Buffer | None:
        """See DirBackend."""
        if self._folder.random.random() < 0.3:
            return None
        try:
            return self.read_range(name, offset, size)
        except ForebayError:
            return None

    def read(self, name: str) -> bytes:
        """See SegmentBackend."""
        if name not in self._folder.files:
            raise SegmentMissingError(place=name, what="segment", expected="bytes", found="nothing")
        return self._folder.files[name]

    def list(self) -> list[str]:
        """See SegmentBackend."""
        return sorted(name for name in self._folder.files if parse_name(name) is not None)

    def delete(self, names: Sequence[str]) -> None:
        """See SegmentBackend."""
        for name in names:
            self._unlink(name)
        self.sync_folder()

    def stat(self, name: str) -> int:
        """See SegmentBackend."""
        return len(self.read(name))

    def _unlink(self, name: str) -> None:
        self._folder.files.pop(name, None)
        self._folder.synced.discard(name)
        self._folder.names.discard(name)

    def _fail(self, name: str) -> None:
        self._error = f"writing segment {name} failed: Input/output error"
        raise BackendError(self._error)

    def _point(self, text: str) -> None:
        self._folder.world.point(f"store {text}", self._loop)


class SimIndex(DictIndex):
    """The index; keeps the state before its newest transaction, to which a power cut may go back."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.tables
        self.on_update: Callable[[], None] = lambda: None

    def update(self, change: Callable[[IndexWriter], Result]) -> Result:
        """See Index."""
        self.point("index is updated")
        before = self.tables
        result = self._change(change)
        self.before = before
        self.on_update()
        self.point("index shows it")
        return result

    def sync(self) -> None:
        """See Index."""
        super().sync()
        self.before = self.tables

    def cut_power(self) -> None:
        """The meta page of the newest transaction may be lost."""
        self.tables = self.before


class SimReportFile:
    """Stands for service/report_file.py: a write is there as a whole or not, and a power cut may take it back."""

    def __init__(self) -> None:
        self.content = self.before = encode_reports(STORE, Reports((), ()))

    def read(self) -> Reports:
        """See File."""
        return decode_reports(self.content, store=STORE, place="reports")

    def write(self, kept: Reports) -> None:
        """See File."""
        self.before = self.content
        self.content = encode_reports(STORE, kept)

    def cut_power(self) -> None:
        """The newest rename is not durable."""
        self.content = self.before


class SimDamageFile:
    """Stands for service/damage_file.py, as SimReportFile for its own."""

    def __init__(self) -> None:
        self.content = self.before = encode_damage(STORE, ScrubState())

    def read(self) -> ScrubState:
        """See File."""
        return decode_damage(self.content, store=STORE, place="damage")

    def write(self, state: ScrubState) -> None:
        """See File."""
        self.before = self.content
        self.content = encode_damage(STORE, state)

    def cut_power(self) -> None:
        """The newest rename is not durable."""
        self.content = self.before


class _Opened:
    """What StoreShell needs of service/opening.py's OpenStore."""

    def __init__(self, backend: SimBackend, index: SimIndex, reports: SimReportFile, damage: SimDamageFile) -> None:
        self.backend = backend
        self.index = index
        self.reports = reports
        self.damage = damage
        self.folder = self
        self.store = STORE
        self.room = lambda: DiskRoom(1 << 40, 1 << 40)
        self.shrink = self.note_proved = lambda: None
        self.newest = claim(backend, index, store=STORE, now_ns=1)  # type: ignore[arg-type]


class StoreHost:
    """The store over all its lives. `shown` is called after each transaction that readers may see."""

    def __init__(self, world: World, network: Network, shown: Callable[[], None]) -> None:
        self.world = world
        self.network = network
        self.random = world.rng("store host")
        self.folder = SimFolder(world)
        self.index = SimIndex()
        self.reports = SimReportFile()
        self.damage = SimDamageFile()
        self.shown = shown
        self.wall_skew_ns = 0
        self.refused = ""
        self.power_goes = False  # the next death is one of the whole host
        self.died: Callable[[], None] = lambda: None
        self.loop: SimLoop | None = None
        self.shell: StoreShell | None = None
        self.backend: SimBackend
        self._peers = 0

    @property
    def running(self) -> bool:
        """Whether clients can connect."""
        return self.shell is not None

    def start(self) -> None:
        """Begin a life: replay, claim, serve."""
        assert self.loop is None
        loop = self.loop = SimLoop(self.world, "store", self._died)
        self.world.note("store starts")
        loop.enter(self._open, loop)

    def _open(self, loop: SimLoop) -> None:
        self.backend = SimBackend(self.folder, loop)
        self.backend.recover()
        self.index.on_update = lambda: None
        self.index.point = self.backend._point
        try:
            replay(self.backend, self.index, store=STORE)
            delete_leaving(self.backend, self.index)
            opened = _Opened(self.backend, self.index, self.reports, self.damage)
        except NoSpaceError:
            raise Died from None  # the daemon ends with an error, and is started again later
        except BackendError:
            self.power_goes = True
            raise Died from None
        except ForebayError as error:
            if not self.world.excuses:
                raise
            self.refused = str(error)
            self.world.store_refuses = True
            self.world.note(f"store refuses to start: {error}")
            return
        self.index.on_update = self.shown
        self.shell = StoreShell(
            opened,  # type: ignore[arg-type]
            settings=StoreSettings(data=Path("simulated")),
            wall_ns=lambda: self.world.now_ns + self.wall_skew_ns,
            fresh_id=self.random.randbytes,
        )
        self.shown()

    def kill(self) -> None:
        """kill -9."""
        if self.loop is not None:
            self.loop.die()

    def cut_power(self) -> None:
        """Take the power from the host."""
        self.power_goes = True
        if self.loop is not None:
            self.loop.die()

    def _died(self) -> None:
        assert self.loop is not None
        self.world.note(f"store {'loses power' if self.power_goes else 'is killed'}")
        self.network.cut(self.loop)
        if self.power_goes:
            self.power_goes = False
            surely = bool(self.folder.outcome)
            self.folder.cut_power()
            self.reports.cut_power()
            self.damage.cut_power()
            if surely or self.random.random() < 0.5:
                self.index.cut_power()
        self.loop = self.shell = None
        self.died()

    @property
    def broken(self) -> bool:
        """Whether it needs a restart to go on."""
        return self.shell is not None and bool(self.shell._engine.error)

    def accept(self, sock: SimSocket) -> None:
        """Serve a client on its socket."""
        assert self.loop is not None
        self.loop.enter(self._serve, sock)

    def _serve(self, sock: SimSocket) -> None:
        assert self.shell is not None
        connection = Connection(Role.SERVER, key=KEY, node=STORE, nonce=self.random.randbytes(32))
        self._peers += 1
        peer = Peer(self._peers, f"client {self._peers}", connection, self.shell.answer, _Owner(self.shell))
        peer.attach(Link(sock, connection, peer))  # type: ignore[arg-type]

    def ask(self, message: messages.AnyMessage) -> messages.AnyMessage:
        """Ask as an operator on the server would, and wait."""
        got: list[messages.AnyMessage] = []

        async def work() -> None:
            assert self.shell is not None
            answer, _ = await self.shell.answer(None, message, memoryview(b""))  # type: ignore[arg-type]
            got.append(answer)

        assert self.loop is not None
        loop = self.loop
        loop.enter(lambda: loop.create_task(work()))
        self.world.run(lambda: bool(got) or self.loop is not loop, limit_s=60)
        return got[0] if got else messages.Failed(messages.FAILED, "the store died")


class _Owner:
    """The wire's server, as a peer sees it, with room for everybody."""

    accepting = True

    def __init__(self, shell: StoreShell) -> None:
        self._shell = shell

    def may_start(self, peer: Peer) -> bool:
        return True

    def has_room(self, peer: Peer, size: int) -> bool:
        return True

    def on_size(self, change: int) -> None:
        pass

    def on_ready(self, peer: Peer) -> None:
        self._shell.new_connection(peer)

    def on_lost(self, peer: Peer, error: ForebayError) -> None:
        if peer.greeting is not None:
            self._shell.lost_connection(peer)

    def on_idle(self, peer: Peer) -> None:
        pass

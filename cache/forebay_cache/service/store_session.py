"""The connection to the store that never gives up: connects, opens the volumes again, notices silence, starts over.

Invariants:
    A volume's session was granted on the connection that `ready` returns with it; both go together.
    Of a volume nothing is asked and nothing sent anywhere but in the store that it lives in. Another one may answer
    under the address (and serve what lives there); the volume waits until its own is back.
    Refusals that somebody can mend (wrong store, no space, a store behind) are asked again; FENCED and VOLUME_IN_USE
    are final, because a writer that lost its epoch must not come back by itself, and so is NO_SUCH_SNAPSHOT.
    A snapshot has neither epoch nor session: it is open as soon as its store says that it is there.
Crash: nothing is kept; the next start opens every volume again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Final, NamedTuple

from forebay_cache.engine.attaching import wrong_store
from forebay_core.errors import AuthenticationError, ForebayError, ProtocolError, RefusedError, StoreUnreachableError
from forebay_core.units import DeviceId, Epoch, StoreId, Version, VolumeId, format_store
from forebay_wire import messages
from forebay_wire.address import Address
from forebay_wire.client import WireClient
from forebay_wire.messages import (
    Done,
    GetSnapshot,
    GetVolume,
    HeldReport,
    ListSnapshots,
    Opened,
    OpenVolume,
    Ping,
    ReleaseVolume,
    Reported,
    ReportHeld,
    Snapshot,
    SnapshotRow,
    Snapshots,
    Volume,
    VolumeRow,
)

CONNECT_TIMEOUT_S: Final = 5.0
OPEN_TIMEOUT_S: Final = 30.0
BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 2.0
STABLE_S: Final = 5.0
"""A connection that lasted this long makes the next reconnect quick again."""

PING_INTERVAL_S: Final = 5.0
PING_TIMEOUT_S: Final = 20.0
"""Silence for this long means a store that hangs; a disk under it may well take seconds."""

REFUSED_RETRY_S: Final = 2.0
COMMAND_WAIT_S: Final = 5.0
"""How long a command waits for a store that is not connected yet before it is told so."""

FINAL_CODES: Final = (messages.FENCED, messages.VOLUME_IN_USE, messages.NO_SUCH_SNAPSHOT)
assert BACKOFF_S_MIN < BACKOFF_S_MAX <= STABLE_S
assert PING_INTERVAL_S < PING_TIMEOUT_S

_LOG = logging.getLogger(__name__)


Connect = Callable[[Address, bytes | None, DeviceId], Awaitable[WireClient]]
"""Connects to an address with a key, as a device; raises as `WireClient.connect` does."""


async def connect(address: Address, key: bytes | None, device: DeviceId) -> WireClient:
    """Connect over TCP."""
    return await WireClient.connect(address, key=key, node=device, timeout_s=CONNECT_TIMEOUT_S)


class Session(NamedTuple):
    """The right to read and change a volume, on one connection."""

    client: WireClient
    number: int
    epoch: Epoch


class OpenedVolume:
    """A volume that is to be open at the store."""

    __slots__ = ("acknowledged", "id", "name", "refusal", "session", "settled", "snapshot", "store")

    def __init__(
        self, volume_id: VolumeId, store: StoreId, name: str, acknowledged: Version, *, snapshot: bool = False
    ) -> None:
        self.id = volume_id
        self.store = store
        self.name = name
        self.acknowledged = acknowledged
        self.snapshot = snapshot
        self.session: Session | None = None
        self.refusal: RefusedError | None = None  # the last one; final if settled
        self.settled = asyncio.Event()  # there is a session, or a final refusal

    def grant(self, session: Session) -> None:
        """The store let us have it."""
        self.session, self.refusal = session, None
        self.settled.set()

    def end(self, refusal: RefusedError) -> None:
        """The store gave it to somebody else."""
        self.session, self.refusal = None, refusal
        self.settled.set()

    def suspend(self) -> None:
        """The connection is gone; a final refusal stays."""
        if self.session is not None:
            self.session = None
            self.settled.clear()


class Backoff:
    """Delays that double up to a bound, spread by `jitter()`, which is from 0 to 1."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._delay_s = BACKOFF_S_MIN

    def reset(self) -> None:
        """Begin with short delays again."""
        self._delay_s = BACKOFF_S_MIN

    async def wait(self) -> None:
        """Wait for the next delay."""
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 2, BACKOFF_S_MAX)
        await asyncio.sleep(delay_s * (0.5 + self._jitter() / 2))


class StoreSession:
    """Keeps one authenticated connection, and the attached volumes open on it."""

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        key: bytes | None,
        device: DeviceId,
        jitter: Callable[[], float],
        on_reopened: Callable[[VolumeId, Opened], None],
        on_refused: Callable[[VolumeId, str, str], None],
        held: Callable[[StoreId], Sequence[HeldReport]] = lambda _: (),
        ping_interval_s: float = PING_INTERVAL_S,
        ping_timeout_s: float = PING_TIMEOUT_S,
        command_wait_s: float = COMMAND_WAIT_S,
        connect: Connect = connect,
    ) -> None:
        assert addresses
        self._addresses = tuple(addresses)
        self._key = key
        self._device = device
        self._jitter = jitter
        self._on_reopened = on_reopened
        self._on_refused = on_refused
        self._held = held
        self._ping_interval_s = ping_interval_s
        self._ping_timeout_s = ping_timeout_s
        self._command_wait_s = command_wait_s
        self._open = connect
        self._volumes: dict[VolumeId, OpenedVolume] = {}
        self._client: WireClient | None = None
        self._connected = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = str(self._addresses[0])
        self.error = ""
        self.control = ""  # where this daemon takes commands over TCP; the store tells who asks for it

    @property
    def connected(self) -> bool:
        """Whether a store is there."""
        return self._client is not None and not self._client.closed

    def start(self) -> None:
        """Begin to connect."""
        self.spawn(self._run())

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run work until it ends or this is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    async def close(self) -> None:
        """Stop everything that is under way, and disconnect."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    def backoff(self) -> Backoff:
        """Return fresh delays."""
        return Backoff(self._jitter)

    def lost(self, client: WireClient) -> None:
        """A request found the connection gone."""
        if self._client is client:
            self._client = None
            self._connected.clear()
            for volume in self._volumes.values():
                volume.suspend()

    # --- volumes ----------------------------------------------------------------------------------------------

    def keep_open(self, volume_id: VolumeId, store: StoreId, name: str, acknowledged: Version) -> None:
        """Open a volume that this device holds already, now or as soon as its store is there."""
        volume = self._volumes[volume_id] = OpenedVolume(volume_id, store, name, acknowledged)
        if self._client is not None:
            self.spawn(self._reopen(self._client, volume))

    def keep_snapshot(self, snapshot_id: VolumeId, store: StoreId, name: str) -> None:
        """Let a snapshot be read, now or as soon as its store is there."""
        if snapshot_id not in self._volumes:
            snapshot = OpenedVolume(snapshot_id, store, name, Version(0), snapshot=True)
            self._volumes[snapshot_id] = snapshot
            if self._client is not None:
                self.spawn(self._reopen(self._client, snapshot))

    def snapshots(self) -> list[VolumeId]:
        """Return the snapshots that may be read."""
        return [volume.id for volume in self._volumes.values() if volume.snapshot]

    def refusal(self, volume_id: VolumeId) -> RefusedError | None:
        """Return why the volume is not open at the store that is connected, if that has said so."""
        volume = self._volumes.get(volume_id)
        return None if volume is None else volume.refusal

    async def connected_store(self) -> StoreId:
        """Return which store is connected.

        Raises:
            StoreUnreachableError: none is.
        """
        return _store_of(await self._connected_client())

    async def find_volume(self, name: str) -> VolumeRow:
        """Return what the store knows of a volume.

        Raises:
            StoreUnreachableError: no store is connected.
            RefusedError: there is no such volume.
        """
        answer, _ = await (await self._connected_client()).ask(GetVolume(name), Volume, timeout_s=OPEN_TIMEOUT_S)
        return answer.row

    async def find_snapshot(self, volume: str, snapshot: str) -> SnapshotRow:
        """Return what the store knows of a snapshot.

        Raises:
            StoreUnreachableError: no store is connected.
            RefusedError: there is no such volume or snapshot.
        """
        return await self._snapshot(GetSnapshot(volume, snapshot))

    async def find_snapshot_by_id(self, snapshot_id: VolumeId) -> SnapshotRow:
        """Return what the store knows of a snapshot. Raises as `find_snapshot`."""
        return await self._snapshot(GetSnapshot(id=snapshot_id))

    async def list_snapshots(self, volume: str) -> list[SnapshotRow]:
        """Return the snapshots of a volume in the order they were taken. Raises as `find_snapshot`."""
        client = await self._connected_client()
        rows: list[SnapshotRow] = []
        while True:
            message = ListSnapshots(volume, rows[-1].version if rows else 0)
            page, _ = await client.ask(message, Snapshots, timeout_s=OPEN_TIMEOUT_S)
            rows += page.rows
            if not (page.more and page.rows):
                return rows

    async def _snapshot(self, message: GetSnapshot) -> SnapshotRow:
        answer, _ = await (await self._connected_client()).ask(message, Snapshot, timeout_s=OPEN_TIMEOUT_S)
        return answer.row

    async def open_volume(self, name: str, *, take_over: bool, acknowledged: Version) -> tuple[Opened, StoreId]:
        """Open a volume by name and keep it open; return as well which store granted it.

        Raises:
            StoreUnreachableError: no store is connected.
            RefusedError: the store says no.
        """
        client = await self._connected_client()
        store = _store_of(client)
        known = next((one for one in self._volumes.values() if (one.name, one.store) == (name, store)), None)
        if known is not None:
            # From the moment the store does this the old session is fenced, maybe before we read its answer.
            known.suspend()
        try:
            message = OpenVolume(name, self._device, take_over, acknowledged, self.control)
            opened, _ = await client.ask(message, Opened, timeout_s=OPEN_TIMEOUT_S)
        except BaseException:
            if known is not None and not known.settled.is_set():
                self.spawn(self._reopen(client, known))
            raise
        volume_id = VolumeId(opened.row.id)
        volume = self._volumes.setdefault(volume_id, OpenedVolume(volume_id, store, name, acknowledged))
        if client is self._client and volume.store == store:
            volume.grant(Session(client, opened.session, Epoch(opened.epoch)))
        return opened, store

    async def release(self, volume_id: VolumeId, epoch: int) -> None:
        """Give the volume back to the store and forget it.

        Raises:
            StoreUnreachableError: no store is connected.
            RefusedError: the store says no.
        """
        volume = self._volumes[volume_id]
        client = await self._connected_client()
        if volume.session is None:
            raise StoreUnreachableError(f"{self.address}: volume {volume.name} is not open there; try again")
        await client.ask(ReleaseVolume(volume_id, epoch, volume.session.number), Done, timeout_s=OPEN_TIMEOUT_S)
        self.forget(volume_id)

    def forget(self, volume_id: VolumeId) -> None:
        """Do not open the volume any more; who waits for it is refused."""
        volume = self._volumes.pop(volume_id, None)
        if volume is not None:
            volume.session = None
            volume.refusal = RefusedError(messages.NOT_ATTACHED, f"volume {volume.name} was detached")
            volume.settled.set()

    def acknowledge(self, volume_id: VolumeId, version: Version) -> None:
        """The store stands at this version; it must not be behind it when it comes back."""
        volume = self._volumes.get(volume_id)
        if volume is not None:
            volume.acknowledged = max(volume.acknowledged, version)

    def fenced(self, volume_id: VolumeId, session: Session, error: RefusedError) -> None:
        """The store refuses a session, and this is the newest: the volume is not ours any more, for good."""
        volume = self._volumes.get(volume_id)
        if volume is not None and volume.session == session:
            volume.end(error)
            self._on_refused(volume_id, error.code, str(error))

    async def ready(self, volume_id: VolumeId) -> Session:
        """Wait for the connection on which the volume is open.

        Raises:
            RefusedError: the store's final no.
        """
        while (volume := self._volumes.get(volume_id)) is not None:
            await volume.settled.wait()
            if volume.session is not None:
                return volume.session
            if volume.settled.is_set() and volume.refusal is not None:
                raise volume.refusal
        raise RefusedError(messages.NOT_ATTACHED, "the volume is not attached")

    # --- the connection ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = self.backoff()
        loop = asyncio.get_running_loop()
        while True:
            client = await self._connect()
            if client is not None:
                began_s = loop.time()
                why = await self._stay(client)
                if loop.time() - began_s > STABLE_S:
                    backoff.reset()
                self._report(f"connection to the store at {self.address} lost: {why}")
            await backoff.wait()

    async def _connect(self) -> WireClient | None:
        for address in self._addresses:
            try:
                client = await self._open(address, self._key, self._device)
            except (StoreUnreachableError, AuthenticationError, ProtocolError) as error:
                self._report(str(error))
                continue
            self.address = str(address)
            return client
        return None

    async def _stay(self, client: WireClient) -> ForebayError:
        """Use the connection until it is lost."""
        self._client = client
        self._connected.set()
        self.error = ""
        _LOG.info("connected to store %s at %s", format_store(_store_of(client)), self.address)
        for volume in self._volumes.values():
            if not volume.settled.is_set():
                self.spawn(self._reopen(client, volume))
        self.spawn(self._ping(client))
        try:
            return await client.wait_closed()
        finally:
            self.lost(client)

    async def _ping(self, client: WireClient) -> None:
        try:
            while True:
                await asyncio.sleep(self._ping_interval_s)
                reports = tuple(self._held(_store_of(client)))
                if reports:
                    reported, _ = await client.ask(ReportHeld(reports), Reported, timeout_s=self._ping_timeout_s)
                    self._note_lost(reports, reported)
                else:
                    await client.ask(Ping(), Done, timeout_s=self._ping_timeout_s)
        except (StoreUnreachableError, ProtocolError, RefusedError):
            await client.close()

    def _note_lost(self, reports: Sequence[HeldReport], reported: Reported) -> None:
        """End what a report said is lost. It may have been opened again, under a newer epoch, since that was sent."""
        for report in reports:
            volume = self._volumes.get(VolumeId(report.volume))
            session = volume.session if volume is not None else None
            if report.volume in reported.lost and session is not None and session.epoch == report.epoch:
                text = f"epoch {report.epoch} is over there"
                self.fenced(VolumeId(report.volume), session, RefusedError(messages.FENCED, text))

    async def _reopen(self, client: WireClient, volume: OpenedVolume) -> None:
        """Open a volume again until the store agrees, refuses for good, or is gone."""
        if volume.store != _store_of(client):
            self._refused(
                volume, RefusedError(messages.WRONG_STORE, wrong_store(volume.name, volume.store, _store_of(client)))
            )
            return  # and tried again on the next connection
        while client is self._client and self._volumes.get(volume.id) is volume:
            message = OpenVolume(volume.name, self._device, False, volume.acknowledged, self.control)
            try:
                if volume.snapshot:
                    await client.ask(GetSnapshot(id=volume.id), Snapshot, timeout_s=OPEN_TIMEOUT_S)
                    volume.grant(Session(client, 0, Epoch(0)))
                    return
                opened, _ = await client.ask(message, Opened, timeout_s=OPEN_TIMEOUT_S)
                if await self._is_same(client, volume, opened):
                    volume.grant(Session(client, opened.session, Epoch(opened.epoch)))
                    self._on_reopened(volume.id, opened)
                    return
                text = f"the store at {self.address} has another volume under the name {volume.name}"
                self._refused(volume, RefusedError(messages.NO_SUCH_VOLUME, text))
            except RefusedError as error:
                self._refused(volume, error)
                if error.code in FINAL_CODES:
                    volume.settled.set()
                    return
            except (StoreUnreachableError, ProtocolError):
                await client.close()
                return
            await asyncio.sleep(REFUSED_RETRY_S)

    async def _is_same(self, client: WireClient, volume: OpenedVolume, opened: Opened) -> bool:
        """Compare ids; a volume of the same name that is not ours is given back at once."""
        if opened.row.id == volume.id:
            return True
        await client.ask(ReleaseVolume(opened.row.id, opened.epoch, opened.session), Done, timeout_s=OPEN_TIMEOUT_S)
        return False

    def _refused(self, volume: OpenedVolume, error: RefusedError) -> None:
        before, volume.refusal = volume.refusal, error
        if before is None or str(before) != str(error):
            _LOG.error("the store at %s does not open volume %s: %s", self.address, volume.name, error)
            self._on_refused(volume.id, error.code, str(error))

    async def _connected_client(self) -> WireClient:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), self._command_wait_s)
        if self._client is None:
            raise StoreUnreachableError(f"no store answers at {self.address}: {self.error or 'not connected yet'}")
        return self._client

    def _report(self, text: str) -> None:
        if text != self.error:
            _LOG.warning("%s", text)
        self.error = text

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "work on the store failed", "exception": error}
            )


def _store_of(client: WireClient) -> StoreId:
    return StoreId(client.peer.node)

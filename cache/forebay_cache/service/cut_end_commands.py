"""Snapshots and resizes of attached volumes, as commands: ids, clocks, and the names that the store has.

Invariants:
    A name is asked for anew before it is refused: its snapshot may have been deleted at the store since.
    Names that could not be learned stand in no command's way: the store finds another name for a twin.
"""

import asyncio
import contextlib
from collections.abc import Callable

from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.changes import Tracked
from forebay_cache.engine.cut_ends import Taken
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.cut_end import CutEnd
from forebay_cache.service.completions import outcome
from forebay_cache.service.store_session import StoreSession
from forebay_core.errors import ForebayError, RefusedError
from forebay_core.names import check_name
from forebay_core.units import ID_SIZE, Version, VolumeId
from forebay_wire import messages
from forebay_wire.messages import SnapshotRow, VolumeRow


class CutEndCommands:
    """Takes snapshots and resizes volumes that are attached here."""

    def __init__(
        self,
        engine: CacheEngine,
        session: StoreSession,
        *,
        draw: Callable[[int], bytes],
        wall_ns: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._session = session
        self._draw = draw
        self._wall_ns = wall_ns

    def learn_soon(self, volume: CacheVolume) -> None:
        """Ask the store for the volume's snapshots as soon as it is open there, beside everything else."""
        self._session.spawn(self._learn_when_open(volume))

    async def learn(self, volume: CacheVolume) -> None:
        """Ask the store for the volume's snapshots, if it is there; of a snapshot, for those taken before it."""
        if not self._session.connected:
            return
        name, _, own = volume.name.partition("@")
        before = set(volume.known_snapshots)
        try:
            rows = await self._session.list_snapshots(name)
        except ForebayError:
            return  # it is asked again at the next connection
        stored = {
            row.name: Tracked(VolumeId(row.id), Version(row.version))
            for row in rows
            if not volume.snapshot or (row.version <= volume.acknowledged and row.name != own)
        }
        came = {key: one for key, one in volume.known_snapshots.items() if key not in before}  # while it was asked
        volume.known_snapshots = stored | came

    async def _learn_when_open(self, volume: CacheVolume) -> None:
        with contextlib.suppress(RefusedError):  # then there is nothing to learn, and others say so
            await self._session.ready(volume.id)
            await self.learn(volume)

    async def snapshot(self, volume: CacheVolume, name: str, *, stored: bool) -> SnapshotRow:
        """Take a snapshot; return when it is durable, or with `stored` when the store has it.

        Raises:
            ForebayError: it is refused, or the device or the volume failed.
        """
        check_name(name, "snapshot")
        if name in volume.known_snapshots:
            await self.learn(volume)
        snapshot, taken_ns = self._draw(ID_SIZE), self._wall_ns()
        end = await self._taken(
            volume, lambda taken: self._engine.cut_ends.snapshot(volume, snapshot, name, taken_ns, taken)
        )
        if stored:
            version = Version(end.version)
            if not await outcome(lambda done: self._engine.destage.drain(volume, done, through=version)):
                raise RefusedError(messages.FAILED, f"snapshot {volume.name}@{name} is taken; {self._failure(volume)}")
        return SnapshotRow(
            id=snapshot,
            volume=volume.id,
            volume_name=volume.name,
            name=name,
            version=end.version,
            size=end.size,
            created_ns=taken_ns,
            origin=volume.origin,
            pending=end.version > volume.acknowledged,
        )

    async def resize(self, volume: CacheVolume, size: int) -> VolumeRow:
        """Make a volume larger; return when that is durable. Clients see the size when they connect anew.

        Raises:
            ForebayError: it is refused, or the device or the volume failed.
        """
        await self._taken(volume, lambda taken: self._engine.cut_ends.resize(volume, size, taken))
        return VolumeRow(
            id=volume.id,
            name=volume.name,
            size=volume.size,
            epoch=volume.epoch,
            version=volume.acknowledged,
            committed_ns=0,
            created_ns=0,
            writer=self._engine.superblock.device,
            stored_size=0,
            data_blocks=0,
            origin=volume.origin,
        )

    async def _taken(self, volume: CacheVolume, start: Callable[[Taken], None]) -> CutEnd:
        future: asyncio.Future[CutEnd | None] = asyncio.get_running_loop().create_future()

        def taken(end: CutEnd | None) -> None:
            if not future.done():  # whoever waited may have been cancelled
                future.set_result(end)

        if volume.snapshot:
            raise RefusedError(messages.BAD_REQUEST, f"{volume.name} is a snapshot: it stays as it is")
        start(taken)
        end = await future
        if end is None:
            raise RefusedError(messages.FAILED, f"volume {volume.name}: {self._failure(volume)}")
        return end

    def _failure(self, volume: CacheVolume) -> str:
        return volume.error or self._engine.failed or "it was detached meanwhile"

"""Snapshots served by this daemon: attached as devices of their own, and read through to by clones.

Invariants:
    Every snapshot that the engine reads of the store is kept open in the session, and no other.
    A snapshot that is not in the store yet is not attached, wherever it was taken.
Crash: rows on the device say which snapshots are attached, and which ones clones read through to.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.sources import SnapshotView
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.volume_note import Front
from forebay_cache.service.completions import outcome
from forebay_cache.service.store_session import StoreSession
from forebay_core.errors import RefusedError
from forebay_core.names import check_name
from forebay_core.units import StoreId, Version, VolumeId
from forebay_wire import messages
from forebay_wire.messages import SnapshotRow

CHAIN_MAX: Final = 64
"""Snapshots that a clone may read through to, one below the other: each costs a question when it is attached."""

_LOG = logging.getLogger(__name__)


def is_snapshot_name(name: str) -> bool:
    """Tell whether an export name is meant to be that of a snapshot."""
    return "@" in name


class SnapshotExports:
    """Finds snapshots at the store and lets the engine serve them."""

    def __init__(self, engine: CacheEngine, session: StoreSession) -> None:
        self._engine = engine
        self._session = session
        self._opening: list[list[SnapshotView]] = []  # chains of those who are being attached

    def resume(self) -> None:
        """Keep open what was served, or read through to, when the daemon ended."""
        for volume in self._engine.volumes.values():
            if volume.snapshot and self._is_read(volume):
                self._session.keep_snapshot(volume.id, volume.store, volume.name)

    async def attach(self, name: str, *, front: Front) -> CacheVolume:
        """Serve a snapshot by its export name.

        Raises:
            ForebayError: there is none, it is not in the store yet, or the engine says no.
        """
        volume_name, _, snapshot_name = name.partition("@")
        check_name(volume_name)
        check_name(snapshot_name, "snapshot")
        store = await self._session.connected_store()
        row = await self._find(volume_name, snapshot_name)
        first = _view(row, store)
        chain = [first, *await self.chain(first.origin, store)]
        with self.reading(chain):
            await outcome(
                lambda done: self._engine.sources.attach(
                    chain, attached=lambda volume: done(volume is not None), front=front
                )
            )
        volume = self._engine.by_id(first.id)
        if volume is None or not volume.attached:
            raise RefusedError(messages.FAILED, f"the cache device failed: {self._engine.failed}")
        return volume

    async def detach(self, volume: CacheVolume) -> None:
        """Stop serving a snapshot whose clients are gone.

        Raises:
            RefusedError: the device failed.
        """
        if not await outcome(lambda done: self._engine.sources.detach(volume, done)):
            raise RefusedError(messages.FAILED, f"the cache device failed: {self._engine.failed}")
        self.forget_unneeded()

    async def chain(self, origin: VolumeId, store: StoreId) -> list[SnapshotView]:
        """Return what a clone with this origin reads through to, nearest first.

        Raises:
            ForebayError: the store is away or says no, or the chain is too long.
        """
        chain: list[SnapshotView] = []
        while origin:
            if len(chain) == CHAIN_MAX:
                raise RefusedError(
                    messages.FAILED,
                    f"it is a clone of more than {CHAIN_MAX} clones, one of the other; flatten one of them first",
                )
            chain.append(self._known(origin, store) or _view(await self._session.find_snapshot_by_id(origin), store))
            origin = chain[-1].origin
        return chain

    @contextmanager
    def reading(self, chain: list[SnapshotView]) -> Iterator[None]:
        """Let these be read from the store while somebody is being attached, and then as long as he needs them."""
        self._opening.append(chain)
        for view in chain:
            self._session.keep_snapshot(view.id, view.store, view.name)
        try:
            yield
        finally:
            self._opening.remove(chain)
            self.forget_unneeded()

    def forget_unneeded(self) -> None:
        """Stop reading the snapshots that nobody serves or reads through to any more."""
        opening = {view.id for chain in self._opening for view in chain}
        for snapshot_id in self._session.snapshots():
            volume = self._engine.by_id(snapshot_id)
            if snapshot_id not in opening and (volume is None or not self._is_read(volume)):
                self._session.forget(snapshot_id)

    def refused(self, volume: CacheVolume, code: str, text: str) -> None:
        """The store does not let a snapshot be read."""
        if code == messages.NO_SUCH_SNAPSHOT:
            self._engine.sources.gone(volume)
        else:
            volume.warning = text

    # --- inside -----------------------------------------------------------------------------------------------

    def _is_read(self, volume: CacheVolume) -> bool:
        return volume.attached or not volume.temporary

    def _known(self, snapshot_id: VolumeId, store: StoreId) -> SnapshotView | None:
        """Return what the device knows of a snapshot: it never changes."""
        volume = self._engine.by_id(snapshot_id)
        if volume is None or volume.store != store:
            return None
        return SnapshotView(volume.id, volume.name, volume.size, volume.acknowledged, store, volume.origin)

    async def _find(self, volume_name: str, snapshot_name: str) -> SnapshotRow:
        try:
            return await self._session.find_snapshot(volume_name, snapshot_name)
        except RefusedError as error:
            if error.code != messages.NO_SUCH_SNAPSHOT:
                raise
            here = next((one for one in self._engine.attached() if one.name == volume_name), None)
            if here is not None and snapshot_name in here.pending_snapshots:
                text = f"snapshot {volume_name}@{snapshot_name} is not in the store yet; it is when it is drained"
            elif here is None:
                text = f"{error}; one that the host of {volume_name} took just now is there when it is drained"
            else:
                text = str(error)
            raise RefusedError(error.code, text) from error


def _view(row: SnapshotRow, store: StoreId) -> SnapshotView:
    name = f"{row.volume_name}@{row.name}"
    return SnapshotView(VolumeId(row.id), name, row.size, Version(row.version), store, VolumeId(row.origin))

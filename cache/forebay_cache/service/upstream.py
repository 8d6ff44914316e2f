"""The store, as the engine sees it: requests that are repeated until they are answered.

Invariants:
    Every accepted request is completed once, on the loop's thread, never inside the call; after `close` not at all.
    A change is sent only under the session that its connection granted; what was in flight when the connection was
    lost is sent again under the next one. Staging twice and committing twice are harmless by the protocol.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

import msgspec

from forebay_cache.engine.ports import ChangedPage, CutIdentity, FetchedPiece, UpstreamRefusal
from forebay_cache.format.cut_end import RESIZE, CutEnd
from forebay_cache.service.store_session import Session, StoreSession
from forebay_core.errors import CorruptionError, ForebayError, ProtocolError, RefusedError, StoreUnreachableError
from forebay_core.extents import Extent, pack
from forebay_core.units import Buffer, Version, VolumeId, make_version
from forebay_wire import messages
from forebay_wire.messages import (
    AnyMessage,
    Blocks,
    Changed,
    Changes,
    CommitCut,
    Committed,
    Done,
    MapExtents,
    Mapped,
    Read,
    StagePart,
)
from forebay_wire.pieces import changed_extents, mapped_pieces, plain_pieces

DECODE_INLINE_SIZE_MAX: Final = 128 * 1024
"""Larger answers are opened in a thread; below, the way there and back costs more than the work."""

MAP_BLOCKS_MAX: Final = 1 << 28
"""Blocks of one question about allocation, 1 TiB; the answer may end early anyway."""

T = TypeVar("T")
FetchDone = Callable[[Sequence[FetchedPiece] | UpstreamRefusal], None]

_LOG = logging.getLogger(__name__)


class StoreUpstream:
    """Implements the engine's `Upstream` port over a StoreSession."""

    def __init__(self, session: StoreSession) -> None:
        self._session = session
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self.waiting_for_space = ""

    async def close(self) -> None:
        """Stop; what is under way is never completed."""
        await self._session.close()
        self._decoder.shutdown(wait=True, cancel_futures=True)

    def fetch(self, volume: VolumeId, extents: Sequence[Extent], min_version: Version, done: FetchDone) -> None:
        """See Upstream."""
        self._session.spawn(self._fetch(volume, extents, min_version, done))

    def allocation(self, volume: VolumeId, extent: Extent, done: FetchDone, *, through: bool) -> None:
        """See Upstream."""
        self._session.spawn(self._allocation(volume, extent, done, through))

    def changed(
        self, volume: VolumeId, since: VolumeId, start: int, done: Callable[[ChangedPage | UpstreamRefusal], None]
    ) -> None:
        """See Upstream."""
        self._session.spawn(self._changed(volume, since, start, done))

    def stage(
        self,
        cut: CutIdentity,
        index: int,
        frames: Sequence[Buffer],
        holes: Sequence[Extent],
        done: Callable[[UpstreamRefusal | None], None],
    ) -> None:
        """See Upstream."""
        self._session.spawn(self._stage(cut, index, frames, pack(holes), done))

    def commit(
        self,
        cut: CutIdentity,
        part_count: int,
        committed_ns: int,
        end: CutEnd | None,
        done: Callable[[UpstreamRefusal | None], None],
    ) -> None:
        """See Upstream."""
        self._session.spawn(self._commit(cut, part_count, committed_ns, end, done))

    async def changed_since(self, volume: VolumeId, since: Version) -> AsyncIterator[Sequence[Extent]]:
        """Yield, page by page, what was written or trimmed since a version.

        Raises:
            RefusedError: HISTORY_GONE, or another final no.
        """
        start = 0
        while start >= 0:
            answer, _ = await self._ask(volume, partial(_changed_since, volume, since, start), Changes)
            yield changed_extents(answer.pieces, start, answer.next_start)
            start = answer.next_start

    # --- one coroutine a request ------------------------------------------------------------------------------

    async def _fetch(self, volume: VolumeId, extents: Sequence[Extent], min_version: Version, done: FetchDone) -> None:
        packed = pack(extents)

        def message(session: Session) -> AnyMessage:
            return Read(volume, packed, min_version, session.epoch, session.number)

        try:
            answer, payload = await self._ask(volume, message, Blocks)
            done(await self._open_pieces(answer, payload, extents, volume))
        except RefusedError as error:
            done(UpstreamRefusal(error.code, str(error)))
        except (CorruptionError, ProtocolError) as error:
            _LOG.error("volume %s: the store's answer to a read is wrong: %s", volume.hex(), error)
            done(UpstreamRefusal(messages.CORRUPT, str(error)))

    async def _open_pieces(
        self, answer: Blocks, payload: memoryview, extents: Sequence[Extent], volume: VolumeId
    ) -> Sequence[FetchedPiece]:
        place = f"store {self._session.address} volume {volume.hex()}"
        decode = partial(plain_pieces, answer.pieces, payload, extents, place=place)
        if payload.nbytes <= DECODE_INLINE_SIZE_MAX:
            pieces = decode()
        else:
            pieces = await asyncio.get_running_loop().run_in_executor(self._decoder, decode)
        return [FetchedPiece(p.extent, p.plain, Version(p.version), p.checksums, p.origin) for p in pieces]

    async def _allocation(self, volume: VolumeId, extent: Extent, done: FetchDone, through: bool) -> None:
        asked = Extent(extent.start, min(extent.count, MAP_BLOCKS_MAX))

        def message(session: Session) -> AnyMessage:
            return MapExtents(volume, asked.start, asked.count, session.epoch, session.number, through)

        try:
            answer, _ = await self._ask(volume, message, Mapped)
            pieces = mapped_pieces(answer.pieces, asked)
            done(
                [
                    FetchedPiece(p.extent, None if p.hole or p.origin else b"", Version(p.version), (), p.origin)
                    for p in pieces
                ]
            )
        except RefusedError as error:
            done(UpstreamRefusal(error.code, str(error)))
        except ProtocolError as error:
            _LOG.error("volume %s: the store's map is wrong: %s", volume.hex(), error)
            done(UpstreamRefusal(messages.FAILED, str(error)))

    async def _changed(
        self, volume: VolumeId, since: VolumeId, start: int, done: Callable[[ChangedPage | UpstreamRefusal], None]
    ) -> None:
        try:
            answer, _ = await self._ask(volume, lambda _: Changed(volume, 0, start, since), Changes)
            done(ChangedPage(changed_extents(answer.pieces, start, answer.next_start), answer.next_start))
        except RefusedError as error:
            done(UpstreamRefusal(error.code, str(error)))
        except ProtocolError as error:
            _LOG.error("volume %s: the store's list of changes is wrong: %s", volume.hex(), error)
            done(UpstreamRefusal(messages.FAILED, str(error)))

    async def _stage(
        self,
        cut: CutIdentity,
        index: int,
        frames: Sequence[Buffer],
        holes: bytes,
        done: Callable[[UpstreamRefusal | None], None],
    ) -> None:
        def message(session: Session) -> AnyMessage:
            return StagePart(cut.volume, cut.epoch, session.number, cut.attempt, index, holes)

        try:
            await self._ask(cut.volume, message, Done, frames)
        except RefusedError as error:
            done(UpstreamRefusal(error.code, str(error)))
        else:
            done(None)

    async def _commit(
        self,
        cut: CutIdentity,
        part_count: int,
        committed_ns: int,
        end: CutEnd | None,
        done: Callable[[UpstreamRefusal | None], None],
    ) -> None:
        stands = make_version(cut.epoch, cut.last)

        def message(session: Session) -> AnyMessage:
            numbers = (cut.attempt, part_count, cut.first, cut.last, committed_ns)
            message = CommitCut(cut.volume, cut.epoch, session.number, *numbers)
            if end is None:
                return message
            if end.kind == RESIZE:
                return msgspec.structs.replace(message, size=end.size)
            return msgspec.structs.replace(
                message, snapshot=end.snapshot, snapshot_name=end.name, snapshot_ns=end.taken_ns
            )

        try:
            # Beyond the cut, what is still dirty would count as clean and never be sent.
            await self._ask(cut.volume, message, Committed, right=lambda answer: answer.version == stands)
        except RefusedError as error:
            done(UpstreamRefusal(error.code, str(error)))
        else:
            self._session.acknowledge(cut.volume, stands)
            done(None)

    async def _ask(
        self,
        volume: VolumeId,
        message: Callable[[Session], AnyMessage],
        expect: type[T],
        payload: Sequence[Buffer] = (),
        *,
        right: Callable[[T], bool] = lambda _: True,
    ) -> tuple[T, memoryview]:
        """Ask until there is an answer; one that is not `right` breaks the rules and ends its connection.

        Raises:
            RefusedError: the store's final no.
        """
        backoff = self._session.backoff()
        while True:
            session = await self._session.ready(volume)
            try:
                answer = await session.client.ask(message(session), expect, payload)
                if not right(answer[0]):
                    raise ProtocolError(f"the store's answer contradicts what was asked: {answer[0]}")
            except (StoreUnreachableError, ProtocolError) as error:
                await self._leave(session, error)
            except RefusedError as error:
                if not await self._may_repeat(volume, session, error):
                    raise
                await backoff.wait()
            else:
                self.waiting_for_space = ""
                return answer

    async def _leave(self, session: Session, error: ForebayError) -> None:
        """The connection is gone, or must go."""
        if not session.client.closed:
            _LOG.error("left the store at %s: %s", self._session.address, error)
            await session.client.close()
        self._session.lost(session.client)

    async def _may_repeat(self, volume: VolumeId, session: Session, error: RefusedError) -> bool:
        match error.code:
            case messages.NO_SPACE:
                text = f"the store at {self._session.address} has no space: {error}"
                if not self.waiting_for_space:
                    _LOG.error("%s", text)
                self.waiting_for_space = text
                return True
            case messages.STOPPING:
                await session.client.close()
                return True
            case messages.FENCED:
                # Opening the volume again on this connection raises the session: only an old number was fenced.
                if await self._session.ready(volume) != session:
                    return True
                self._session.fenced(volume, session, error)
                return False
            case _:
                return False


def _changed_since(volume: VolumeId, since: Version, start: int, _session: Session) -> AnyMessage:
    return Changed(volume, since, start)

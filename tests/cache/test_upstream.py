"""The upstream port over real sockets, against a scripted store that comes, goes and refuses."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from forebay_cache.engine.ports import CutIdentity, FetchedPiece, UpstreamRefusal
from forebay_cache.format.cut_end import RESIZE, SNAPSHOT, CutEnd
from forebay_cache.service.store_session import StoreSession
from forebay_cache.service.upstream import StoreUpstream
from forebay_core.errors import ForebayError, RefusedError, StoreUnreachableError
from forebay_core.extents import Extent, pack, unpack
from forebay_core.frame import FrameBuilder
from forebay_core.units import (
    BLOCK_SIZE,
    Buffer,
    DeviceId,
    Epoch,
    StoreId,
    VolumeId,
    format_store,
    make_version,
)
from forebay_core.units import Sequence as ChangeSequence
from forebay_wire import messages
from forebay_wire.address import Address
from forebay_wire.limits import REQUESTS_IN_FLIGHT_MAX
from forebay_wire.messages import (
    HOLE_FRAME,
    PIECE_DTYPE,
    AnyMessage,
    Blocks,
    Changed,
    Changes,
    CommitCut,
    Committed,
    Done,
    HeldReport,
    MapExtents,
    Mapped,
    Opened,
    OpenVolume,
    Read,
    ReleaseVolume,
    Reported,
    ReportHeld,
    StagePart,
    VolumeRow,
)
from forebay_wire.peer import Peer
from forebay_wire.server import WireServer

DEVICE = DeviceId(b"D" * 16)
VOLUME = VolumeId(b"V" * 16)
STORE = StoreId(b"S" * 16)
OTHER_STORE = StoreId(b"X" * 16)
VERSION = make_version(3, 7)
CUT = CutIdentity(VOLUME, Epoch(3), 99, ChangeSequence(8), ChangeSequence(9))
BLOCKS = [bytes([65 + index]) * BLOCK_SIZE for index in range(8)]

Reply = tuple[AnyMessage, Sequence[Buffer]]


class ScriptedStore:
    """Answers like a store with one volume of eight blocks; `refusals` come first, one for each request of a type."""

    def __init__(self) -> None:
        self.node = bytes(STORE)
        self.port = 0
        self.volume_id = VOLUME
        self.session = 0
        self.asked: list[AnyMessage] = []
        self.refusals: list[tuple[type, RefusedError]] = []
        self.frames = [FrameBuilder().build([Extent(0, 8)], b"".join(BLOCKS))]
        self.silent: asyncio.Event | None = None
        self.lost: tuple[bytes, ...] = ()
        self._server: WireServer | None = None

    async def start(self) -> None:
        self._server = WireServer(self._answer, key=None, node=self.node)
        self.port = (await self._server.listen_tcp(Address("127.0.0.1", self.port))).port

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close(0)
            self._server = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.asked)

    async def _answer(self, _peer: Peer, message: AnyMessage, payload: memoryview) -> Reply:
        self.asked.append(message)
        for item in self.refusals:
            if isinstance(message, item[0]):
                self.refusals.remove(item)
                raise item[1]
        if self.silent is not None and isinstance(message, Read | StagePart | CommitCut):
            self.silent.set()
            await asyncio.sleep(60)
        return self._reply(message)

    def _reply(self, message: AnyMessage) -> Reply:
        match message:
            case OpenVolume():
                self.session += 1
                row = VolumeRow(self.volume_id, message.name, 8 * BLOCK_SIZE, 3, VERSION, 0, 0, message.device, 0, 8)
                return Opened(row, 3, self.session), ()
            case ReleaseVolume():
                return Done(), ()
            case ReportHeld():
                return Reported(self.lost), ()
            case StagePart() | CommitCut() | Read() | MapExtents() if message.session != self.session:
                raise RefusedError(messages.FENCED, "old session")
            case StagePart():
                return Done(), ()
            case CommitCut():
                return Committed(make_version(3, message.last), False), ()
            case Read():
                rows = [(e.start, e.count, 0, e.start, VERSION) for e in unpack(message.extents, count_max=99)]
                return Blocks(np.array(rows, PIECE_DTYPE).tobytes()), self.frames
            case MapExtents():
                rows = [(message.start, 1, 0, 0, 1), (message.start + 1, 1, HOLE_FRAME, 0, 0)]
                return Mapped(np.array(rows, PIECE_DTYPE).tobytes()), ()
            case Changed():
                rows = [(message.start, 1, 0, 0, VERSION)]
                next_start = 5 if message.start == 0 else -1
                return Changes(np.array(rows, PIECE_DTYPE).tobytes(), next_start, VERSION), ()
            case _:
                raise AssertionError(message)


class Rig:
    def __init__(self, store: ScriptedStore, *, ping_s: float = 5.0) -> None:
        self.reopened: list[Opened] = []
        self.refused: list[tuple[str, str]] = []
        self.session = StoreSession(
            [Address("127.0.0.1", store.port)],
            key=None,
            device=DEVICE,
            jitter=lambda: 0.0,
            on_reopened=lambda _, opened: self.reopened.append(opened),
            on_refused=lambda _, code, text: self.refused.append((code, text)),
            ping_interval_s=ping_s,
            ping_timeout_s=ping_s,
            command_wait_s=0.2,
        )
        self.upstream = StoreUpstream(self.session)

    def fetch(self, extents: Sequence[Extent]) -> Awaitable[Sequence[FetchedPiece] | UpstreamRefusal]:
        return asked(lambda done: self.upstream.fetch(VOLUME, extents, VERSION, done))

    def stage(self, frames: Sequence[Buffer] = (b"frame",)) -> Awaitable[UpstreamRefusal | None]:
        return asked(lambda done: self.upstream.stage(CUT, 0, frames, [Extent(1, 2)], done))

    def commit(self, end: CutEnd | None = None) -> Awaitable[UpstreamRefusal | None]:
        return asked(lambda done: self.upstream.commit(CUT, 1, 123, end, done))


def asked(start: Callable[[Callable[..., None]], None]) -> Awaitable[object]:
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    start(future.set_result)
    assert not future.done(), "completed inside the call"
    return future


@asynccontextmanager
async def running(store: ScriptedStore, *, ping_s: float = 5.0, started: bool = True) -> AsyncIterator[Rig]:
    await store.start()
    if not started:
        await store.stop()
    rig = Rig(store, ping_s=ping_s)
    rig.session.start()
    rig.session.keep_open(VOLUME, STORE, "disk", VERSION)
    try:
        yield rig
    finally:
        await rig.upstream.close()
        await store.stop()


def run(test: Coroutine[None, None, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_fetch_brings_blocks_with_versions_and_checksums() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            pieces = await rig.fetch([Extent(1, 2), Extent(5, 1)])
            assert [(p.extent, bytes(p.plain or b""), p.version) for p in pieces] == [
                (Extent(1, 2), BLOCKS[1] + BLOCKS[2], VERSION),
                (Extent(5, 1), BLOCKS[5], VERSION),
            ]
            assert len(pieces[0].checksums) == 2
            assert Read(VOLUME, pack([Extent(1, 2), Extent(5, 1)]), VERSION, 3, 1) in store.asked

    run(test())


def test_a_large_answer_is_opened_beside_the_loop() -> None:
    async def test() -> None:
        store = ScriptedStore()
        noise = [os.urandom(8 * BLOCK_SIZE) for _ in range(6)]
        store.frames = [FrameBuilder().build([Extent(8 * i, 8)], plain) for i, plain in enumerate(noise)]
        store._reply = lambda message, reply=store._reply: (  # type: ignore[method-assign]
            (Blocks(np.array([(8 * i, 8, i, 0, 1) for i in range(6)], PIECE_DTYPE).tobytes()), store.frames)
            if isinstance(message, Read)
            else reply(message)
        )
        async with running(store) as rig:
            pieces = await rig.fetch([Extent(0, 48)])
            assert [bytes(piece.plain or b"") for piece in pieces] == noise

    run(test())


def test_a_fetch_waits_for_a_store_that_is_away() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store, started=False) as rig:
            answer = rig.fetch([Extent(0, 1)])
            await until(lambda: rig.session.error != "")
            assert not rig.session.connected
            await store.start()
            assert (await answer)[0].plain == BLOCKS[0]
            assert rig.session.connected and not rig.session.error

    run(test())


@pytest.mark.parametrize("kind", ["fetch", "stage", "commit"])
def test_what_was_in_flight_is_sent_again_after_reopening(kind: str) -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.silent = asyncio.Event()
        async with running(store) as rig:
            answer = rig.fetch([Extent(0, 1)]) if kind == "fetch" else getattr(rig, kind)()
            await store.silent.wait()
            store.silent = None
            await store.restart()
            result = await answer
            assert not isinstance(result, UpstreamRefusal)
            assert len(rig.reopened) == store.session == 2
            if kind != "fetch":
                changes = [m for m in store.asked if isinstance(m, StagePart | CommitCut)]
                assert [m.session for m in changes] == [1, 2]

    run(test())


def test_the_newest_acknowledged_version_is_told_when_reopening() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            assert await rig.stage() is None
            assert await rig.commit() is None
            await store.restart()
            await until(lambda: len(rig.reopened) == 2)
            opens = [m for m in store.asked if isinstance(m, OpenVolume)]
            assert [m.acknowledged for m in opens] == [VERSION, make_version(3, 9)]
            assert opens[0].device == DEVICE and not opens[0].take_over

    run(test())


def test_a_commit_carries_the_snapshot_or_the_size_that_the_cut_ends_with() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            for end in (
                None,
                CutEnd(1, SNAPSHOT, make_version(3, 9), 1 << 30, 77, b"i" * 16, "monday"),
                CutEnd(1, RESIZE, make_version(3, 9), 1 << 31),
            ):
                assert await rig.commit(end) is None
        plain, snapshot, resize = (m for m in store.asked if isinstance(m, CommitCut))
        assert (plain.snapshot, plain.snapshot_name, plain.snapshot_ns, plain.size) == (b"", "", 0, 0)
        assert (snapshot.snapshot, snapshot.snapshot_name, snapshot.snapshot_ns) == (b"i" * 16, "monday", 77)
        assert (snapshot.size, resize.size, resize.snapshot) == (0, 1 << 31, b"")
        assert plain.last == snapshot.last == resize.last == 9

    run(test())


def test_a_commit_that_answers_another_version_ends_the_connection_and_is_sent_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        store = ScriptedStore()
        wrong = [make_version(3, 14), make_version(4, 9), make_version(3, 8)]
        store._reply = lambda message, reply=store._reply: (  # type: ignore[method-assign]
            (Committed(wrong.pop(), False), ()) if isinstance(message, CommitCut) and wrong else reply(message)
        )
        async with running(store) as rig:
            assert await rig.commit() is None
            assert not wrong and store.session == store.count(CommitCut) == 4
            opens = [m for m in store.asked if isinstance(m, OpenVolume)]
            assert [m.acknowledged for m in opens] == [VERSION] * 4
            await store.restart()
            await until(lambda: len(rig.reopened) == 5)
            assert store.asked[-1] == OpenVolume("disk", DEVICE, False, make_version(3, 9))

    run(test())
    assert "contradicts what was asked" in caplog.text


def test_another_store_under_the_same_address_is_not_talked_to() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            await until(lambda: len(rig.reopened) == 1)
            await store.stop()
            await until(lambda: not rig.session.connected)
            answer = rig.fetch([Extent(0, 1)])
            store.node = bytes(OTHER_STORE)
            store.asked.clear()
            await store.start()
            await until(lambda: bool(rig.refused))
            code, text = rig.refused[0]
            assert code == messages.WRONG_STORE and format_store(STORE) in text and format_store(OTHER_STORE) in text
            assert rig.session.refusal(VOLUME) is not None and not store.asked
            assert await rig.session.connected_store() == OTHER_STORE
            store.node = bytes(STORE)
            await store.restart()
            assert (await answer)[0].plain == BLOCKS[0]

    run(test())


def test_a_store_hears_only_of_the_volumes_that_live_in_it() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.node = bytes(OTHER_STORE)
        asked_for: list[StoreId] = []
        async with running(store, ping_s=0.02) as rig:
            rig.session._held = lambda home: asked_for.append(home) or ()  # type: ignore[func-returns-value]
            await until(lambda: len(asked_for) > 1)
            assert set(asked_for) == {OTHER_STORE} and store.count(OpenVolume) == 0
            store.node = bytes(STORE)
            await store.restart()
            await until(lambda: asked_for[-1] == STORE)
            await until(lambda: len(rig.reopened) == 1)

    run(test())


def test_another_volume_under_the_name_is_given_back_and_waited_out() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.volume_id = VolumeId(b"W" * 16)
        async with running(store) as rig:
            answer = rig.fetch([Extent(0, 1)])
            await until(lambda: store.count(ReleaseVolume) == 1)
            await until(lambda: bool(rig.refused))
            assert rig.refused[0][0] == messages.NO_SUCH_VOLUME and "another volume" in rig.refused[0][1]
            store.volume_id = VOLUME
            assert (await answer)[0].plain == BLOCKS[0]
            assert store.count(Read) == 1

    run(test())


def test_a_full_store_is_waited_out() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.refusals = [(StagePart, RefusedError(messages.NO_SPACE, "disk full"))] * 2
        async with running(store) as rig:
            answer = rig.stage()
            await until(lambda: rig.upstream.waiting_for_space.endswith("has no space: disk full"))
            assert await answer is None
            assert store.count(StagePart) == 3 and rig.upstream.waiting_for_space == ""

    run(test())


def test_a_stopping_store_is_left_and_found_again() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.refusals = [(StagePart, RefusedError(messages.STOPPING, "stopping"))]
        async with running(store) as rig:
            assert await rig.stage() is None
            assert store.session == 2

    run(test())


def test_fenced_is_final() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.refusals = [(StagePart, RefusedError(messages.FENCED, "epoch 4 is newer"))]
        async with running(store) as rig:
            assert await rig.stage() == UpstreamRefusal(messages.FENCED, "epoch 4 is newer")
            assert store.count(StagePart) == 1

    run(test())


@pytest.mark.parametrize("kind", ["fetch", "allocation"])
def test_a_read_that_is_fenced_ends_the_volume_for_good(kind: str) -> None:
    async def test() -> None:
        store = ScriptedStore()
        refusal = UpstreamRefusal(messages.FENCED, "epoch 3 is over")
        store.refusals = [(Read if kind == "fetch" else MapExtents, RefusedError(*refusal))]
        async with running(store) as rig:
            if kind == "fetch":
                assert await rig.fetch([Extent(0, 1)]) == refusal
            else:
                assert (
                    await asked(lambda done: rig.upstream.allocation(VOLUME, Extent(0, 8), done, through=True))
                    == refusal
                )
            assert rig.refused == [refusal]
            assert await rig.fetch([Extent(0, 1)]) == await rig.stage() == refusal
            await store.restart()
            await until(lambda: rig.session.connected)
            assert await rig.commit() == refusal
            assert store.count(OpenVolume) == 1 and store.count(Read) == (kind == "fetch")

    run(test())


def test_a_read_of_an_older_session_is_asked_again_under_the_new_one() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            await until(lambda: len(rig.reopened) == 1)
            store.session += 1  # the store has opened it again, and its answer is on its way
            answer = rig.fetch([Extent(0, 1)])
            opening = asyncio.create_task(rig.session.open_volume("disk", take_over=False, acknowledged=VERSION))
            assert (await answer)[0].plain == BLOCKS[0]
            assert (await opening)[0].session == 3 and rig.refused == []
            assert [m.session for m in store.asked if isinstance(m, Read)][-1] == 3

    run(test())


def test_a_report_of_a_volume_that_is_lost_ends_it() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store, ping_s=0.02) as rig:
            await until(lambda: len(rig.reopened) == 1)
            rig.session._held = lambda _: [HeldReport(VOLUME, 3, VERSION, 0, 1)]
            await until(lambda: store.count(ReportHeld) > 2)
            assert rig.refused == []
            store.lost = (VOLUME,)
            await until(lambda: bool(rig.refused))
            assert rig.refused == [(messages.FENCED, "epoch 3 is over there")]
            assert await rig.fetch([Extent(0, 1)]) == UpstreamRefusal(*rig.refused[0])
            assert store.count(Read) == 0

    run(test())


def test_a_report_from_before_the_volume_was_opened_again_ends_nothing() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.lost = (VOLUME,)
        async with running(store, ping_s=0.02) as rig:
            rig.session._held = lambda _: [HeldReport(VOLUME, 2, VERSION, 0, 1)]
            await until(lambda: store.count(ReportHeld) > 2)
            assert (await rig.fetch([Extent(0, 1)]))[0].plain == BLOCKS[0]
            assert rig.refused == []

    run(test())


def test_only_an_old_session_fenced_is_tried_under_the_new_one() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.refusals = [(StagePart, RefusedError(messages.FENCED, "old session"))]
        async with running(store) as rig:
            await until(lambda: len(rig.reopened) == 1)
            answer = rig.stage()
            opening = asyncio.create_task(rig.session.open_volume("disk", take_over=False, acknowledged=VERSION))
            assert await answer is None
            assert (await opening)[0].session == 2

    run(test())


def test_a_volume_that_somebody_else_holds_is_refused_for_good() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.refusals = [(OpenVolume, RefusedError(messages.VOLUME_IN_USE, "held by another"))]
        async with running(store) as rig:
            refusal = UpstreamRefusal(messages.VOLUME_IN_USE, "held by another")
            assert await rig.stage() == refusal
            assert await rig.fetch([Extent(0, 1)]) == refusal
            assert rig.refused == [refusal]
            await store.restart()
            await until(lambda: store.count(OpenVolume) == 1 and rig.session.connected)
            assert await rig.commit() == refusal
            assert store.count(OpenVolume) == 1
            await rig.session.open_volume("disk", take_over=True, acknowledged=VERSION)
            assert await rig.stage() is None

    run(test())


def test_a_corrupt_frame_is_refused_as_corrupt(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        store = ScriptedStore()
        damaged = bytearray(store.frames[0])
        damaged[-1] ^= 1
        store.frames = [bytes(damaged)]
        async with running(store) as rig:
            refusal = await rig.fetch([Extent(0, 1)])
            assert isinstance(refusal, UpstreamRefusal)
            assert refusal.code == messages.CORRUPT and VOLUME.hex() in refusal.text

    run(test())
    assert "answer to a read is wrong" in caplog.text


def test_a_store_that_hangs_is_left() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.silent = asyncio.Event()
        async with running(store, ping_s=0.05) as rig:
            answers = [rig.fetch([Extent(0, 1)]) for _ in range(REQUESTS_IN_FLIGHT_MAX)]  # so a ping waits as well
            await store.silent.wait()
            store.silent = None
            for answer in answers:
                assert (await answer)[0].plain == BLOCKS[0]
            assert store.session == 2

    run(test())


def test_allocation_tells_data_from_holes() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            pieces = await asked(lambda done: rig.upstream.allocation(VOLUME, Extent(4, 100), done, through=True))
            assert [(p.extent, p.plain) for p in pieces] == [(Extent(4, 1), b""), (Extent(5, 1), None)]

    run(test())


def test_changes_come_page_by_page() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            pages = [page async for page in rig.upstream.changed_since(VOLUME, VERSION)]
            assert pages == [[Extent(0, 1)], [Extent(5, 1)]]

    run(test())


def test_history_that_is_gone_is_said() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.refusals = [(Changed, RefusedError(messages.HISTORY_GONE, "copy everything"))]
        async with running(store) as rig:
            with pytest.raises(RefusedError, match="copy everything"):
                [page async for page in rig.upstream.changed_since(VOLUME, VERSION)]

    run(test())


def test_a_released_volume_is_not_opened_again() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store) as rig:
            await until(lambda: len(rig.reopened) == 1)
            await rig.session.release(VOLUME, 3)
            assert ReleaseVolume(VOLUME, 3, 1) in store.asked
            assert await rig.stage() == UpstreamRefusal(messages.NOT_ATTACHED, "the volume is not attached")
            await store.restart()
            await until(lambda: rig.session.connected)
            assert store.count(OpenVolume) == 1

    run(test())


def test_opening_without_a_store_says_so_soon() -> None:
    async def test() -> None:
        store = ScriptedStore()
        async with running(store, started=False) as rig:
            with pytest.raises(StoreUnreachableError, match="no store answers at"):
                await rig.session.open_volume("disk", take_over=False, acknowledged=VERSION)
            with pytest.raises(ForebayError):
                await rig.session.release(VOLUME, 3)

    run(test())


def test_closing_with_requests_under_way_leaves_nothing_behind() -> None:
    async def test() -> None:
        store = ScriptedStore()
        store.silent = asyncio.Event()
        async with running(store) as rig:
            rig.stage()
            rig.fetch([Extent(0, 1)])
            await store.silent.wait()

    run(test())

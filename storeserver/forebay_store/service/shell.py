"""The shell around the engine: starts its commands in threads, brings completions back, and answers requests.

One thread writes segments, one changes the index, a few read; the event loop decides and answers. Invariant: the
engine is touched from the event loop only.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, assert_never

from forebay_core.config import StoreSettings
from forebay_core.errors import CorruptionError, ForebayError, RefusedError
from forebay_core.units import ID_SIZE, KIB, Buffer
from forebay_store.engine.apply import apply_segments
from forebay_store.engine.background import Copied, CopyOrigin
from forebay_store.engine.books import is_of_index
from forebay_store.engine.changes import Change, Incoming, expect_name
from forebay_store.engine.cleaner import Records, delete_leaving
from forebay_store.engine.ports import BackendError, SegmentMissingError
from forebay_store.engine.queries import Query, answer_query
from forebay_store.engine.reading import ReadPlan, check_frames, plan_read
from forebay_store.engine.store import Answer, ApplySegments, Command, StoreEngine, WriteSegment
from forebay_store.format.part import PartTable, parse_part
from forebay_store.format.rows import Table, decode_segment_row
from forebay_store.limits import FLATTEN_RETRY_S, FLATTEN_RETRY_S_MAX, PART_ENTRIES_MAX
from forebay_store.service.cleaner_shell import CleanerShell
from forebay_store.service.copying import copy_origin
from forebay_store.service.kept_reports import KeptReports
from forebay_store.service.openers import Openers
from forebay_store.service.opening import OpenStore
from forebay_store.service.scrub_shell import ScrubShell
from forebay_wire import messages
from forebay_wire.limits import BODY_SIZE_MAX
from forebay_wire.peer import Peer

READ_THREADS: Final = 4
DAY_NS: Final = 24 * 3600 * 10**9
INLINE_SIZE_MAX: Final = 128 * KIB
"""Bytes that are checked within the event loop; more go to a thread (128 KiB: 20 us of hashing)."""

_LOG: Final = logging.getLogger("forebay.store")

Reply = tuple[messages.AnyMessage, Sequence[Buffer]]
Done = Callable[[ForebayError | None], None]


class StoreShell:
    """Answers the wire's requests for one open store."""

    def __init__(
        self,
        store: OpenStore,
        *,
        settings: StoreSettings,
        wall_ns: Callable[[], int] = time.time_ns,
        fresh_id: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """`wall_ns` and `fresh_id` are where time and random bytes come from."""
        self._store = store
        self._wall_ns = wall_ns
        self._fresh_id = fresh_id
        self._engine = StoreEngine(store.index, store=store.folder.store, newest=store.newest)
        self._loop = asyncio.get_running_loop()
        self._writer = ThreadPoolExecutor(1, "segments")
        self._indexer = ThreadPoolExecutor(1, "index")
        self._readers = ThreadPoolExecutor(READ_THREADS, "reads")
        self._waiting: dict[int, asyncio.Future[messages.AnyMessage]] = {}
        self._ticket = 0
        self._reads = 0
        self._openers = Openers()
        self._reports = KeptReports(store.reports, store.index.view, self._readers)
        self._copy_retry: asyncio.TimerHandle | None = None
        self._copy_delay_s = FLATTEN_RETRY_S
        self._idle = asyncio.Event()
        self._reported = ""
        self._condemned = ""
        names = store.backend.list()
        self._segments = len(names)
        self._segment_bytes = sum(store.backend.stat(name) for name in names)
        self._cleaner = CleanerShell(
            store.index,
            store.backend,
            store=store.folder.store,
            rate=settings.clean_rate,
            room=store.room,
            append=self._append,
            fresh_number=lambda: int.from_bytes(fresh_id(8), "little"),
            on_damage=lambda places: self._scrub.note_places(places),
            condemn=self._condemn,
            purging=lambda: self._engine.purging,
            shrink=store.shrink,
        )
        self._scrub = ScrubShell(
            store.index,
            store.backend,
            store.damage,
            store=store.folder.store,
            rate=settings.scrub_rate,
            every_ns=int(settings.scrub_every_days * DAY_NS),
            wall_ns=wall_ns,
            bar=self._cleaner.bar,
            condemn=self._condemn,
            proved=store.note_proved,
        )
        self._pump()

    async def answer(self, peer: Peer, message: messages.AnyMessage, payload: memoryview) -> Reply:
        """Answer one request; what is raised is answered as Failed by the wire server."""
        self._expect_whole(message)
        try:
            return await self._answer(peer, message, payload)
        except CorruptionError as error:
            if is_of_index(error):
                self._condemn(error)
                self._expect_whole(message)
            raise

    def _expect_whole(self, message: messages.AnyMessage) -> None:
        """Refuse all but questions about the store itself once the index is damaged. Who asks waits, as for a store
        that is away, until it was made anew: an error would reach the guests, and no answer of it can be trusted.

        Raises:
            RefusedError: STOPPING.
        """
        if self._condemned and not isinstance(message, messages.GetStoreStatus | messages.GetDamage):
            raise RefusedError(messages.STOPPING, self._condemned)

    async def _answer(self, peer: Peer, message: messages.AnyMessage, payload: memoryview) -> Reply:
        match message:
            case messages.Read():
                return await self._read(peer, message)
            case messages.GetVolume():
                return self._query(message), ()
            case messages.GetSnapshot():
                return self._query(message), ()
            case messages.ListVolumes() | messages.ListSnapshots() | messages.Changed():
                await peer.reserve(BODY_SIZE_MAX)
                return await self._loop.run_in_executor(self._readers, self._query, message), ()
            case messages.MapExtents():
                await peer.reserve(BODY_SIZE_MAX)
                mapped = await self._loop.run_in_executor(self._readers, self._query, message)
                self._check_session(message)
                return mapped, ()
            case messages.ReportHeld():
                return messages.Reported(tuple(self._reports.receive(peer.node, message.reports))), ()
            case messages.GetHeld():
                return self._told(message), ()
            case messages.GetStoreStatus():
                return await self._status(), ()
            case messages.CleanStore():
                self._cleaner.ask()
                return messages.Done(), ()
            case messages.ScrubStore():
                self._scrub.ask(message.rate)
                return messages.Done(), ()
            case messages.GetDamage():
                return self._scrub.damage(message), ()
            case messages.StagePart():
                if payload.nbytes:
                    await self._cleaner.wait_turn(payload.nbytes)
                with self._cleaner.room_for(payload.nbytes):
                    return await self._change(message, await self._parse(message, payload), (payload,)), ()
            case messages.OpenVolume():
                self._openers.expect_newest(peer)
                opened = await self._change(message, None, ())
                if isinstance(opened, messages.Opened):
                    self._reports.note_opened(opened)
                return opened, ()
            case (
                messages.CreateVolume()
                | messages.ResizeVolume()
                | messages.DeleteVolume()
                | messages.CreateSnapshot()
                | messages.DeleteSnapshot()
                | messages.RollbackVolume()
                | messages.CloneVolume()
                | messages.FlattenVolume()
                | messages.ReleaseVolume()
                | messages.CommitCut()
            ):
                changed = await self._change(message, None, ())
                if isinstance(changed, messages.Committed):
                    self._cleaner.note_commit()
                return changed, ()
            case _:
                raise RefusedError(messages.BAD_REQUEST, f"a store does not answer {type(message).__name__}")

    def new_connection(self, peer: Peer) -> None:
        """A client has authenticated."""
        self._openers.came(peer)

    def lost_connection(self, peer: Peer) -> None:
        """A client is gone."""
        self._openers.gone(peer)

    async def stop(self) -> None:
        """Refuse further changes, finish what is under way and bring the index up."""
        await self._cleaner.stop()
        await self._scrub.stop()
        if self._copy_retry is not None:
            self._copy_retry.cancel()
        self._engine.stop()
        self._pump()
        await self._idle.wait()
        if not self._engine.error:
            await self._loop.run_in_executor(self._writer, self._delete_leaving)
        await self._reports.stop()
        self._writer.shutdown()
        self._indexer.shutdown()
        self._readers.shutdown()

    def _delete_leaving(self) -> None:
        """Delete what the cleaner had no time for: a store that ends in order leaves nothing that nobody needs."""
        try:
            delete_leaving(self._store.backend, self._store.index)
        except ForebayError as error:
            _LOG.warning("segments that nothing needs are still there: %s", error)

    # Requests.

    def _told(self, message: messages.GetHeld) -> messages.Held:
        with self._store.index.view() as reader:
            row = expect_name(reader, message.name)
        return self._reports.told(row)

    def _query(self, message: Query) -> messages.AnyMessage:
        with self._store.index.view() as reader:
            return answer_query(reader, message, self._engine.controls)

    async def _read(self, peer: Peer, message: messages.Read) -> Reply:
        self._reads += 1
        self._cleaner.note_read()
        plan = self._plan(message)
        await peer.reserve(sum(read.size for read in plan.reads))
        while True:
            try:
                frames = self._read_now(plan)
                if frames is None:
                    frames = await self._loop.run_in_executor(self._readers, self._read_slowly, plan)
                return messages.Blocks(plan.pieces), frames
            except SegmentMissingError as error:
                later = self._plan(message)
                if later.reads == plan.reads:  # The cleaner has not moved anything: it should be there.
                    self._scrub.note_error(error)
                    raise
                plan = later
            except CorruptionError as error:
                self._scrub.note_error(error)
                raise

    def _plan(self, message: messages.Read) -> ReadPlan:
        with self._store.index.view() as reader:
            plan = plan_read(reader, message)
        self._check_session(message)
        return plan

    def _check_session(self, message: messages.Read | messages.MapExtents) -> None:
        """Refuse who reads under a session that is over; the view that answers has been asked for the epoch."""
        if message.session:
            self._engine.expect_session(message.volume, message.session)

    def _read_now(self, plan: ReadPlan) -> list[Buffer] | None:
        """Read what is in the page cache already; None if that would take time."""
        if sum(read.size for read in plan.reads) > INLINE_SIZE_MAX:
            return None
        buffers: list[Buffer] = []
        for read in plan.reads:
            buffer = self._store.backend.read_now(read.segment.text, read.offset, read.size)
            if buffer is None:
                return None
            buffers.append(buffer)
        return check_frames(plan, buffers)

    def _read_slowly(self, plan: ReadPlan) -> list[Buffer]:
        backend = self._store.backend
        return check_frames(
            plan, [backend.read_range(read.segment.text, read.offset, read.size) for read in plan.reads]
        )

    async def _parse(self, message: messages.StagePart, payload: memoryview) -> PartTable:
        place = f"part {message.index} of attempt {message.attempt:#x} as received"

        def parse() -> PartTable:
            return parse_part(payload, place=place, stored=True, entries_max=PART_ENTRIES_MAX)

        if payload.nbytes <= INLINE_SIZE_MAX:
            return parse()
        return await self._loop.run_in_executor(self._readers, parse)

    async def _change(
        self, message: Change, part: PartTable | None, payload: tuple[Buffer, ...]
    ) -> messages.AnyMessage:
        incoming = Incoming(message, part, self._wall_ns(), self._fresh_id(ID_SIZE))
        self._cleaner.note_request(sum(memoryview(buffer).nbytes for buffer in payload))
        return await self._settled(lambda ticket: self._engine.submit(ticket, incoming, payload))

    async def _append(self, records: Records) -> None:
        """Put records of the cleaner into the log, and wait until the index shows them."""
        answer = await self._settled(lambda ticket: self._engine.submit_records(ticket, records))
        if isinstance(answer, messages.Failed):
            raise RefusedError(answer.code, answer.text)

    async def _settled(self, submit: Callable[[int], None]) -> messages.AnyMessage:
        """Hand something in and return the answer to its ticket."""
        self._ticket += 1
        ticket = self._ticket
        future: asyncio.Future[messages.AnyMessage] = self._loop.create_future()
        self._waiting[ticket] = future
        submit(ticket)
        self._pump()
        try:
            return await future
        finally:
            self._waiting.pop(ticket, None)

    async def _status(self) -> messages.StoreStatus:
        volumes, free_bytes, live_bytes = await self._loop.run_in_executor(self._readers, self._measure)
        return messages.StoreStatus(
            volumes=volumes,
            segments=self._segments - self._cleaner.segments_freed,
            segment_bytes=self._segment_bytes - self._cleaner.bytes_freed,
            free_bytes=free_bytes,
            incarnation=self._engine.newest.incarnation,
            reads=self._reads,
            cuts=self._engine.cuts,
            error=self._engine.error,
            live_bytes=live_bytes,
            clean=self._cleaner.status(),
            scrub=self._scrub.status(),
        )

    def _measure(self) -> tuple[int, int, int]:
        """Count volumes, free bytes and live ones."""
        with self._store.index.view() as reader:
            volumes = sum(1 for _ in reader.scan(Table.VOLUMES, b""))
            live_bytes = sum(decode_segment_row(value).live for _, value in reader.scan(Table.SEGMENTS, b""))
        return volumes, self._store.room().free, live_bytes

    # Commands.

    def _condemn(self, error: ForebayError) -> None:
        """The index is damaged: answer nothing from it any more, neither now nor after a restart."""
        if self._condemned:
            return
        data = self._store.folder.path
        self._condemned = (
            f"the index is damaged ({error}); stop the store and run: forebay store rebuild-index --data {data}"
        )
        self._engine.condemn(self._condemned)
        try:
            self._store.condemn(str(error))
        except OSError as failure:
            _LOG.error("the next start will not know that the index is damaged: %s", failure)
        self._pump()

    def _pump(self) -> None:
        """Start what the engine wants."""
        for command in self._engine.take_commands():
            self._start(command)
        if self._engine.index_damage is not None and not self._condemned:
            self._condemn(self._engine.index_damage)
        if self._engine.error and not self._reported:
            self._reported = self._engine.error
            _LOG.error("the store refuses changes: %s", self._engine.error)
        if self._engine.idle:
            self._idle.set()
        else:
            self._idle.clear()

    def _start(self, command: Command) -> None:
        match command:
            case Answer():
                future = self._waiting.get(command.ticket)
                if future is not None and not future.done():
                    future.set_result(command.message)
            case WriteSegment():
                self._run(self._writer, lambda: self._write(command), self._engine.complete_write)
            case ApplySegments():
                self._run(self._indexer, lambda: self._apply(command), self._engine.complete_apply)
            case CopyOrigin():
                self._start_copy(command)
            case _:
                assert_never(command)

    def _write(self, command: WriteSegment) -> None:
        self._store.backend.create(command.name.text, command.buffers)
        self._segments += 1
        self._segment_bytes += command.size

    def _apply(self, command: ApplySegments) -> None:
        self._store.index.update(lambda writer: apply_segments(writer, command.segments))

    def _start_copy(self, command: CopyOrigin) -> None:
        copied: list[Copied | None] = []

        def done(error: ForebayError | None) -> None:
            if error is not None:
                _LOG.error("a step of flattening volume %s failed: %s", command.volume.hex(), error)
                self._retry_copies_later()
            else:
                self._copy_delay_s = FLATTEN_RETRY_S
            self._engine.complete_copy(error or copied[0])

        self._run(
            self._readers,
            lambda: copied.append(copy_origin(self._store.index, self._store.backend, command)),
            done,
        )

    def _retry_copies_later(self) -> None:
        if self._copy_retry is None and not self._engine.error:
            self._copy_retry = self._loop.call_later(self._copy_delay_s, self._retry_copies)
            self._copy_delay_s = min(2 * self._copy_delay_s, FLATTEN_RETRY_S_MAX)

    def _retry_copies(self) -> None:
        self._copy_retry = None
        self._engine.retry_copies()
        self._pump()

    def _run(self, thread: ThreadPoolExecutor, work: Callable[[], None], done: Done) -> None:
        future = self._loop.run_in_executor(thread, work)
        future.add_done_callback(lambda ended: self._completed(ended.exception(), done))

    def _completed(self, error: BaseException | None, done: Done) -> None:
        if error is not None and not isinstance(error, ForebayError):
            _LOG.error("a bug in the store", exc_info=error)
            error = BackendError(f"a bug ({type(error).__name__}: {error})")
        done(error)
        if isinstance(error, ForebayError) and is_of_index(error):
            self._condemn(error)
        self._pump()

"""The store's ports in memory, and a driver that runs the engine over them one command at a time.

`DictIndex` forgets transactions that were not made durable, `MemoryBackend` fails or crashes where it is told to.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from sim_index import DictIndex

from forebay_core.errors import CorruptionError, ForebayError, NoSpaceError, RefusedError
from forebay_core.extents import Extent, pack
from forebay_core.units import Buffer
from forebay_store.engine.apply import LogRecord, LogSegment, apply_segments
from forebay_store.engine.background import Copied, CopyOrigin
from forebay_store.engine.changes import Change, Incoming
from forebay_store.engine.cleaner import Append, Cleaner, Pause, Records, Work
from forebay_store.engine.ports import BackendError, NothingKeptError, SegmentExistsError, SegmentMissingError
from forebay_store.engine.queries import Query, answer_query
from forebay_store.engine.reading import check_frames, plan_read
from forebay_store.engine.replay import next_incarnation, replay, segment_names
from forebay_store.engine.space import RESTING, Pressure
from forebay_store.engine.store import Answer, ApplySegments, Command, StoreEngine, WriteSegment
from forebay_store.format.layout import build_segment
from forebay_store.format.part import parse_part
from forebay_store.format.records import StoreClaimed
from forebay_store.format.segment import NO_SEGMENT, SegmentHeader, SegmentName
from forebay_store.service.copying import copy_origin
from forebay_wire import messages
from forebay_wire.pieces import PlainPiece, plain_pieces

Result = TypeVar("Result")
STORE = b"store-of-a-test!"


class Crash(Exception):
    """The store died here."""


class MemoryBackend:
    """Segments in memory. `fault` is what the next create meets: no-space, nothing-kept, broken, crash-before or
    -after."""

    def __init__(self) -> None:
        self.segments: dict[str, bytes] = {}
        self.fault = ""
        self.point: Callable[[str], None] = lambda text: None

    def create(self, name: str, buffers: Sequence[Buffer]) -> None:
        fault, self.fault = self.fault, ""
        match fault:
            case "no-space":
                raise NoSpaceError("the disk is full")
            case "nothing-kept":
                raise NothingKeptError("no file could be opened; repeat it")
            case "crash-before":
                raise Crash
            case "broken":
                raise BackendError("the disk broke")
        if name in self.segments:
            raise SegmentExistsError(name)
        self.point("create")
        self.segments[name] = b"".join(buffers)
        self.point("created")
        if fault == "crash-after":
            raise Crash
        if fault == "broken-after":
            raise BackendError("the disk broke, but not before it wrote")

    def read_range(self, name: str, offset: int, size: int) -> Buffer:
        found = self.read(name)[offset : offset + size]
        if len(found) != size:
            raise CorruptionError(place=name, what="size", expected=size, found=len(found))
        return found

    def read(self, name: str) -> bytes:
        if name not in self.segments:
            raise SegmentMissingError(place=name, what="segment", expected="bytes", found="nothing")
        return self.segments[name]

    def list(self) -> list[str]:
        return sorted(self.segments)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.point("delete")
            self.segments.pop(name, None)
        self.point("deleted")

    def stat(self, name: str) -> int:
        return len(self.read(name))


class StoreTwin:
    """A store in memory: replays, claims, then runs the engine's commands in an order of its own choosing."""

    def __init__(self, backend: MemoryBackend | None = None, index: DictIndex | None = None, *, seed: int = 0) -> None:
        self.backend = backend or MemoryBackend()
        self.index = index or DictIndex()
        self.random = random.Random(seed)
        replay(self.backend, self.index, store=STORE)
        names = segment_names(self.backend)
        newest = SegmentName(next_incarnation(names), 0)
        record = StoreClaimed(1)
        built = build_segment(SegmentHeader(STORE, newest, names[-1] if names else NO_SEGMENT), [(record, ())])
        self.backend.create(newest.text, built.buffers)
        log_record = LogRecord(record, built.placed[0].payload_offset, 0, b"")
        self.index.update(lambda writer: apply_segments(writer, [LogSegment(newest, [log_record], built.size)]))
        self.engine = StoreEngine(self.index, store=STORE, newest=newest)
        self.answers: dict[int, messages.AnyMessage] = {}
        self.todo: list[Command] = []
        self.ticket = 0

    def submit(self, message: Change, payload: bytes = b"") -> int:
        """Hand in a request; return its ticket."""
        self.ticket += 1
        part = None
        if isinstance(message, messages.StagePart):
            part = parse_part(payload, place="test", stored=True)
        incoming = Incoming(message, part, now_ns=1000 + self.ticket, fresh_id=self.random.randbytes(16))
        self.engine.submit(self.ticket, incoming, (payload,) if payload else ())
        self.collect()
        return self.ticket

    def collect(self) -> None:
        """Take the engine's commands; answers are final at once."""
        for command in self.engine.take_commands():
            if isinstance(command, Answer):
                assert command.ticket not in self.answers, "answered twice"
                self.answers[command.ticket] = command.message
            else:
                self.todo.append(command)

    def step(self) -> None:
        """Do one of the commands that are under way."""
        command = self.todo.pop(self.random.randrange(len(self.todo)))
        match command:
            case WriteSegment():
                self.engine.complete_write(self._try(lambda: self.backend.create(command.name.text, command.buffers)))
            case ApplySegments():
                self.engine.complete_apply(
                    self._try(lambda: self.index.update(lambda writer: apply_segments(writer, command.segments)))
                )
            case CopyOrigin():
                copied: list[Copied | None] = []
                error = self._try(lambda: copied.append(copy_origin(self.index, self.backend, command)))
                self.engine.complete_copy(error or copied[0])
        self.collect()

    def _try(self, work: Callable[[], object]) -> ForebayError | None:
        try:
            work()
        except ForebayError as error:
            return error
        return None

    def clean(
        self,
        pressure: Pressure = RESTING,
        between: Callable[[], None] = lambda: None,
        damaged: Iterable[SegmentName] = (),
    ) -> Cleaner:
        """Let the cleaner make one pass; `between` is called before each of its jobs, `damaged` is known to be."""
        cleaner = Cleaner(self.index, self.backend, store=STORE)
        cleaner.bar(damaged)
        for job in cleaner.clean(pressure=lambda _: pressure, checkpoint=lambda: self.random.getrandbits(64)):
            between()
            match job:
                case Work(call):
                    call()
                case Append(records):
                    self.append(records)
                case Pause():
                    pass
        return cleaner

    def append(self, records: Records) -> None:
        """Put records of the cleaner into the log and see them through."""
        self.ticket += 1
        self.engine.submit_records(self.ticket, records)
        self.collect()
        self.settle()
        answer = self.answers[self.ticket]
        if isinstance(answer, messages.Failed):
            raise RefusedError(answer.code, answer.text)

    def settle(self) -> None:
        """Do all commands."""
        while self.todo:
            self.step()

    def ask(self, message: Change, payload: bytes = b"") -> messages.AnyMessage:
        """Hand in a request and see it through."""
        ticket = self.submit(message, payload)
        self.settle()
        return self.answers[ticket]

    def query(self, message: Query) -> messages.AnyMessage:
        """Answer a request that changes nothing."""
        try:
            with self.index.view() as reader:
                return answer_query(reader, message, self.engine.controls)
        except RefusedError as error:
            return messages.Failed(error.code, str(error))

    def read(self, message: messages.Read) -> tuple[messages.Blocks, bytes]:
        """Answer a Read; raises what a store would answer."""
        with self.index.view() as reader:
            plan = plan_read(reader, message)
        buffers = [self.backend.read_range(one.segment.text, one.offset, one.size) for one in plan.reads]
        return messages.Blocks(plan.pieces), b"".join(check_frames(plan, buffers))

    def plain(self, volume: bytes, extent: Extent, *, through: bool = False) -> list[PlainPiece]:
        """Read one extent and open what comes."""
        blocks, payload = self.read(messages.Read(volume, pack([extent]), through=through))
        return plain_pieces(blocks.pieces, payload, [extent], place="test")

    def rebuilt(self) -> DictIndex:
        """Return the index that the segments alone give."""
        index = DictIndex()
        replay(self.backend, index, store=STORE)
        return index

"""The store's decisions: requests to change something go in, commands come out, completions come back in.

A request that changes a volume waits for its turn: changes of one volume happen one after the other, each begun only
when the index shows all that came before it. Parts of cuts need no turn: they are invisible. Everything durable goes
through the log; a part is answered when its segment is durable, a change when the index shows it as well.

Invariants:
    serials settle in order: refused, or durable and applied.
    at most one segment is written and at most one change of the index runs at a time.
    the index lags at most UNAPPLIED_SEGMENTS_MAX segments behind the log.
Crash: what was answered is in a segment; replay brings the index up.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from forebay_core.errors import CorruptionError, ForebayError, NoSpaceError, RefusedError
from forebay_core.units import Buffer, make_version
from forebay_store.engine import changes, snapshot_changes
from forebay_store.engine.apply import LogSegment
from forebay_store.engine.background import Background, Copied, CopyOrigin
from forebay_store.engine.books import is_of_index
from forebay_store.engine.changes import Change, Incoming, QueuedChange, SnapshotChange
from forebay_store.engine.log import TOGETHER_MAX, Log, Written, record_size_max
from forebay_store.engine.ports import Index, IndexReader, NothingKeptError
from forebay_store.engine.rows import snapshot_row, volume_row
from forebay_store.format.records import CutPart, Record
from forebay_store.format.rows import VolumeState
from forebay_store.format.segment import SegmentName
from forebay_store.format.snapshot_records import OriginPart
from forebay_store.limits import UNAPPLIED_SEGMENTS_MAX, WAITING_PER_VOLUME_MAX
from forebay_wire import messages

_NOT_UP: Final = 1 << 64
"""The barrier of a turn that is not the first yet: behind every serial."""

HIDING: Final = (messages.CommitCut, messages.ResizeVolume, messages.RollbackVolume)
"""Changes that may hide more than they remove at once."""

AFTER_SWEEP: Final = (
    messages.CreateSnapshot,
    messages.DeleteSnapshot,
    messages.DeleteVolume,
    messages.FlattenVolume,
)
"""Changes that, like those, begin only when nothing of the head is hidden."""

_CONTROL_SIZE_MAX: Final = 300
_BUSY: Final = "the store is busy; repeat the request"
_FULL_INDEX: Final = "the disk under the store is full; the request shows when there is space: repeat it then"


class WriteSegment(NamedTuple):
    """Create this segment, then call `complete_write`."""

    name: SegmentName
    buffers: list[Buffer]
    size: int


class ApplySegments(NamedTuple):
    """Apply these durable segments to the index in one transaction, then call `complete_apply`."""

    segments: tuple[LogSegment, ...]


class Answer(NamedTuple):
    """The reply to the request of this ticket."""

    ticket: int
    message: messages.AnyMessage


Command = WriteSegment | ApplySegments | CopyOrigin | Answer


@dataclass(slots=True)
class Turn:
    """A request that changes volumes, usually one; `barrier` and `serial` are those of the records before and of its
    own. It is the turn's when it is the first in the queue of each of them."""

    ticket: int
    incoming: Incoming
    payload: tuple[Buffer, ...]
    names: tuple[str, ...] = ()
    barrier: int = _NOT_UP
    serial: int = 0
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    """Who waits until records of the cleaner show in the index, all of which lie in one segment."""

    ticket: int


class StoreEngine:
    """Decides for one store. Feed it, then drain `take_commands` and start them."""

    def __init__(self, index: Index, *, store: bytes, newest: SegmentName) -> None:
        """`newest` is the segment that claimed this incarnation; the index shows it."""
        self._index = index
        self._log = Log(store, newest)
        self._incarnation = newest.incarnation
        self._commands: list[Command] = []
        self._turns: dict[str, deque[Turn]] = {}
        self._owners: dict[int, int | Together | Turn] = {}  # by serial: the ticket of a part, or a turn
        self._newest_serials: dict[str, int] = {}  # by volume, of records that are not settled
        self._unapplied: deque[Written] = deque()
        self._applying: tuple[Written, ...] = ()
        self._background = Background(index)
        self._urgent = 0  # the index is wanted up to this serial
        self._sessions: dict[bytes, int] = {}
        self.controls: dict[bytes, str] = {}  # by volume, where its holder takes commands
        self._session = newest.incarnation << 32
        self._index_full = False
        self._retry_index = False
        self._stopping = False
        self.index_damage: ForebayError | None = None  # what a request met
        self._error = ""
        self._cuts = 0
        self._advance()

    @property
    def error(self) -> str:
        """Why the store refuses changes; empty: it does not."""
        return self._error

    @property
    def cuts(self) -> int:
        """Cuts committed since the start."""
        return self._cuts

    @property
    def newest(self) -> SegmentName:
        """The newest durable segment."""
        return self._log.newest

    @property
    def purging(self) -> bool:
        """Whether what was deleted is being taken out of the index: not while a full disk or an error stops that."""
        return not self._error and not self._index_full and self._background.purging

    @property
    def idle(self) -> bool:
        """Whether nothing is under way and the index shows everything; a failed store never gets further."""
        if self._commands or self._log.writing or self._applying or self._background.busy:
            return False
        stuck = bool(self._error) or (self._index_full and not self._retry_index)
        return stuck or not (self._log.pending or self._unapplied)

    def take_commands(self) -> list[Command]:
        """Return what is to be started, in order."""
        commands, self._commands = self._commands, []
        return commands

    def submit(self, ticket: int, incoming: Incoming, payload: tuple[Buffer, ...] = ()) -> None:
        """Take a request; its `Answer` comes now or later. The payload must not change until then."""
        try:
            self._admit(sum(memoryview(buffer).nbytes for buffer in payload))
            with self._index.view() as reader:
                self._sort(reader, Turn(ticket, incoming, payload))
        except ForebayError as error:
            self._answer(ticket, self._excuse(error))
        self._advance()

    def submit_records(self, ticket: int, records: Sequence[tuple[Record, Buffer]]) -> None:
        """Take records that the store makes by itself, with their payloads; Done when the index shows all of them.

        They get into one segment, so all of them are refused or none.
        """
        assert sum(record_size_max(record, memoryview(payload).nbytes) for record, payload in records) <= TOGETHER_MAX
        try:
            self._admit(sum(memoryview(payload).nbytes for _, payload in records))
        except ForebayError as error:
            self._answer(ticket, _failed(error))
            return
        for record, payload in records:
            serial = self._log.append(record, (payload,) if memoryview(payload).nbytes else ())
        self._owners[serial] = Together(ticket)
        self._urgent = max(self._urgent, serial)
        self._advance()

    def expect_session(self, volume: bytes, session: int) -> None:
        """Check that a session is the newest of its volume.

        Raises:
            RefusedError: FENCED.
        """
        if self._sessions.get(volume) != session:
            raise RefusedError(
                messages.FENCED, f"session {session:#x} of volume {volume.hex()} is over; open the volume again"
            )

    def stop(self) -> None:
        """Take no more requests and bring the index up, so that the next start has nothing to replay."""
        self._stopping = True
        self._retry_index = True
        self._advance()

    def condemn(self, error: str) -> None:
        """The index is damaged: nothing is answered from it and nothing built on it any more. Who waits may repeat the
        request: with an index that was made anew, the store does all that it was asked for."""
        self._error = error
        self._applying = ()
        self._refuse_all(messages.Failed(messages.STOPPING, error))

    def complete_write(self, error: ForebayError | None) -> None:
        """The segment of the last WriteSegment is durable, or nothing of it remains, or nobody knows."""
        if error is None:
            self._background.resume()
            self._after_write(self._log.written())
        elif isinstance(error, NoSpaceError | NothingKeptError):
            self._refuse(self._log.refused(), _failed(error))
        else:
            self._log.refused()
            self._fail(error)
        self._advance()

    def complete_apply(self, error: ForebayError | None) -> None:
        """The segments of the last ApplySegments show in the index, or nothing of them does."""
        applied, self._applying = self._applying, ()
        if error is None:
            self._index_full = False
            for written in applied:
                for serial in range(written.first_serial, written.last_serial + 1):
                    self._finish(serial)
            self._wake()
        else:
            self._unapplied.extendleft(reversed(applied))
            if isinstance(error, NoSpaceError):
                self._stop_waiting()
            else:
                self._fail(error)
        self._advance()

    def complete_copy(self, copied: Copied | ForebayError | None) -> None:
        """The blocks of the last CopyOrigin are in frames, or can't be; None: the volume is no clone any more."""
        record = None if self._error else self._background.copied(copied)
        if isinstance(record, OriginPart):
            assert isinstance(copied, Copied)
            self._note_background(
                self._log.append(record, copied.payload, copied.table.entries), self._background.copies
            )
        elif record is not None:
            self._note_background(self._log.append(record), self._background.copies)
        self._advance()

    def retry_copies(self) -> None:
        """What could not be read for a clone may be readable now."""
        self._background.retry_copies()
        self._advance()

    # Admission.

    def _admit(self, payload_size: int) -> None:
        if self._stopping:
            raise RefusedError(messages.STOPPING, "the store is stopping; repeat the request when it is back")
        if self._error:
            raise RefusedError(messages.FAILED, f"the store refuses changes: {self._error}")
        if self._index_full:
            self._retry_index = True
            raise NoSpaceError(_FULL_INDEX)
        if not self._log.has_room(payload_size):
            raise RefusedError(messages.FAILED, _BUSY)

    def _sort(self, reader: IndexReader, turn: Turn) -> None:
        """Stage a part at once if it needs no turn; queue everything else."""
        message = turn.incoming.message
        if isinstance(message, messages.StagePart):
            row = self._expect_writer(reader, message)
            if self._append_part(reader, turn, row, message):
                return
            names: tuple[str, ...] = (row.name,)
        else:
            names = _names(reader, message)
        if any(len(self._turns.get(name, ())) >= WAITING_PER_VOLUME_MAX for name in names):
            raise RefusedError(messages.FAILED, _BUSY)
        turn.names = names
        for name in names:
            self._turns.setdefault(name, deque()).append(turn)
        self._come_up(turn)

    def _append_part(self, reader: IndexReader, turn: Turn, row: VolumeState, message: messages.StagePart) -> bool:
        """Put a part into the log, unless an older cut must make way for it."""
        part = turn.incoming.part
        assert part is not None
        record = changes.stage(message, row)
        if changes.make_way(reader, row, record, part.payload_size):
            return False
        serial = self._log.append(record, turn.payload, part.entries)
        self._owners[serial] = turn.ticket
        self._newest_serials[row.name] = serial
        return True

    def _expect_writer(
        self, reader: IndexReader, message: messages.StagePart | messages.CommitCut | messages.ReleaseVolume
    ) -> VolumeState:
        row = changes.expect_volume(reader, message.volume)
        changes.expect_epoch(row, message.epoch)
        self.expect_session(row.id, message.session)
        return row

    # Turns.

    def _come_up(self, turn: Turn) -> None:
        """A turn that is the next of its volumes begins when the index shows what was recorded before."""
        if not all(self._turns[name][0] is turn for name in turn.names):
            return
        turn.barrier = max(self._newest_serials.get(name, 0) for name in turn.names)
        self._urgent = max(self._urgent, turn.barrier)
        if turn.barrier < self._first_unsettled():
            self._begin(turn)

    def _begin(self, turn: Turn) -> None:
        try:
            with self._index.view() as reader:
                if self._waits_for_sweep(reader, turn):
                    return
                records = self._decide(reader, turn)
                reply = None if records else self._reply(reader, turn)
        except ForebayError as error:
            reply, records = self._excuse(error), []
        if reply is not None:
            self._end(turn, reply)
            return
        for record in records:
            if isinstance(record, CutPart):
                assert turn.incoming.part is not None
                turn.serial = self._log.append(record, turn.payload, turn.incoming.part.entries)
            else:
                turn.serial = self._log.append(record)
            self._owners[turn.serial] = turn
        for name in turn.names:
            self._newest_serials[name] = turn.serial
        self._urgent = max(self._urgent, turn.serial)

    def _waits_for_sweep(self, reader: IndexReader, turn: Turn) -> bool:
        """Tell whether a turn changes a head of which something is still hidden: it begins when that is swept.

        Raises:
            NoSpaceError: the disk is too full for the sweep, which is tried once more for each request.
        """
        message = turn.incoming.message
        if not isinstance(message, HIDING + AFTER_SWEEP) or not changes.is_sweeping(reader, turn.names):
            return False
        self._background.want_steps()
        if self._background.paused:
            self._background.resume()
            raise NoSpaceError(_FULL_INDEX)
        return True

    def _decide(self, reader: IndexReader, turn: Turn) -> list[Record]:
        message: Change = turn.incoming.message
        match message:
            case messages.CreateVolume():
                incoming = turn.incoming
                return changes.create(reader, message, now_ns=incoming.now_ns, fresh_id=incoming.fresh_id)
            case messages.ResizeVolume():
                return changes.resize(reader, message, self.controls)
            case messages.DeleteVolume():
                return changes.delete(reader, message, self.controls)
            case messages.OpenVolume():
                return changes.take(reader, message, self.controls)
            case messages.ReleaseVolume():
                return changes.release(self._expect_writer(reader, message))
            case messages.CommitCut():
                return changes.commit(reader, self._expect_writer(reader, message), message)
            case messages.StagePart():
                assert turn.incoming.part is not None
                row = self._expect_writer(reader, message)
                record = changes.stage(message, row)
                return [*changes.make_way(reader, row, record, turn.incoming.part.payload_size), record]
            case _:
                return self._decide_more(reader, turn.incoming, message)

    def _decide_more(self, reader: IndexReader, incoming: Incoming, message: SnapshotChange) -> list[Record]:
        now_ns, fresh_id = incoming.now_ns, incoming.fresh_id
        match message:
            case messages.CreateSnapshot():
                return snapshot_changes.take_snapshot(reader, message, self.controls, now_ns=now_ns, fresh_id=fresh_id)
            case messages.DeleteSnapshot():
                return snapshot_changes.delete_snapshot(reader, message)
            case messages.RollbackVolume():
                return snapshot_changes.roll_back(reader, message, self.controls)
            case messages.CloneVolume():
                return snapshot_changes.clone(reader, message, now_ns=now_ns, fresh_id=fresh_id)
            case messages.FlattenVolume():
                return snapshot_changes.flatten(reader, message)

    def _reply(self, reader: IndexReader, turn: Turn) -> messages.AnyMessage:
        """Return the answer to a change that the index shows."""
        message = turn.incoming.message
        if isinstance(message, HIDING):
            self._background.want_steps()
        match message:
            case messages.CreateVolume() | messages.ResizeVolume() | messages.CloneVolume():
                return self._volume(reader, message.name)
            case messages.RollbackVolume():
                return self._volume(reader, message.volume)
            case messages.CreateSnapshot():
                row = changes.expect_name(reader, message.volumes[0])
                state = changes.expect_snapshot(reader, row, message.snapshot)
                return messages.SnapshotTaken(snapshot_row(reader, row, state))
            case messages.OpenVolume():
                return self._opened(reader, message)
            case messages.CommitCut():
                already_applied = turn.serial == 0
                self._cuts += not already_applied
                return messages.Committed(make_version(message.epoch, message.last), already_applied)
            case messages.ReleaseVolume():
                self._sessions.pop(message.volume, None)
                self.controls.pop(message.volume, None)
            case messages.DeleteVolume() | messages.DeleteSnapshot():
                self._background.want_steps()
            case messages.FlattenVolume():
                self._background.flatten(changes.expect_name(reader, message.name).id)
            case messages.StagePart():
                pass
        return messages.Done()

    def _volume(self, reader: IndexReader, name: str) -> messages.Volume:
        return messages.Volume(volume_row(reader, changes.expect_name(reader, name), self.controls))

    def _opened(self, reader: IndexReader, message: messages.OpenVolume) -> messages.Opened:
        row = changes.expect_name(reader, message.name)
        self._session += 1
        self._sessions[row.id] = self._session
        self.controls[row.id] = message.control if _is_control(message.control) else ""
        return messages.Opened(volume_row(reader, row, self.controls), row.epoch, self._session)

    def _finish(self, serial: int) -> None:
        """A record shows in the index: if it was the last of a turn, the turn is over."""
        owner = self._owners.pop(serial, None)
        if isinstance(owner, Together):
            self._answer(owner.ticket, messages.Done())
        if owner is None:
            self._background.settle(serial)
        if isinstance(owner, Turn) and owner.serial == serial and not owner.answered:
            try:
                with self._index.view() as reader:
                    reply = self._reply(reader, owner)
            except ForebayError as error:
                reply = self._excuse(error)
            self._end(owner, reply)

    def _end(self, turn: Turn, reply: messages.AnyMessage) -> None:
        if turn.answered:
            return
        turn.answered = True
        self._answer(turn.ticket, reply)
        for name in turn.names:
            queue = self._turns[name]
            assert queue[0] is turn
            queue.popleft()
            if not queue:
                del self._turns[name]
        for name in turn.names:
            if name in self._turns:
                following = self._turns[name][0]
                if following.barrier == _NOT_UP:
                    self._come_up(following)

    def _wake(self) -> None:
        """Begin the turns that waited for records which are settled now."""
        settled = self._first_unsettled()
        self._newest_serials = {name: serial for name, serial in self._newest_serials.items() if serial >= settled}
        for queue in list(self._turns.values()):
            if queue and queue[0].serial == 0 and queue[0].barrier < settled:
                self._begin(queue[0])

    # Log and index.

    def _first_unsettled(self) -> int:
        if self._applying:
            return self._applying[0].first_serial
        return self._unapplied[0].first_serial if self._unapplied else self._log.first_serial

    def _after_write(self, written: Written) -> None:
        self._unapplied.append(written)
        for serial in range(written.first_serial, written.last_serial + 1):
            owner = self._owners.get(serial)
            if isinstance(owner, int):
                del self._owners[serial]
                self._answer(owner, messages.Done())

    def _advance(self) -> None:
        """Start whatever can be started."""
        if self._error:
            return
        self._start_background()
        lag = len(self._unapplied) + len(self._applying)
        if self._log.pending and not self._log.writing and lag < UNAPPLIED_SEGMENTS_MAX:
            name, built = self._log.start()
            self._commands.append(WriteSegment(name, built.buffers, built.size))
        if not self._applying and self._index_wanted():
            self._retry_index = False
            self._applying = tuple(self._unapplied)
            self._unapplied.clear()
            self._commands.append(ApplySegments(tuple(written.segment for written in self._applying)))

    def _start_background(self) -> None:
        if self._stopping or self._index_full:
            return
        step = self._background.next_step()
        if step is not None:
            self._note_background(self._log.append(step), self._background.steps)
        copy = self._background.next_copy()
        if copy is not None:
            self._commands.append(copy)

    def _note_background(self, serial: int, note: Callable[[int], None]) -> None:
        note(serial)
        self._urgent = max(self._urgent, serial)

    def _index_wanted(self) -> bool:
        if not self._unapplied or (self._index_full and not self._retry_index):
            return False
        lagging = len(self._unapplied) >= UNAPPLIED_SEGMENTS_MAX // 2
        return self._stopping or lagging or self._urgent >= self._unapplied[0].first_serial

    # Refusals.

    def _excuse(self, error: ForebayError) -> messages.Failed:
        """Return the answer to what met an error; damage to the index is no final no."""
        if not is_of_index(error):
            return _failed(error)
        self.index_damage = self.index_damage or error
        return messages.Failed(messages.STOPPING, str(error))

    def _answer(self, ticket: int, message: messages.AnyMessage) -> None:
        self._commands.append(Answer(ticket, message))

    def _refuse(self, serials: list[int], reply: messages.Failed) -> None:
        for serial in serials:
            owner = self._owners.pop(serial, None)
            if isinstance(owner, int):
                self._answer(owner, reply)
            elif isinstance(owner, Together):
                self._answer(owner.ticket, reply)
            elif owner is None:
                self._background.refuse(serial)
            elif owner.serial == serial:
                self._end(owner, reply)
        self._wake()

    def _stop_waiting(self) -> None:
        """The index can't grow: refuse all that waits. What is durable shows when there is space again."""
        self._index_full = True
        self._refuse_all(_failed(NoSpaceError(_FULL_INDEX)))

    def _fail(self, error: ForebayError) -> None:
        """Nobody knows what is durable: refuse everything until the next start has read the log."""
        self._error = f"{error}; restart the store"
        self._applying = ()
        self._refuse_all(messages.Failed(messages.FAILED, f"the store refuses changes: {self._error}"))

    def _refuse_all(self, reply: messages.Failed) -> None:
        pending = set(self._log.drop_pending())
        for serial in pending.difference(self._owners):
            self._background.refuse(serial)
        for serial, owner in list(self._owners.items()):
            if isinstance(owner, int | Together) and (serial in pending or self._error):
                del self._owners[serial]
                self._answer(owner if isinstance(owner, int) else owner.ticket, reply)
        turns = {turn.ticket: turn for queue in self._turns.values() for turn in queue}.values()
        self._turns.clear()
        for turn in turns:
            turn.answered = True
            self._answer(turn.ticket, reply)


def _names(reader: IndexReader, message: QueuedChange) -> tuple[str, ...]:
    """Return the names of the volumes that a request changes, or needs as they are."""
    match message:
        case messages.ReleaseVolume() | messages.CommitCut():
            return (changes.expect_volume(reader, message.volume).name,)
        case messages.CreateSnapshot():
            return message.volumes[:1] or ("",)
        case messages.DeleteSnapshot() | messages.RollbackVolume():
            return (message.volume,)
        case messages.CloneVolume():
            return tuple(dict.fromkeys((message.volume, message.name)))
        case _:
            return (message.name,)


def _is_control(address: str) -> bool:
    return address.isprintable() and len(address) <= _CONTROL_SIZE_MAX


def _failed(error: ForebayError) -> messages.Failed:
    match error:
        case RefusedError():
            return messages.Failed(error.code, str(error))
        case NoSpaceError():
            return messages.Failed(messages.NO_SPACE, str(error))
        case CorruptionError():
            return messages.Failed(messages.CORRUPT, str(error))
        case _:
            return messages.Failed(messages.FAILED, str(error))

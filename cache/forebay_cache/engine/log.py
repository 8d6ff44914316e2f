"""The log: entries are gathered into records, records are written in order and applied in order.

A batch is a record in the making, or a few that stand behind one another and are written by one command; its place on
the device is fixed when it begins, so every entry knows its place at once. It is sealed when it is full, when an entry
does not fit its order, or when the shell says that no more requests are at hand and the device has nothing to do.

Invariants:
    Records are applied, and their writers told, in the order of their log positions, and only when written: replay
    stops at a hole, so a record behind one would be lost.
    `durable` <= `applied` <= `position`; a sync covers what was applied when it began.
    Data entries stand before others in a record; a data entry that comes behind another one begins a new batch. So all
    records of a batch but the last hold `record_blocks` data entries and nothing else.
    The last block of a zone is kept for its SEAL.
    Entries without data wait in `_held`, in order, rather than take the room of moves, which free zones.
Crash: what was written as an unbroken chain of records is found again; the rest was never acknowledged.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.front import IoError, Reply
from forebay_cache.engine.group_commit import GroupCommit
from forebay_cache.engine.limits import BATCH_RECORDS_MAX, BATCHES_IN_FLIGHT_MAX, RUN_BLOCKS_MIN, ZONES_FOR_MOVES
from forebay_cache.engine.ports import Device, U64Array
from forebay_cache.engine.zones import ZoneTable
from forebay_cache.format import record
from forebay_cache.format.cut_end import CutEnd
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Buffer

_pack_into = record.ENTRY.pack_into
_ENTRIES_OFFSET = record.ENTRIES_OFFSET
_ENTRY_SIZE = record.ENTRY_SIZE
_WRITE = record.WRITE

Settled = Callable[[bool], None]
"""Told once: True when what was asked for is so, False when the device failed."""


class Fill(NamedTuple):
    """The entry of a FILL."""

    volume_key: int
    lba: int
    version: int
    checksum: int
    place: int


class Moves(NamedTuple):
    """Consecutive entries of MOVEs and PINs, of which the batch knows no more than their packed form."""

    header: bytearray  # block of their record
    entry: int  # the first one in the record
    sources: npt.NDArray[np.int64]  # the places that they copy from
    first_place: int  # of their blocks


class Writes:
    """Consecutive entries of WRITEs of one volume, of which the batch knows no more than their packed form.

    Where their record is full they go on in the next one of the batch.
    """

    __slots__ = ("count", "first_place", "headers", "index", "number", "version", "volume_key")

    def __init__(self, volume_key: int, batch: "Batch") -> None:
        """They begin where the batch's next entry comes."""
        self.volume_key = volume_key
        self.headers = batch.headers  # blocks of the batch's records
        self.number = len(batch.headers) - 1  # of the record that they begin in
        self.index = batch.index  # of the first entry in that record
        self.count = 0
        self.first_place = batch.next_place  # of their blocks; between two records is one place for a header
        self.version = 0  # of the newest

    def keys(self, record_blocks: int) -> U64Array:
        """Return the key of each entry; all records but the last have so many."""
        rows = [record.entries_in(header, record_blocks) for header in self.headers[self.number :]]
        lbas = np.concatenate(rows)["lba"][self.index : self.index + self.count]
        return lbas | np.uint64(self.volume_key << LBA_BITS)


class Change(NamedTuple):
    """An entry without data: `start` and `value` as the record's table says."""

    kind: int
    volume_key: int
    start: int
    version: int
    value: int


class _Event(NamedTuple):
    """An entry without data, or a note, that is not in a batch yet."""

    kind: int
    volume_key: int
    start: int
    version: int
    value: int
    settled: Settled | None
    note: VolumeNote | CutEnd | None = None


class LogPoint(NamedTuple):
    """A place in the log: the record that comes next, where it goes, and the chain it continues."""

    position: int
    zone: int
    block: int
    chain: int


class Batch:
    """Records in the making, on their way to the device, or waiting to be applied."""

    __slots__ = (
        "admitted_key",
        "after",
        "block",
        "buffers",
        "changes",
        "data",
        "data_count",
        "end",
        "end_place",
        "entry_count",
        "headers",
        "index",
        "kind",
        "newest",
        "next_place",
        "record_blocks",
        "replies",
        "room",
        "settled",
        "written",
        "zone",
    )

    def __init__(self, zone: int, block: int, record_blocks: int, *, first_place: int, end_place: int) -> None:
        self.kind: int = record.DATA
        self.zone = zone
        self.block = block
        self.record_blocks = record_blocks
        self.end_place = end_place  # of the zone's last block, which is kept for its SEAL
        self.headers: list[bytearray] = []  # of the records; what comes goes to the last one
        self.admitted_key = 0  # of the volume that was found to have room for what comes to it
        self.index = 0  # of the entry that comes next in the last record
        self.room = 0  # data blocks that still fit it
        self.next_place = first_place  # of the block that comes next
        self.data: list[Writes | Fill | Moves] = []
        self.newest: Writes | None = None  # the last of `data`, as long as it may grow
        self.changes: list[Change] = []
        self.end: CutEnd | None = None  # alone in its record
        self.buffers: list[Buffer] = []  # all that is to be written, header blocks included
        self.data_count = 0
        self.entry_count = 0
        self.replies: list[Reply] = []  # of writes that want nothing but to be in the log
        self.settled: list[Settled] = []
        self.written = False
        self.after = LogPoint(0, 0, 0, 0)

    @property
    def block_count(self) -> int:
        """Blocks that it takes on the device."""
        return len(self.headers) + self.data_count

    def begin_record(self) -> None:
        """What comes now goes to one more record."""
        header = bytearray(BLOCK_SIZE)
        self.headers.append(header)
        self.buffers.append(header)
        self.index = 0
        self.next_place += 1
        self.room = min(self.end_place - self.next_place, self.record_blocks)

    @property
    def may_grow(self) -> bool:
        """Whether one more record, with a block of data at least, may stand behind its last one, which is full."""
        return len(self.headers) < BATCH_RECORDS_MAX and not self.changes and self.next_place + 1 < self.end_place

    def grow(self) -> bool:
        """Begin that record; return False if there may be none."""
        may = self.may_grow
        if may:
            self.begin_record()
        return may

    def begin_writes(self, volume_key: int) -> Writes:
        """What is written next is of this volume."""
        self.newest = newest = Writes(volume_key, self)
        self.data.append(newest)
        return newest

    def data_entries(self) -> record.EntryArray:
        """Return the entries of all data blocks."""
        return np.concatenate([record.entries_in(header, count) for header, count in self.data_counts()])

    def data_counts(self) -> list[tuple[bytearray, int]]:
        """Return the header of each record, and of how many data blocks it has the entries."""
        full = len(self.headers) - 1
        counts = [*[self.record_blocks] * full, self.data_count - full * self.record_blocks]
        return list(zip(self.headers, counts, strict=True))

    @property
    def can_wait(self) -> bool:
        """Whether all that it holds is a few blocks that were fetched."""
        if self.replies or self.settled or self.changes or self.data_count >= RUN_BLOCKS_MIN:
            return False
        return all(isinstance(item, Fill) for item in self.data)


class Log:
    """Appends to the zones of one device.

    `apply` is told of each written record, in order; `on_failure` of a failed write or sync, and must call `fail`.
    `promised_zones` tells how many free zones moves under way may need: nobody else opens those.
    """

    def __init__(
        self,
        device: Device,
        zones: ZoneTable,
        *,
        device_tag: int,
        life: int,
        apply: Callable[[Batch], None],
        on_failure: Callable[[str], None],
        promised_zones: Callable[[], int],
        record_blocks: int,
    ) -> None:
        self._device = device
        self._zones = zones
        self._device_tag = device_tag
        self._life = life
        self._apply = apply
        self._on_failure = on_failure
        self._promised_zones = promised_zones
        self.record_blocks = record_blocks  # data blocks of one record
        self._next = LogPoint(0, 0, 0, 0)  # where the next sealed record goes
        self.gathered: Batch | None = None  # what is being gathered
        self._held: deque[_Event] = deque()  # entries without data that wait for a free zone
        self._sealed: deque[Batch] = deque()
        self._in_flight: deque[Batch] = deque()
        self._waiting: deque[tuple[int, Settled]] = deque()
        self._barriers: list[Settled] = []
        self._syncing = False
        self.group = GroupCommit()
        self.queued_blocks = 0
        self.applied = self._next
        self.changed_position = 0  # behind the newest applied record that holds anything
        self.durable = 0
        self._noted_durable = 0  # what the newest record says of `durable`
        self.failed = False
        self.bytes_written = 0
        self.records_written = 0

    # --- starting ---------------------------------------------------------------------------------------------

    def begin(self, point: LogPoint) -> None:
        """Go on behind the last valid record; the zone of `point` is open.

        `life` is in every record, so nothing that an earlier life left behind this point can chain to what is written
        now. What is on the device must be durable.
        """
        self._next = self.applied = point
        self.durable = self.changed_position = point.position

    # --- appending --------------------------------------------------------------------------------------------

    @property
    def room_in_zone(self) -> int:
        """Blocks that the open zone still takes, headers included."""
        return max(0, self._zones.zone_blocks - 2 - self._next.block)

    @property
    def idle(self) -> bool:
        """Whether nothing is gathered, queued or under way."""
        return not (self.gathered or self._sealed or self._in_flight or self._held)

    def data_batch(self) -> Batch:
        """Return the batch that takes the next data block; it has room for one at least."""
        batch = self.gathered
        if batch is None or batch.changes or not (batch.room or batch.grow()):
            return self._fresh_batch()
        return batch

    def add_write(self, batch: Batch, volume_key: int, lba: int, version: int, checksum: int) -> None:
        """Add the entry of one block that a guest wrote; the caller adds the bytes to `batch.buffers`."""
        index = batch.index
        newest = batch.newest
        if newest is None or newest.volume_key != volume_key:
            newest = batch.begin_writes(volume_key)
        newest.count += 1
        newest.version = version
        at = _ENTRIES_OFFSET + index * _ENTRY_SIZE
        _pack_into(batch.headers[-1], at, lba, version, checksum, volume_key, _WRITE, 0, 0xFF, 0)
        batch.data_count += 1  # as `_added`, a call of which is 5 % of a write
        batch.entry_count += 1
        batch.index = index + 1
        batch.next_place += 1
        batch.room -= 1
        self.queued_blocks += 1

    def add_writes(self, batch: Batch, volume_key: int, lba: int, version: int, checksums: U64Array) -> None:
        """Add the entries of consecutive blocks, as `add_write` does one by one."""
        count = checksums.size
        assert count <= batch.room
        newest = batch.newest
        if newest is None or newest.volume_key != volume_key:
            newest = batch.begin_writes(volume_key)
        newest.count += count
        newest.version = version
        record.put_writes_fast(batch.headers[-1], batch.index, volume_key, lba, version, checksums)
        batch.data_count += count  # as `_added`
        batch.entry_count += count
        batch.index += count
        batch.next_place += count
        batch.room -= count
        self.queued_blocks += count

    def add_fill(self, batch: Batch, volume_key: int, lba: int, version: int, checksum: int) -> None:
        """Add the entry of a block that was fetched; the caller adds the bytes to `batch.buffers`."""
        batch.data.append(Fill(volume_key, lba, version, checksum, batch.next_place))
        batch.newest = None
        at = _ENTRIES_OFFSET + batch.index * _ENTRY_SIZE
        _pack_into(batch.headers[-1], at, lba, version, checksum, volume_key, record.FILL, 0, 0xFF, 0)
        self._added(batch, 1)

    def add_moves(
        self,
        batch: Batch,
        kinds: npt.NDArray[np.uint8],
        keys: U64Array,
        versions: U64Array,
        checksums: U64Array,
        sources: npt.NDArray[np.int64],
    ) -> None:
        """Add the entries of blocks that are moved from places; the caller adds the bytes to `batch.buffers`."""
        assert sources.size <= batch.room
        batch.data.append(Moves(batch.headers[-1], batch.index, sources, batch.next_place))
        batch.newest = None
        record.put_copies(batch.headers[-1], batch.index, keys, versions, checksums, kinds)
        self._added(batch, int(sources.size))

    def _added(self, batch: Batch, count: int) -> None:
        batch.data_count += count
        batch.entry_count += count
        batch.index += count
        batch.next_place += count
        batch.room -= count
        self.queued_blocks += count

    def unapplied(self) -> list[Batch]:
        """Return what is gathered, queued or under way."""
        return [*self._in_flight, *self._sealed, *(() if self.gathered is None else (self.gathered,))]

    def seal_if_full(self) -> None:
        """Send the batch on its way when nothing more fits."""
        batch = self.gathered
        if batch is not None and batch.room == 0 and not batch.may_grow:
            self._seal()

    def add_event(
        self, kind: int, volume_key: int, start: int, version: int, value: int, settled: Settled | None = None
    ) -> None:
        """Add an entry without data: a trim, zeroes, an acknowledgement, a drop."""
        self._append_held()  # what waited has room by now, or this waits behind it
        if self._held or not self._has_place():
            self._held.append(_Event(kind, volume_key, start, version, value, settled))
            return
        self._append_event(_Event(kind, volume_key, start, version, value, settled))

    def _append_event(self, event: _Event) -> None:
        kind, volume_key, start, version, value, settled, _ = event
        batch = self.gathered
        if batch is None or batch.index >= record.RECORD_ENTRIES_MAX:
            batch = self._fresh_batch()
        at = _ENTRIES_OFFSET + batch.index * _ENTRY_SIZE
        _pack_into(batch.headers[-1], at, start, version, value, volume_key, kind, 0, 0xFF, 0)
        batch.changes.append(Change(kind, volume_key, start, version, value))
        batch.index += 1
        batch.entry_count += 1
        if settled is not None:
            batch.settled.append(settled)

    def add_note(self, note: VolumeNote | CutEnd, settled: Settled) -> None:
        """Append a record that holds one volume's row, or the change that a cut ends with."""
        self._append_held()
        if self._held or not self._has_place():
            self._held.append(_Event(record.BLOB, 0, 0, 0, 0, settled, note))
            return
        self._append_note(note, settled)

    def _append_note(self, note: VolumeNote | CutEnd, settled: Settled) -> None:
        batch = self._fresh_batch()
        batch.kind = record.NOTE
        batch.end = note if isinstance(note, CutEnd) else None
        packed = record.pack_note(note)
        batch.headers[0][_ENTRIES_OFFSET : _ENTRIES_OFFSET + len(packed)] = packed
        batch.index = batch.entry_count = 1
        batch.settled.append(settled)
        self._seal()

    def _has_place(self) -> bool:
        """Whether one more record has somewhere to go and leaves moves enough to free zones with, and what is promised
        to them: free zones, or the rest of those that they have begun. Guests leave zones free for it, a restart may
        find none."""
        gathered = 0 if self.gathered is None else self.gathered.block_count
        left = len(self._zones.free) - self._promised_zones()
        return left > ZONES_FOR_MOVES or (left >= 0 and self.room_in_zone - gathered > 1)

    def _append_held(self) -> None:
        while self._held and self._has_place():
            event = self._held.popleft()
            if event.note is not None and event.settled is not None:
                self._append_note(event.note, event.settled)
            else:
                self._append_event(event)

    def kick(self, *, patient: bool = False) -> None:
        """Submit what is gathered unless the device has enough to do; then it goes when that is done.

        A small batch does not go behind another: it would be written no sooner, but without what comes meanwhile. Nor
        while a sync is under way if all writers flush: see `group_commit`.
        One that only holds a few fills nobody waits for: when `patient`, it stays open for more of them.
        """
        if self._held:
            self._append_held()
        batch = self.gathered
        if batch is None or self._sealed or len(self._in_flight) >= BATCHES_IN_FLIGHT_MAX:
            return
        if patient and batch.can_wait:
            return
        waits = self._in_flight or (self._syncing and self.group.active)
        if not waits or batch.data_count >= RUN_BLOCKS_MIN:
            self._seal()

    def note_durable(self) -> None:
        """Leave an empty record behind what is durable when nothing else follows.

        Without it a damaged last record could not be told from one that was never finished.
        """
        if (
            self.room_in_zone > 1
            and self._has_place()
            and self.idle
            and self.durable == self.applied.position > self._noted_durable
            and not self.failed
        ):
            self._fresh_batch()
            self._seal()

    # --- durability -------------------------------------------------------------------------------------------

    def flush(self, settled: Settled) -> None:
        """Tell when all that was applied is durable: a guest asked."""
        self.group.flushed()
        self.when_durable(self.changed_position, settled)

    def when_durable(self, position: int, settled: Settled) -> None:
        """Tell when all records below `position` are durable. Callers pass `applied.position`, which only grows."""
        if self.failed:
            settled(False)
        elif position <= self.durable:
            settled(True)
        else:
            assert position <= self.applied.position
            self._waiting.append((position, settled))
            if not self._syncing:
                self._sync()

    def barrier(self, settled: Settled) -> None:
        """Tell when everything written to the device before this call is durable, checkpoints included."""
        if self.failed:
            settled(False)
        else:
            self._barriers.append(settled)
            self._sync()

    def _sync(self, *, ahead: bool = False) -> None:
        if self._syncing or not (self._waiting or self._barriers or ahead) or self.failed:
            return
        self._syncing = True
        target = self.applied.position
        barriers, self._barriers = self._barriers, []
        self._device.sync(lambda ok: self._synced(target, barriers, ok))

    def _synced(self, target: int, barriers: list[Settled], ok: bool) -> None:
        self._syncing = False
        if not ok:
            self._barriers += barriers
            self._on_failure("a sync failed")
            return
        self.durable = max(self.durable, target)
        for settled in barriers:
            settled(True)
        told = 0
        while self._waiting and self._waiting[0][0] <= target:
            self._waiting.popleft()[1](True)
            told += 1
        self.group.synced(told)
        if self.gathered is not None or self._held:
            self.kick(patient=True)
        if self._waiting or self._barriers:
            self._sync()

    # --- records ----------------------------------------------------------------------------------------------

    def _fresh_batch(self) -> Batch:
        if self.gathered is not None:
            self._seal()
        if self._next.block + 2 >= self._zones.zone_blocks:
            self._seal_zone()
        self.gathered = batch = self._batch_at(self._next)
        return batch

    def _batch_at(self, point: LogPoint) -> Batch:
        zone_place = self._zones.place_at(point.zone, 0)
        end_place = zone_place + self._zones.zone_blocks - 1
        first_place = zone_place + point.block
        batch = Batch(point.zone, point.block, self.record_blocks, first_place=first_place, end_place=end_place)
        batch.begin_record()
        return batch

    def _seal(self) -> None:
        batch = self.gathered
        assert batch is not None
        self.gathered = None
        free = self._zones.free
        self._write(batch, next_zone=free[0] if free else batch.zone)

    def _seal_zone(self) -> None:
        """End the open zone: its SEAL names the zone where the log goes on."""
        point = self._next
        seal = self._batch_at(point)
        seal.kind = record.SEAL
        zone = self._zones.open_next(point.position + 1)
        self._write(seal, next_zone=zone)
        self._next = seal.after = LogPoint(self._next.position, zone, 0, self._next.chain)

    def _write(self, batch: Batch, *, next_zone: int) -> None:
        if self.failed:
            for settled in _waiters_of(batch):
                settled(False)
            return
        assert batch.data_count <= batch.entry_count
        position, zone, block, chain = self._next
        before = batch.kind, 0, self._device_tag, batch.zone, self._zones.incarnations[batch.zone]
        full = batch.record_blocks
        entries, blocks = batch.entry_count, batch.data_count
        last = batch.headers[-1]
        for header in batch.headers:
            counts = (entries, blocks) if header is last else (full, full)
            chain = record.finish_record(header, *before, position, self.durable, chain, *counts, next_zone, self._life)
            position += 1
            entries -= full
            blocks -= full
        count = batch.block_count
        self.bytes_written += count * BLOCK_SIZE
        self.records_written += len(batch.headers)
        self._noted_durable = self.durable
        self._next = batch.after = LogPoint(position, zone, block + count, chain)
        self._sealed.append(batch)
        self._submit()

    def _submit(self) -> None:
        while self._sealed and len(self._in_flight) < BATCHES_IN_FLIGHT_MAX and not self.failed:
            batch = self._sealed.popleft()
            self._in_flight.append(batch)
            offset = self._zones.offset_of(self._zones.place_at(batch.zone, batch.block))
            self._device.write(offset, batch.buffers, partial(self._written, batch))

    def _written(self, batch: Batch, ok: bool) -> None:
        if not ok:
            self._on_failure("a write failed")
        if self.failed:
            return
        batch.written = True
        was_asked = bool(batch.replies or batch.settled)
        while self._in_flight and self._in_flight[0].written:
            first = self._in_flight.popleft()
            self.queued_blocks -= first.data_count
            self.applied = first.after
            if first.entry_count:
                self.changed_position = first.after.position
            if first.kind == record.SEAL:
                self._zones.close(first.zone)
            self._apply(first)
            self.group.written(len(first.replies))
            for reply in first.replies:
                reply(IoError.OK)
            for settled in first.settled:
                settled(True)
        if self._sealed:
            self._submit()
        if not self._in_flight:
            self._sync(ahead=self.group.active and was_asked)
        if self.gathered is not None or self._held:
            self.kick()

    def fail(self) -> None:
        """The device failed: nothing more is written, everybody waiting is told."""
        if self.failed:
            return
        self.failed = True
        waiting = [settled for _, settled in self._waiting] + self._barriers
        for batch in (*self._in_flight, *self._sealed, *((self.gathered,) if self.gathered else ())):
            waiting += _waiters_of(batch)
        waiting += [event.settled for event in self._held if event.settled is not None]
        self._held.clear()
        self._waiting.clear()
        self._barriers.clear()
        self._in_flight.clear()
        self._sealed.clear()
        self.gathered = None
        for settled in waiting:
            settled(False)


def _waiters_of(batch: Batch) -> list[Settled]:
    """Return those who wait for a batch in a form that a failure can be told to."""
    return [*(partial(_answer, reply) for reply in batch.replies), *batch.settled]


def _answer(reply: Reply, ok: bool) -> None:
    reply(IoError.OK if ok else IoError.IO)

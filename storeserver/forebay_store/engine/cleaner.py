"""One pass of the cleaner, as jobs that a shell does one after the other: looks, copies, checkpoints, deletions.

A pass ends when nothing is worth it (`forebay_store.engine.space` decides). Jobs are calls for a thread, records for
the log, and pauses by which the shell limits the rate. What a call raises, or what the log refuses, is thrown into the
pass and ends it; the next one begins with a look at what there is.

Invariants:
    files go only after the record that names them shows in the index, and that one is written only after the index
    with the checkpoint that covers them is durable. So whatever a crash takes, replay finds all it needs.
Crash: at most segments without a row remain; the next pass deletes those that the newest record names, `store fsck`
    finds the others.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

from forebay_core.frame import FrameBuilder
from forebay_core.units import Buffer
from forebay_store.engine.checkpoint import checkpoint_records
from forebay_store.engine.cleaning import Copied, DamagedPlace, copy_live
from forebay_store.engine.live import find_segment
from forebay_store.engine.log import TOGETHER_MAX, record_size_max
from forebay_store.engine.moving import leaving_segments, read_checkpoint, segment_name
from forebay_store.engine.ports import Index, IndexReader, SegmentBackend
from forebay_store.engine.space import (
    CopyBlocks,
    DeleteSegments,
    Pressure,
    Rest,
    SegmentSpace,
    Space,
    TakeCheckpoint,
    next_step,
)
from forebay_store.engine.volumes import read_applied
from forebay_store.format.records import Record
from forebay_store.format.rows import STAGED_PART, Table, decode_segment_row
from forebay_store.format.segment import NO_SEGMENT, SegmentName
from forebay_store.format.space_records import SegmentsDeleted, pack_names
from forebay_store.limits import CHECKPOINT_BATCH_SIZE, COPY_ROOM_SHARE, COPY_SIZE

_ROW_SIZE_GUESS = 16
"""Bytes of an index row in a checkpoint, for the first one: 10 to 20 were seen."""

Records = list[tuple[Record, Buffer]]


class Work(NamedTuple):
    """Call this in a thread."""

    call: Callable[[], None]


class Append(NamedTuple):
    """Put these records into the log, all in one segment, and go on when the index shows them."""

    records: Records


class Pause(NamedTuple):
    """So many bytes were copied; go on when the rate limit allows more."""

    size: int


Job = Work | Append | Pause


class Counts(NamedTuple):
    """What all passes did."""

    segments_freed: int = 0
    bytes_freed: int = 0
    bytes_copied: int = 0


class Cleaner:
    """Cleans one store; `space` is what the newest look found, `damaged` what copying met and nobody took yet."""

    def __init__(
        self,
        index: Index,
        backend: SegmentBackend,
        *,
        store: bytes,
        room: Callable[[], int] = lambda: int(COPY_SIZE / COPY_ROOM_SHARE),
    ) -> None:
        """`room` tells how many bytes the disk has left."""
        self._index = index
        self._backend = backend
        self._store = store
        self._room = room
        self._builder = FrameBuilder()
        self.barred: set[SegmentName] = set()
        self.damaged: list[DamagedPlace] = []
        self.counts = Counts()
        self.space: Space | None = None
        self.disk_size = self.live_size = 0  # of all segments in it
        self._copies: dict[SegmentName, tuple[int, int]] = {}  # size and live bytes of copies when they were new

    def bar(self, segments: Iterable[SegmentName]) -> None:
        """Damage was found in these: they are no victims any more."""
        self.barred.update(segments)

    def take_damaged(self) -> list[DamagedPlace]:
        """Return the damage that was met since the last call."""
        damaged, self.damaged = self.damaged, []
        return damaged

    def clean(
        self, *, pressure: Callable[[Space], Pressure], checkpoint: Callable[[], int]
    ) -> Generator[Job, None, None]:
        """Yield the jobs of one pass. `checkpoint` returns a random number for each checkpoint."""
        fruitless: set[SegmentName] = set()
        yield from self._delete_files()
        while True:
            yield Work(lambda: self._look(fruitless))
            assert self.space is not None
            match next_step(self.space, pressure(self.space)):
                case Rest():
                    return
                case DeleteSegments(names, size):
                    yield from self._delete(names, size)
                case TakeCheckpoint():
                    yield from self._take_checkpoint(checkpoint())
                case CopyBlocks(names):
                    yield from self._copy(names, fruitless)

    def _look(self, fruitless: set[SegmentName]) -> None:
        with self._index.view() as reader:
            found = look(reader, self.barred | fruitless)
        self._note_copies(found)
        copied_size = sum(size for size, _ in self._copies.values())
        usual = max(1.0, copied_size / max(1, sum(live for _, live in self._copies.values())))
        segments = [one._replace(cost=self._cost(one, usual)) for one in found.segments]
        self.space = found._replace(segments=segments, damaged=frozenset(self.barred))
        self.disk_size = sum(one.size for one in segments)
        self.live_size = sum(one.live for one in segments)

    def _note_copies(self, found: Space) -> None:
        """Note the copies that this start of the store made: what is in them is older than what lies before them."""
        newest = 0
        for one in found.segments:
            if one.written < newest and one.name.incarnation == found.applied.incarnation and one.live:
                self._copies.setdefault(one.name, (one.size, one.live))
            newest = max(newest, one.written)
        names = {one.name for one in found.segments}
        self._copies = {name: sizes for name, sizes in self._copies.items() if name in names}

    def _cost(self, one: SegmentSpace, usual: float) -> float:
        """Return what a copy costs: of a copy as much as it did, so that copying it again wins nothing at first."""
        size, live = self._copies.get(one.name, (0, 0))
        return size / live if live else usual

    def _delete(self, names: list[SegmentName], size: int) -> Iterator[Job]:
        yield Work(self._index.sync)
        yield Append([(SegmentsDeleted(pack_names(names)), b"")])
        yield from self._delete_files()
        self.barred.difference_update(names)
        self.counts = self.counts._replace(
            segments_freed=self.counts.segments_freed + len(names), bytes_freed=self.counts.bytes_freed + size
        )

    def _delete_files(self) -> Iterator[Job]:
        yield Work(lambda: delete_leaving(self._backend, self._index))

    def _take_checkpoint(self, checkpoint: int) -> Iterator[Job]:
        with self._index.view() as reader:
            records = checkpoint_records(reader, checkpoint)
            batch: Records = []
            size = 0
            while True:
                found: list[tuple[Record, bytes]] = []
                yield Work(lambda found=found: found.extend([one for one in [next(records, None)] if one]))  # type: ignore[misc]
                if not found:
                    break
                fresh = record_size_max(found[0][0], len(found[0][1]))
                if batch and size + fresh > CHECKPOINT_BATCH_SIZE:
                    yield Append(batch)
                    batch, size = [], 0
                batch.append(found[0])
                size += fresh
        yield Append(batch)

    def _copy(self, names: list[SegmentName], fruitless: set[SegmentName]) -> Iterator[Job]:
        done: list[Copied] = []
        yield Work(lambda: done.append(self._copy_now(names)))
        copied = done[0]
        self.damaged += copied.damaged
        self.barred |= {place.segment for place in copied.damaged}
        if not copied.parts:  # What lives there is on its way out already, or is damaged.
            fruitless |= set(names)
        for batch in _batches(copied):
            yield Append(batch)
        self.counts = self.counts._replace(bytes_copied=self.counts.bytes_copied + copied.size)
        yield Pause(copied.size)

    def _copy_now(self, names: list[SegmentName]) -> Copied:
        size_max = min(COPY_SIZE, int(self._room() * COPY_ROOM_SHARE))
        return copy_live(self._index, self._backend, names, store=self._store, builder=self._builder, size_max=size_max)


def delete_leaving(backend: SegmentBackend, index: Index) -> None:
    """Delete the files that the newest record of this kind names; after a crash some may be there still."""
    with index.view() as reader:  # Keys bear no checksum: one that was damaged may name a segment that is needed.
        names = [name for name in leaving_segments(reader) if find_segment(reader, name) is None]
    if names:
        backend.delete([name.text for name in names])


def look(reader: IndexReader, barred: set[SegmentName]) -> Space:
    """Return how full the segments are."""
    segments: list[SegmentSpace] = []
    for key, value in reader.scan(Table.SEGMENTS, b""):
        row = decode_segment_row(value)
        segments.append(SegmentSpace(segment_name(key), row.size, row.live, row.written))
    staged = {SegmentName(*STAGED_PART.unpack_from(value)[:2]) for _, value in reader.scan(Table.STAGED, b"")}
    mark = read_checkpoint(reader)
    if mark is None:
        rows = sum(row.live for row in segments) // 4096
        return Space(segments, NO_SEGMENT, read_applied(reader), rows * _ROW_SIZE_GUESS, barred | staged)
    return Space(segments, mark.shows, read_applied(reader), mark.stored_size, barred | staged)


def _batches(copied: Copied) -> Iterator[Records]:
    """Group records so that each group gets into one segment."""
    batch: Records = []
    size = 0
    for record, payload in copied.parts:
        fresh = record_size_max(record, len(payload))
        if batch and size + fresh > TOGETHER_MAX:
            yield batch
            batch, size = [], 0
        batch.append((record, payload))
        size += fresh
    if batch:
        yield batch

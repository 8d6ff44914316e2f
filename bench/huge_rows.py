"""Ten million extents: what an operation reads and writes of the index against a small volume, and its snapshots.

Rows of the index are counted where the engine asks for them, so the figures do not depend on the machine. What a look
costs inside LMDB grows with the depth of its trees, which is in the note. The store is made first, or is the one in the
folder that BENCH_HUGE names, which is made there if need be and kept (`huge_volume.py`).
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import snapshot_rows
from clean_rows import DEVICE
from forebay_core.extents import Extent, pack
from forebay_store.engine.apply import apply_segments
from forebay_store.engine.changes import Change, Incoming
from forebay_store.engine.ports import IndexCursor, IndexReader, IndexWriter
from forebay_store.engine.reading import plan_read
from forebay_store.engine.store import Answer, ApplySegments, StoreEngine, WriteSegment
from forebay_store.format.part import parse_part
from forebay_store.format.rows import Table
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.opening import OpenStore, open_store
from forebay_wire import messages
from huge_volume import HUGE, HUGE_EXTENTS, HUGE_SIZE, SMALL, SMALL_EXTENTS, STRIDE, AlikeFrames, make
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, Store

Result = TypeVar("Result")
CUT_BLOCKS = 1024
CACHE_SIZE = "2GiB"


class Counts:
    """Rows of the index that were read and written; those of segments apart: what lives in a segment is counted once
    for each that a cut displaces something in, however large the volume is."""

    def __init__(self) -> None:
        self.reads = self.writes = self.of_segments = 0


class CountingCursor:
    """A cursor that counts."""

    def __init__(self, cursor: IndexCursor, counts: Counts) -> None:
        self._cursor, self._counts = cursor, counts

    def seek(self, key: bytes) -> tuple[bytes, bytes] | None:
        """See IndexCursor."""
        self._counts.reads += 1
        return self._cursor.seek(key)

    def step(self) -> tuple[bytes, bytes] | None:
        """See IndexCursor."""
        self._counts.reads += 1
        return self._cursor.step()

    def before(self) -> tuple[bytes, bytes] | None:
        """See IndexCursor."""
        self._counts.reads += 1
        return self._cursor.before()


class CountingReader:
    """A view that counts."""

    def __init__(self, reader: IndexReader, counts: Counts) -> None:
        self._reader, self._counts = reader, counts

    def get(self, table: Table, key: bytes) -> bytes | None:
        """See IndexReader."""
        self._counts.reads += table is not Table.SEGMENTS
        return self._reader.get(table, key)

    def scan(self, table: Table, key: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See IndexReader."""
        for row in self._reader.scan(table, key):
            self._counts.reads += 1
            yield row

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """See IndexReader."""
        self._counts.reads += 1
        return self._reader.before(table, key)

    def cursor(self, table: Table) -> IndexCursor:
        """See IndexReader."""
        return CountingCursor(self._reader.cursor(table), self._counts)


class CountingWriter(CountingReader):
    """A transaction that counts."""

    def __init__(self, writer: IndexWriter, counts: Counts) -> None:
        super().__init__(writer, counts)
        self._writer = writer

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """See IndexWriter."""
        self._counts.writes += table is not Table.SEGMENTS
        self._counts.of_segments += table is Table.SEGMENTS
        self._writer.put(table, key, value)

    def put_many(self, table: Table, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """See IndexWriter."""
        self._counts.writes += len(rows)
        self._writer.put_many(table, rows)

    def delete(self, table: Table, key: bytes) -> None:
        """See IndexWriter."""
        self._counts.writes += 1
        self._writer.delete(table, key)


class CountingIndex:
    """The index, and what was asked of it."""

    def __init__(self, index: LmdbIndex) -> None:
        self._index = index
        self.counts = Counts()

    @contextmanager
    def view(self) -> Iterator[IndexReader]:
        """See Index."""
        with self._index.view() as reader:
            yield CountingReader(reader, self.counts)

    def update(self, change: Callable[[IndexWriter], Result]) -> Result:
        """See Index."""
        return self._index.update(lambda writer: change(CountingWriter(writer, self.counts)))

    def sync(self) -> None:
        """See Index."""
        self._index.sync()


class Outcome(NamedTuple):
    """What an operation took."""

    reads: int
    writes: int
    of_segments: int
    ms: float


class Driver:
    """Runs one engine on an open store, a command at a time, and counts."""

    def __init__(self, store: OpenStore) -> None:
        self._store = store
        self.index = CountingIndex(store.index)
        self._engine = StoreEngine(self.index, store=store.folder.store, newest=store.newest)
        self._frames = AlikeFrames()
        self._fresh = 0

    def ask(self, message: Change, payload: bytes = b"") -> messages.AnyMessage:
        """See one request through; what it leaves to the background as well."""
        self._fresh += 1
        part = parse_part(payload, place="bench", stored=True) if isinstance(message, messages.StagePart) else None
        incoming = Incoming(message, part, now_ns=self._fresh, fresh_id=os.urandom(16))
        self._engine.submit(self._fresh, incoming, (payload,) if payload else ())
        answer: messages.AnyMessage | None = None
        while commands := self._engine.take_commands():
            for command in commands:
                match command:
                    case WriteSegment():
                        self._store.backend.create(command.name.text, command.buffers)
                        self._engine.complete_write(None)
                    case ApplySegments(segments):
                        self.index.update(lambda writer, segments=segments: apply_segments(writer, segments))  # type: ignore[misc]
                        self._engine.complete_apply(None)
                    case Answer(_, reply):
                        answer = reply
        assert answer is not None and not isinstance(answer, messages.Failed), answer
        return answer

    def counted(self, work: Callable[[], object]) -> Outcome:
        """Return what a piece of work took."""
        self.index.counts = Counts()
        began_s = time.perf_counter()
        work()
        counts = self.index.counts
        return Outcome(counts.reads, counts.writes, counts.of_segments, (time.perf_counter() - began_s) * 1e3)

    def read(self, volume: bytes, block: int) -> None:
        """Plan the read of a block."""
        with self.index.view() as reader:
            plan_read(reader, messages.Read(volume, pack([Extent(block, 1)])))

    def write(self, opened: messages.Opened, sequence: int, blocks: range) -> None:
        """Send and apply a cut."""
        key = (opened.row.id, opened.epoch, opened.session, sequence)
        self.ask(messages.StagePart(*key, 0), b"".join(self._frames.of(blocks)))
        self.ask(messages.CommitCut(*key, 1, sequence, sequence, 1))


def measure(plan: Plan) -> list[Row]:
    """Return the rows."""
    kept = os.environ.get("BENCH_HUGE")
    folder = Path(kept) if kept else plan.folder / "huge-store"
    if not folder.exists():
        make(folder)
    try:
        rows = _counted_rows(folder)
        return rows + _snapshot_rows(plan, folder)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _counted_rows(folder: Path) -> list[Row]:
    store = open_store(folder, now_ns=1)
    try:
        driver = Driver(store)
        counted = {name: _operations(driver, name) for name in (SMALL, HUGE)}
        depth = store.index.depth(Table.HEAD)
    finally:
        store.close()
    rows = []
    for what, huge in counted[HUGE].items():
        small = counted[SMALL][what]
        note = f"{_show(huge)}, {_show(small)}; the tree of the head is {depth} deep"
        text = f"index rows of {what}, 1 TiB in 10 M extents over 1 GiB"
        row = Row("huge-index", text, "ratio", Goal(1, 1, True), note)
        row.add(OURS, Sample((huge.reads + huge.writes) / (small.reads + small.writes)))
        timed = Row("huge-time", "the time that takes", "ratio", Goal(), f"{huge.ms:.1f} and {small.ms:.1f} ms")
        timed.add(OURS, Sample(huge.ms / small.ms))
        rows += [row, timed]
    return rows


def _show(one: Outcome) -> str:
    return f"{one.reads} read, {one.writes} written and {one.of_segments} of segments"


def _operations(driver: Driver, name: str) -> dict[str, Outcome]:
    """Do the same to a volume: most of its extents lie far apart, the operations take the same number of them."""
    opened = driver.ask(messages.OpenVolume(name, DEVICE))
    assert isinstance(opened, messages.Opened)
    last = opened.row.version & ((1 << 44) - 1)
    extents = HUGE_EXTENTS if name == HUGE else SMALL_EXTENTS
    spread = extents // CUT_BLOCKS * STRIDE  # blocks between those of a scattered cut
    blocks = range(0, CUT_BLOCKS * spread, spread)
    found = {
        "reads of 1,024 written blocks": driver.counted(lambda: [driver.read(opened.row.id, lba) for lba in blocks]),
        "reads of 1,024 others": driver.counted(lambda: [driver.read(opened.row.id, lba + 1) for lba in blocks]),
        "a cut of 1,024 blocks that exist": driver.counted(lambda: driver.write(opened, last + 1, blocks)),
        "a cut of 1,024 new ones": driver.counted(
            lambda: driver.write(opened, last + 2, range(2, 2 + CUT_BLOCKS * spread, spread))
        ),
    }
    driver.ask(messages.ReleaseVolume(opened.row.id, opened.epoch, opened.session))
    snapshot = f"s{last}"
    found["a snapshot"] = driver.counted(lambda: driver.ask(messages.CreateSnapshot((name,), snapshot)))
    clone = f"{name}-clone{last}"
    found["a clone"] = driver.counted(lambda: driver.ask(messages.CloneVolume(name, snapshot, clone)))
    driver.ask(messages.DeleteVolume(clone))
    again = driver.ask(messages.OpenVolume(name, DEVICE))
    assert isinstance(again, messages.Opened)
    found["a cut that displaces 1,024 from the snapshot"] = driver.counted(
        lambda: driver.write(again, last + 4, blocks)
    )
    driver.ask(messages.ReleaseVolume(again.row.id, again.epoch, again.session))
    found["deleting the snapshot"] = driver.counted(lambda: driver.ask(messages.DeleteSnapshot(name, snapshot)))
    return found


def _snapshot_rows(plan: Plan, folder: Path) -> list[Row]:
    with ExitStack() as stack:
        store = Store(folder)
        stack.callback(store.stop)
        place = plan.folder / "huge-cache"
        place.mkdir()
        cache = Cache(place / "cache", place, store=store.address, size=CACHE_SIZE)
        stack.callback(cache.stop)
        cache.attach(HUGE)
        what = "; 1 TiB in 10 M extents, written all over"
        rows = snapshot_rows.measure_on(cache, HUGE, HUGE_SIZE, plan.rounds, "huge-snapshot", what)
        cache.command("detach", HUGE)
        return rows

"""Costs of the hot paths one by one, without sockets and disks; run by `make bench`.

A call does many operations, so that it is long against the clock: map finds and replaces COUNT, engine writes 960,
engine reads 1024 blocks; the names say the others.
"""

# ruff: noqa: D103

import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.blockmap import BlockMap, make_key
from forebay_cache.engine.cache import CacheEngine, EngineSettings
from forebay_cache.engine.dirty import DirtyBlocks
from forebay_cache.engine.emptying import clear_places, clear_places_fast, find_kept, find_kept_fast
from forebay_cache.engine.front import Chunk, IoError
from forebay_cache.engine.nbd_budget import Account
from forebay_cache.engine.nbd_negotiation import ReplyStyle, Session
from forebay_cache.engine.nbd_transmission import ReceiveBuffer, Transmission
from forebay_cache.engine.policy import WORTHY_FROM
from forebay_cache.engine.recovery import blank_device, recover
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format import record
from forebay_cache.format.nbd import CMD_READ, CMD_WRITE, REQUEST, REQUEST_MAGIC
from forebay_cache.format.superblock import Superblock, plan_geometry
from forebay_core.checksums import block_checksums
from forebay_core.extents import Extent
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE, MIB, Buffer, Epoch, StoreId, Version, VolumeId
from forebay_store.engine.apply import LogRecord, LogSegment, apply_segments
from forebay_store.format.part import PART_ENTRY
from forebay_store.format.records import CutCommitted, CutPart, VolumeCreated, WriterTaken
from forebay_store.format.segment import SegmentName
from forebay_store.service.lmdb_index import LmdbIndex

COUNT = 1000
PLACES = 1 << 18
ZONE_BLOCKS = 1024
BLOCK = bytes(range(256)) * 16
VOLUME_SIZE = 256 * MIB


@pytest.fixture(scope="module")
def full_map() -> BlockMap:
    table = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    keys = np.arange(PLACES, dtype=np.uint64) + np.uint64(make_key(1, 0) - 1)
    np.random.default_rng(1).shuffle(keys[1:])
    ones = np.ones(PLACES, np.uint64)
    keys[0] = 0  # place 0 holds no block
    table.load(keys, ones, ones)
    return table


def some_keys() -> list[int]:
    rng = random.Random(2)
    return [make_key(1, rng.randrange(PLACES - 1)) for _ in range(COUNT)]


def test_map_finds(benchmark: BenchmarkFixture, full_map: BlockMap) -> None:
    find, keys = full_map.find, some_keys()
    assert all(place >= 0 for place in benchmark(lambda: [find(key) for key in keys]))


def test_map_finds_runs_of_256(benchmark: BenchmarkFixture, full_map: BlockMap) -> None:
    assert (benchmark(full_map.find_run, make_key(1, 5000), 256) >= 0).all()


def test_map_replaces(benchmark: BenchmarkFixture, full_map: BlockMap) -> None:
    keys = list(dict.fromkeys(some_keys()))
    remove, insert = full_map.remove, full_map.insert

    def replace() -> None:
        for key in keys:
            insert(key, 2, 3, remove(key))

    benchmark(replace)


@pytest.mark.parametrize("twin", [clear_places, clear_places_fast], ids=["python", "native"])
def test_zone_of_1024_places_is_emptied(benchmark: BenchmarkFixture, twin: Callable[..., int]) -> None:
    table = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    keys = np.arange(PLACES, dtype=np.uint64) + np.uint64(make_key(1, 0) - 1)  # as a guest writes them in their order
    keys[0] = 0
    ones = np.ones(PLACES, np.uint64)
    table.load(keys, ones, ones)
    zones = iter(range(1, PLACES // ZONE_BLOCKS))

    def one() -> tuple[tuple[object, ...], dict[str, object]]:
        first = next(zones) * ZONE_BLOCKS
        return (table._views, table._second, ZONE_BLOCKS, np.arange(first, first + ZONE_BLOCKS)), {}

    assert benchmark.pedantic(twin, setup=one, rounds=200) == ZONE_BLOCKS


@pytest.mark.parametrize("twin", [find_kept, find_kept_fast], ids=["python", "native"])
def test_zone_of_1024_places_keeps_100(
    benchmark: BenchmarkFixture, full_map: BlockMap, twin: Callable[..., int]
) -> None:
    states, noted, found = np.zeros(PLACES, np.uint8), np.full(64, 9, np.uint64), np.empty(ZONE_BLOCKS, np.int64)
    states[np.random.default_rng(1).permutation(ZONE_BLOCKS)[:100] + ZONE_BLOCKS] = WORTHY_FROM
    arguments = (full_map._views, states, noted, ZONE_BLOCKS, ZONE_BLOCKS, WORTHY_FROM, found)
    assert benchmark(twin, *arguments) == 100


def test_closing_a_cut_of_a_million_dirty_blocks(benchmark: BenchmarkFixture) -> None:
    lbas = np.random.default_rng(1).integers(0, 1 << 28, (8000, 125)).astype(np.uint64)

    def listed() -> tuple[tuple[DirtyBlocks], dict[str, object]]:
        dirty = DirtyBlocks()
        for row in lbas:
            dirty.add(row)
        return (dirty,), {}

    benchmark.pedantic(DirtyBlocks.take, setup=listed, rounds=5)


def test_block_checksums_of_4_mib(benchmark: BenchmarkFixture) -> None:
    benchmark(block_checksums, memoryview(random.Random(3).randbytes(4 * MIB)))


def test_record_of_125_entries_is_encoded(benchmark: BenchmarkFixture) -> None:
    entries = b"".join(record.ENTRY.pack(i, 1, 2, 1, record.WRITE, 0, 0xFF, 0) for i in range(125))
    header = record.RecordHeader(record.DATA, 0, 1, 2, 3, 4, 5, 6, 125, 125, 0, 7)
    assert len(benchmark(record.encode_record, header, entries)) == BLOCK_SIZE


@pytest.mark.parametrize("kind", ["text", "random"])
def test_frame_of_64_kib_is_built(benchmark: BenchmarkFixture, kind: str) -> None:
    rng = random.Random(4)
    plain = rng.randbytes(16 * BLOCK_SIZE) if kind == "random" else b" ".join(rng.choices(WORDS, k=16384))
    plain = plain[: 16 * BLOCK_SIZE]
    sums = block_checksums(memoryview(plain))
    builder = FrameBuilder(1)
    benchmark(lambda: builder.build([Extent(0, 16)], plain, sums))


WORDS = [b"reservoir", b"turbine", b"penstock", b"spillway", b"intake", b"surge", b"gate", b"weir"]


class _InstantVolume:
    """Answers at once, with the same block."""

    name = "v"
    size = VOLUME_SIZE
    read_only = False
    _chunks = (Chunk(BLOCK_SIZE, memoryview(BLOCK)),)

    def read(self, _offset: int, _length: int, reply: Callable[[IoError, Sequence[Chunk]], None]) -> None:
        reply(IoError.OK, self._chunks)

    def write(self, _offset: int, _payload: Buffer, _fua: bool, reply: Callable[[IoError], None]) -> None:
        reply(IoError.OK)

    def kick(self) -> None:
        pass


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE], ids=["reads", "writes"])
def test_64_nbd_requests_are_parsed_and_answered(benchmark: BenchmarkFixture, command: int) -> None:
    payload = BLOCK if command == CMD_WRITE else b""
    received = b"".join(
        REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, cookie << 12, BLOCK_SIZE) + payload for cookie in range(64)
    )
    session = Session(_InstantVolume(), ReplyStyle.SIMPLE, False)  # type: ignore[arg-type]
    account = Account(lambda: None)
    transmission = Transmission(session, account, wake=lambda: None, kick=lambda: None, reuse=lambda _buffer: None)
    buffer = ReceiveBuffer(memoryview(received))

    def converse() -> int:
        at = 0
        while at < len(received):
            at = transmission.accept(buffer, at, len(received))
            held = transmission.take_out()[2]
            account.held -= held
        return at

    assert benchmark(converse) == len(received)


class _InstantDevice:
    """A device in memory: writes and syncs are completed when `run` is called, in order."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.waiting: deque[Callable[[], None]] = deque()

    def read_now(self, offset: int, size: int) -> Buffer:
        return memoryview(self.content)[offset : offset + size]

    def read_into_now(self, offset: int, target: memoryview) -> bool:
        target[:] = self.read_now(offset, target.nbytes)
        return True

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        self.waiting.append(lambda: done(self.read_now(offset, size)))

    def write(self, offset: int, buffers: Sequence[Buffer], done: Callable[[bool], None]) -> None:
        for buffer in buffers:
            self.content[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
        self.waiting.append(lambda: done(True))

    def sync(self, done: Callable[[bool], None]) -> None:
        self.waiting.append(lambda: done(True))

    def run(self) -> None:
        while self.waiting:
            self.waiting.popleft()()


class _NoStore:
    """Never asked here: the volume begins as one hole, and no cut is closed."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"{name} of the store was called")


class _Engine:
    """An engine with one volume on a device of 1 GiB, with `tick` under way only between the rounds."""

    def __init__(self) -> None:
        geometry = plan_geometry(1024 * MIB, ZONE_BLOCKS)
        superblock = Superblock(b"d" * 16, 1, *geometry, 0)
        self.device = _InstantDevice(geometry.size)
        for offset, content in blank_device(superblock):
            self.device.content[offset : offset + len(content)] = content
        self.engine = CacheEngine(
            recover(self.device.read_now, superblock),
            device=self.device,
            upstream=_NoStore(),
            builder=_NoStore(),
            settings=EngineSettings(cut_blocks_max=1 << 30, cut_age_ns_max=1 << 62, dirty_share_max=0.9),
            life=1,
            report=print,
        )
        self.engine.start()
        self.device.run()
        got: list[CacheVolume | None] = []
        view = StoreView(VolumeId(b"v" * 16), "v", VOLUME_SIZE, Epoch(1), Version(0), StoreId(b"s" * 16))
        self.engine.attaching.attach(view, [], read_only=False, attached=got.append)
        self.device.run()
        assert got[0] is not None
        self.volume = got[0]
        self.now_ns = 0

    def settle(self) -> None:
        """Let time pass until nothing moves: checkpoints and reclaim happen here."""
        for _ in range(4):
            self.now_ns += 50_000_000
            self.engine.tick(self.now_ns, self.now_ns)
            self.device.run()

    def write(self, lbas: Sequence[int], *, depth: int) -> int:
        """Write blocks, `depth` at a time; return how many were acknowledged."""
        errors: list[IoError] = []
        payload = memoryview(BLOCK)
        for at in range(0, len(lbas), depth):
            for lba in lbas[at : at + depth]:
                self.volume.write(lba * BLOCK_SIZE, payload, False, errors.append)
            self.volume.kick()
            self.device.run()
        assert not any(errors)
        return len(errors)


@pytest.fixture(scope="module")
def small_engine() -> _Engine:
    return _Engine()


@pytest.mark.parametrize("depth", [1, 16, 64])
def test_engine_writes_blocks(benchmark: BenchmarkFixture, small_engine: _Engine, depth: int) -> None:
    rng = random.Random(5)
    lbas = [rng.randrange(VOLUME_SIZE // BLOCK_SIZE) for _ in range(960)]
    done = benchmark.pedantic(
        lambda: small_engine.write(lbas, depth=depth), setup=lambda: small_engine.settle(), rounds=20, iterations=1
    )
    assert done == len(lbas)


def test_engine_writes_1_mib(benchmark: BenchmarkFixture, small_engine: _Engine) -> None:
    payload = memoryview(BLOCK * 256)
    errors: list[IoError] = []

    def write() -> None:
        small_engine.volume.write(16 * MIB, payload, False, errors.append)
        small_engine.volume.kick()
        small_engine.device.run()

    benchmark.pedantic(write, setup=lambda: small_engine.settle(), rounds=20, iterations=1)
    assert errors and not any(errors)


@pytest.mark.parametrize("blocks", [1, 256])
def test_engine_reads_what_is_cached(benchmark: BenchmarkFixture, small_engine: _Engine, blocks: int) -> None:
    small_engine.write(range(1024), depth=64)
    small_engine.settle()
    errors: list[IoError] = []
    reads = [(lba * BLOCK_SIZE, blocks * BLOCK_SIZE) for lba in range(0, 1024, blocks)]

    def read() -> None:
        for offset, length in reads:
            small_engine.volume.read(offset, length, lambda error, _chunks: errors.append(error))
        small_engine.volume.kick()
        small_engine.device.run()

    benchmark(read)
    assert errors and not any(errors)


@pytest.mark.parametrize("kind", ["into_a_gap", "over_others", "over_a_snapshot"])
def test_store_commits_16384_scattered_blocks(benchmark: BenchmarkFixture, tmp_path: Path, kind: str) -> None:
    """Each an extent of its own, 16 in a frame, as a cache sends random writes of one block."""
    index = LmdbIndex(tmp_path, lasting=False)
    created = [VolumeCreated(b"v" * 16, 1 << 40, 1, "v"), WriterTaken(b"v" * 16, 1, b"d" * 16)]
    _apply(index, 1, [LogRecord(record, 0, 0, b"") for record in created])
    turn = 0

    def stage() -> tuple[tuple[LmdbIndex, int, list[LogRecord]], dict[str, object]]:
        nonlocal turn
        turn += 1
        region = turn << 20 if kind == "into_a_gap" else 0
        lbas = [region + lba for lba in sorted(random.Random(turn).sample(range(1 << 17), 16384))]
        parts = [_part(at, lbas[1024 * at : 1024 * (at + 1)]) for at in range(16)]
        _apply(index, 2 * turn, parts)
        commit = CutCommitted(b"v" * 16, 1, 7, len(parts), turn, turn, 1, 0)
        if kind == "over_a_snapshot":  # All that a commit displaces goes to the history.
            commit = commit._replace(snapshot=turn.to_bytes(16, "big"), snapshot_name=f"s{turn}")
        return (index, 2 * turn + 1, [LogRecord(commit, 0, 0, b"")]), {}

    benchmark.pedantic(_apply, setup=stage, rounds=10, warmup_rounds=2)
    index.close()


def _part(index: int, lbas: Sequence[int]) -> LogRecord:
    entries = b"".join(PART_ENTRY.pack(lba, 1, at // 16 * 40000, 40000, at % 16, 16, 0) for at, lba in enumerate(lbas))
    return LogRecord(CutPart(b"v" * 16, 1, 7, index, b""), 64, 40000 * len(lbas) // 16, entries)


def _apply(index: LmdbIndex, number: int, records: list[LogRecord]) -> None:
    index.update(lambda writer: apply_segments(writer, [LogSegment(SegmentName(1, number), records, 1 << 25)]))

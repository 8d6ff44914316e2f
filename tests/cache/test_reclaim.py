"""Reclaiming while guests write: zones freed at once, moves against newer changes, and a device that is full."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from engine_rig import Rig, check_books
from test_engine_review import attach_second, settle

from forebay_cache.engine import destage, reclaim
from forebay_cache.engine.front import IoError
from forebay_cache.engine.log import Log
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.engine.zones import ZoneState
from forebay_cache.format import record
from forebay_core.units import BLOCK_SIZE, LBA_BITS, MIB

OLD, NEW = b"O" * BLOCK_SIZE, b"N" * BLOCK_SIZE
QUEUED = 150


class QuickStore:
    """Steps of a rig whose syncs, builds and store are quick, while records are written only when nothing else is to
    do; or, `writes_first`, the other way round with syncs that take `sync_steps`."""

    def __init__(self, rig: Rig, *, writes_first: bool = False, sync_steps: int = 0) -> None:
        self.rig = rig
        self.writes_first = writes_first
        self.steps = 0
        self.syncs: list[tuple[int, Callable[[], None]]] = []
        if sync_steps:
            begin = rig.device.sync

            def sync(done: Callable[[bool], None]) -> None:
                begin(done)
                self.syncs.append((self.steps + sync_steps, rig.device.queue.pop()))

            rig.device.sync = sync  # type: ignore[method-assign]

    def step(self) -> None:
        device, store = self.rig.device, self.rig.store
        self.steps += 1
        if self.steps % 300 == 0:
            self.rig.tick()
        if self.rig.alarm_ns is not None and self.rig.alarm_ns <= self.rig.now_ns:
            self.rig.pace()
        if self.writes_first and device.writes:
            device.writes.pop(0)()
        elif self.syncs and self.syncs[0][0] <= self.steps:
            self.syncs.pop(0)[1]()
        elif device.queue:
            device.queue.pop(0)()
        elif store.queue and not store.away:
            store.queue.pop(0)()
        elif device.writes:
            device.writes.pop(0)()
        else:
            self.rig.tick()

    def until(self, reached: Callable[[], bool], steps: int = 20_000) -> bool:
        for _ in range(steps):
            if reached():
                return True
            self.step()
        return False


def checkpointed(rig: Rig) -> None:
    settled: list[bool] = []
    rig.engine.checkpoints.want(settled.append)
    rig.run_until(lambda: bool(settled))


def worth_moving() -> tuple[Rig, CacheVolume]:
    """A clean block worth keeping, in a zone that could be a victim; and a second volume that is not destaged."""
    rig = Rig(7, size=64 << 20, blocks=8000, cut_age_ns_max=10**15, cut_blocks_max=10**9)
    rig.device.now_share = 1.0
    other = attach_second(rig)
    other.destaging = False
    assert rig.write(0, OLD) == IoError.OK
    assert rig.write(BLOCK_SIZE, rig.rng.randbytes(200 * BLOCK_SIZE)) == IoError.OK
    assert rig.drain()
    for _ in range(3):
        checkpointed(rig)
        assert rig.write(300 * BLOCK_SIZE, rig.rng.randbytes(100 * BLOCK_SIZE)) == IoError.OK
        assert rig.drain()
    for _ in range(3):
        assert rig.read(0, BLOCK_SIZE) == OLD
    settle(rig, 300)
    rig.run_until(lambda: rig.engine.log.idle and not rig.device.queue and not rig.device.writes)
    return rig, other


def begin_moving(rig: Rig) -> Sequence[Callable[[], None]]:
    """Let reclaim choose the zone of block 0; return its reads, which are under way."""
    engine = rig.engine
    rig.device.now_share = 0.0
    zone = engine.map.find(rig.volume.key << LBA_BITS) // engine.zones.zone_blocks
    spare, engine.reclaim.spare = engine.reclaim.spare, engine.zones.zone_count
    for _ in range(50):
        engine.reclaim.kick()
        if engine.zones.states[zone] == ZoneState.EMPTYING:
            break
    assert engine.zones.states[zone] == ZoneState.EMPTYING
    engine.reclaim.spare = spare
    rig.pace()
    reads, rig.device.queue[:] = list(rig.device.queue), []
    return reads


@pytest.mark.parametrize("trim", [False, True], ids=["overwritten", "trimmed"])
def test_no_late_move_brings_an_old_block_back(trim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is upstream and in a checkpoint when the move, logged behind it, is applied; then the daemon dies."""
    monkeypatch.setattr(destage, "HOLES_KEPT_MAX", 2)  # so that one hole is forgotten once it is acknowledged
    rig, other = worth_moving()
    volume, now = rig.volume, bytes(BLOCK_SIZE) if trim else NEW
    reads = begin_moving(rig)
    answers: list[IoError] = []
    if trim:
        volume.trim(0, BLOCK_SIZE, False, answers.append)
    else:
        volume.write(0, NEW, False, answers.append)
    volume.kick()
    for _ in range(3):
        volume.write(1000 * BLOCK_SIZE, rig.rng.randbytes(100 * BLOCK_SIZE), False, answers.append)
        volume.kick()
    for _ in range(QUEUED):
        other.write(0, rig.rng.randbytes(100 * BLOCK_SIZE), False, lambda _: None)
        other.kick()
    for read in reads:
        read()
    quick = QuickStore(rig)
    assert quick.until(lambda: len(answers) == 4)
    rig.engine.destage.drain(volume, lambda _: None)
    assert quick.until(lambda: volume.acknowledged >= volume.version)
    settled: list[bool] = []
    rig.engine.checkpoints.want(settled.append)
    assert quick.until(lambda: bool(settled) and rig.engine.log.idle)
    assert rig.read(0, BLOCK_SIZE) == now
    rig.restart(power=False)
    assert rig.read(0, BLOCK_SIZE) == now
    rig.run_until(lambda: not rig.engine.loading.active)
    assert rig.read(0, BLOCK_SIZE) == now
    check_books(rig.engine)


@pytest.mark.parametrize("sync_steps", [1, 200])
def test_a_device_full_of_single_blocks_waits_and_goes_on_with_the_store(sync_steps: int) -> None:
    """Each block was a record of its own, and reclaim's reads come one by one: moves must not need what they free."""
    rig = Rig(1, size=24 << 20, blocks=60_000)
    rig.store.away = True
    steps = QuickStore(rig, writes_first=True, sync_steps=sync_steps)
    answers: list[IoError] = [IoError.OK]
    lba = 0
    while answers:
        answers = []
        rig.volume.write(lba * BLOCK_SIZE, rig.rng.randbytes(BLOCK_SIZE), False, answers.append)
        rig.volume.kick()
        steps.until(lambda answers=answers: bool(answers))
        lba += 1
    assert rig.engine.buffer_fill > 0.9
    written = rig.engine.log.bytes_written
    steps.until(lambda: False, 5000)
    assert rig.engine.log.bytes_written - written < 1 << 20, "reclaim moves the same blocks again and again"
    rig.store.away = False
    rig.run_until(lambda: bool(answers))
    assert answers == [IoError.OK]


def test_a_write_that_was_overtaken_while_its_zone_was_emptied_is_not_lost() -> None:
    """A dirty block is not moved when a newer write of it is logged already; a cut that closes in between needs it."""
    rig, _ = worth_moving()
    volume = rig.volume
    assert rig.write(0, OLD) == IoError.OK  # dirty, in the open zone
    for _ in range(4):
        assert rig.write(2000 * BLOCK_SIZE, rig.rng.randbytes(60 * BLOCK_SIZE)) == IoError.OK
    volume.destaging = False
    checkpointed(rig)
    checkpointed(rig)
    reads = begin_moving(rig)
    answers: list[IoError] = []
    volume.write(0, NEW, False, answers.append)
    volume.kick()
    for read in reads:
        read()
    volume.destaging = True
    rig.engine.destage.drain(volume, lambda _: None)  # closes the cut before the newer write is applied
    assert len(volume.cuts) == 1
    rig.run_until(lambda: bool(answers))
    settle(rig, 200)
    check_books(rig.engine)
    assert rig.drain()
    assert rig.store.plain()[0] == NEW
    assert rig.read(0, BLOCK_SIZE) == NEW


@pytest.mark.parametrize("moving", [False, True], ids=["", "some blocks moved"])
def test_zones_whose_content_is_upstream_are_filled_anew_without_waiting_for_a_sync(
    moving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(3, size=24 << 20, blocks=6000)
    for lba in range(0, 5000, 100):  # the log goes round
        assert rig.write(lba * BLOCK_SIZE, rig.rng.randbytes(100 * BLOCK_SIZE)) == IoError.OK
    assert rig.drain()
    assert rig.flush() == IoError.OK
    checkpointed(rig)
    checkpointed(rig)
    settle(rig, 400)
    zones, syncs, moved = rig.engine.zones, rig.device.syncs, rig.engine.reclaim.moving.moved_blocks
    before = sum(zones.incarnations)
    if moving:
        table = rig.engine.map
        states = np.where(np.arange(table.place_count) % 16 == 1, np.uint8(0xFF), np.uint8(0))  # worth keeping, or not
        find_kept = table.find_kept
        monkeypatch.setattr(table, "find_kept", lambda first, count, _, *rest: find_kept(first, count, states, *rest))
    answers: list[IoError] = []
    rig.device.sync = lambda done: None  # type: ignore[method-assign]
    for turn in range(20):
        rig.volume.write(turn * 100 * BLOCK_SIZE, rig.rng.randbytes(100 * BLOCK_SIZE), False, answers.append)
        rig.volume.kick()
        rig.run_until(lambda turn=turn: len(answers) == turn + 1)
    assert rig.device.syncs == syncs
    assert sum(zones.incarnations) - before > 20, "the log went on in zones that had held something"
    assert (rig.engine.reclaim.moving.moved_blocks > moved) == moving
    settle(rig, 100)
    assert rig.engine.reclaim._busy == 0, "none waits for a sync"


@pytest.mark.parametrize("fault", [False, True], ids=["", "planted fault"])
def test_flushed_blocks_are_not_written_over_before_what_replaced_them_is_durable(
    fault: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(3, size=24 << 20, blocks=6000, cut_age_ns_max=10**15, cut_blocks_max=10**9)
    rig.store.away = True
    assert rig.write(0, OLD * 600) == IoError.OK
    assert rig.flush() == IoError.OK
    checkpointed(rig)
    checkpointed(rig)
    zones = rig.engine.zones
    held = {place // zones.zone_blocks for place in rig.engine.map.find_run(rig.volume.key << LBA_BITS, 600).tolist()}
    held -= {rig.engine.log.applied.zone}
    settle(rig, 200)
    if fault:
        monkeypatch.setattr(reclaim.Reclaim, "_is_upstream", lambda self, zone: True)
    rig.device.sync = lambda done: None  # type: ignore[method-assign]
    answers: list[IoError] = []
    for turn in range(400):
        rig.volume.write(turn % 6 * 100 * BLOCK_SIZE, NEW * 100, False, answers.append)
        rig.volume.kick()
        settle(rig, 20)
    written = {
        (offset - rig.engine.zones_offset) // (zones.zone_blocks * BLOCK_SIZE) for offset, _ in rig.device.unsynced
    }
    assert len(answers) > 20, "guests wait too early"
    assert bool(held & written) == fault


def test_a_partial_write_waits_for_no_changes_of_other_blocks() -> None:
    rig = Rig(4, size=64 << 20, blocks=200_000, cut_age_ns_max=10**15, cut_blocks_max=10**9)
    got: list[IoError] = []
    others: list[IoError] = []
    rig.volume.write(100, b"part", False, got.append)
    rig.volume.kick()
    begun = 0
    for step in range(5000):  # the store answers while others write all the time
        if got:
            break
        while begun - len(others) < 4:
            rig.volume.write((1000 + begun % 500) * BLOCK_SIZE, NEW, False, others.append)
            begun += 1
        rig.volume.kick()
        rig.device.step()
        if step % 30 == 0:
            rig.store.step()
    assert got == [IoError.OK]
    assert rig.read(98, 8) == b"\0\0part\0\0"


def test_a_partial_write_starts_over_when_its_block_changes() -> None:
    rig = Rig(4, size=64 << 20, blocks=2000)
    got: list[IoError] = []
    rig.store.away = True
    rig.volume.write(100, b"part", False, got.append)
    assert rig.write(0, NEW) == IoError.OK
    rig.store.away = False
    rig.run_until(lambda: bool(got))
    assert rig.read(98, 8) == b"NNpartNN"


def test_a_zone_without_anything_to_keep_is_found_behind_old_ones_that_have_nowhere_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(5, size=24 << 20, blocks=6000, cut_age_ns_max=10**15, cut_blocks_max=10**9)
    rig.store.away = True
    for turn in range(8):
        assert rig.write(turn * 100 * BLOCK_SIZE, OLD * 100) == IoError.OK  # the oldest zones
    for lba in range(0, 800, 25):
        assert rig.write(lba * BLOCK_SIZE, NEW * 12) == IoError.OK  # half of what they hold is dirty
    for _ in range(10):
        assert rig.write(2000 * BLOCK_SIZE, NEW * 100) == IoError.OK  # behind them: written over
    checkpointed(rig)
    checkpointed(rig)
    settle(rig, 200)
    monkeypatch.setattr(reclaim.Reclaim, "_room", lambda self: 0)
    victim = rig.engine.reclaim._choose()
    assert victim is not None
    assert victim.keep.size == 0


def test_what_is_clean_in_memory_only_is_not_dropped_before_the_log_says_so() -> None:
    """After a power cut without that record it would be dirty, and its bytes gone."""
    rig = Rig(3, size=24 << 20, blocks=6000, cut_age_ns_max=10**15, cut_blocks_max=10**9)
    rig.device.now_share = 1.0
    volume, engine = rig.volume, rig.engine
    assert rig.write(0, OLD * 60) == IoError.OK
    for turn in range(30):
        assert rig.write(5000 * BLOCK_SIZE, bytes([turn + 1]) * BLOCK_SIZE * 20) == IoError.OK
    assert rig.flush() == IoError.OK
    checkpointed(rig)
    checkpointed(rig)
    settle(rig, 300)
    zone = engine.map.find(volume.key << LBA_BITS) // engine.zones.zone_blocks
    engine.destage.drain(volume, lambda _: None)
    while not (volume.cuts and volume.cuts[0].is_staged):
        if not rig.device.step():
            rig.store.step()
    while rig.device.step():
        pass
    engine.reclaim.spare = engine.zones.zone_count
    while rig.store.queue:
        rig.store.step()
    assert volume.acknowledged > volume.noted, "the record waits for the device"
    engine.policy.states[:] = 0
    for _ in range(20):
        engine.reclaim.kick()
    assert engine.zones.states[zone] not in (ZoneState.FREE, ZoneState.EMPTY)
    assert rig.drain()
    assert rig.read(0, 60 * BLOCK_SIZE) == OLD * 60


def test_no_write_overtakes_a_trim_behind_a_record_that_waited_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(5)
    volume, log = rig.volume, rig.engine.log
    with monkeypatch.context() as patch:
        patch.setattr(Log, "_has_place", lambda self: False)
        log.add_event(record.ACKNOWLEDGED, volume.key, 0, volume.acknowledged, 0)
    answers: list[str] = []
    volume.trim(0, BLOCK_SIZE, False, lambda _: answers.append("trim"))
    volume.write(BLOCK_SIZE, NEW, False, lambda _: answers.append("write"))
    volume.kick()
    rig.run_until(lambda: len(answers) == 2)
    assert answers == ["trim", "write"]
    assert volume.applied == volume.version
    assert rig.drain()


def test_a_block_is_moved_in_front_of_a_trim_that_waits_for_a_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, _ = worth_moving()
    reads = begin_moving(rig)
    answers: list[IoError] = []
    with monkeypatch.context() as patch:
        patch.setattr(Log, "_has_place", lambda self: False)
        rig.volume.trim(0, BLOCK_SIZE, False, answers.append)
        assert not rig.engine.log.unapplied()
        for read in reads:
            read()
    rig.run_until(lambda: bool(answers))
    assert rig.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    rig.restart(power=False)
    assert rig.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    check_books(rig.engine)


def test_an_entry_that_waits_for_a_zone_goes_as_soon_as_one_is_free() -> None:
    """Not at the next tick: nobody else may be waiting."""
    rig, answers = Rig(3), []
    engine = rig.engine
    rig.run_until(lambda: engine.log.idle and not rig.device.writes)
    engine.reclaim.moving.promised_zones = len(engine.zones.free) + 1
    engine.set_limit(None, answers.append, average=MIB, peak=MIB)
    assert not rig.device.writes
    engine.reclaim.moving.promised_zones = 0
    engine.reclaim._synced([])
    assert rig.device.writes
    rig.run_until(lambda: answers == [True])

"""Blocks on their way to the log's end: what changes them between reading, appending and applying, and bad ones."""

from collections.abc import Callable, Sequence

import pytest
from engine_rig import Rig, check_books
from test_engine_review import settle
from test_engine_unreadable import WornDevice

from forebay_cache.engine.front import IoError
from forebay_cache.engine.log import Moves
from forebay_cache.engine.zones import ZoneState
from forebay_cache.format import record
from forebay_core.units import BLOCK_SIZE, LBA_BITS

NEW = b"N" * BLOCK_SIZE
KEPT = range(0, 60, 3)  # of these one zone holds the newest version; the others were written over
ELSEWHERE = 1000


class Scattered:
    """A zone in which each third block is to be kept: dirty, or clean and worth it."""

    def __init__(self, *, clean: bool = False) -> None:
        limits = {"cut_age_ns_max": 10**15, "cut_blocks_max": 10**9, "record_blocks": record.RECORD_ENTRIES_MAX}
        self.rig = rig = Rig(7, size=64 << 20, blocks=8000, zone_blocks=256, **limits)
        self.expected = {lba: rig.rng.randbytes(BLOCK_SIZE) for lba in range(60)}
        rig.volume.destaging = clean
        self._fill_rest_of_zone()
        assert rig.write(0, b"".join(self.expected.values())) == IoError.OK
        self.zone = self.place(0) // rig.engine.zones.zone_blocks
        self._fill_rest_of_zone()
        for lba in range(60):
            if lba not in KEPT:
                self.expected[lba] = rig.rng.randbytes(BLOCK_SIZE)
                assert rig.write(lba * BLOCK_SIZE, self.expected[lba]) == IoError.OK
        for _ in range(3):
            self._fill_rest_of_zone()
        if clean:
            assert rig.drain()
            for _ in range(3):
                for lba in KEPT:
                    assert rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == self.expected[lba]
        for _ in range(2):
            settled: list[bool] = []
            rig.engine.checkpoints.want(settled.append)
            rig.run_until(lambda settled=settled: bool(settled))
        settle(rig, 300)
        rig.run_until(lambda: rig.engine.log.idle and not rig.device.queue and not rig.device.writes)
        assert {self.place(lba) // rig.engine.zones.zone_blocks for lba in KEPT} == {self.zone}

    def _fill_rest_of_zone(self) -> None:
        log, zone = self.rig.engine.log, self.rig.engine.log.applied.zone
        while log.applied.zone == zone:
            assert self.rig.write(ELSEWHERE * BLOCK_SIZE, self.rig.rng.randbytes(10 * BLOCK_SIZE)) == IoError.OK

    def place(self, lba: int) -> int:
        return self.rig.engine.map.find(self.rig.volume.key << LBA_BITS | lba)

    def begin(self, *, in_memory: float = 0.0) -> Sequence[Callable[[], None]]:
        """Let reclaim choose the zone; return its reads, which are under way."""
        rig, engine = self.rig, self.rig.engine
        rig.device.now_share = in_memory
        spare, engine.reclaim.spare = engine.reclaim.spare, engine.zones.zone_count
        for _ in range(50):
            engine.reclaim.kick()
        engine.reclaim.spare = spare
        assert engine.zones.states[self.zone] == ZoneState.EMPTYING
        for _ in range(50):
            rig.pace()
        reads, rig.device.queue[:] = list(rig.device.queue), []
        return reads

    def moves(self) -> list[tuple[int, int]]:
        """Kind and block of what is moved from the zone in records that are not applied."""
        found = []
        for item in (item for batch in self.rig.engine.log.unapplied() for item in batch.data):
            if isinstance(item, Moves):
                rows = record.entries_in(item.header, item.entry + item.sources.size)[item.entry :]
                inside = item.sources // self.rig.engine.zones.zone_blocks == self.zone
                found += [(int(row["kind"]), int(row["lba"])) for row in rows[inside]]
        return found

    def check(self) -> None:
        """All is there, now and after power cuts, and the zone is free in the end."""
        rig = self.rig
        rig.run_until(lambda: rig.engine.reclaim.moving.blocks == 0)
        settle(rig, 300)
        check_books(rig.engine)
        assert self.left() == 0
        self._compare()
        assert rig.flush() == IoError.OK
        rig.restart(power=True)
        rig.run_until(lambda: not rig.engine.loading.active)
        self._compare()
        rig.volume.destaging = True
        rig.store.away = False
        assert rig.drain()
        assert {lba: rig.store.plain().get(lba, bytes(BLOCK_SIZE)) for lba in self.expected} == self.expected

    def left(self) -> int:
        """Blocks that the zone still holds."""
        first, count = self.rig.engine.zones.place_at(self.zone, 0), self.rig.engine.zones.zone_blocks
        return int((self.rig.engine.map.key_array[first : first + count] != 0).sum())

    def _compare(self) -> None:
        for lba, block in self.expected.items():
            assert self.rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == block, lba


def overwrite(one: Scattered) -> None:
    """Two blocks, one of them in the same request as its neighbours."""
    for lba, count in ((3, 1), (9, 4)):
        one.rig.volume.write(lba * BLOCK_SIZE, NEW * count, False, lambda _: None)
        one.expected |= dict.fromkeys(range(lba, lba + count), NEW)
    one.rig.volume.kick()


def trim(one: Scattered) -> None:
    one.rig.volume.trim(3 * BLOCK_SIZE, 7 * BLOCK_SIZE, False, lambda _: None)
    one.rig.volume.kick()
    one.expected |= dict.fromkeys(range(3, 10), bytes(BLOCK_SIZE))


def acknowledge(one: Scattered) -> None:
    """All of it is destaged, as far as the device needs not be written for that."""
    rig = one.rig
    rig.volume.destaging = True
    rig.engine.destage.drain(rig.volume, lambda _: None)
    for _ in range(400):
        if not (rig.store.step() or (rig.device.queue and rig.device.queue.pop(0)())):
            rig.tick()


def pin(one: Scattered) -> None:
    """A cut closes, and what it needs is overwritten."""
    one.rig.store.away = True
    one.rig.volume.destaging = True
    one.rig.engine.destage.drain(one.rig.volume, lambda _: None)
    assert one.rig.volume.cuts
    overwrite(one)


CHANGES = [(change, clean) for change in (overwrite, trim, acknowledge, pin) for clean in (False, True)]
CHANGES.remove((pin, True))  # nothing of a clean block is needed by a cut


@pytest.mark.parametrize(("change", "clean"), CHANGES)
def test_a_block_that_changes_before_it_is_appended_is_what_it_was_changed_to(
    change: Callable[[Scattered], None], clean: bool
) -> None:
    one = Scattered(clean=clean)
    reads = one.begin()
    change(one)
    for read in reads:
        read()
    if change in (overwrite, trim, pin):
        assert (record.MOVE, 3) not in one.moves(), "behind a newer change"
        assert (record.MOVE, 0) in one.moves()
    one.check()


@pytest.mark.parametrize(("change", "clean"), CHANGES)
def test_a_block_that_changes_before_it_is_applied_is_what_it_was_changed_to(
    change: Callable[[Scattered], None], clean: bool
) -> None:
    one = Scattered(clean=clean)
    for read in one.begin():
        read()
    assert {lba for _, lba in one.moves()} == set(KEPT)
    change(one)
    one.check()


def test_pinned_versions_are_moved_beside_newer_ones() -> None:
    one = Scattered()
    pin(one)
    one.rig.run_until(lambda: one.rig.engine.log.idle and not one.rig.device.writes)
    assert one.rig.engine.map.held_count >= 3
    for read in one.begin():
        read()
    assert set(one.moves()) == {(record.PIN if lba in (3, 9, 12) else record.MOVE, lba) for lba in KEPT}
    one.rig.run_until(lambda: one.rig.engine.reclaim.moving.blocks == 0)
    assert one.rig.engine.map.held_count >= 3
    one.check()


@pytest.mark.parametrize("in_memory", [0.0, 0.5, 1.0])
def test_scattered_blocks_are_moved_together(in_memory: float) -> None:
    one = Scattered()
    reads = one.begin(in_memory=in_memory)
    if in_memory == 0.0:
        assert len(reads) <= 6, "a read for each run"
    for read in reads:
        read()
    assert {lba for _, lba in one.moves()} == set(KEPT)
    one.check()


@pytest.mark.parametrize("in_memory", [0.0, 1.0])
@pytest.mark.parametrize("clean", [False, True], ids=["dirty", "clean"])
def test_a_bad_block_among_good_ones_costs_only_itself(clean: bool, in_memory: float) -> None:
    one = Scattered(clean=clean)
    rig = one.rig
    at = rig.engine.zones.offset_of(one.place(30)) + 17
    rig.device.bytes[at] ^= 1
    rig.device.durable[at] ^= 1
    for read in one.begin(in_memory=in_memory):
        read()
    assert sum("corrupt block 30 " in report for report in rig.reports) == 1
    assert {lba for _, lba in one.moves()} == set(KEPT) - ({30} if clean else set())
    if clean:
        one.check()  # it is fetched again
        return
    rig.run_until(lambda: rig.engine.reclaim.moving.blocks == 0)
    got: list[IoError] = []
    rig.volume.read(30 * BLOCK_SIZE, BLOCK_SIZE, lambda error, _chunks: got.append(error))
    rig.run_until(lambda: bool(got))
    assert got == [IoError.IO], "a bad block was given a new checksum"
    for lba in KEPT:
        assert lba == 30 or rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == one.expected[lba]


def wear(one: Scattered, place: int) -> None:
    one.rig.device.__class__ = WornDevice
    assert isinstance(one.rig.device, WornDevice)
    one.rig.device.bad = frozenset([one.rig.engine.zones.offset_of(place)])


@pytest.mark.parametrize("in_memory", [0.0, 1.0])
def test_a_block_that_cannot_be_read_costs_only_itself(in_memory: float) -> None:
    one = Scattered()
    rig = one.rig
    wear(one, one.place(30))
    for read in one.begin(in_memory=in_memory):
        read()
    while rig.device.queue:  # what was read again, run by run
        rig.device.queue.pop(0)()
    assert {lba for _, lba in one.moves()} == set(KEPT) - {30}
    assert sum(f"zone {one.zone} can't be read" in report for report in rig.reports) == 1
    rig.run_until(lambda: rig.engine.reclaim.moving.blocks == 0)
    settle(rig, 300)
    check_books(rig.engine)
    assert one.left() == 1
    for lba in KEPT:
        assert lba == 30 or rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == one.expected[lba]


def test_a_block_that_cannot_be_read_and_that_nobody_wants_costs_nothing() -> None:
    one = Scattered()
    wear(one, one.place(30) + 1)
    for read in one.begin():
        read()
    while one.rig.device.queue:
        one.rig.device.queue.pop(0)()
    assert {lba for _, lba in one.moves()} == set(KEPT)
    assert not one.rig.reports
    one.check()

"""Long trims: zeros at once, gone step by step, and whatever happens between the steps changes nothing of that."""

import pytest
from engine_rig import SWEEP_STEP_BLOCKS, Rig, check_books

from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.front import IoError
from forebay_cache.engine.limits import SWEEPS_MAX
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.cut_end import CutEnd
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, LBA_BITS, StoreId, Version

BLOCKS = 200


def filled(seed: int = 1, *, away: bool = True) -> Rig:
    """Return a rig whose volume has BLOCKS blocks written, and no store."""
    rig = Rig(seed, blocks=1000)
    rig.device.now_share = 1.0
    assert rig.write(0, b"a" * BLOCKS * BLOCK_SIZE) == IoError.OK
    if not away:
        assert rig.drain()
    rig.store.away = away
    return rig


def run_device(rig: Rig) -> None:
    """Let the device do all that it has to do, and nothing else have a turn: no step of a sweep."""
    rig.volume.kick()
    while rig.device.step():
        pass


def trim(rig: Rig, lba: int = 0, count: int = BLOCKS) -> None:
    """Trim, and hold the sweep off."""
    answers: list[IoError] = []
    rig.volume.trim(lba * BLOCK_SIZE, count * BLOCK_SIZE, False, answers.append)
    run_device(rig)
    assert answers == [IoError.OK]
    assert rig.engine.sweeps.count


def read_now(rig: Rig, lba: int, count: int) -> bytes:
    """Read what needs no turn."""
    found: list[bytes] = []

    def got(error: IoError, chunks) -> None:
        assert error == IoError.OK
        found.append(b"".join(bytes(c.length) if c.buffer is None else bytes(c.buffer) for c in chunks))

    rig.volume.read(lba * BLOCK_SIZE, count * BLOCK_SIZE, got)
    run_device(rig)
    return found[0]


def sweep(rig: Rig) -> None:
    rig.run_until(lambda: rig.engine.sweeps.count == 0)


@pytest.mark.parametrize("away", [True, False])
def test_a_long_trim_reads_as_zeros_before_its_first_step(away: bool) -> None:
    rig = filled(away=away)
    trim(rig)
    assert read_now(rig, 0, BLOCKS) == bytes(BLOCKS * BLOCK_SIZE)
    assert rig.engine.map.linked_count >= BLOCKS
    check_books(rig.engine)
    sweep(rig)
    assert rig.engine.map.linked_count == 0
    rig.store.away = False
    assert rig.content() == bytes(rig.size)
    check_books(rig.engine)


def test_no_turn_takes_out_more_than_a_step() -> None:
    rig = filled()
    trim(rig)
    while rig.engine.sweeps.count:
        before = rig.engine.map.linked_count
        rig.pace()
        assert rig.engine.map.linked_count >= before - SWEEP_STEP_BLOCKS


def test_what_is_written_while_blocks_are_swept_stays() -> None:
    rig = filled()
    trim(rig)
    rig.pace()
    assert rig.engine.sweeps.count
    for lba in (0, 5, 100, BLOCKS - 1):  # swept already and not
        answers: list[IoError] = []
        rig.volume.write(lba * BLOCK_SIZE, b"b" * BLOCK_SIZE, False, answers.append)
        run_device(rig)
        assert answers == [IoError.OK]
        assert read_now(rig, lba, 1) == b"b" * BLOCK_SIZE
    check_books(rig.engine)
    sweep(rig)
    rig.store.away = False
    assert rig.drain()
    assert sorted(rig.store.plain()) == [0, 5, 100, BLOCKS - 1]


def take(rig: Rig, name: str) -> None:
    ends: list[CutEnd | None] = []
    rig.engine.cut_ends.snapshot(rig.volume, name[0].encode() * 16, name, 0, ends.append)
    run_device(rig)
    assert ends and ends[0] is not None


def checkpoint(rig: Rig) -> None:
    made: list[bool] = []
    rig.engine.checkpoints.want(made.append)
    run_device(rig)
    assert made == [True]


def test_a_checkpoint_does_not_show_what_is_hidden() -> None:
    rig = filled()
    trim(rig)
    checkpoint(rig)
    assert rig.engine.sweeps.count
    rig.restart(power=False)
    assert read_now(rig, 0, BLOCKS) == bytes(BLOCKS * BLOCK_SIZE)
    take(rig, "behind")
    rig.store.away = False
    assert rig.drain()
    assert rig.store.snapshots["behind"][2] == {}


def test_a_checkpoint_shows_what_is_hidden_and_a_closed_cut_needs() -> None:
    rig = filled()
    rig.engine.destage.suspend(rig.volume)
    take(rig, "before")
    trim(rig)
    checkpoint(rig)
    assert rig.engine.sweeps.count
    rig.restart(power=False)
    assert read_now(rig, 0, BLOCKS) == bytes(BLOCKS * BLOCK_SIZE)
    rig.store.away = False
    assert rig.drain()
    assert sorted(rig.store.snapshots["before"][2]) == list(range(BLOCKS))
    assert rig.store.plain() == {}


def test_the_oldest_trim_decides_what_a_closed_cut_needs() -> None:
    rig = filled()
    rig.engine.destage.suspend(rig.volume)
    trim(rig)
    take(rig, "between")
    trim(rig)  # had it been the only one, the snapshot would need the blocks
    assert rig.engine.sweeps.count == 2
    answers: list[IoError] = []
    rig.volume.write(0, b"b" * BLOCK_SIZE * BLOCKS, False, answers.append)
    run_device(rig)
    rig.store.away = False
    rig.attach()
    assert rig.drain()
    assert rig.store.snapshots["between"][2] == {}
    assert rig.store.plain() == dict.fromkeys(range(BLOCKS), b"b" * BLOCK_SIZE)


def test_trims_wait_when_many_trims_are_swept() -> None:
    rig = filled()
    answers: list[IoError] = []
    for _ in range(3 * SWEEPS_MAX):
        rig.volume.trim(0, BLOCKS * BLOCK_SIZE, False, answers.append)
    run_device(rig)
    assert len(answers) == rig.engine.sweeps.count == SWEEPS_MAX
    assert rig.engine.has_room(rig.volume)  # others' writes need not wait
    rig.run_until(lambda: len(answers) == 3 * SWEEPS_MAX)
    assert rig.engine.sweeps.count <= SWEEPS_MAX


def test_a_volume_is_served_again_only_when_nothing_stale_is_hidden() -> None:
    rig = filled(away=False)
    rig.engine.attaching.detach(rig.volume, leave_dirty=False, settled=lambda _: None)
    run_device(rig)
    version = Version(rig.volume.version + 5)
    view = StoreView(rig.volume.id, "v", rig.size, rig.volume.epoch, version, StoreId(b"s" * 16))
    got: list[CacheVolume | None] = []
    stale = [Extent(at, 20) for at in range(0, BLOCKS, 40)] * 8
    rig.engine.attaching.attach(view, stale, read_only=False, attached=got.append)
    run_device(rig)
    assert not got and 0 < rig.engine.sweeps.count <= SWEEPS_MAX
    rig.run_until(lambda: bool(got))
    assert got == [rig.volume] and rig.engine.sweeps.count == 0
    find = rig.engine.map.find
    left = [lba for lba in range(BLOCKS) if find(rig.volume.key << LBA_BITS | lba) >= 0]
    assert left == [lba for lba in range(BLOCKS) if lba % 40 >= 20]


def test_who_waits_for_a_sweep_is_told_when_the_device_fails() -> None:
    rig = filled()
    trim(rig)
    told: list[bool] = []
    rig.engine.sweeps.when_over(told.append)
    rig.engine.fail("the disk is gone")
    assert told == [False]
    rig.pace()  # nothing is swept any more


def test_a_forgotten_volume_leaves_the_map_step_by_step() -> None:
    rig = filled(away=False)
    rig.engine.attaching.detach(rig.volume, leave_dirty=False, settled=lambda _: None)
    run_device(rig)
    rig.engine.attaching.forget(rig.volume)
    assert rig.engine.map.linked_count == BLOCKS
    checkpoint(rig)
    sweep(rig)
    assert rig.engine.map.linked_count == 0

"""What a second review broke, each as the scenario that broke it."""

from collections.abc import Sequence

import pytest
from engine_rig import STORE_ID, VOLUME_ID, Rig, check_books

from forebay_cache.engine import attaching
from forebay_cache.engine import cache as cache_module
from forebay_cache.engine import destage as destage_module
from forebay_cache.engine import volume as volume_module
from forebay_cache.engine.attaching import Standing, StoreView
from forebay_cache.engine.front import IoError
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format import checkpoint
from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Epoch, Version, VolumeId, make_version, sequence_of

OLD, NEW = b"O" * BLOCK_SIZE, b"N" * BLOCK_SIZE


def settle(rig: Rig, steps: int = 400) -> None:
    for _ in range(steps):
        if not rig.step():
            rig.tick()


def view_of(name: str, *, epoch: int = 1, version: int = 0, size: int = 1 << 20) -> StoreView:
    return StoreView(VolumeId(name.encode() * 16), name, size, Epoch(epoch), Version(version), STORE_ID)


def begin_attach(rig: Rig, view: StoreView, stale: Sequence[Extent] = ()) -> list[CacheVolume | None]:
    got: list[CacheVolume | None] = []
    rig.engine.attaching.attach(view, stale, read_only=False, attached=got.append)
    return got


def attach(rig: Rig, view: StoreView) -> CacheVolume:
    got = begin_attach(rig, view)
    rig.run_until(lambda: bool(got))
    assert got[0] is not None
    return got[0]


def detach(rig: Rig, volume: CacheVolume) -> None:
    settled: list[bool] = []
    rig.engine.attaching.detach(volume, leave_dirty=False, settled=settled.append)
    rig.run_until(lambda: bool(settled))
    assert settled == [True]


def make_checkpoint(rig: Rig) -> None:
    settled: list[bool] = []
    rig.engine.checkpoints.want(settled.append)
    rig.run_until(lambda: bool(settled))
    assert settled == [True]


def change_elsewhere(rig: Rig) -> StoreView:
    """Let another device change the first blocks; return what the store says to us then."""
    last = make_version(Epoch(3), sequence_of(rig.store.version) + 1)
    rig.store.blocks.update(dict.fromkeys(range(4), (NEW, last)))
    rig.store.version = last
    rig.store.epoch = Epoch(4)
    return StoreView(VOLUME_ID, "v", rig.size, Epoch(4), last, STORE_ID)


def kill(rig: Rig) -> None:
    rig.store.queue.clear()
    rig.device.kill()
    rig.start()


def test_a_checkpoint_while_stale_blocks_are_being_dropped_does_not_make_them_valid() -> None:
    rig = Rig(7, size=64 << 20, blocks=4000)
    busy = attach(rig, view_of("w", size=1 << 22))
    assert rig.write(0, OLD * 4) == IoError.OK
    assert rig.drain()
    detach(rig, rig.volume)
    make_checkpoint(rig)
    view = change_elsewhere(rig)
    answers: list[IoError] = []
    for index in range(160):  # these stand in the log before the drops
        busy.write(0, rig.rng.randbytes((8 if index < 100 else 126) * BLOCK_SIZE), False, answers.append)
        busy.kick()
    attached = begin_attach(rig, view, [Extent(0, 4)])
    noted: list[bool] = []
    rig.engine.checkpoints.want(noted.append)
    while not noted:
        (rig.device.queue or rig.device.writes).pop(0)()
    assert not attached
    kill(rig)
    assert rig.engine.attaching.compare(view) is Standing.STALE
    attached = begin_attach(rig, view, [Extent(0, 4)])
    rig.run_until(lambda: bool(attached))
    assert rig.engine.attaching.compare(view) is Standing.VALID
    assert attached[0] is not None
    rig.volume = attached[0]
    assert rig.read(0, BLOCK_SIZE) == NEW
    check_books(rig.engine)


def test_a_reconnect_while_stale_blocks_are_being_dropped_stops_nothing() -> None:
    rig = Rig(8)
    assert rig.write(0, OLD * 4) == IoError.OK
    assert rig.drain()
    settled: list[bool] = []
    rig.engine.attaching.detach(rig.volume, leave_dirty=True, settled=settled.append)
    rig.run_until(lambda: bool(settled))
    view = change_elsewhere(rig)
    attached = begin_attach(rig, view, [Extent(0, 4)])
    rig.engine.attaching.reopened(rig.volume, view)
    rig.run_until(lambda: bool(attached))
    assert not rig.volume.error
    assert rig.read(0, BLOCK_SIZE) == NEW
    assert rig.write(0, OLD) == IoError.OK
    assert rig.drain()
    assert rig.store.plain()[0] == OLD


def few_holes(monkeypatch: pytest.MonkeyPatch, *, kept: int, area: int = 65536, reserve: int = 0) -> None:
    """Make the bounds of holes so small that a test reaches them: of a volume, and of a checkpoint area."""
    for module in (cache_module, destage_module, volume_module):
        if hasattr(module, "HOLES_KEPT_MAX"):
            monkeypatch.setattr(module, "HOLES_KEPT_MAX", kept)
    monkeypatch.setattr(cache_module, "HOLES_PER_TICK_MAX", reserve)
    monkeypatch.setattr(checkpoint, "HOLES_MIN", area)
    monkeypatch.setattr(checkpoint, "VOLUME_COUNT_MAX", 8)  # else the room for their rows takes many holes


def trim_every_other(rig: Rig, first: int, count: int) -> list[IoError]:
    """Ask for so many trims of single blocks that do not touch."""
    answers: list[IoError] = []
    for lba in range(first, first + 2 * count, 2):
        rig.volume.trim(lba * BLOCK_SIZE, BLOCK_SIZE, False, answers.append)
    rig.volume.kick()
    return answers


def trim_and_drain(rig: Rig, count: int) -> None:
    """Trim in steps of which each is upstream, and forgotten by the cache, before the next one."""
    for first in range(0, 2 * count, 800):
        answers = trim_every_other(rig, first, 400)
        rig.run_until(lambda answers=answers: len(answers) == 400)
        assert rig.drain()
        rig.tick()


def test_holes_that_replay_finds_again_keep_no_writer_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    few_holes(monkeypatch, kept=1000)
    rig = Rig(5, size=64 << 20, blocks=4000)
    trim_and_drain(rig, 1200)
    rig.restart(power=False)
    assert not rig.volume.has_changes
    assert rig.write(BLOCK_SIZE, NEW) == IoError.OK


def test_holes_of_a_cut_whose_answer_was_lost_keep_no_writer_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    few_holes(monkeypatch, kept=1000)
    rig = Rig(5, size=64 << 20, blocks=4000, cut_age_ns_max=10**15)
    answers = trim_every_other(rig, 0, 1000)
    rig.run_until(lambda: len(answers) == 1000)
    lose_answer(rig)
    rig.restart(power=False)
    settle(rig, 100)
    assert not rig.volume.has_changes
    assert rig.write(BLOCK_SIZE, NEW) == IoError.OK


def lose_answer(rig: Rig) -> None:
    """Let the store take all changes of the volume, and keep the answer to the last commit from us."""
    commit, last = rig.store.commit, sequence_of(rig.volume.applied)

    def send(cut, *words) -> None:  # type: ignore[no-untyped-def]
        commit(cut, *words[:-1], words[-1] if cut.last < last else lambda _: None)

    rig.store.commit = send  # type: ignore[method-assign]
    rig.engine.destage.drain(rig.volume, lambda _: None)
    rig.run_until(lambda: sequence_of(rig.store.version) >= last)
    rig.store.commit = commit  # type: ignore[method-assign]


def test_a_full_buffer_that_reopening_finds_upstream_lets_writers_go_on() -> None:
    rig = Rig(3, size=12 << 20, blocks=6000, cut_blocks_max=10**9, cut_age_ns_max=10**15)
    rig.store.away = True
    answers: list[IoError] = []
    asked = 0
    while len(answers) == asked:
        rig.volume.write(32 * asked * BLOCK_SIZE, rig.rng.randbytes(32 * BLOCK_SIZE), False, answers.append)
        rig.volume.kick()
        asked += 1
        settle(rig, 1000)
    assert rig.engine.buffer_fill > 0.9
    rig.store.away = False
    lose_answer(rig)
    rig.restart(power=False)
    assert not (rig.volume.has_changes or rig.volume.dirty)
    assert rig.write(0, NEW) == IoError.OK
    check_books(rig.engine)


def test_a_drain_that_reopening_ends_is_told_when_the_device_knows() -> None:
    rig = Rig(6, cut_age_ns_max=10**15)
    assert rig.write(0, OLD * 4) == IoError.OK
    lose_answer(rig)
    kill(rig)
    volume = rig.engine.attached()[0]
    drained: list[bool] = []
    rig.engine.destage.drain(volume, drained.append)
    rig.attach()
    rig.engine.destage.drain(volume, drained.append)
    assert not drained
    rig.run_until(lambda: len(drained) == 2)
    assert drained == [True, True]
    kill(rig)
    assert not rig.engine.attached()[0].has_changes


def test_a_drain_is_not_told_that_all_is_upstream_when_the_device_fails_before_it_knows() -> None:
    rig = Rig(7, cut_age_ns_max=10**15)
    assert rig.write(0, OLD * 4) == IoError.OK
    drained: list[bool] = []
    rig.engine.destage.drain(rig.volume, drained.append)
    rig.run_until(lambda: not rig.volume.has_changes)
    rig.device.failing = True
    settle(rig)
    assert drained == [False]


def test_a_device_starts_with_more_replayed_holes_than_a_checkpoint_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    few_holes(monkeypatch, kept=100_000, area=600)
    rig = Rig(5, blocks=20_000)
    trim_and_drain(rig, 8000)
    kill(rig)
    settle(rig)
    make_checkpoint(rig)


def test_one_turn_of_trims_does_not_outgrow_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    few_holes(monkeypatch, kept=100_000, area=600, reserve=100)
    rig = Rig(5, blocks=4000)
    rig.store.away = True
    answers = trim_every_other(rig, 0, 1500)
    settle(rig, 2000)
    make_checkpoint(rig)
    assert len(answers) == 500
    rig.store.away = False
    rig.run_until(lambda: len(answers) == 1500)
    assert rig.drain()


def test_a_checkpoint_waits_until_its_holes_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    few_holes(monkeypatch, kept=100_000, area=600)
    rig = Rig(5, blocks=4000)
    rig.store.away = True
    answers = trim_every_other(rig, 0, 500)
    rig.run_until(lambda: len(answers) == 500)
    for lba in range(1001, 1501, 2):  # as cutting holes in two may add some beyond the bound
        rig.volume.holes.add(Extent(lba, 1), rig.volume.applied)
    noted: list[bool] = []
    rig.engine.checkpoints.want(noted.append)
    settle(rig, 1000)
    assert not noted
    rig.store.away = False
    rig.run_until(lambda: bool(noted))
    assert noted == [True]


def test_a_volume_that_was_forgotten_and_came_again_has_no_twin_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "VOLUMES_MAX", 4)
    rig = Rig(1)
    kept, other, forgotten = attach(rig, view_of("k")), attach(rig, view_of("o")), attach(rig, view_of("b"))
    answers: list[IoError] = []
    forgotten.write(0, OLD, False, answers.append)
    rig.run_until(lambda: bool(answers))
    forgotten.adopt(forgotten.applied)
    version = forgotten.applied
    detach(rig, forgotten)
    make_checkpoint(rig)
    passing = attach(rig, view_of("p"))
    assert rig.engine.by_id(forgotten.id) is None
    detach(rig, passing)
    again = attach(rig, view_of("b", epoch=2, version=version))
    for volume in (kept, other):
        detach(rig, volume)
    again.write(BLOCK_SIZE, NEW, False, answers.append)
    rig.run_until(lambda: len(answers) == 2)
    kill(rig)
    settle(rig)
    assert [volume.key for volume in rig.engine.volumes.values() if volume.id == again.id] == [again.key]
    assert rig.engine.map.find(forgotten.key << LBA_BITS) < 0
    assert rig.engine.map.find(again.key << LBA_BITS | 1) >= 0


def test_a_volume_that_is_being_attached_is_not_forgotten_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "VOLUMES_MAX", 2)
    rig = Rig(1)
    detach(rig, attach(rig, view_of("b")))
    arriving = begin_attach(rig, view_of("b", epoch=3, version=make_version(Epoch(3), 5)), [Extent(0, 4)])
    with pytest.raises(ForebayError, match="detach one first"):
        begin_attach(rig, view_of("c"))
    rig.run_until(lambda: bool(arriving))
    assert arriving == [rig.engine.by_id(VolumeId(b"b" * 16))]


def test_a_volume_that_is_being_attached_is_not_attached_twice() -> None:
    rig = Rig(1)
    detach(rig, attach(rig, view_of("b")))
    view = view_of("b", epoch=3, version=make_version(Epoch(3), 5))
    arriving = begin_attach(rig, view, [Extent(0, 4)])
    with pytest.raises(ForebayError, match="is being attached"):
        begin_attach(rig, view, [Extent(0, 4)])
    rig.run_until(lambda: bool(arriving))
    settle(rig)
    assert len(arriving) == 1


@pytest.mark.parametrize("failed_before", [False, True])
def test_who_waits_for_a_checkpoint_is_told_when_the_device_fails(failed_before: bool) -> None:
    rig = Rig(1)
    settle(rig)
    rig.device.failing = True
    if failed_before:
        assert rig.write(0, OLD) == IoError.IO
    settled: list[bool] = []
    rig.engine.stop(settled.append)
    settle(rig)
    assert settled == [False]


def test_state_records_leave_moves_the_zones_that_are_promised_to_them() -> None:
    rig = Rig(1, size=12 << 20, blocks=1500, cut_blocks_max=10**9, cut_age_ns_max=10**15)
    engine = rig.engine
    rig.store.away = True
    answers: list[IoError] = []
    asked = 0
    while engine.reclaim.moving.promised_zones == 0:
        if len(answers) == asked:
            rig.volume.write(rig.rng.randrange(700) * BLOCK_SIZE, OLD, False, answers.append)
            rig.volume.kick()
            asked += 1
        if not rig.step():
            rig.tick()
    noted: list[bool] = []
    for peak in range(8 << 20, 1000 + (8 << 20)):  # more than all free zones take, while the moved blocks are read
        engine.set_limit(rig.volume, noted.append, average=4 << 20, peak=peak)
        while rig.device.writes:
            rig.device.writes.pop(0)()
    assert engine.free_zones >= 0
    rig.run_until(lambda: engine.reclaim.moving.promised_zones == 0)
    rig.store.away = False
    rig.engine.destage.relieve()
    rig.run_until(lambda: len(noted) == 1000)
    assert all(noted)
    check_books(engine)

"""Attaching what another device, or the store itself, may have changed meanwhile; and what a kill in between leaves."""

import pytest
from engine_rig import STORE_ID, VOLUME_ID, Rig

from forebay_cache.engine.attaching import Standing, StoreView
from forebay_cache.engine.check import check_device
from forebay_cache.engine.front import IoError
from forebay_cache.engine.volume import CacheVolume
from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, Epoch, make_version

OLD, NEW = b"O" * BLOCK_SIZE, b"N" * BLOCK_SIZE


def test_what_the_store_numbered_itself_is_not_taken_for_our_change_of_that_number() -> None:
    """Another device took the volume over, wrote nothing and released it; then the store took a snapshot of it, or
    rolled it back, which got the number behind our last cut: that of a change which we still hold."""
    rig = Rig(10)
    assert rig.write(0, OLD) == IoError.OK
    assert rig.drain()
    rig.engine.destage.suspend(rig.volume)
    assert rig.write(0, NEW) == IoError.OK
    view = StoreView(VOLUME_ID, "v", rig.size, Epoch(3), rig.volume.version, STORE_ID)
    rig.engine.attaching.reopened(rig.volume, view)
    assert "changed elsewhere" in rig.volume.error and rig.volume.has_changes
    settled: list[bool] = []
    rig.engine.attaching.detach(rig.volume, leave_dirty=True, settled=settled.append)
    rig.run_until(lambda: bool(settled))
    with pytest.raises(ForebayError, match="kept and not merged"):
        begin_attach(rig, view)
    assert rig.volume.has_changes


def begin_attach(rig: Rig, view: StoreView) -> list[CacheVolume | None]:
    """Attach a volume, of which what the store changed is stale."""
    got: list[CacheVolume | None] = []
    stale = [Extent(0, 4)] if rig.engine.attaching.compare(view) is Standing.STALE else []
    rig.engine.attaching.attach(view, stale, read_only=False, attached=got.append)
    return got


def attach_after_a_change_elsewhere(rig: Rig, *, leave_dirty: bool) -> tuple[StoreView, list[CacheVolume | None]]:
    """Write, detach, let another device write under epoch 3, and begin to attach under epoch 4."""
    assert rig.write(0, OLD * 4) == IoError.OK
    assert rig.drain()
    settled: list[bool] = []
    rig.engine.attaching.detach(rig.volume, leave_dirty=leave_dirty, settled=settled.append)
    rig.run_until(lambda: bool(settled))
    rig.store.version, rig.store.epoch = make_version(3, 2), Epoch(4)
    rig.store.blocks.update(dict.fromkeys(range(4), (NEW, rig.store.version)))
    view = StoreView(VOLUME_ID, "v", rig.size, rig.store.epoch, rig.store.version, STORE_ID)
    return view, begin_attach(rig, view)


def fsck(rig: Rig) -> None:
    image = bytes(rig.device.bytes)
    assert check_device(lambda at, size: image[at : at + size], len(image)) == []


def attach_again(rig: Rig, view: StoreView) -> CacheVolume:
    """Attach a volume after a start, if that has not found it attached."""
    volume = rig.engine.by_id(VOLUME_ID)
    if volume is not None and volume.attached:
        rig.engine.attaching.reopened(volume, view)
        assert not volume.error
        return volume
    got = begin_attach(rig, view)
    rig.run_until(lambda: bool(got))
    assert got[0] is not None
    return got[0]


@pytest.mark.parametrize("leave_dirty", [False, True])
def test_a_kill_at_any_step_of_an_attach_leaves_nothing_for_fsck_and_can_be_attached(leave_dirty: bool) -> None:
    """The store's version is logged before the row with the epoch that it is of."""
    for steps in range(100):
        rig = Rig(8)
        view, attached = attach_after_a_change_elsewhere(rig, leave_dirty=leave_dirty)
        for _ in range(steps):
            rig.step()
        if attached:
            break
        rig.store.queue.clear()
        rig.device.kill()
        fsck(rig)
        rig.start()
        noted: list[bool] = []
        rig.engine.checkpoints.want(noted.append)
        rig.run_until(lambda noted=noted: bool(noted))
        fsck(rig)
        rig.volume = attach_again(rig, view)
        assert rig.read(0, BLOCK_SIZE) == NEW
    assert 4 < steps < 99

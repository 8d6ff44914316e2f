"""Snapshots attached as devices: read-only, with a bounded share of the cache that goes with them."""

from clone_rig import BASE, CLONES, MIDDLE, CloneRig

from forebay_cache.engine.front import IoError
from forebay_core.units import BLOCK_SIZE


def pattern(rig: CloneRig, snapshot: bytes, count: int) -> bytes:
    blocks, origin = rig.family.of(snapshot)
    seen = [rig.family.see(blocks, origin, lba) or bytes(BLOCK_SIZE) for lba in range(count)]
    return b"".join(seen)


def test_a_snapshot_of_a_clone_reads_through_and_refuses_every_change() -> None:
    rig = CloneRig(1, clones=())  # type: ignore[arg-type]
    volume = rig.attach_snapshot(MIDDLE)
    assert rig.content_of(volume) == pattern(rig, MIDDLE, 1290)
    got: list[IoError] = []
    volume.write(0, b"x" * BLOCK_SIZE, False, got.append)
    volume.trim(0, BLOCK_SIZE, False, got.append)
    volume.write_zeroes(5, 1, False, got.append)
    assert got == [IoError.READ_ONLY] * 3
    volume.flush(got.append)
    rig.run_until(lambda: len(got) == 4)
    assert got[3] == IoError.OK


def test_what_is_cached_of_a_snapshot_goes_when_it_is_detached_and_stays_gone() -> None:
    rig = CloneRig(2, clones=CLONES[:1])
    own = rig.content_of(rig.volume)
    volume = rig.attach_snapshot(MIDDLE)
    rig.content_of(volume)
    assert rig.cached(MIDDLE) > 0
    rig.detach_snapshot(volume)
    assert rig.engine.by_id(MIDDLE) is None
    assert rig.cached(BASE) > 0, "the clone needs its origin still"
    for power in (False, True):
        rig.restart(power=power)
        rig.run_until(lambda: not rig.engine.loading.active)
        assert rig.cached(MIDDLE) == 0
    assert rig.content_of(rig.engine.by_id(CLONES[0])) == own


def test_an_attached_snapshot_is_served_again_after_a_kill() -> None:
    rig = CloneRig(3, clones=CLONES[:1])
    rig.attach_snapshot(MIDDLE)
    rig.restart(power=False)
    volume = rig.engine.by_id(MIDDLE)
    assert volume is not None and volume.attached and volume.read_only
    assert rig.content_of(volume) == pattern(rig, MIDDLE, 1290)


def test_attached_snapshots_keep_no_more_than_their_share() -> None:
    rig = CloneRig(4, clones=CLONES[:1])
    volume = rig.attach_snapshot(MIDDLE)
    share = rig.engine.sources._ring_max
    assert share < 400
    rig.engine.sources._ring_max = 60
    for _ in range(3):
        rig.content_of(volume)
        rig.run_until(lambda: not rig.engine.log.unapplied())
        assert rig.cached(MIDDLE) <= 60


def test_a_snapshot_that_a_clone_needs_is_not_temporary_and_stays_when_it_is_detached() -> None:
    rig = CloneRig(5, clones=CLONES[:1])
    volume = rig.attach_snapshot(BASE)
    assert not volume.temporary
    content = rig.content_of(volume)
    rig.tick()
    rig.run_until(lambda: rig.engine.log.idle)
    cached = rig.cached(BASE)
    assert cached > 500
    rig.detach_snapshot(volume)
    assert rig.cached(BASE) >= cached
    rig.family.away = True
    rig.volume = rig.volumes[CLONES[0]]
    find = rig.engine.map.find
    lba = next(lba for lba in range(1200) if find(volume.key << 40 | lba) >= 0 and rig.volume.origins.has(lba))
    assert rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE]


def test_reads_of_a_snapshot_that_is_gone_fail_and_say_so() -> None:
    rig = CloneRig(6, clones=())  # type: ignore[arg-type]
    volume = rig.attach_snapshot(BASE)
    del rig.family.snapshots[BASE]
    got: list[IoError] = []
    volume.read(0, BLOCK_SIZE, lambda error, _: got.append(error))
    rig.run_until(lambda: bool(got))
    assert got == [IoError.IO]
    assert "deleted in the store" in volume.error

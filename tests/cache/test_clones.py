"""Clones: blocks that are not their own come from the origin, are cached once for all, and never come back."""

import pytest
from clone_rig import BASE, CLONES, MIDDLE, CloneRig
from engine_rig import check_books

from forebay_cache.engine.check import check_device
from forebay_cache.engine.front import IoError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, Version


def test_a_clone_reads_as_its_origin_and_zeros_behind_it() -> None:
    rig = CloneRig(1)
    for volume_id in CLONES:
        assert rig.content_of(rig.volumes[volume_id]) == rig.family.content(volume_id, 1500)


def test_the_blocks_of_an_origin_are_fetched_once_for_all_its_clones() -> None:
    rig = CloneRig(2, clones=CLONES[:2])
    rig.learn()
    first = rig.content_of(rig.volumes[CLONES[0]])
    fetched = dict(rig.family.fetched)
    assert fetched[BASE] >= 1200 - 4
    assert rig.content_of(rig.volumes[CLONES[1]]) == first
    assert rig.family.fetched[BASE] == fetched[BASE]
    assert rig.cached(CLONES[0]) == rig.cached(CLONES[1]) == 0


def test_a_trimmed_block_of_a_clone_never_shows_the_parents_data() -> None:
    rig = CloneRig(3)
    volume = rig.volume
    got: list[IoError] = []
    volume.trim(0, 64 * BLOCK_SIZE, False, got.append)
    volume.kick()
    rig.run_until(lambda: bool(got))
    assert rig.read(0, 64 * BLOCK_SIZE) == bytes(64 * BLOCK_SIZE)
    assert rig.drain()
    volume.holes.forget_up_to(volume.acknowledged)  # as when there are many
    rig.learn()
    assert rig.read(0, 64 * BLOCK_SIZE) == bytes(64 * BLOCK_SIZE)
    rig.restart(power=False)
    assert rig.read(0, 64 * BLOCK_SIZE) == bytes(64 * BLOCK_SIZE)


def test_an_own_block_that_left_the_cache_is_fetched_and_not_the_parents() -> None:
    rig = CloneRig(4)
    rig.learn()
    rig.write(7 * BLOCK_SIZE, b"own!" * 1024)
    assert rig.drain()
    engine, volume = rig.engine, rig.volume
    key = volume.key << 40 | 7
    engine.drop_block(key, engine.map.find(key))
    assert rig.read(7 * BLOCK_SIZE, BLOCK_SIZE) == b"own!" * 1024


def test_a_partial_write_keeps_the_origins_bytes_around_it() -> None:
    rig = CloneRig(5)
    before = bytearray(rig.family.content(CLONES[0], 1500))
    for offset in (5, 4096 * 9 + 100, 4096 * 400 - 3):
        rig.write(offset, b"part")
        before[offset : offset + 4] = b"part"
    assert rig.content_of(rig.volume) == before


def test_what_is_cached_of_an_origin_is_a_hit_while_the_store_is_away_even_after_a_kill() -> None:
    rig = CloneRig(6, clones=CLONES[:1])
    rig.learn()
    content = rig.content_of(rig.volume)
    rig.write(3 * BLOCK_SIZE, b"x" * BLOCK_SIZE)
    expected = content[: 3 * BLOCK_SIZE] + b"x" * BLOCK_SIZE + content[4 * BLOCK_SIZE : 1200 * BLOCK_SIZE]
    assert rig.drain()
    for power in (False, True):
        durable: list[bool] = []
        rig.engine.log.barrier(durable.append)
        rig.run_until(lambda: bool(durable))  # noqa: B023
        source, find = rig.engine.by_id(BASE), rig.engine.map.find
        cached = [lba for lba in range(1200) if find(source.key << 40 | lba) >= 0]
        assert len(cached) > 600
        rig.family.away = True
        rig.restart(power=power)
        for lba in (3, *cached):
            assert rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == expected[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE]
        rig.family.away = False
        rig.family.queue.clear()


def test_a_flattened_clone_goes_on_when_its_origin_is_gone() -> None:
    rig = CloneRig(7, clones=CLONES[:1])
    rig.learn()
    expected = rig.content_of(rig.volume)[: 1000 * BLOCK_SIZE]
    engine = rig.engine
    source = engine.by_id(BASE)
    for lba in range(0, 1000, 3):
        place = engine.map.find(source.key << 40 | lba)
        if place >= 0:
            engine.drop_block(source.key << 40 | lba, place)
    rig.family.flatten(CLONES[0])
    del rig.family.snapshots[BASE]
    assert rig.read(0, 1000 * BLOCK_SIZE) == expected
    rig.detach(rig.volume)
    rig.volume = rig.attach_one(CLONES[0])
    assert rig.volume.source is None
    assert rig.read(0, 1000 * BLOCK_SIZE) == expected


def test_what_a_rollback_made_the_origins_again_is_read_from_there() -> None:
    rig = CloneRig(8, clones=CLONES[:1])
    rig.learn()
    volume = rig.volume
    rig.write(10 * BLOCK_SIZE, b"o" * 4 * BLOCK_SIZE)
    rig.detach(volume)
    head = rig.family.heads[CLONES[0]]
    for lba in range(10, 14):
        del head.blocks[lba]
    head.version += 1
    expected = rig.family.content(CLONES[0], 1500)
    rig.volume = rig.attach_one(CLONES[0], stale=[Extent(10, 4)])
    assert rig.content_of(rig.volume) == expected
    rig.restart(power=False)
    assert rig.content_of(rig.volume) == expected


def test_sources_stay_as_long_as_a_clone_needs_them() -> None:
    rig = CloneRig(9)
    engine = rig.engine
    engine.attaching.forget_released(room=1000)
    assert {v.id for v in engine.volumes.values()} == {BASE, MIDDLE, *CLONES}
    rig.detach(rig.volumes[CLONES[2]])
    engine.attaching.forget_released(room=1000)
    assert {v.id for v in engine.volumes.values()} == {BASE, *CLONES[:2]}
    rig.detach(rig.volumes[CLONES[0]])
    rig.detach(rig.volumes[CLONES[1]])
    engine.attaching.forget_released(room=1000)
    assert not engine.volumes
    assert rig.engine.map.linked_count == 0


def test_allocation_of_a_clone_shows_what_its_origin_has() -> None:
    rig = CloneRig(10)
    for volume_id in CLONES:
        volume = rig.volumes[volume_id]
        rig.volume = volume
        for cached in (False, True):
            if cached:
                rig.content_of(volume)
                rig.learn()
            content = rig.family.content(volume_id, 1500)
            at = 0
            while at < rig.size:
                for run in rig.allocation(at, rig.size - at):
                    if run.hole:
                        assert not any(content[at : at + run.length])
                    at += run.length


def test_allocation_of_cached_blocks_of_an_origin_needs_no_store() -> None:
    rig = CloneRig(14, clones=CLONES[2:])
    rig.content_of(rig.volume)
    rig.learn()
    source = rig.engine.by_id(BASE)
    first = next(lba for lba in range(1200) if rig.engine.map.find(source.key << 40 | lba) >= 0)
    middle = rig.engine.by_id(MIDDLE)
    assert rig.volume.origins.has(first) and middle.origins.has(first)
    rig.family.away = True
    [run] = rig.allocation(first * BLOCK_SIZE, BLOCK_SIZE)
    assert run == (BLOCK_SIZE, False)


def test_prefetch_brings_the_origins_blocks_in() -> None:
    rig = CloneRig(11)
    got: list[IoError] = []
    rig.volumes[CLONES[2]].prefetch(0, 1000 * BLOCK_SIZE, got.append)
    rig.run_until(lambda: bool(got))
    assert got == [IoError.OK]
    rig.learn()
    rig.run_until(lambda: not rig.engine.log.unapplied())  # what was fetched is in the map
    fetched = dict(rig.family.fetched)
    rig.volume = rig.volumes[CLONES[2]]
    rig.read(0, 1000 * BLOCK_SIZE)
    assert rig.family.fetched == fetched


def test_blocks_behind_the_end_of_a_shrunk_volume_do_not_come_back_when_it_grows_again() -> None:
    rig = CloneRig(12, clones=CLONES[:1])
    rig.write(1400 * BLOCK_SIZE, b"o" * BLOCK_SIZE)
    rig.content_of(rig.volume)
    rig.detach(rig.volume)
    head, size = rig.family.heads[CLONES[0]], rig.size
    for count in (1000, 1500):
        rig.size = count * BLOCK_SIZE
        if count == 1000:
            head.blocks |= {lba: (None, Version(head.version + 1)) for lba in range(1000, 1500)}
            head.version += 1
        rig.volume = rig.attach_one(CLONES[0], stale=[])
        if count == 1000:
            rig.detach(rig.volume)
    assert rig.size == size
    assert rig.content_of(rig.volume) == rig.family.content(CLONES[0], 1500)
    assert rig.read(1000 * BLOCK_SIZE, 500 * BLOCK_SIZE) == bytes(500 * BLOCK_SIZE)


def test_fsck_finds_nothing_wrong_with_clones_and_snapshots() -> None:
    rig = CloneRig(13)
    rig.attach_snapshot(MIDDLE)
    for volume in rig.volumes.values():
        rig.volume = volume
        rig.write(5 * BLOCK_SIZE, b"x" * 9 * BLOCK_SIZE)
        rig.content_of(volume)
    for stopped in (False, True):
        if stopped:
            done: list[bool] = []
            rig.engine.stop(done.append)
            rig.run_until(lambda: bool(done))  # noqa: B023
        image = rig.device.bytes
        found = check_device(lambda at, size: bytes(image[at : at + size]), len(image), with_blocks=True)  # noqa: B023
        assert found == []


@pytest.mark.parametrize("seed", range(40))
def test_clones_equal_byte_arrays_through_writes_trims_kills_and_reclaim(seed: int) -> None:
    rig = CloneRig(seed, size=12 << 20)
    rng = rig.rng
    models = {volume_id: bytearray(rig.family.content(volume_id, 1500)) for volume_id in CLONES}
    for _ in range(rng.randrange(60, 140)):
        volume_id = rng.choice(CLONES)
        volume, model = rig.volumes[volume_id], models[volume_id]
        rig.volume = volume
        offset = rng.randrange(rig.size - 1)
        length = min(rig.size - offset, rng.choice([1, 700, 4096, 9000, 120_000]))
        match rng.randrange(12):
            case 0 | 1 | 2 | 3:
                payload = rng.randbytes(length)
                if rng.random() < 0.6:
                    offset, payload = offset & ~4095, payload.ljust(-(-length // 4096) * 4096, b"p")
                    payload = payload[: rig.size - offset]
                assert rig.write(offset, payload) == IoError.OK
                model[offset : offset + len(payload)] = payload
            case 4 | 5:
                got: list[IoError] = []
                volume.write_zeroes(offset, length, False, got.append)
                volume.kick()
                rig.run_until(lambda: bool(got))  # noqa: B023
                model[offset : offset + length] = bytes(length)
            case 6:
                assert rig.drain()
            case 7:
                assert rig.flush() == IoError.OK
                rig.restart(power=rng.random() < 0.5)
            case 8:
                other = bytes(model[: 300 * BLOCK_SIZE])
                assert rig.read(0, 300 * BLOCK_SIZE) == other
            case _:
                assert rig.read(offset, length) == model[offset : offset + length]
    for volume_id in CLONES:
        assert rig.content_of(rig.volumes[volume_id]) == models[volume_id], volume_id
        assert rig.drain()
        assert rig.family.content(volume_id, 1500) == models[volume_id]
    check_books(rig.engine)

"""Reading ahead: a cold sequential stream is in memory before it is asked for, and nothing else is fetched."""

import random

import pytest
from clone_rig import BASE, CloneRig
from engine_rig import Rig, check_books, joined
from test_ring import content, full_rig, place_of, settle

from forebay_cache.engine.front import IoError
from forebay_cache.engine.limits import AHEAD_BLOCKS_MAX, AHEAD_STEP_BLOCKS
from forebay_cache.engine.ring import AHEAD, USED
from forebay_core.units import BLOCK_SIZE

BLOCKS = 4000
MIB_BLOCKS = 256


def ahead_rig(**options: int) -> Rig:
    return full_rig(**{"blocks": BLOCKS, "read_ahead_blocks": 256, **options})


def read(rig: Rig, lba: int, count: int = 8) -> None:
    assert rig.read(lba * BLOCK_SIZE, count * BLOCK_SIZE) == b"".join(content(lba + i) for i in range(count))
    settle(rig)


def test_a_sequential_read_finds_its_blocks_in_memory_with_the_store_away() -> None:
    rig = ahead_rig()
    for lba in range(0, 800, 8):
        read(rig, lba)
    assert rig.store.fetched_blocks <= 800 + 256 + 4
    rig.store.away = True
    for lba in range(800, 920, 8):
        read(rig, lba)
    assert rig.volume.miss_blocks == 920, "what was read ahead was fetched for these reads: no hits of the cache"
    assert rig.volume.hit_blocks == 0
    check_books(rig.engine)


@pytest.mark.parametrize("count", [1, 3, 32, 300])
def test_every_size_of_reads_is_read_ahead(count: int) -> None:
    rig = ahead_rig()
    for lba in range(0, 900, count):
        read(rig, lba, count)
    assert rig.engine.admission.ring.count(AHEAD) >= 60
    rig.store.away = True
    end = -(-900 // count) * count
    read(rig, end, min(count, 60))


def test_what_nobody_asks_for_is_never_written_and_pushes_nothing_used_out() -> None:
    rig = ahead_rig(fill_blocks=1)
    read(rig, 3999, 1)
    for lba in range(0, 16, 8):
        read(rig, lba)
    ring = rig.engine.admission.ring
    assert ring.count(AHEAD) > 0
    assert rig.volume.key << 40 | 3999 in ring.blocks
    frequent = ring.count(USED)
    assert frequent == 17
    for lba in range(1000, 1600, 50):
        read(rig, lba, 1)
    settle(rig)
    mapped = [lba for lba in range(BLOCKS) if place_of(rig, lba) >= 0]
    assert all(lba < 16 or lba >= 1000 for lba in mapped)


def test_nothing_is_read_ahead_of_random_reads_or_when_it_is_off() -> None:
    rig, rng = ahead_rig(fill_blocks=1), random.Random(3)
    lbas = [rng.randrange(BLOCKS) for _ in range(200)]
    for lba in lbas:
        read(rig, lba, 1)
    assert rig.store.fetched_blocks <= 200
    off = ahead_rig(fill_blocks=1, read_ahead_blocks=0)
    for lba in range(0, 400, 8):
        read(off, lba)
    assert off.store.fetched_blocks == 400


def test_it_stops_when_the_stream_breaks() -> None:
    rig, rng = ahead_rig(), random.Random(4)
    for lba in range(0, 400, 8):
        read(rig, lba)
    fetched = rig.store.fetched_blocks
    for lba in [2000 + 4 * rng.randrange(400) for _ in range(50)]:
        read(rig, lba, 1)
    assert rig.store.fetched_blocks <= fetched + 4 * 50


def test_cached_blocks_and_holes_are_not_fetched() -> None:
    rig = ahead_rig()
    assert rig.write(100 * BLOCK_SIZE, b"".join(content(lba) for lba in range(100, 200))) == IoError.OK
    zeroed: list[IoError] = []
    rig.volume.write_zeroes(200 * BLOCK_SIZE, 200 * BLOCK_SIZE, False, zeroed.append)
    rig.volume.kick()
    rig.run_until(lambda: bool(zeroed))
    for lba in range(0, 96, 8):
        read(rig, lba)
    settle(rig)
    assert rig.store.fetched_blocks <= 100


def test_a_stream_that_hits_asks_for_nothing() -> None:
    rig = ahead_rig(size=64 << 20)
    assert rig.write(0, b"".join(content(lba) for lba in range(1000))) == IoError.OK
    for lba in range(0, 1000, 8):
        read(rig, lba)
    assert rig.store.fetched_blocks == 0


def test_a_write_into_what_was_read_ahead_is_seen() -> None:
    rig = ahead_rig()
    for lba in range(0, 400, 8):
        read(rig, lba)
    assert rig.volume.key << 40 | 420 in rig.engine.admission.ring.blocks
    assert rig.write(420 * BLOCK_SIZE, b"n" * BLOCK_SIZE) == IoError.OK
    assert rig.read(420 * BLOCK_SIZE, BLOCK_SIZE) == b"n" * BLOCK_SIZE
    check_books(rig.engine)


def test_no_step_asks_for_much_and_what_is_under_way_is_bounded() -> None:
    rig = ahead_rig(blocks=1 << 20, read_ahead_blocks=AHEAD_BLOCKS_MAX)
    rig.store.away = True
    for lba in range(0, 60 * MIB_BLOCKS, MIB_BLOCKS):
        before = rig.engine.read_ahead.in_flight_blocks
        rig.volume.read(lba * BLOCK_SIZE, MIB_BLOCKS * BLOCK_SIZE, lambda error, chunks: None)
        assert rig.engine.read_ahead.in_flight_blocks - before <= AHEAD_STEP_BLOCKS
        for _ in range(200):
            rig.pace()
    assert rig.engine.read_ahead.in_flight_blocks == AHEAD_BLOCKS_MAX // 2
    rig.store.away = False
    rig.run_until(lambda: rig.engine.read_ahead.in_flight_blocks == 0)
    assert rig.engine.admission.ring.count(AHEAD) <= AHEAD_BLOCKS_MAX


def test_what_went_with_an_error_is_asked_for_again_and_told_then() -> None:
    rig = ahead_rig()
    for lba in range(0, 80, 8):
        read(rig, lba)
    rig.engine.destage.stop_volume(rig.volume, "fenced")
    while rig.step():
        pass
    assert rig.engine.read_ahead.in_flight_blocks == 0
    got: list[IoError] = []
    rig.volume.read(80 * BLOCK_SIZE, BLOCK_SIZE, lambda error, chunks: got.append(error))
    assert got == [IoError.IO]


def test_a_clone_is_read_ahead_through_its_origin_and_a_snapshot_as_well() -> None:
    rig = CloneRig(7, read_ahead_blocks=256)
    clone, snapshot = rig.volume, rig.attach_snapshot(BASE)
    for volume in (clone, snapshot):
        expected = rig.store.content(volume.id, volume.block_count)
        for lba in range(0, 600, 8):
            got: list[bytes] = []
            volume.read(lba * BLOCK_SIZE, 8 * BLOCK_SIZE, lambda _, chunks, got=got: got.append(joined(chunks)))
            rig.run_until(lambda got=got: bool(got))
            assert got[0] == expected[lba * BLOCK_SIZE : (lba + 8) * BLOCK_SIZE]
            settle(rig)
        ahead = [key for key, held in rig.engine.admission.ring.blocks.items() if held.pool == AHEAD]
        assert len(ahead) > 20
        rig.engine.admission.ring.clear()

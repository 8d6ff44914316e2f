"""Prefetching (the NBD command CACHE): any length, in turns, and never at the cost of others."""

import pytest
from engine_rig import Rig

from forebay_cache.engine.front import IoError
from forebay_core.units import BLOCK_SIZE
from forebay_wire.limits import READ_BLOCKS_MAX


def prefetched(rig: Rig, offset: int, length: int) -> IoError:
    got: list[IoError] = []
    rig.volume.prefetch(offset, length, got.append)
    rig.run_until(lambda: bool(got))
    return got[0]


@pytest.mark.parametrize("written", [False, True], ids=["a hole", "holes and blocks"])
def test_a_prefetch_of_what_is_known_ends_however_long_it_is(written: bool) -> None:
    rig = Rig(1, blocks=1 << 20)
    zeroed: list[IoError] = []
    rig.volume.write_zeroes(0, rig.size, False, zeroed.append)
    rig.volume.kick()
    rig.run_until(lambda: bool(zeroed))
    if written:
        for lba in range(0, 900 * READ_BLOCKS_MAX, READ_BLOCKS_MAX):
            assert rig.write(lba * BLOCK_SIZE, b"x" * BLOCK_SIZE) == IoError.OK
    assert prefetched(rig, 0, rig.size) == IoError.OK
    assert prefetched(rig, 4097, rig.size - 4097) == IoError.OK
    assert rig.store.fetched_blocks == 0


def test_others_have_their_turn_while_what_is_cached_is_looked_at() -> None:
    rig = Rig(2, blocks=1 << 20, size=96 << 20)
    for lba in range(0, 60 * READ_BLOCKS_MAX, READ_BLOCKS_MAX):
        assert rig.write(lba * BLOCK_SIZE, bytes(READ_BLOCKS_MAX * BLOCK_SIZE)) == IoError.OK
    got: list[IoError] = []
    rig.volume.prefetch(0, 60 * READ_BLOCKS_MAX * BLOCK_SIZE, got.append)
    assert not got
    turns = 0
    while not got:
        rig.pace()
        turns += 1
    assert got == [IoError.OK]
    assert turns > 2


def test_a_prefetch_brings_what_only_the_store_has() -> None:
    rig = Rig(3, blocks=4000, size=64 << 20)
    assert rig.write(0, b"y" * (1000 * BLOCK_SIZE)) == IoError.OK
    assert rig.drain()
    for place in rig.engine.map.find_run(rig.volume.key << 40, 1000).tolist():
        rig.engine.drop_block(rig.engine.map.keys[place], place)
    assert prefetched(rig, 0, 1000 * BLOCK_SIZE) == IoError.OK
    rig.engine.log.kick()
    rig.run_until(lambda: rig.engine.log.idle)
    fetched = rig.store.fetched_blocks
    assert fetched >= 1000
    assert rig.read(0, 1000 * BLOCK_SIZE) == b"y" * (1000 * BLOCK_SIZE)
    assert rig.store.fetched_blocks == fetched


def test_a_prefetch_of_a_failed_volume_is_answered() -> None:
    rig = Rig(4, blocks=1 << 20)
    got: list[IoError] = []
    rig.store.away = True
    rig.volume.prefetch(0, rig.size, got.append)
    rig.engine.destage.stop_volume(rig.volume, "fenced")
    rig.store.away = False
    rig.run_until(lambda: bool(got))
    assert got == [IoError.IO]

"""What salvage finds on a device: all of it on a whole one; on a damaged one only what is provable, and a doubt."""

import random

import numpy as np
import pytest
from engine_rig import Rig
from test_check import BLOCKS, Image, stopped, trim, work, worked_in

from forebay_cache.engine.front import IoError
from forebay_cache.engine.salvage import Salvage, SalvageVolume, search_device
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE


def search(image: bytes | bytearray) -> Salvage:
    return search_device(lambda at, size: bytes(image[at : at + size]), len(image))


def dirty_of(volume: SalvageVolume, image: bytes | bytearray) -> dict[int, bytes | None]:
    """Blocks whose bytes are whole; trimmed ones are None."""
    found: dict[int, bytes | None] = {lba: None for hole in volume.holes for lba in range(hole.start, hole.end)}
    for lba, _, expected, offset in volume.dirty.tolist():
        block = bytes(image[offset : offset + BLOCK_SIZE])
        if checksum(block) == expected:
            found[lba] = block
    return found


def expected_dirty(rig: Rig) -> dict[int, bytes | None]:
    """The same from the engine's memory."""
    table, volume = rig.engine.map, rig.volume
    found: dict[int, bytes | None] = {
        lba: None for hole in volume.holes.newer_than(volume.acknowledged) for lba in range(hole.start, hole.end)
    }
    newer = table.version_array > np.uint64(volume.acknowledged)
    for place in np.flatnonzero(table.linked_mask(0, table.place_count) & newer).tolist():
        at = rig.engine.zones.offset_of(place)
        found[table.keys[place] & ((1 << 40) - 1)] = bytes(rig.device.bytes[at : at + BLOCK_SIZE])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_whole_device_gives_everything(seed: int) -> None:
    rig = worked_in(seed)
    found = search(rig.device.bytes)
    (volume,) = found.volumes
    assert found.doubts == []
    assert dirty_of(volume, rig.device.bytes) == expected_dirty(rig)
    assert (volume.version, volume.acknowledged) == (rig.volume.applied, rig.volume.acknowledged)
    assert volume.clean.size + volume.dirty.size == rig.engine.map.linked_count


def restarted(seed: int) -> Rig:
    """A device with records behind the newest checkpoint, all durable and known so."""
    rig = worked_in(seed, size=64 << 20)
    stopped(rig)
    rig.start()
    rig.attach()
    rng = random.Random(seed)
    for _ in range(6):
        work(rig, 3, rng)
        assert rig.flush() == IoError.OK
        for _ in range(5):
            rig.tick()
            while rig.device.step():
                pass
    return rig


@pytest.mark.parametrize("seed", range(4))
def test_a_search_finds_the_same_when_only_an_empty_record_is_damaged(seed: int) -> None:
    """Both areas are whole; a flipped bit in a record without entries makes recovery refuse the device."""
    rig = restarted(seed)
    image = Image(rig)
    expected = expected_dirty(rig)
    empty = [at for at, header in image.new_records() if header.entry_count == 0][:-1]
    assert empty
    image.flip(empty[-1] + 97)
    found = search(image.bytes)
    assert found.doubts
    assert dirty_of(found.volumes[0], image.bytes) == expected
    assert found.volumes[0].clean.size == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_record_costs_no_more_than_itself(seed: int) -> None:
    rig = restarted(seed)
    image = Image(rig)
    expected = expected_dirty(rig)
    records = [(at, header) for at, header in image.new_records()[:-2] if header.block_count]
    at, header = random.Random(seed).choice(records)
    lost = rig.engine.map
    first = (at - rig.engine.zones_offset) // BLOCK_SIZE + 1
    lbas = {lost.keys[place] & ((1 << 40) - 1) for place in range(first, first + header.block_count)}
    image.flip(at + 97)
    found = search(image.bytes)
    assert any("damaged or gone" in doubt for doubt in found.doubts)
    got = dirty_of(found.volumes[0], image.bytes)
    wrong = {lba for lba in expected if got.get(lba) != expected[lba]}
    assert wrong <= lbas, sorted(wrong - lbas)


def test_trimmed_blocks_do_not_come_back() -> None:
    rig = Rig(3, size=8 << 20, blocks=BLOCKS)
    rig.store.away = True
    assert rig.write(0, b"a" * BLOCK_SIZE * 20) == IoError.OK
    trim(rig, 5, 10)
    assert rig.flush() == IoError.OK
    got: list[bool] = []
    rig.engine.checkpoints.want(got.append)
    rig.run_until(lambda: bool(got))
    trim(rig, 0, 2)
    assert rig.flush() == IoError.OK
    for _ in range(40):
        rig.tick()
        while rig.device.step():
            pass
    image = Image(rig)
    for offset in image.superblock.checkpoint_offsets:
        image.flip(offset + 50)
    found = search(image.bytes)
    assert any("no checkpoint is whole" in doubt for doubt in found.doubts)
    got_blocks = dirty_of(found.volumes[0], image.bytes)
    assert {lba for lba, block in got_blocks.items() if block is not None} == {2, 3, 4, *range(15, 20)}
    assert {lba for lba, block in got_blocks.items() if block is None} == {0, 1, *range(5, 15)}


@pytest.mark.parametrize("seed", range(10))
def test_what_a_power_cut_took_away_is_not_brought_back(seed: int) -> None:
    """Unflushed writes of an earlier life lie on the device behind the log; they are no part of any history."""
    rig = Rig(seed, size=8 << 20, blocks=BLOCKS)
    rig.store.away = True
    rng = random.Random(seed)
    work(rig, 30, rng)
    assert rig.flush() == IoError.OK
    for lba in range(0, 240, 8):
        rig.volume.write(lba * BLOCK_SIZE, rng.randbytes(8 * BLOCK_SIZE), False, lambda error: None)
        rig.volume.kick()
        for _ in range(4):
            rig.device.step()
    rig.store.queue.clear()
    rig.device.cut_power()
    rig.start()
    rig.volume = rig.engine.attached()[0]
    work(rig, 10, rng)
    assert rig.flush() == IoError.OK
    for _ in range(40):
        rig.tick()
        while rig.device.step():
            pass
    expected = expected_dirty(rig)
    image = Image(rig)
    for offset in image.superblock.checkpoint_offsets:
        image.flip(offset + 50)
    got = dirty_of(search(image.bytes).volumes[0], image.bytes)
    assert {lba for lba in got if got[lba] != expected.get(lba)} == set()
    assert got.keys() == expected.keys()


def test_a_device_without_a_superblock_is_refused() -> None:
    rig = worked_in()
    image = bytearray(rig.device.bytes)
    image[0 : 2 * BLOCK_SIZE] = bytes(2 * BLOCK_SIZE)
    with pytest.raises(CorruptionError, match="superblocks"):
        search(image)

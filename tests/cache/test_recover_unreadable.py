"""Starting on a device with blocks that can't be read: each costs itself at most, and nothing wrong is served."""

import random

import numpy as np
import pytest
from engine_rig import Rig, check_books
from test_check import stopped, worked_in
from test_engine_damage import records_of, written_in_a_row
from test_engine_review import attach_second
from test_engine_unreadable import CONTENT, WornDevice, assert_goes_on, read_error, worn
from test_salvage import dirty_of, expected_dirty

from forebay_cache.engine.check import check_device
from forebay_cache.engine.device_reads import ReadDevice
from forebay_cache.engine.front import IoError
from forebay_cache.engine.recovery import recover
from forebay_cache.engine.salvage import search_device
from forebay_cache.format import checkpoint
from forebay_core.errors import CorruptionError, UnreadableError
from forebay_core.units import BLOCK_SIZE, Buffer


def reading(image: bytes | bytearray, *bad: int) -> ReadDevice:
    """Return a port on which blocks at these offsets can't be read."""

    def read(offset: int, size: int) -> Buffer:
        if any(offset <= at < offset + size for at in bad):
            raise UnreadableError(place=f"{size} bytes at offset {offset}", reason="Input/output error")
        return bytes(image[offset : offset + size])

    return read


class UnreadableDevice(WornDevice):
    """Starting meets the read errors as well."""

    def read_whole(self, offset: int, size: int) -> bytes:
        return bytes(reading(self.bytes, *self.bad)(offset, size))


def restart(rig: Rig, *lbas: int) -> None:
    worn(rig, *lbas)
    rig.device.__class__ = UnreadableDevice
    rig.restart(power=False)


@pytest.mark.parametrize("seed", range(2))
def test_an_unreadable_block_of_a_record_hides_no_record(seed: int) -> None:
    rig, _ = written_in_a_row(seed)
    whole = recover(reading(rig.device.bytes), rig.engine.superblock)
    replayed = [one for one in records_of(rig) if one[0] >= rig.engine.checkpoints._kept[0].position]
    with_blocks = [one for one in replayed if one[2].block_count]
    for _, at, header in [*random.Random(seed).sample(with_blocks, 8), with_blocks[-1]]:
        bad = at + BLOCK_SIZE * header.block_count
        found = recover(reading(rig.device.bytes, bad), rig.engine.superblock)
        assert found.point == whole.point and found.records_replayed == whole.records_replayed
        assert np.array_equal(found.map.version_array, whole.map.version_array)
        assert [f"the first at offset {bad};" in one for one in found.findings] == [True]


@pytest.mark.parametrize("seed", range(2))
def test_an_unreadable_header_of_a_durable_record_is_refused_with_its_place(seed: int) -> None:
    rig, _ = written_in_a_row(seed)
    replayed = [one for one in records_of(rig) if one[0] >= rig.engine.checkpoints._kept[0].position]
    for _, at, _header in random.Random(seed).sample(replayed[:-3], 12):
        with pytest.raises(CorruptionError, match=rf"log record in zone \d+ block \d+.*offset {at}: can't be read"):
            recover(reading(rig.device.bytes, at), rig.engine.superblock)


def test_an_unreadable_header_behind_all_that_was_durable_ends_the_log_and_is_told() -> None:
    rig, _ = written_in_a_row(1)
    last = records_of(rig)[-1]
    found = recover(reading(rig.device.bytes, last[1]), rig.engine.superblock)
    assert found.point.position == last[0]
    assert any("the log ends there" in one for one in found.findings)


def test_an_unreadable_part_of_the_newest_checkpoint_falls_back_to_the_older_one() -> None:
    rig = worked_in(3)
    superblock = rig.engine.superblock
    newest, older = rig.engine.checkpoints._kept
    base = superblock.checkpoint_offsets[newest.area]
    header = checkpoint.decode_checkpoint_header(
        rig.device.bytes[base : base + BLOCK_SIZE], device=superblock.device, size_max=1 << 40, place=""
    )
    for at in (0, header.layout.table.offset, header.layout.volume_chunks[0].offset):
        found = recover(reading(rig.device.bytes, base + at), superblock)
        assert found.kept[0].sequence == older.sequence
        assert [f"offset {base + at}: can't be read" in one for one in found.findings] == [True]
    both = (base, superblock.checkpoint_offsets[older.area])
    with pytest.raises(CorruptionError, match="can't be read"):
        recover(reading(rig.device.bytes, *both), superblock)


def test_after_a_start_an_unreadable_clean_block_is_fetched() -> None:
    rig = Rig(1, size=8 << 20, blocks=300)
    assert rig.write(0, CONTENT) == IoError.OK
    assert rig.drain()
    restart(rig, 7)
    assert rig.read(0, len(CONTENT)) == CONTENT
    check_books(rig.engine)


def test_after_a_start_an_unreadable_dirty_block_costs_only_itself_and_stops_only_its_volume() -> None:
    rig = Rig(2, size=8 << 20, blocks=300)
    attach_second(rig)
    rig.store.away = True
    assert rig.write(0, CONTENT) == IoError.OK
    assert rig.flush() == IoError.OK
    restart(rig, 7)
    assert read_error(rig, 7, 1) == IoError.IO
    assert rig.read(0, 7 * BLOCK_SIZE) == CONTENT[: 7 * BLOCK_SIZE]
    assert rig.read(8 * BLOCK_SIZE, 32 * BLOCK_SIZE) == CONTENT[8 * BLOCK_SIZE :]
    other = next(one for one in rig.engine.volumes.values() if one.name == "w")
    assert_goes_on(rig, other)


@pytest.mark.parametrize("damaged", [False, True], ids=["a whole log", "a log that must be searched"])
def test_salvage_saves_all_but_the_unreadable_block(damaged: bool) -> None:
    rig, _ = written_in_a_row(1)
    rig.store.away = True
    expected = expected_dirty(rig)
    records = records_of(rig)
    # The last record with blocks is not known as durable, so its blocks are compared.
    bad = [at for _, at, header in records if header.block_count][-1] + BLOCK_SIZE
    seal = next(at for position, at, header in reversed(records[:-3]) if not header.block_count)
    found = search_device(reading(rig.device.bytes, bad, *([seal] if damaged else [])), len(rig.device.bytes))
    (volume,) = found.volumes
    lost = {lba for lba, _, _, offset in volume.dirty.tolist() if offset == bad}
    saved = dirty_of(volume, rig.device.bytes)
    assert {lba: saved.get(lba) for lba in expected} == expected
    assert lost and any("can't be read" in doubt for doubt in found.doubts)


def test_fsck_tells_of_an_unreadable_block_and_checks_the_rest() -> None:
    rig = worked_in(2)
    image = bytearray(stopped(rig))
    place = int(np.flatnonzero(rig.engine.map.linked_mask(0, rig.engine.map.place_count))[0])
    for bad in (0, BLOCK_SIZE, *rig.engine.superblock.checkpoint_offsets, rig.engine.zones.offset_of(place)):
        found = check_device(reading(image, bad), len(image))
        assert [one.code for one in found] == ["read-error"], found
        assert str(bad) in found[0].place

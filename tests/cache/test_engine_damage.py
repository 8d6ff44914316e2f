"""Flipped bits on the cache device: an error or a repair, never wrong bytes."""

import random

import pytest
from engine_rig import Rig, joined

from forebay_cache.engine.front import IoError
from forebay_cache.format.checkpoint import choose_checkpoints
from forebay_cache.format.record import SEAL, RecordHeader, decode_record
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, LBA_BITS

BLOCKS = 300


def worked_in() -> tuple[Rig, bytes]:
    """A device with clean, dirty, trimmed and moved blocks, everything flushed, and what a guest must read."""
    rig = Rig(5, size=8 << 20, blocks=BLOCKS)
    rng = random.Random(5)
    model = bytearray(rig.size)
    for turn in range(240):
        lba = rng.randrange(BLOCKS)
        count = min(rng.choice((1, 2, 9)), BLOCKS - lba)
        if rng.random() < 0.15:
            got: list[IoError] = []
            rig.volume.trim(lba * BLOCK_SIZE, count * BLOCK_SIZE, False, got.append)
            rig.volume.kick()
            rig.run_until(lambda got=got: bool(got))
            model[lba * BLOCK_SIZE : (lba + count) * BLOCK_SIZE] = bytes(count * BLOCK_SIZE)
        else:
            payload = rng.randbytes(count * BLOCK_SIZE)
            rig.write(lba * BLOCK_SIZE, payload)
            model[lba * BLOCK_SIZE : (lba + count) * BLOCK_SIZE] = payload
        if turn == 150:
            assert rig.drain()
    assert rig.flush() == IoError.OK
    for _ in range(40):
        rig.tick()
        while rig.device.step():
            pass
    return rig, bytes(model)


def check_damaged(rig: Rig, model: bytes, image: bytes) -> str:
    """Start on a damaged image and read everything; return what came of it."""
    rig.device.bytes[:] = image
    rig.device.unsynced.clear()
    rig.device.queue.clear()
    rig.device.writes.clear()
    rig.store.queue.clear()
    rig.reports.clear()
    try:
        rig.start()
    except ForebayError as error:
        assert str(error)
        return "refused"
    rig.attach()
    errors = 0
    for lba in range(BLOCKS):
        got: list[tuple[IoError, object]] = []
        rig.volume.read(lba * BLOCK_SIZE, BLOCK_SIZE, lambda error, chunks, got=got: got.append((error, chunks)))
        rig.run_until(lambda got=got: bool(got))
        error, chunks = got[0]
        if error == IoError.OK:
            same = joined(chunks) == model[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE]
            assert same, f"block {lba} is wrong"
        else:
            assert rig.reports, "an error that nobody was told of"
            errors += 1
    return "errors" if errors else "repaired" if rig.reports else "harmless"


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_is_never_served(seed: int) -> None:
    rig, model = worked_in()
    image = bytes(rig.device.bytes)
    used = [at for at in range(0, len(image), BLOCK_SIZE) if any(image[at : at + 64])]
    rng = random.Random(seed)
    seen: dict[str, int] = {}
    assert check_damaged(rig, model, image) == "harmless"
    for _ in range(60):
        block = rng.choice(used)
        damaged = bytearray(image)
        damaged[block + rng.choice((rng.randrange(64), rng.randrange(BLOCK_SIZE)))] ^= 1 << rng.randrange(8)
        outcome = check_damaged(rig, model, bytes(damaged))
        seen[outcome] = seen.get(outcome, 0) + 1
    assert seen.get("harmless", 0) < 60, seen


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("bad", [0, 4, 8])
def test_a_bad_block_inside_of_a_large_read_is_fetched_again_or_an_error(bad: int, clean: bool) -> None:
    rig = Rig(5, size=8 << 20, blocks=BLOCKS)
    payload = random.Random(bad).randbytes(9 * BLOCK_SIZE)
    rig.write(0, payload)
    assert rig.flush() == IoError.OK
    assert not clean or rig.drain()
    place = rig.engine.map.find(rig.volume.key << LBA_BITS | bad)
    rig.device.bytes[rig.engine.zones_offset + place * BLOCK_SIZE + 100] ^= 1
    rig.device.now_share = 1.0  # all of it is in memory
    got: list[tuple[IoError, object]] = []
    rig.volume.read(0, len(payload), lambda error, chunks: got.append((error, chunks)))
    rig.run_until(lambda: bool(got))
    error, chunks = got[0]
    assert error == (IoError.OK if clean else IoError.IO)
    assert not clean or joined(chunks) == payload
    assert rig.reports


def test_every_record_header_since_the_checkpoint_is_guarded() -> None:
    rig, model = worked_in()
    image = bytes(rig.device.bytes)
    zones = rig.engine.zones
    newest = rig.engine.checkpoints._kept[0]
    headers = [
        at
        for at in range(zones.zones_offset, len(image), BLOCK_SIZE)
        if image[at : at + 4] == b"FBRR" and int.from_bytes(image[at + 24 : at + 32], "little") >= newest.position
    ]
    assert headers
    outcomes = []
    for at in headers:
        damaged = bytearray(image)
        damaged[at + 97] ^= 4
        outcomes.append(check_damaged(rig, model, bytes(damaged)))
    assert outcomes.count("refused") >= len(headers) - 3, outcomes


def test_a_damaged_checkpoint_falls_back_to_the_older_one() -> None:
    rig, model = worked_in()
    image = bytes(rig.device.bytes)
    superblock = rig.engine.superblock
    blocks = [image[offset : offset + BLOCK_SIZE] for offset in superblock.checkpoint_offsets]
    names = ("area 0", "area 1")
    found = choose_checkpoints(blocks, device=superblock.device, size_max=superblock.checkpoint_size, places=names)
    assert len(found) == 2
    newest = superblock.checkpoint_offsets[found[0][0]]
    chunk = found[0][1].layout.zone_chunks[0]
    for at in (newest, newest + 100, newest + chunk.offset):
        damaged = bytearray(image)
        damaged[at] ^= 1
        assert check_damaged(rig, model, bytes(damaged)) in ("harmless", "repaired")


def written_in_a_row(seed: int) -> tuple[Rig, bytes]:
    """A device with records since its checkpoint in many zones, synced so rarely that whole zones know of no sync."""
    rig = Rig(seed, size=64 << 20, blocks=BLOCKS)
    rng = random.Random(seed)
    model = bytearray(rig.size)
    for turn in range(130):
        lba = rng.randrange(BLOCKS - 9)
        payload = rng.randbytes(rng.choice((1, 3, 9)) * BLOCK_SIZE)
        rig.write(lba * BLOCK_SIZE, payload)
        model[lba * BLOCK_SIZE : lba * BLOCK_SIZE + len(payload)] = payload
        if turn % 40 == 39:
            assert rig.flush() == IoError.OK
    assert rig.flush() == IoError.OK
    for _ in range(40):
        rig.tick()
        while rig.device.step():
            pass
    return rig, bytes(model)


def records_of(rig: Rig) -> list[tuple[int, int, RecordHeader]]:
    """Return (log position, offset, header) of every record on the device, in the order of the log."""
    records = []
    for at in range(rig.engine.zones.zones_offset, len(rig.device.bytes), BLOCK_SIZE):
        block = bytes(rig.device.bytes[at : at + BLOCK_SIZE])
        if block[:4] == b"FBRR":
            header, _ = decode_record(block, place="")
            records.append((header.log_position, at, header))
    return sorted(records)


@pytest.mark.parametrize("seed", range(3))
def test_a_lost_write_is_never_the_silent_end_of_the_log(seed: int) -> None:
    """Behind a lost write stands what was there before it: nothing, or a record of long ago, not something damaged."""
    rig, model = written_in_a_row(seed)
    image = bytes(rig.device.bytes)
    newest = rig.engine.checkpoints._kept[0]
    records = records_of(rig)
    needed = [one for one in records if one[0] >= newest.position]
    assert len({header.zone for _, _, header in needed}) > 4
    outcomes = []
    rng = random.Random(seed)
    for _, at, header in rng.sample(needed[:-3], 25):
        damaged = bytearray(image)
        old = rng.choice(records)[1]
        for block in range(header.size):
            damaged[at + block * BLOCK_SIZE : at + (block + 1) * BLOCK_SIZE] = (
                bytes(BLOCK_SIZE) if seed else image[old + block * BLOCK_SIZE : old + (block + 1) * BLOCK_SIZE]
            )
        outcomes.append(check_damaged(rig, model, bytes(damaged)))
    assert set(outcomes) <= {"refused", "harmless"}, outcomes
    assert outcomes.count("refused") > 20, outcomes


@pytest.mark.parametrize("whole", [False, True], ids=["from a record on", "the zone as a whole"])
def test_the_lost_end_of_a_zone_is_never_the_end_of_the_log(whole: bool) -> None:
    """Not even where nothing of a zone is left behind the break, its SEAL included, but later zones are there."""
    rig, model = written_in_a_row(1)
    image = bytes(rig.device.bytes)
    zones = rig.engine.zones
    records = records_of(rig)
    ended = [header.zone for _, _, header in records if header.kind == SEAL]
    outcomes = []
    for zone in ended:
        start = zones.offset_of(zones.place_at(zone, 0))
        offsets = [at for _, at, header in records if header.zone == zone]
        damaged = bytearray(image)
        first = start if whole else offsets[len(offsets) // 2]
        damaged[first : start + zones.zone_blocks * BLOCK_SIZE] = bytes(start + zones.zone_blocks * BLOCK_SIZE - first)
        outcomes.append(check_damaged(rig, model, bytes(damaged)))
    assert len(outcomes) > 4
    assert set(outcomes) <= {"refused", "harmless"}, outcomes
    assert outcomes.count("refused") >= len(outcomes) - 1, outcomes

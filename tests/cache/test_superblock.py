"""Superblocks: table, golden bytes, damage, geometry, and what is refused and why."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layout_tables
from forebay_cache.format import superblock as module
from forebay_cache.format.checkpoint import area_size
from forebay_cache.format.superblock import (
    SUPERBLOCK,
    ZONE_COUNT_MIN,
    DeviceRefusedError,
    Geometry,
    Refusal,
    Superblock,
    check_fits,
    choose,
    decode_superblock,
    encode_superblock,
    plan_geometry,
)
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError, ForebayError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, GIB, KIB, MIB, TIB

DEVICE = bytes(range(16))
NEWER = Superblock(DEVICE, 7, *plan_geometry(1 * GIB), 1_234_567_890)
BLOCK = encode_superblock(NEWER)
OLDER = encode_superblock(NEWER._replace(generation=6))
BLANK = bytes(BLOCK_SIZE)
FOREIGN = b"\x7fELF" + bytes(BLOCK_SIZE - 4)
DAMAGED = BLOCK[:200] + b"\1" + BLOCK[201:]


def sealed(block: bytes) -> bytes:
    """Return the block with a fresh checksum."""
    bare = block[:88] + bytes(8) + block[96:]
    return bare[:88] + checksum(bare).to_bytes(8, "little") + bare[96:]


OTHER_VERSION = sealed(BLOCK[:8] + b"\1" + BLOCK[9:])


def test_the_table_is_the_code() -> None:
    layout_tables.assert_matches(module, "Superblock", SUPERBLOCK)


def test_golden_bytes() -> None:
    assert BLOCK[:96].hex() == (
        "464f5242415930310200000000000000000102030405060708090a0b0c0d0e0f070000000000000000040000fa000000"
        "00200000000000000060bf00000000000040bf000000000000a07e0100000000d2029649000000001f788810755f0717"
    )
    assert BLOCK[96:] == bytes(BLOCK_SIZE - 96)


def test_what_was_encoded_is_decoded() -> None:
    assert decode_superblock(BLOCK, place="dev") == NEWER
    assert NEWER.geometry == plan_geometry(1 * GIB)


def test_any_flipped_bit_is_detected_and_the_other_copy_used() -> None:
    damaged = bytearray(BLOCK)
    for bit in range(BLOCK_SIZE * 8):
        damaged[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(DeviceRefusedError):
            decode_superblock(damaged, place="dev")
        damaged[bit >> 3] ^= 1 << (bit & 7)
    damaged[100] ^= 1
    assert choose(damaged, OLDER).generation == 6
    assert choose(OLDER, damaged).generation == 6


def test_the_higher_generation_wins() -> None:
    assert choose(OLDER, BLOCK) == choose(BLOCK, OLDER) == NEWER
    assert choose(BLANK, OLDER).generation == choose(OLDER, FOREIGN).generation == 6


@pytest.mark.parametrize(
    ("block_a", "block_b", "refusal"),
    [
        (BLANK, BLANK, Refusal.BLANK),
        (FOREIGN, BLANK, Refusal.FOREIGN),
        (BLANK, FOREIGN, Refusal.FOREIGN),
        (FOREIGN, FOREIGN, Refusal.FOREIGN),
        (DAMAGED, DAMAGED, Refusal.DAMAGED),
        (DAMAGED, BLANK, Refusal.DAMAGED),
        (FOREIGN, DAMAGED, Refusal.DAMAGED),
        (OTHER_VERSION, OTHER_VERSION, Refusal.OTHER_VERSION),
        (OTHER_VERSION, DAMAGED, Refusal.OTHER_VERSION),
    ],
)
def test_a_refused_device_says_why(block_a: bytes, block_b: bytes, refusal: Refusal) -> None:
    with pytest.raises(DeviceRefusedError) as caught:
        choose(block_a, block_b, place="/dev/sdx")
    assert caught.value.refusal is refusal
    assert isinstance(caught.value, ForebayError)
    assert "/dev/sdx" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_names_what_was_expected_and_found() -> None:
    with pytest.raises(DeviceRefusedError, match=r"expected checksum 0x[0-9a-f]+, found 0x[0-9a-f]+"):
        decode_superblock(DAMAGED, place="dev")
    with pytest.raises(DeviceRefusedError, match=r"expected magic 0x3130594142524f46, found 0x464c457f"):
        decode_superblock(FOREIGN, place="dev")
    with pytest.raises(DeviceRefusedError, match="format version 1, this program knows 2"):
        decode_superblock(OTHER_VERSION, place="dev")


@pytest.mark.parametrize("size", [0, 96, BLOCK_SIZE - 1, BLOCK_SIZE + 1])
def test_a_block_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(CorruptionError):
        decode_superblock((BLOCK * 2)[:size], place="dev")


GEOMETRY = NEWER.geometry


@pytest.mark.parametrize(
    "geometry",
    [
        GEOMETRY._replace(zone_blocks=63),
        GEOMETRY._replace(zone_blocks=4097),
        GEOMETRY._replace(zone_count=15),
        GEOMETRY._replace(zone_count=(1 << 32) - 1),
        GEOMETRY._replace(checkpoint_size=4096),
        GEOMETRY._replace(checkpoint_size=GEOMETRY.checkpoint_size + 1),
        GEOMETRY._replace(checkpoint_offsets=(0, GEOMETRY.checkpoint_offsets[1])),
        GEOMETRY._replace(checkpoint_offsets=(8192, 8192)),
        GEOMETRY._replace(zones_offset=8192),
    ],
)
def test_a_sealed_superblock_that_contradicts_itself_is_refused(geometry: Geometry) -> None:
    block = encode_superblock(Superblock(DEVICE, 1, *geometry, 0))
    with pytest.raises(DeviceRefusedError) as caught:
        decode_superblock(block, place="dev")
    assert caught.value.refusal is Refusal.DAMAGED


@pytest.mark.parametrize("at", [10, 15, 96, BLOCK_SIZE - 1])
def test_used_reserved_bytes_are_refused(at: int) -> None:
    with pytest.raises(DeviceRefusedError):
        decode_superblock(sealed(BLOCK[:at] + b"\1" + BLOCK[at + 1 :]), place="dev")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 16 * TIB), st.integers(64, 4096))
def test_a_planned_geometry_fits_and_wastes_less_than_a_zone(size: int, zone_blocks: int) -> None:
    try:
        geometry = plan_geometry(size, zone_blocks)
    except WrongUsageError:
        # Too small for 16 zones and two checkpoint areas.
        assert size < ZONE_COUNT_MIN * zone_blocks * BLOCK_SIZE * 2 + 8 * MIB
        return
    assert geometry.zone_count >= ZONE_COUNT_MIN
    assert geometry.size <= size
    assert size - geometry.size < zone_blocks * BLOCK_SIZE * 2
    assert geometry.checkpoint_size >= area_size(geometry.place_count, geometry.zone_count)
    parts = (*geometry.checkpoint_offsets, geometry.zones_offset)
    assert [part % BLOCK_SIZE for part in parts] == [0, 0, 0]
    assert parts[0] == 2 * BLOCK_SIZE
    assert parts[1] - parts[0] == parts[2] - parts[1] == geometry.checkpoint_size


def test_an_impossible_device_is_refused_with_what_is_needed() -> None:
    with pytest.raises(WrongUsageError, match="needs at least 72531968 bytes"):
        plan_geometry(64 * MIB)
    assert plan_geometry(72531968).zone_count == ZONE_COUNT_MIN
    with pytest.raises(WrongUsageError, match="needs at least"):
        plan_geometry(0)
    with pytest.raises(WrongUsageError, match=r"zone size 128 KiB: use 256 KiB to 16 MiB"):
        plan_geometry(1 * GIB, 128 * KIB // BLOCK_SIZE)
    with pytest.raises(WrongUsageError, match="too large"):
        plan_geometry(20 * TIB)


def test_a_device_that_became_smaller_is_refused() -> None:
    check_fits(NEWER, NEWER.geometry.size, place="dev")
    with pytest.raises(DeviceRefusedError, match="was cut short"):
        check_fits(NEWER, NEWER.geometry.size - 1, place="dev")

"""Frames: layout, golden bytes, and that no damage ever comes out as data."""

import random
import struct

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import layout_tables
from forebay_core import frame as module
from forebay_core.checksums import block_checksums, checksum
from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent, from_blocks
from forebay_core.frame import (
    CODEC_RAW,
    CODEC_ZSTD,
    FRAME_BLOCKS_MAX,
    FRAME_HEADER,
    FRAME_SIZE_MAX,
    FrameBuilder,
    check_stored,
    decode_header,
    encode_frame,
    open_frame,
)
from forebay_core.units import BLOCK_SIZE, LBA_MAX

ONE = [Extent(7, 1)]
TEXT = (b"the same again " * 300)[:BLOCK_SIZE]
NOISE = random.Random(1).randbytes(BLOCK_SIZE)


def opened(packed: bytes, offset: int = 0) -> bytes:
    header = decode_header(packed, offset, place="test")
    return open_frame(header, check_stored(header, packed, offset, place="test"), place="test")


def test_the_table_is_the_struct() -> None:
    layout_tables.assert_matches(module, "Frame header", FRAME_HEADER)


def test_a_raw_frame_is_what_it_always_was() -> None:
    packed = encode_frame(CODEC_RAW, [Extent(1, 1), Extent(9, 1)], [3, 4], b"stored")
    assert packed.hex() == (
        "4642465200000202000000000000000000000000000000000600000000000000d032e8f339439081a44cabce3b700274"
        "0100000000000000010000000900000000000000010000000300000000000000040000000000000073746f726564"
    )


@pytest.mark.parametrize(("plain", "codec"), [(TEXT, CODEC_ZSTD), (NOISE, CODEC_RAW)])
def test_what_compresses_is_compressed(plain: bytes, codec: int) -> None:
    packed = FrameBuilder().build(ONE, plain)
    header = decode_header(packed, place="test")
    assert header.codec == codec
    assert header.size == len(packed) <= FRAME_SIZE_MAX
    assert opened(packed) == plain


@settings(deadline=None, derandomize=True)
@given(
    lbas=st.sets(st.integers(0, 60) | st.integers(LBA_MAX - 10, LBA_MAX), min_size=1, max_size=FRAME_BLOCKS_MAX),
    seed=st.integers(0, 1000),
    zeros=st.integers(0, BLOCK_SIZE),
    offset=st.integers(0, 9),
)
def test_blocks_come_out_as_they_went_in(lbas: set[int], seed: int, zeros: int, offset: int) -> None:
    extents = from_blocks(sorted(lbas))
    plain = (random.Random(seed).randbytes(BLOCK_SIZE - zeros) + bytes(zeros)) * len(lbas)
    packed = FrameBuilder().build(extents, plain)
    header = decode_header(bytes(offset) + packed + b"behind", offset, place="test")
    assert list(header.extents) == extents
    assert list(header.checksums) == block_checksums(plain).tolist()
    assert (header.size, header.block_count) == (len(packed), len(lbas))
    assert opened(bytes(offset) + packed + b"behind", offset) == plain


@pytest.mark.parametrize("plain", [TEXT, NOISE])
def test_every_flipped_bit_is_noticed(plain: bytes) -> None:
    packed = FrameBuilder().build(ONE, plain)
    step = 1 if len(packed) < 1000 else 37
    head = (FRAME_HEADER.size + 20) * 8
    for bit in [*range(head), *range(head, len(packed) * 8, step)]:
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError) as caught:
            opened(bytes(flipped))
        assert "test" in caught.value.place


def test_every_truncation_is_noticed() -> None:
    packed = FrameBuilder().build(ONE, TEXT)
    for size in range(len(packed)):
        with pytest.raises(CorruptionError):
            opened(packed[:size])


def test_checksums_that_came_with_the_blocks_are_kept_and_compared() -> None:
    packed = FrameBuilder().build(ONE, NOISE, [checksum(NOISE) ^ 1])
    with pytest.raises(CorruptionError, match="block checksum in test block 0"):
        opened(packed)


def sealed(**fields: int) -> bytes:
    """Return a frame whose checksums are right but whose meaning is not."""
    values = {
        "codec": 0,
        "cipher": 0,
        "blocks": 1,
        "extents": 1,
        "size": BLOCK_SIZE,
        "reserved": 0,
        "start": 7,
        "count": 1,
    }
    values |= fields
    stored = NOISE + bytes(max(0, values["size"] - BLOCK_SIZE))
    stored = stored[: values["size"]]
    tables = struct.pack("<QI", values["start"], values["count"]) * values["extents"]
    tables += struct.pack("<Q", checksum(NOISE)) * values["blocks"]
    prefix = struct.pack(
        "<IBBBBI12sIIQ",
        module.FRAME_MAGIC,
        values["codec"],
        values["cipher"],
        values["blocks"],
        values["extents"],
        0,
        bytes(12),
        values["size"],
        values["reserved"],
        checksum(stored),
    )
    return prefix + struct.pack("<Q", checksum(prefix + tables)) + tables + stored


def test_the_forged_frame_is_good_before_it_is_changed() -> None:
    assert opened(sealed()) == NOISE
    assert opened(sealed(start=LBA_MAX)) == NOISE


@pytest.mark.parametrize(
    "fields",
    [
        {"codec": 2},
        {"codec": CODEC_ZSTD},
        {"cipher": 1},
        {"blocks": 0},
        {"blocks": 17},
        {"blocks": 2},
        {"extents": 0},
        {"extents": 2},
        {"extents": 2, "blocks": 2},
        {"count": 0},
        {"count": 2},
        {"start": LBA_MAX + 1},
        {"start": LBA_MAX, "count": 2, "blocks": 2},
        {"start": 2**64 - 1},
        {"reserved": 1},
        {"size": 0},
        {"size": BLOCK_SIZE - 1},
        {"size": BLOCK_SIZE + 1},
    ],
)
def test_a_frame_that_makes_no_sense_is_corruption(fields: dict[str, int]) -> None:
    with pytest.raises(CorruptionError):
        opened(sealed(**fields))


def test_a_zip_bomb_stays_small() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    lying = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    for stored in (bomb, lying):
        with pytest.raises(CorruptionError, match="plain size"):
            opened(encode_frame(CODEC_ZSTD, ONE, [1], stored))


def test_a_builder_is_given_blocks_that_fit_its_extents() -> None:
    with pytest.raises(AssertionError):
        FrameBuilder().build([Extent(0, 2)], NOISE)
    with pytest.raises(AssertionError):
        FrameBuilder().build([Extent(0, FRAME_BLOCKS_MAX + 1)], bytes((FRAME_BLOCKS_MAX + 1) * BLOCK_SIZE))


@settings(derandomize=True)
@given(st.binary(max_size=400))
def test_garbage_is_corruption(garbage: bytes) -> None:
    with pytest.raises(CorruptionError):
        opened(garbage)

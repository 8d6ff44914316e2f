"""Checksums of blocks, and the test for zeros, against plain Python."""

import platform
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_core import checksums
from forebay_core.checksums import (
    ZERO_BLOCK,
    ZERO_CHECKSUM,
    are_sound,
    block_checksums,
    checksum,
    is_zero,
    sum_blocks,
    zero_blocks,
)
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE

native = checksums._sums


def test_the_checksum_is_xxh3_64_and_stays_so() -> None:
    assert checksum(b"") == 0x2D06800538D394C2
    assert checksum(b"forebay") == 0x37943E07B6564785
    assert checksum(ZERO_BLOCK) == ZERO_CHECKSUM == 0x93D76FE148C689BA


@settings(derandomize=True, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=16), at=st.integers(0, BLOCK_SIZE - 1))
def test_zero_blocks_are_told_from_others(flags: list[bool], at: int) -> None:
    other = bytearray(BLOCK_SIZE)
    other[at] = 1
    buffer = b"".join(ZERO_BLOCK if flag else bytes(other) for flag in flags)
    assert zero_blocks(buffer).tolist() == flags
    assert block_checksums(buffer).tolist() == [checksum(ZERO_BLOCK if flag else bytes(other)) for flag in flags]
    for form in (buffer, bytearray(buffer), memoryview(b"x" + buffer)[1:]):
        assert is_zero(form) is all(flags)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 512, 4095, 4097, 65536])
def test_zeros_of_any_size_are_zeros(size: int) -> None:
    assert is_zero(bytes(size))
    assert not is_zero(bytes(size) + b"\x01")


def test_the_native_sums_were_built_where_there_is_a_compiler() -> None:
    if shutil.which("gcc") is None or platform.machine() != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the twin does the work")
    assert native is not None, "install again: .venv/bin/pip install --editable ."


needs_native = pytest.mark.skipif(native is None, reason="there is no compiler here, or no AVX2")


@needs_native
@settings(derandomize=True, deadline=None)
@given(seed=st.integers(0, 1 << 32), count=st.integers(0, 9), shift=st.integers(0, 9))
def test_native_sums_are_those_of_the_twin(seed: int, count: int, shift: int) -> None:
    blocks = memoryview(random.Random(seed).randbytes(shift + count * BLOCK_SIZE))[shift:]
    sums, expected = np.zeros(count, np.uint64), np.ones(count, np.uint64)
    native.sum_blocks(blocks, sums)
    sum_blocks(blocks, expected)
    assert sums.tolist() == expected.tolist()


JUDGES = [are_sound, *([] if native is None else [native.are_sound])]


@pytest.mark.parametrize("judge", JUDGES)
def test_blocks_are_sound_until_any_byte_of_them_or_of_their_sums_is_another(judge) -> None:
    plain = random.Random(3).randbytes(5 * BLOCK_SIZE)
    sums = block_checksums(plain)
    assert judge(plain, sums.data)
    assert judge(b"", b"")
    for at in (0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE + 2000, 5 * BLOCK_SIZE - 1):
        other = bytearray(plain)
        other[at] ^= 1
        assert not judge(other, sums.data)
    for at in range(sums.nbytes):
        found = bytearray(sums.tobytes())
        found[at] ^= 128
        assert not judge(plain, found)


@pytest.mark.parametrize("judge", JUDGES)
def test_sums_that_are_not_one_for_each_block_are_refused(judge) -> None:
    for size in (0, 8, 24):
        with pytest.raises(ValueError, match="8 bytes for each"):
            judge(bytes(2 * BLOCK_SIZE), bytes(size))


@needs_native
@pytest.mark.parametrize("size", [BLOCK_SIZE - 1, BLOCK_SIZE + 1, 2 * BLOCK_SIZE])
def test_native_sums_refuse_arrays_that_do_not_fit_the_blocks(size: int) -> None:
    with pytest.raises(ValueError, match="8 bytes for each"):
        native.sum_blocks(bytes(size), np.zeros(1, np.uint64))


def test_half_a_block_has_no_block_checksum() -> None:
    with pytest.raises(AssertionError):
        block_checksums(bytes(BLOCK_SIZE + 1))


def test_corruption_names_place_and_both_values() -> None:
    error = CorruptionError(place="segment 7 offset 4096", what="frame", expected=0xABC, found="nothing")
    assert str(error) == "corrupt frame in segment 7 offset 4096: expected 0xabc, found 'nothing'"
    assert (error.expected, error.found) == (0xABC, "nothing")

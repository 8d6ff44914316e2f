"""Writing a range out ahead of its sync."""

import ctypes
import os
from pathlib import Path

import pytest

from forebay_cache.service.writeback import begin_writeback

SIZE = 8192
FIRST = 16384
SECOND = 1 << 20
_CACHESTAT = 451


def unwritten_pages(fd: int, offset: int, size: int) -> int:
    """Return how many pages of a range are dirty, and not on their way to the disk."""
    asked = (ctypes.c_uint64 * 2)(offset, size)
    told = (ctypes.c_uint64 * 5)()  # in memory, dirty, on their way, evicted, evicted recently
    if ctypes.CDLL(None, use_errno=True).syscall(_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(told), 0):
        pytest.skip("the kernel has no cachestat")
    return told[1]


def test_a_range_begins_to_be_written_out_and_no_other(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        fd = file.fileno()
        for offset in (FIRST, SECOND):
            os.pwrite(fd, b"x" * SIZE, offset)
        if unwritten_pages(fd, FIRST, SIZE) == 0:
            pytest.skip("this file system has no dirty pages")
        begin_writeback(fd, FIRST, SIZE)
        assert unwritten_pages(fd, FIRST, SIZE) == 0
        assert unwritten_pages(fd, SECOND, SIZE) > 0
        assert os.pread(fd, SIZE, FIRST) == os.pread(fd, SIZE, SECOND) == b"x" * SIZE


def test_what_cannot_be_written_out_is_left_to_the_sync() -> None:
    ours, theirs = os.pipe()
    try:
        begin_writeback(ours, 0, 4096)
        begin_writeback(-1, 0, 4096)
    finally:
        os.close(ours)
        os.close(theirs)

"""A new cache file has no unwritten extents left, and the tables of what the kernel is asked are as the code says."""

import errno
import os
from pathlib import Path

import pytest

import layout_tables
from forebay_cache.service import zeroing
from forebay_cache.service.device_file import open_device
from forebay_cache.service.zeroing import EXTENT, REQUEST, UNWRITTEN, find_extents, write_zeros_once
from forebay_core.units import MIB

SIZE = 8 * MIB


def unwritten(fd: int) -> int:
    """Return the bytes that are allocated and unwritten."""
    return sum(size for _, _, size, flags in find_extents(fd, 0, SIZE) if flags & UNWRITTEN)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A file that is allocated and unwritten but for one block in the middle; skips where that can't be seen."""
    path = tmp_path / "device"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        os.pwrite(file.fileno(), b"x" * 4096, SIZE // 2)
        if not unwritten(file.fileno()):
            pytest.skip("this file system does not tell of unwritten extents")
    return path


def test_the_tables_are_as_the_code_says() -> None:
    layout_tables.assert_matches(zeroing, "FIEMAP request", REQUEST)
    layout_tables.assert_matches(zeroing, "FIEMAP extent", EXTENT)


def test_only_what_was_unwritten_is_written(fresh: Path) -> None:
    with fresh.open("r+b") as file:
        write_zeros_once(file.fileno(), fresh, SIZE)
        assert unwritten(file.fileno()) == 0
    assert fresh.read_bytes() == bytes(SIZE // 2) + b"x" * 4096 + bytes(SIZE // 2 - 4096)


def test_a_new_device_has_nothing_unwritten(fresh: Path) -> None:
    path = fresh.with_name("new")
    file = open_device(path, SIZE)
    try:
        assert file.blank and unwritten(file.fd) == 0
    finally:
        os.close(file.fd)
    assert path.read_bytes() == bytes(SIZE)


def test_a_file_system_that_does_not_tell_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    path = tmp_path / "device"
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        monkeypatch.setattr("fcntl.ioctl", ioctl)
        write_zeros_once(file.fileno(), path, SIZE)
        assert os.fstat(file.fileno()).st_size == SIZE

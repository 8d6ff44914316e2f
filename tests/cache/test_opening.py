"""Opening a device that is not quite whole: what is used, what is told, what is refused."""

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from forebay_cache.engine.recovery import Recovered
from forebay_cache.service.device_file import open_device
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.opening import recover_device
from forebay_core.checksums import checksum
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, MIB


def opened(path: Path, size: int | None = None) -> Recovered:
    file = open_device(path, size)
    try:
        return recover_device(file, zone_size=256 * 1024, format_anew=False, mark=FailureMark(path.parent, file.fd))
    finally:
        os.close(file.fd)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    opened(tmp_path / "cache", 8 * MIB)
    return tmp_path / "cache"


def wear_out(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Let the kernel give read errors for blocks at these offsets."""
    real_pread, real_preadv = os.pread, os.preadv

    def check(offset: int, size: int) -> None:
        if any(offset <= at < offset + size for at in bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pread(fd: int, size: int, offset: int) -> bytes:
        check(offset, size)
        return real_pread(fd, size, offset)

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        check(offset, sum(one.nbytes for one in buffers))
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("index", [0, 1])
def test_an_unreadable_superblock_is_no_harm(
    index: int, device: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wear_out(monkeypatch, index * BLOCK_SIZE)
    assert opened(device).point.position == 1
    assert f"superblock {'AB'[index]}" in caplog.text and "Input/output error" in caplog.text


def test_two_unreadable_superblocks_are_refused(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wear_out(monkeypatch, 0, BLOCK_SIZE)
    with pytest.raises(ForebayError, match=r"superblock A: can't be read.*--format"):
        opened(device)


def test_an_unreadable_checkpoint_without_another_is_refused_with_its_place(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wear_out(monkeypatch, 2 * BLOCK_SIZE)
    with pytest.raises(ForebayError, match=rf"offset {2 * BLOCK_SIZE}: can't be read.*forebay cache salvage"):
        opened(device)


def test_a_device_that_failed_is_read_from_the_disk_and_not_from_memory(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noting(name: str) -> None:
        real = getattr(os, name)

        def noted(*arguments: object) -> object:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)

    for name in ("fdatasync", "posix_fadvise", "preadv"):
        noting(name)
    mark_of(device).set()
    opened(device)
    assert calls[:3] == ["fdatasync", "posix_fadvise", "preadv"]
    assert not mark_of(device).is_set
    calls.clear()
    opened(device)
    assert "posix_fadvise" not in calls


def test_the_mark_of_a_device_that_failed_stays_until_it_was_recovered(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_of(device).set()
    with monkeypatch.context() as patched:
        wear_out(patched, 2 * BLOCK_SIZE)
        with pytest.raises(ForebayError):
            opened(device)
    assert mark_of(device).is_set
    opened(device)
    assert not mark_of(device).is_set


def test_a_sync_that_fails_at_the_start_leaves_the_mark(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed daemon had written may fail only then, and the start after it must not believe a second sync."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(ForebayError, match="can't be read or written"):
            opened(device)
    assert mark_of(device).is_set


def test_a_mark_is_of_one_device(device: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    mark_of(device).set()
    assert not mark_of(other).is_set
    device.rename(tmp_path / "renamed")
    assert mark_of(tmp_path / "renamed").is_set


@pytest.mark.parametrize(("index", "content"), [(0, b"\xff"), (1, b"\xff"), (0, bytes(BLOCK_SIZE)), (1, b"LABELONE")])
def test_a_damaged_superblock_is_told_with_both_values_and_written_anew(
    index: int, content: bytes, device: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = device.read_bytes()[: 2 * BLOCK_SIZE]
    with device.open("r+b") as file:
        file.seek(index * BLOCK_SIZE + (0 if len(content) > 1 else 100))
        file.write(content)
    opened(device)
    (told,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert f"{device} superblock {'AB'[index]}: " in told and ("expected" in told or "blank" in told)
    assert device.read_bytes()[: 2 * BLOCK_SIZE] == before
    caplog.clear()
    opened(device)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_superblock_that_cannot_be_written_anew_is_told_and_no_harm(
    device: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with device.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")

    def fail(fd: int, block: bytes, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    opened(device)
    assert "superblock A: can't be written (Input/output error)" in caplog.text


def test_a_superblock_of_another_version_is_not_overwritten(device: Path) -> None:
    block = bytearray(device.read_bytes()[:BLOCK_SIZE])
    block[8] += 1
    block[88:96] = bytes(8)
    block[88:96] = checksum(block).to_bytes(8, "little")
    with device.open("r+b") as file:
        file.write(block)
    opened(device)
    assert device.read_bytes()[:BLOCK_SIZE] == block


def mark_of(path: Path) -> FailureMark:
    with path.open("rb") as file:
        return FailureMark(path.parent, file.fileno())

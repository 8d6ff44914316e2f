"""Opening a device that is not quite whole: what is used, what is told, what is refused."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from forebay_cache.engine.recovery import Recovered
from forebay_cache.service.device_file import open_device
from forebay_cache.service.opening import recover_device
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, MIB


def opened(path: Path, size: int | None = None) -> Recovered:
    file = open_device(path, size)
    try:
        return recover_device(file, zone_size=256 * 1024, format_anew=False)
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

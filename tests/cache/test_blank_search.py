"""Which devices are formatted unasked: those that hold nothing, or what an interrupted formatting of ours left."""

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forebay_cache.engine.recovery import blank_device
from forebay_cache.format.superblock import SUPERBLOCK_COUNT, Superblock, plan_geometry
from forebay_cache.service import blank_search
from forebay_cache.service.device_file import DeviceFile, open_device
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.opening import recover_device
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, MIB

SIZE = 24 * MIB
ZONE_SIZE = 256 * 1024
FOREIGN = {
    "a raw image that begins with zeros": (10 * MIB, b"content"),
    "btrfs": (65600, b"_BHRfS_M"),
    "ISO 9660": (32769, b"CD001"),
    "its last byte": (SIZE - 1, b"x"),
    "the header's place": (SUPERBLOCK_COUNT * BLOCK_SIZE, b"swap"),
}


@contextmanager
def opened(path: Path) -> Iterator[DeviceFile]:
    file = open_device(path, None)
    try:
        yield file
    finally:
        os.close(file.fd)


def sparse(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", FOREIGN)
def test_something_elses_bytes_behind_zeros_are_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    offset, content = FOREIGN[name]
    path = sparse(tmp_path / "image")
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(content)
    before = path.read_bytes()
    with opened(path) as file, pytest.raises(ForebayError, match=f"other bytes at offset {offset & ~4095}.*--format"):
        recover_device(file, zone_size=ZONE_SIZE, format_anew=False, mark=FailureMark(path.parent, file.fd))
    assert path.read_bytes() == before
    with opened(path) as file:
        recover_device(file, zone_size=ZONE_SIZE, format_anew=True, mark=FailureMark(path.parent, file.fd))
    with opened(path) as file:
        recover_device(file, zone_size=ZONE_SIZE, format_anew=False, mark=FailureMark(path.parent, file.fd))


def test_zeros_that_were_written_are_blank(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(SIZE))
    with opened(path) as file:
        assert file.blank
        recover_device(file, zone_size=ZONE_SIZE, format_anew=False, mark=FailureMark(path.parent, file.fd))


@pytest.mark.parametrize("zone_size", [ZONE_SIZE, MIB])
def test_what_an_interrupted_formatting_left_is_formatted_anew(zone_size: int, tmp_path: Path) -> None:
    """Each subset of what it writes before the superblocks is what a power cut may leave."""
    geometry = plan_geometry(SIZE, ZONE_SIZE // BLOCK_SIZE)
    body = blank_device(Superblock(os.urandom(16), 1, *geometry, 1))[:-SUPERBLOCK_COUNT]
    for mask in range(1 << len(body)):
        path = sparse(tmp_path / "device")
        with path.open("r+b") as device:
            for index, (offset, block) in enumerate(body):
                if mask >> index & 1:
                    device.seek(offset)
                    device.write(block)
        with opened(path) as file:
            assert file.blank, f"{mask:b}"
            assert (
                recover_device(
                    file, zone_size=zone_size, format_anew=False, mark=FailureMark(path.parent, file.fd)
                ).point.position
                == 1
            )


def test_an_interrupted_formatting_of_a_used_device_must_be_asked_for_again(tmp_path: Path) -> None:
    path = sparse(tmp_path / "device")
    with path.open("r+b") as device:
        device.seek(8 * MIB)
        device.write(random.Random(1).randbytes(BLOCK_SIZE))
    with opened(path) as file, pytest.raises(ForebayError, match="--format"):
        recover_device(file, zone_size=ZONE_SIZE, format_anew=False, mark=FailureMark(path.parent, file.fd))


@pytest.mark.parametrize("size", [BLOCK_SIZE, 3 * MIB, 9 * MIB, 100 * MIB])
def test_of_a_block_device_both_ends_and_blocks_in_between_are_looked_at(size: int) -> None:
    places = list(blank_search._sampled(size))
    assert places[0][0] == 0 and places[-1][1] == size
    assert all(0 <= start < end <= size for start, end in places)
    assert len(places) <= 2 * blank_search.SAMPLES + 2
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(places)]
    assert max(gaps, default=0) <= max(size // blank_search.SAMPLES, BLOCK_SIZE)

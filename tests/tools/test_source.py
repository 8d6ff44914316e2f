"""What is read of an image: every block that is not zero, once, in frames that open again."""

import os
import random
from pathlib import Path

import pytest

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.frame import check_stored, decode_header, open_frame
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_tools.source import GROUP_SIZE, PART_SIZE, Part, RawSource, detect_format
from forebay_wire.limits import PAYLOAD_SIZE_MAX


def rebuild(parts: list[Part], size: int) -> bytes:
    """Return the image that the frames of the parts make, after checking each frame."""
    image = bytearray(size)
    seen: set[int] = set()
    for part in parts:
        assert sum(map(len, part.frames)) <= PAYLOAD_SIZE_MAX
        assert 0 < part.blocks * BLOCK_SIZE <= PART_SIZE
        count = 0
        for frame in part.frames:
            header = decode_header(frame, place="frame")
            plain = open_frame(header, check_stored(header, frame, place="frame"), place="frame")
            lbas = [lba for extent in header.extents for lba in range(extent.start, extent.end)]
            assert len({lba // 16 for lba in lbas}) == 1, "a frame holds blocks of one group only"
            assert not seen & set(lbas)
            seen.update(lbas)
            count += len(lbas)
            for index, lba in enumerate(lbas):
                block = plain[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
                assert any(block), "zero blocks are left out"
                image[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE] = block
        assert count == part.blocks
    return bytes(image)


def read_parts(path: Path) -> tuple[list[Part], RawSource]:
    source = RawSource(path)
    try:
        return list(source.parts()), source
    finally:
        source.close()


def sparse_image(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    image = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, piece in pieces:
            file.seek(offset)
            file.write(piece)
            image[offset : offset + len(piece)] = piece
    return bytes(image)


@pytest.mark.parametrize("size", [1, 511, 4095, 4096, 4097, GROUP_SIZE - 1, GROUP_SIZE + 1, 3 * MIB + 12345])
def test_odd_sizes_are_padded_with_zeros_to_whole_blocks(tmp_path: Path, size: int) -> None:
    plain = random.Random(size).randbytes(size)
    path = tmp_path / "image"
    path.write_bytes(plain)
    parts, source = read_parts(path)
    padded = -(-size // BLOCK_SIZE) * BLOCK_SIZE
    assert source.size == padded
    assert rebuild(parts, padded) == plain.ljust(padded, b"\0")
    assert parts[-1].done == source.data_size


@pytest.mark.parametrize("seed", range(8))
def test_every_data_block_comes_once_and_zeros_never(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    size = 40 * MIB
    pieces = []
    for _ in range(chance.randint(1, 60)):
        length = chance.choice([1, 100, 4096, 8192, GROUP_SIZE, 300_000])
        plain = chance.choice([bytes(length), chance.randbytes(length), b"text" * (length // 4 + 1)])
        pieces.append((chance.randrange(size - 400_000), plain))
    image = sparse_image(tmp_path / "image", size, pieces)
    parts, _ = read_parts(tmp_path / "image")
    assert rebuild(parts, size) == image


def test_parts_are_full_when_the_image_is(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(20 * MIB))
    parts, _ = read_parts(path)
    assert [part.blocks * BLOCK_SIZE for part in parts] == [8 * MIB, 8 * MIB, 4 * MIB]
    assert parts[0].frames[1][48:60] == Extent(16, 16).start.to_bytes(8, "little") + (16).to_bytes(4, "little")


def test_holes_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"x", 5 * MIB)
        os.pwrite(file.fileno(), b"y", (1 << 40) - 1)
    parts, source = read_parts(tmp_path / "image")
    assert source.data_size <= 4 * MIB
    assert [part.blocks for part in parts] == [2]


def test_an_image_of_holes_has_no_parts(tmp_path: Path) -> None:
    sparse_image(tmp_path / "image", 10 * MIB, [])
    assert read_parts(tmp_path / "image")[0] == []


def test_a_file_that_is_written_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(20 * MIB))
    source = RawSource(path)
    parts = source.parts()
    next(parts)
    with path.open("r+b") as file:
        file.write(b"new")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ForebayError, match="was written while being imported"):
        list(parts)
    source.close()


def test_a_file_that_is_written_meanwhile_is_refused_even_if_its_time_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(20 * MIB))
    source = RawSource(path)
    before = path.stat()
    parts = source.parts()
    next(parts)
    with path.open("r+b") as file:
        file.write(b"new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ForebayError, match="was written while being imported"):
        list(parts)
    source.close()


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(20 * MIB))
    source = RawSource(path)
    parts = source.parts()
    next(parts)
    os.truncate(path, 9 * MIB)
    with pytest.raises(ForebayError, match="import again"):
        list(parts)
    source.close()


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ForebayError, match="at least one"):
        RawSource(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ForebayError, match="neither a file nor a block device"):
            RawSource(path)


@pytest.mark.parametrize(
    ("first", "kind"),
    [(b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"\x1f\x8b\x08", "gzip"), (bytes(64) + b"\x7f\x10\xda\xbe", "VDI")],
)
def test_other_formats_are_named_and_refused(tmp_path: Path, first: bytes, kind: str) -> None:
    (tmp_path / "image").write_bytes(first.ljust(4096, b"\0"))
    with pytest.raises(ForebayError, match=f"looks like a {kind}"):
        detect_format(tmp_path / "image")


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(b"plain")
    (tmp_path / "b.raw").write_bytes(b"QFI\xfb")
    assert detect_format(tmp_path / "a.qcow2") == "raw"
    assert detect_format(tmp_path / "b.raw") == "qcow2"

"""The images that an incremental export writes: sound to qemu-img, and byte for byte when laid over the older state."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, GIB, KIB, MIB, TIB
from forebay_tools import qcow2_writer
from forebay_tools.qcow2_map import held_runs
from forebay_tools.qcow2_tables import L1_SIZE_MAX
from forebay_tools.qcow2_writer import HEADER, Qcow2Writer, cluster_bits_for

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def qemu_img(*words: object) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def written(path: Path, size: int, add: Callable[[Qcow2Writer], None], *, cluster_bits: int | None = None) -> Path:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        writer = Qcow2Writer(descriptor, size, cluster_bits=cluster_bits)
        add(writer)
        writer.finish()
    finally:
        os.close(descriptor)
    return path


def runs_of(path: Path) -> list[tuple[int, int, bool]]:
    """Return the image's runs, touching ones of a kind joined."""
    joined: list[tuple[int, int, bool]] = []
    with path.open("rb") as file:
        for (start, count), zero in held_runs(file.fileno(), str(path)):
            if joined and joined[-1][0] + joined[-1][1] == start and joined[-1][2] == zero:
                joined[-1] = (joined[-1][0], joined[-1][1] + count, zero)
            else:
                joined.append((start, count, zero))
    return joined


def lay_over(base: Path, increment: Path, out: Path) -> bytes:
    """Return what qemu-img makes of an increment with its base below it."""
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", base, "-F", "raw", increment)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", increment, out)
    return out.read_bytes()


class Scatter:
    """Adds random clusters to an image, and knows what the image shows over a base."""

    def __init__(self, size: int, seed: int) -> None:
        self._chance = random.Random(seed)
        self._blocks = size // BLOCK_SIZE
        self.base = self._chance.randbytes(BLOCK_SIZE) * self._blocks
        self.expected = bytearray(self.base)
        self.runs: list[tuple[int, int, bool]] = []

    def __call__(self, writer: Qcow2Writer) -> None:
        at = 0
        while at < self._blocks:
            clusters = self._chance.choice([1, 1, 2, 5, 40, 600, 1500])
            end = min(at + clusters * writer.cluster_blocks, self._blocks)
            extent = Extent(at, end - at)
            kind = self._chance.choice(["left out", "zeros", "data"])
            if kind == "zeros":
                writer.add_zeros(extent)
                self._expect(extent, bytes(extent.count * BLOCK_SIZE), zero=True)
            elif kind == "data":
                plain = self._chance.randbytes(extent.count * BLOCK_SIZE)
                for piece, offset in writer.add_data(extent):
                    begin = (piece.start - extent.start) * BLOCK_SIZE
                    writer.write(offset, plain[begin : begin + piece.count * BLOCK_SIZE])
                self._expect(extent, plain, zero=False)
            at = end

    def _expect(self, extent: Extent, plain: bytes, *, zero: bool) -> None:
        self.expected[extent.start * BLOCK_SIZE : extent.end * BLOCK_SIZE] = plain
        if self.runs and self.runs[-1][0] + self.runs[-1][1] == extent.start and self.runs[-1][2] == zero:
            start = self.runs.pop()[0]
            extent = Extent(start, extent.end - start)
        self.runs.append((extent.start, extent.count, zero))


def test_the_header_table_matches_the_struct() -> None:
    rows = [line.split() for line in (qcow2_writer.__doc__ or "").splitlines() if line.strip()[:1].isdigit()]
    offset, letters = 0, ""
    for row in rows:
        assert int(row[0]) == offset
        assert int(row[1]) == {"u32": 4, "u64": 8}[row[2]]
        letters += {"u32": "I", "u64": "Q"}[row[2]]
        offset += int(row[1])
    assert (offset, ">" + letters) == (HEADER.size, HEADER.format)


@needs_qemu_img
@pytest.mark.parametrize("cluster_bits", [None, 13, 16])
@pytest.mark.parametrize("seed", range(3))
def test_an_increment_over_its_base_is_the_newer_state(tmp_path: Path, seed: int, cluster_bits: int | None) -> None:
    size = 48 * MIB + seed * 3 * BLOCK_SIZE
    scatter = Scatter(size, seed)
    (tmp_path / "base").write_bytes(scatter.base)
    image = written(tmp_path / "inc", size, scatter, cluster_bits=cluster_bits)
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", image)
    assert lay_over(tmp_path / "base", image, tmp_path / "out") == scatter.expected


@pytest.mark.parametrize("cluster_bits", [None, 13, 16])
@pytest.mark.parametrize("seed", range(3))
def test_the_map_of_an_increment_is_what_was_added(tmp_path: Path, seed: int, cluster_bits: int | None) -> None:
    size = 48 * MIB + seed * 3 * BLOCK_SIZE
    scatter = Scatter(size, seed)
    assert runs_of(written(tmp_path / "inc", size, scatter, cluster_bits=cluster_bits)) == scatter.runs


def test_scattered_blocks_cost_little_more_than_themselves(tmp_path: Path) -> None:
    def add(writer: Qcow2Writer) -> None:
        for lba in range(0, GIB // BLOCK_SIZE, 64):
            for _, offset in writer.add_data(Extent(lba, 1)):
                writer.write(offset, b"x" * BLOCK_SIZE)

    image = written(tmp_path / "inc", GIB, add)
    assert image.stat().st_size <= (GIB // BLOCK_SIZE // 64) * BLOCK_SIZE * 1.2


@needs_qemu_img
def test_a_trimmed_tebibyte_is_a_small_image(tmp_path: Path) -> None:
    whole = Extent(0, TIB // BLOCK_SIZE)
    image = written(tmp_path / "inc", TIB, lambda writer: writer.add_zeros(whole))
    assert image.stat().st_size <= 5 * MIB
    assert runs_of(image) == [(0, whole.count, True)]
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", image)


@needs_qemu_img
def test_an_increment_without_changes_is_an_image_too(tmp_path: Path) -> None:
    image = written(tmp_path / "inc", MIB, lambda writer: None)
    assert runs_of(image) == []
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", image)
    (tmp_path / "base").write_bytes(b"b" * MIB)
    assert lay_over(tmp_path / "base", image, tmp_path / "out") == b"b" * MIB


@needs_qemu_img
def test_one_whole_table_of_zeros_is_not_shared(tmp_path: Path) -> None:
    image = written(tmp_path / "inc", 4 * MIB, lambda writer: writer.add_zeros(Extent(0, 512)))
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", image)
    assert runs_of(image) == [(0, 512, True)]


def test_clusters_are_as_small_as_the_largest_table_allows() -> None:
    for size in (BLOCK_SIZE, GIB, 8 * TIB, 8 * TIB + BLOCK_SIZE, 2048 * TIB, 4096 * TIB):
        bits = cluster_bits_for(size)
        assert size <= L1_SIZE_MAX // 8 << (2 * bits - 3)
        assert bits == 12 or size > L1_SIZE_MAX // 8 << (2 * (bits - 1) - 3)
    assert (cluster_bits_for(8 * TIB), cluster_bits_for(4096 * TIB)) == (12, 17)
    with pytest.raises(ForebayError, match="too large for a qcow2 image"):
        cluster_bits_for(1 << 63)


def test_clusters_are_added_in_order(tmp_path: Path) -> None:
    def add(writer: Qcow2Writer) -> None:
        writer.add_zeros(Extent(16, 16))
        with pytest.raises(AssertionError):
            writer.add_zeros(Extent(0, 16))
        with pytest.raises(AssertionError):
            list(writer.add_data(Extent(17, 16)))

    written(tmp_path / "inc", 64 * KIB * 4, add, cluster_bits=16)

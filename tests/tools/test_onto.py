"""`volume import --onto`: what an image holds goes over the volume, the rest of it stays, and errors change nothing."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import pytest
from store_rig import MAIN, Forebay, StoreProcess

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, KIB, MIB, Buffer
from forebay_tools.onto import import_onto
from forebay_tools.qcow2_writer import Qcow2Writer
from forebay_wire.address import parse_address
from forebay_wire.client import WireClient
from forebay_wire.messages import AnyMessage, Opened, OpenVolume

T = TypeVar("T")
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
SIZE = 4 * MIB
DEVICE = bytes(range(16))


def old_volume(forebay: Forebay, folder: Path, size: int = SIZE) -> bytearray:
    """Make the volume `v` of random bytes and return them."""
    content = random.Random(5).randbytes(size)
    (folder / "old").write_bytes(content)
    assert forebay("volume", "import", "v", folder / "old").code == 0
    return bytearray(content)


def exported(forebay: Forebay, folder: Path) -> bytes:
    assert forebay("volume", "export", "v", folder / "out", "--force").code == 0
    return (folder / "out").read_bytes()


def increment(path: Path, size: int, data: Sequence[tuple[Extent, bytes]], zeros: Sequence[Extent]) -> Path:
    """Write an increment: data and zeros in the order of the disk."""
    with path.open("w+b") as file:
        writer = Qcow2Writer(file.fileno(), size)
        rows = sorted([*((extent, plain) for extent, plain in data), *((extent, b"") for extent in zeros)])
        for extent, plain in rows:
            if not plain:
                writer.add_zeros(extent)
                continue
            for piece, offset in writer.add_data(extent):
                begin = (piece.start - extent.start) * BLOCK_SIZE
                writer.write(offset, plain[begin : begin + piece.count * BLOCK_SIZE])
        writer.finish()
    return path


@needs_qemu_img
def test_only_what_an_increment_holds_changes(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    expected = old_volume(forebay, tmp_path)
    chance = random.Random(6)
    data = [(Extent(lba, 1), chance.randbytes(BLOCK_SIZE)) for lba in range(3, 400, 7)]
    data += [(Extent(600, 150), chance.randbytes(150 * BLOCK_SIZE)), (Extent(760, 2), bytes(2 * BLOCK_SIZE))]
    zeros = [Extent(4, 2), Extent(450, 100), Extent(1000, 24)]
    for extent, plain in data:
        expected[extent.start * BLOCK_SIZE : extent.end * BLOCK_SIZE] = plain
    for extent in zeros:
        expected[extent.start * BLOCK_SIZE : extent.end * BLOCK_SIZE] = bytes(extent.count * BLOCK_SIZE)
    done = forebay("volume", "import", "--onto", "v", increment(tmp_path / "inc", SIZE, data, zeros))
    assert (done.code, done.err) == (0, "")
    assert f"{(57 + 150) * 4} KiB of data and {128 * 4} KiB of zeros laid over it" in done.out
    assert exported(forebay, tmp_path) == expected


@needs_qemu_img
def test_an_increment_alone_makes_no_volume(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    image = increment(tmp_path / "inc", SIZE, [(Extent(5, 1), b"new!" * KIB)], [])
    (tmp_path / "base").write_bytes(bytes(SIZE))
    for _ in range(2):
        refused = forebay("volume", "import", "v", image)
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert f"forebay volume import --onto NAME {image}" in refused.err
        # qemu keeps the mark when it writes the header.
        for base in (("-b", tmp_path / "base", "-F", "raw"), ("-b", "")):
            subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", *base, image], check=True)
    assert forebay("volume", "list", "--json").out.strip() == "[]"


@needs_qemu_img
@pytest.mark.parametrize(
    "options",
    [
        ("-o", "cluster_size=4096"),
        ("-o", "cluster_size=2M"),
        ("-o", "compat=0.10"),
        ("-o", "extended_l2=on,cluster_size=128k"),
    ],
)
def test_images_of_qemu_leave_what_was_never_written(
    tmp_path: Path, store: StoreProcess, forebay: Forebay, options: tuple[str, ...]
) -> None:
    """Below the clusters that qemu-img fills up from it lies the old content, so that the whole result is known."""
    expected = old_volume(forebay, tmp_path)
    words = ["create", "-q", "-f", "qcow2", *options, "-b", str(tmp_path / "old"), "-F", "raw", str(tmp_path / "inc")]
    subprocess.run(["qemu-img", *words], check=True)
    orders = ["write -P 7 1M 8k", "write -P 8 1100k 300k", "write -P 9 3M 4k"]
    if "compat=0.10" not in options:
        orders.append("write -z 2M 512k")
        expected[2 * MIB : 2 * MIB + 512 * KIB] = bytes(512 * KIB)
    subprocess.run(["qemu-io", *(word for one in orders for word in ("-c", one)), tmp_path / "inc"], check=True)
    expected[MIB : MIB + 8 * KIB] = b"\x07" * 8 * KIB
    expected[1100 * KIB : 1400 * KIB] = b"\x08" * 300 * KIB
    expected[3 * MIB : 3 * MIB + 4 * KIB] = b"\x09" * 4 * KIB
    refused = forebay("volume", "import", "--onto", "v", tmp_path / "inc")
    assert refused.code == 1 and "qemu-img rebase -u -b ''" in refused.err
    subprocess.run(["qemu-img", "rebase", "-u", "-b", "", tmp_path / "inc"], check=True)
    assert forebay("volume", "import", "--onto", "v", tmp_path / "inc").code == 0
    assert exported(forebay, tmp_path) == expected


@needs_qemu_img
def test_a_compressed_image_holds_its_clusters(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    expected = old_volume(forebay, tmp_path)
    expected[: 64 * KIB] = b"text" * 16 * KIB
    (tmp_path / "raw").write_bytes(expected)
    words = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "image"]
    subprocess.run(words, check=True)
    assert forebay("volume", "import", "--onto", "v", tmp_path / "image").code == 0
    assert exported(forebay, tmp_path) == expected


@needs_qemu_img
def test_an_image_with_a_part_of_a_block_is_refused(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    expected = old_volume(forebay, tmp_path)
    for options in ("cluster_size=512", "extended_l2=on,cluster_size=16k"):
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(tmp_path / "inc"), "4M"]
        subprocess.run(words, check=True)
        subprocess.run(["qemu-io", "-c", "write -P 7 1M 8k", tmp_path / "inc"], check=True)
        assert forebay("volume", "import", "--onto", "v", tmp_path / "inc").code == 0
        expected[MIB : MIB + 8 * KIB] = b"\x07" * 8 * KIB
        subprocess.run(["qemu-io", "-c", "write -P 7 2M 512", tmp_path / "inc"], check=True)
        refused = forebay("volume", "import", "--onto", "v", tmp_path / "inc")
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert "only a part of the 4096 bytes from 2097152 on" in refused.err
    assert exported(forebay, tmp_path) == expected


def test_a_raw_image_replaces_everything(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    old_volume(forebay, tmp_path)
    with (tmp_path / "image").open("wb") as file:
        file.write(b"begin")
        file.seek(3 * MIB)
        file.write(bytes(64 * KIB) + b"end")
        file.truncate(SIZE)
    assert forebay("volume", "import", "--onto", "v", tmp_path / "image").code == 0
    assert exported(forebay, tmp_path) == (tmp_path / "image").read_bytes()
    assert '"data_size": 8192' in forebay("volume", "info", "v", "--json").out


def test_a_larger_image_makes_the_volume_larger(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    old_volume(forebay, tmp_path)
    image = random.Random(9).randbytes(SIZE + 5000)
    (tmp_path / "image").write_bytes(image)
    assert forebay("volume", "import", "--onto", "v", tmp_path / "image").code == 0
    assert exported(forebay, tmp_path) == image.ljust(SIZE + 8192, b"\0")


def test_a_smaller_image_is_refused_without_force(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    expected = old_volume(forebay, tmp_path)
    (tmp_path / "image").write_bytes(b"small")
    refused = forebay("volume", "import", "--onto", "v", tmp_path / "image")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "has 4 KiB, volume v has 4 MiB; give --force" in refused.err
    assert exported(forebay, tmp_path) == expected


def test_what_can_not_be_laid_over_is_one_line(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    (tmp_path / "image").write_bytes(b"small")
    for words, part in (
        (["import", "--onto", "none", tmp_path / "image"], "none"),
        (["import", "--onto", "none", tmp_path / "no-image"], "none"),
        (["import", "v", tmp_path / "image", "--force"], "without it NAME must be a new volume"),
        (["import", "v", tmp_path / "image", "--take-over"], "without it NAME must be a new volume"),
    ):
        refused = forebay("volume", *words)
        assert refused.code in (1, 2) and refused.err.count("\n") == 1
        assert part in refused.err
    assert forebay("volume", "list", "--json").out.strip() == "[]"


def test_a_volume_that_somebody_holds_is_left_alone(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    expected = old_volume(forebay, tmp_path)
    (tmp_path / "image").write_bytes(b"new!" * (SIZE // 4))

    async def hold() -> None:
        client = await WireClient.connect(parse_address(store.address), key=None, node=DEVICE, timeout_s=10)
        await client.ask(OpenVolume("v", DEVICE), Opened)
        await client.close()

    asyncio.run(hold())
    refused = forebay("volume", "import", "--onto", "v", tmp_path / "image")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert exported(forebay, tmp_path) == expected
    assert forebay("volume", "import", "--onto", "v", tmp_path / "image", "--take-over").code == 0
    assert exported(forebay, tmp_path) == (tmp_path / "image").read_bytes()


def test_an_interrupted_import_leaves_the_volume_as_it_was(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    assert forebay("volume", "create", "v", "--size", "512MiB").code == 0
    piece = random.Random(3).randbytes(4 * MIB)
    with (tmp_path / "image").open("wb") as file:
        for _ in range(128):
            file.write(piece)
    segments = len(list(store.data.rglob("*")))
    child = subprocess.Popen(
        [*MAIN, "volume", "import", "--onto", "v", str(tmp_path / "image")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while len(list(store.data.rglob("*"))) < segments + 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, complaint = child.communicate(timeout=60)
    assert (child.returncode, complaint) == (1, "forebay: volume import: interrupted\n")
    told = forebay("volume", "info", "v", "--json").out
    assert '"data_size": 0' in told and '"writer": null' in told


class Meddling:
    """A client that writes the image as soon as the volume is held."""

    def __init__(self, client: WireClient, image: Path) -> None:
        self._client = client
        self._image = image

    async def ask(self, message: AnyMessage, expect: type[T], payload: Sequence[Buffer] = ()) -> tuple[T, memoryview]:
        answer = await self._client.ask(message, expect, payload)
        if isinstance(message, OpenVolume):
            with self._image.open("r+b") as file:
                file.write(b"meddled")
                os.fsync(file.fileno())
        return answer


@needs_qemu_img
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_image_that_is_written_meanwhile_changes_nothing(
    tmp_path: Path, store: StoreProcess, forebay: Forebay, kind: str
) -> None:
    expected = old_volume(forebay, tmp_path)
    image = tmp_path / "image"
    if kind == "raw":
        image.write_bytes(b"new!" * (SIZE // 4))
    else:
        increment(image, SIZE, [(Extent(5, 1), b"new!" * KIB)], [])

    async def run() -> None:
        client = await WireClient.connect(parse_address(store.address), key=None, node=DEVICE, timeout_s=10)
        try:
            meddling = cast(WireClient, Meddling(client, image))
            with pytest.raises(ForebayError, match="was written while being imported"):
                await import_onto(meddling, "v", image, None, force=False, take_over=False)
        finally:
            await client.close()

    asyncio.run(run())
    assert exported(forebay, tmp_path) == expected
    assert '"writer": null' in forebay("volume", "info", "v", "--json").out

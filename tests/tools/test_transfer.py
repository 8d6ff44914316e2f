"""Import and export against a real store: the same bytes come back, or nothing is left."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import pytest
from store_rig import MAIN, Forebay, StoreProcess

from forebay_core.errors import ForebayError, StoreUnreachableError
from forebay_core.extents import Extent
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE, MIB, Buffer
from forebay_tools.exporter import export_view
from forebay_tools.importer import import_image
from forebay_wire.address import parse_address
from forebay_wire.client import WireClient
from forebay_wire.messages import (
    AnyMessage,
    CommitCut,
    Committed,
    CreateVolume,
    Done,
    GetVolume,
    Opened,
    OpenVolume,
    Read,
    StagePart,
    Volume,
)

T = TypeVar("T")

DEVICE = bytes(range(16))


def mixed_image(path: Path, size: int, seed: int = 1) -> bytes:
    """Write a file of random, compressible, zero and unwritten pieces, and return its bytes."""
    chance = random.Random(seed)
    image = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(chance.choice([512, 5000, BLOCK_SIZE, 70_000, 900_000]), size - at)
            kind = chance.randrange(4)
            if kind:
                piece = [b"", chance.randbytes(length), (b"text " * length)[:length], bytes(length)][kind]
                file.seek(at)
                file.write(piece)
                image[at : at + length] = piece
            at += length
    return bytes(image)


def names(forebay: Forebay) -> list[str]:
    return [row["name"] for row in json.loads(forebay("volume", "list", "--json").out)]


def info(forebay: Forebay, name: str) -> dict[str, object]:
    return json.loads(forebay("volume", "info", name, "--json").out)


@pytest.mark.parametrize("size", [1, 4096, 20 * MIB + 777])
def test_an_image_comes_back_as_it_was(tmp_path: Path, store: StoreProcess, forebay: Forebay, size: int) -> None:
    image = mixed_image(tmp_path / "image", size)
    done = forebay("volume", "import", "v", tmp_path / "image")
    assert (done.code, done.err) == (0, "")
    assert (f"filled up with {-size % BLOCK_SIZE} bytes of zeros" in done.out) == (size % BLOCK_SIZE > 0)
    assert forebay("volume", "export", "v", tmp_path / "out").code == 0
    content = (tmp_path / "out").read_bytes()
    assert len(content) == -(-size // BLOCK_SIZE) * BLOCK_SIZE
    assert content[:size] == image
    assert not any(content[size:])


def test_zeros_are_not_stored_and_exports_are_sparse(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.write(bytes(8 * MIB))
        file.write(b"data")
        file.truncate(1 << 36)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert info(forebay, "v")["data_size"] == BLOCK_SIZE
    assert info(forebay, "v")["writer"] is None
    assert "4 KiB of it data" in forebay("volume", "export", "v", tmp_path / "out").out
    status = (tmp_path / "out").stat()
    assert (status.st_size, status.st_blocks * 512 <= 2 * BLOCK_SIZE) == (1 << 36, True)


def test_an_image_of_zeros_needs_no_cut(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    (tmp_path / "image").write_bytes(bytes(5 * MIB))
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert info(forebay, "v")["committed_sequence"] == 0
    assert forebay("volume", "export", "v", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == bytes(5 * MIB)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_a_qcow2_image_comes_back_as_raw(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    image = mixed_image(tmp_path / "raw", 3 * MIB)
    words = ["qemu-img", "convert", "-c", "-O", "qcow2", tmp_path / "raw", tmp_path / "image"]
    subprocess.run(words, check=True)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert forebay("volume", "export", "v", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == image
    assert forebay("volume", "import", "w", tmp_path / "image", "--format", "raw").code == 0
    assert info(forebay, "w")["size"] == -(-(tmp_path / "image").stat().st_size // BLOCK_SIZE) * BLOCK_SIZE


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_an_image_with_a_backing_file_makes_no_volume(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    (tmp_path / "secret").write_bytes(bytes(MIB))
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", str(tmp_path / "image")]
    subprocess.run(words, check=True)
    refused = forebay("volume", "import", "v", tmp_path / "image")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "names a backing file" in refused.err
    assert names(forebay) == []


def test_volumes_are_made_listed_grown_and_deleted(store: StoreProcess, forebay: Forebay) -> None:
    for name in ("b", "a"):
        assert forebay("volume", "create", name, "--size", "1GiB").code == 0
    assert names(forebay) == ["a", "b"]
    assert "NAME  SIZE" in forebay("volume", "list").out
    assert forebay("volume", "resize", "a", "2GiB").code == 0
    assert info(forebay, "a")["size"] == 2 << 30
    for words in (["resize", "a", "1GiB"], ["create", "b", "--size", "1GiB"], ["info", "c"], ["delete", "c"]):
        refused = forebay("volume", *words)
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert forebay("volume", "delete", "b").code == 0
    assert names(forebay) == ["a"]
    assert json.loads(forebay("status", "--json").out)["store"]["volumes"] == 1
    assert "segments:" in forebay("status").out


def test_more_volumes_than_a_page_are_all_listed(store: StoreProcess, forebay: Forebay) -> None:
    async def make() -> None:
        client = await WireClient.connect(parse_address(store.address), key=None, node=DEVICE, timeout_s=10)
        await asyncio.gather(*(client.ask(CreateVolume(f"v{n:03}", BLOCK_SIZE), Volume) for n in range(300)))
        await client.close()

    asyncio.run(make())
    assert names(forebay) == [f"v{n:03}" for n in range(300)]


def test_an_existing_volume_is_neither_replaced_nor_deleted(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    image = mixed_image(tmp_path / "image", MIB)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    mixed_image(tmp_path / "other", 2 * MIB, seed=2)
    refused = forebay("volume", "import", "v", tmp_path / "other")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert forebay("volume", "export", "v", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == image


def large_image(path: Path) -> None:
    """Write a file that takes a store a second or more, at little cost to us."""
    piece = random.Random(3).randbytes(4 * MIB)
    with path.open("wb") as file:
        for _ in range(128):
            file.write(piece)


def start_import(path: Path, store: StoreProcess) -> subprocess.Popen[str]:
    """Return an import that has brought a little: looking into the folder takes no time in which it could end."""
    segments = len(list(store.data.rglob("*")))
    child = subprocess.Popen(
        [*MAIN, "volume", "import", "v", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background of a script, SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while len(list(store.data.rglob("*"))) < segments + 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_no_volume(
    tmp_path: Path, store: StoreProcess, forebay: Forebay, number: signal.Signals
) -> None:
    large_image(tmp_path / "image")
    child = start_import(tmp_path / "image", store)
    child.send_signal(number)
    _, complaint = child.communicate(timeout=60)
    assert (child.returncode, complaint) == (1, "forebay: volume import: interrupted\n")
    assert names(forebay) == []


def test_an_import_that_loses_its_store_says_what_is_left(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    large_image(tmp_path / "image")
    child = start_import(tmp_path / "image", store)
    store.end(signal.SIGKILL)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == 1
    assert complaint.count("\n") == 1
    assert "the incomplete volume v is left" in complaint
    store.start(listen=store.address)
    assert info(forebay, "v")["writer"] is not None
    assert forebay("volume", "delete", "v").code == 1, "its writer might live"
    assert forebay("volume", "delete", "v", "--take-over").code == 0
    assert names(forebay) == []


class Forgetful:
    """A client of an import that creates the volume, but whose connection breaks before the answer comes."""

    def __init__(self, client: WireClient) -> None:
        self._client = client

    async def ask(self, message: AnyMessage, expect: type[T], payload: Sequence[Buffer] = ()) -> tuple[T, memoryview]:
        answer = await self._client.ask(message, expect, payload)
        if isinstance(message, CreateVolume):
            raise StoreUnreachableError("the connection broke")
        return answer


class Slow:
    """A client of an import that is interrupted between the volume's creation and the answer."""

    def __init__(self, client: WireClient) -> None:
        self._client = client
        self.importing: asyncio.Task[str] | None = None

    async def ask(self, message: AnyMessage, expect: type[T], payload: Sequence[Buffer] = ()) -> tuple[T, memoryview]:
        answer = await self._client.ask(message, expect, payload)
        if isinstance(message, CreateVolume):
            assert self.importing is not None
            self.importing.cancel()
            await asyncio.sleep(0)
        return answer


def test_an_import_whose_volume_may_have_been_made_says_so(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    mixed_image(tmp_path / "image", MIB)

    async def run() -> None:
        client = await WireClient.connect(parse_address(store.address), key=None, node=DEVICE, timeout_s=10)
        try:
            with pytest.raises(ForebayError, match=r"nobody knows whether the volume v was made.*volume delete v"):
                await import_image(cast(WireClient, Forgetful(client)), "v", tmp_path / "image", None)
        finally:
            await client.close()

    asyncio.run(run())
    assert forebay("volume", "delete", "v").code == 0


def test_an_import_interrupted_while_it_creates_leaves_no_volume(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    mixed_image(tmp_path / "image", MIB)

    async def run() -> None:
        client = await WireClient.connect(parse_address(store.address), key=None, node=DEVICE, timeout_s=10)
        slow = Slow(client)
        slow.importing = asyncio.create_task(import_image(cast(WireClient, slow), "v", tmp_path / "image", None))
        try:
            with pytest.raises(asyncio.CancelledError):
                await slow.importing
        finally:
            await client.close()

    asyncio.run(run())
    assert names(forebay) == []


def test_an_export_needs_force_to_overwrite(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    assert forebay("volume", "create", "v", "--size", "1MiB").code == 0
    (tmp_path / "out").write_bytes(b"precious")
    assert "--force" in forebay("volume", "export", "v", tmp_path / "out").err
    assert (tmp_path / "out").read_bytes() == b"precious"
    assert forebay("volume", "export", "v", tmp_path / "out", "--force").code == 0
    assert (tmp_path / "out").read_bytes() == bytes(MIB)


def test_a_flipped_bit_in_the_store_is_an_error_and_no_file(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    mixed_image(tmp_path / "image", 4 * MIB)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    segment = max((store.data / "segments").iterdir(), key=lambda path: path.stat().st_size)
    segment.chmod(0o600)
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    failed = forebay("volume", "export", "v", tmp_path / "out")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert "corrupt" in failed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "store", "store.log"]


class Meddler:
    """A client of an export beside which another writer commits as soon as the first blocks are asked for."""

    def __init__(self, client: WireClient, writer: WireClient) -> None:
        self._client = client
        self._writer = writer
        self._met = False

    async def ask(self, message: AnyMessage, expect: type[T], payload: Sequence[Buffer] = ()) -> tuple[T, memoryview]:
        if isinstance(message, Read) and not self._met:
            self._met = True
            await commit_block(self._writer)
        return await self._client.ask(message, expect, payload)


async def commit_block(client: WireClient) -> None:
    opened, _ = await client.ask(OpenVolume("v", DEVICE), Opened)
    frame = FrameBuilder().build([Extent(0, 1)], b"new!" * 1024)
    row, epoch, session = opened.row, opened.epoch, opened.session
    await client.ask(StagePart(row.id, epoch, session, 1, 0), Done, [frame])
    first = (row.version & ((1 << 44) - 1)) + 1
    await client.ask(CommitCut(row.id, epoch, session, 1, 1, first, first, 0), Committed)


def test_an_export_never_mixes_two_versions(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    mixed_image(tmp_path / "image", 4 * MIB)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0

    async def run() -> None:
        address = parse_address(store.address)
        clients = [await WireClient.connect(address, key=None, node=DEVICE, timeout_s=10) for _ in range(2)]
        meddler = cast(WireClient, Meddler(*clients))
        try:
            with pytest.raises(ForebayError, match="was changed while it was exported"):
                await export_view(meddler, "v", tmp_path / "out", force=False)
            row = (await clients[0].ask(GetVolume("v"), Volume))[0].row
            assert row.writer == DEVICE
        finally:
            for client in clients:
                await client.close()

    asyncio.run(run())
    assert not (tmp_path / "out").exists()
    later = forebay("volume", "export", "v", tmp_path / "out")
    assert later.code == 0
    assert "drain it first" in later.err
    assert (tmp_path / "out").read_bytes()[:BLOCK_SIZE] == b"new!" * 1024


def test_the_key_must_be_the_stores(tmp_path: Path, forebay: Forebay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("right", "wrong"):
        (tmp_path / name).write_bytes(name.encode() * 8)
        (tmp_path / name).chmod(0o600)
    process = StoreProcess(tmp_path / "store", "--key-file", str(tmp_path / "right"))
    try:
        monkeypatch.setenv("FOREBAY_STORE", process.address)
        assert forebay("volume", "list", "--key-file", tmp_path / "right").code == 0
        for words in ([], ["--key-file", str(tmp_path / "wrong")]):
            refused = forebay("volume", "list", *words)
            assert (refused.code, refused.err.count("\n")) == (1, 1)
        (tmp_path / "right").chmod(0o644)
        assert forebay("volume", "list", "--key-file", tmp_path / "right").code == 2
    finally:
        process.end()


def test_a_stopped_store_is_checked_and_its_index_rebuilt(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    image = mixed_image(tmp_path / "image", 2 * MIB)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert forebay("store", "fsck", "--data", store.data).code == 1, "it is in use"
    store.end()
    try:
        assert json.loads(forebay("store", "fsck", "--data", store.data, "--json").out) == []
        shutil.rmtree(store.data / "index")
        assert forebay("store", "rebuild-index", "--data", store.data).code == 0
        assert "nothing wrong" in forebay("store", "fsck", "--data", store.data).out
    finally:
        store.start(listen=store.address)
    assert forebay("volume", "export", "v", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == image


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 4 MiB full of old bytes."""
    (tmp_path / "backing").write_bytes(b"old!" * MIB)
    words = ["losetup", "--show", "--find", str(tmp_path / "backing")]
    made = subprocess.run(words, capture_output=True, text=True) if shutil.which("losetup") else None
    if made is None or made.returncode:
        pytest.skip("no loop devices here" + (f": {made.stderr.strip()}" if made else ""))
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", str(device)], check=True)


def test_an_export_onto_a_block_device_leaves_nothing_old(
    tmp_path: Path, store: StoreProcess, forebay: Forebay, loop_device: Path
) -> None:
    image = mixed_image(tmp_path / "image", 3 * MIB)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert forebay("volume", "export", "v", loop_device).code == 1
    assert forebay("volume", "export", "v", loop_device, "--force").code == 0
    assert loop_device.read_bytes()[: 3 * MIB] == image
    assert forebay("volume", "import", "w", loop_device).code == 0
    assert forebay("volume", "create", "large", "--size", "1GiB").code == 0
    assert "the volume needs 1 GiB" in forebay("volume", "export", "large", loop_device, "--force").err

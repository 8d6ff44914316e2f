"""The builder's processes on real files: frames, holes, corruption, death."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from forebay_cache.engine.ports import BuildRequest, BuiltPart
from forebay_cache.service import builder_worker
from forebay_cache.service.builder import ProcessBuilder
from forebay_cache.service.builder_worker import ANSWER, BUILD_BLOCKS_MAX, FRAME_GAP_BLOCKS_MAX
from forebay_core.checksums import checksum
from forebay_core.extents import Extent
from forebay_core.frame import check_stored, decode_header, open_frame
from forebay_core.units import BLOCK_SIZE

T = TypeVar("T")


class Disk:
    """A device file whose blocks the test knows."""

    def __init__(self, path: Path, blocks: list[bytes]) -> None:
        self.path = path
        self.blocks = blocks
        path.write_bytes(b"".join(blocks))

    def request(self, lbas: list[int], places: list[int]) -> BuildRequest:
        sums = [checksum(self.blocks[place]) for place in places]
        return BuildRequest(
            np.array(lbas, np.uint64),
            np.array(places, np.uint64) * np.uint64(BLOCK_SIZE),
            np.array(sums, np.uint64),
        )


def random_blocks(count: int, seed: int = 1) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(64) * (BLOCK_SIZE // 64) for _ in range(count)]


def with_builder(path: Path, test: Callable[[ProcessBuilder], Coroutine[None, None, T]], workers: int = 1) -> T:
    async def run() -> T:
        builder = ProcessBuilder(str(path), level=1, workers=workers, loop=asyncio.get_running_loop())
        try:
            return await test(builder)
        finally:
            builder.close()

    return asyncio.run(run())


async def built(builder: ProcessBuilder, request: BuildRequest) -> BuiltPart | None:
    future: asyncio.Future[BuiltPart | None] = asyncio.get_running_loop().create_future()
    builder.build(request, future.set_result)
    return await asyncio.wait_for(future, 60)


def opened(part: BuiltPart) -> dict[int, bytes]:
    plain: dict[int, bytes] = {}
    for frame in part.frames:
        header = decode_header(frame, place="test")
        content = open_frame(header, check_stored(header, frame, place="test"), place="test")
        lbas = [lba for extent in header.extents for lba in range(extent.start, extent.end)]
        for index, lba in enumerate(lbas):
            plain[lba] = content[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
    return plain


def test_frames_hold_the_blocks_wherever_they_lay(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(64))
    lbas = [*range(100, 140), 150, 151, 1000, 5000]
    places = [(index * 13) % 64 for index in range(len(lbas))]
    part = with_builder(disk.path, lambda builder: built(builder, disk.request(lbas, places)))
    assert part is not None
    assert opened(part) == {lba: disk.blocks[place] for lba, place in zip(lbas, places, strict=True)}
    assert part.plain_size == len(lbas) * BLOCK_SIZE
    assert not part.holes and not part.corrupt


def test_zero_blocks_become_holes(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", [*random_blocks(3), bytes(BLOCK_SIZE)])
    part = with_builder(
        disk.path, lambda builder: built(builder, disk.request([5, 6, 7, 8, 9, 20], [0, 3, 3, 1, 2, 3]))
    )
    assert part is not None
    assert list(part.holes) == [Extent(6, 2), Extent(20, 1)]
    assert opened(part) == {5: disk.blocks[0], 8: disk.blocks[1], 9: disk.blocks[2]}
    assert part.plain_size == 3 * BLOCK_SIZE


def test_a_part_of_zeros_has_no_frames(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", [bytes(BLOCK_SIZE)])
    part = with_builder(disk.path, lambda builder: built(builder, disk.request([5, 6], [0, 0])))
    assert part is not None and not part.frames and list(part.holes) == [Extent(5, 2)]


def test_neighbours_share_frames_and_far_blocks_do_not(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(8))
    lbas = [*range(20), 20 + FRAME_GAP_BLOCKS_MAX, 10_000]
    part = with_builder(disk.path, lambda builder: built(builder, disk.request(lbas, [0] * len(lbas))))
    assert part is not None
    counts = [decode_header(frame, place="test").block_count for frame in part.frames]
    assert counts == [16, 4, 1, 1]


def test_a_corrupt_block_is_named_and_never_framed(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(4))
    request = disk.request([10, 11, 12], [0, 1, 2])
    damaged = bytearray(disk.blocks[1])
    damaged[77] ^= 1
    with disk.path.open("r+b") as file:
        file.seek(BLOCK_SIZE)
        file.write(damaged)
    part = with_builder(disk.path, lambda builder: built(builder, request))
    assert part is not None and not part.frames
    assert list(part.corrupt) == [11] and list(part.found) == [checksum(damaged)]


def test_a_device_that_ends_too_early_is_unreadable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = Disk(tmp_path / "device", random_blocks(4))
    request = disk.request([10, 11], [2, 3])
    os.truncate(disk.path, 3 * BLOCK_SIZE)
    assert with_builder(disk.path, lambda builder: built(builder, request)) is None
    assert "can't be read" in capfd.readouterr().err


def test_the_largest_request_is_built(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(16))
    lbas = list(range(0, BUILD_BLOCKS_MAX * 20, 20))
    places = [index % 16 for index in range(BUILD_BLOCKS_MAX)]
    part = with_builder(disk.path, lambda builder: built(builder, disk.request(lbas, places)))
    assert part is not None and len(part.frames) == BUILD_BLOCKS_MAX


def test_many_requests_are_all_answered(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(16))

    async def run(builder: ProcessBuilder) -> None:
        requests = [disk.request([index], [index % 16]) for index in range(100)]
        parts = await asyncio.gather(*(built(builder, request) for request in requests))
        for index, part in enumerate(parts):
            assert part is not None and opened(part) == {index: disk.blocks[index % 16]}

    with_builder(disk.path, run, workers=2)


def test_frames_outlive_the_builder(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(1))
    part = with_builder(disk.path, lambda builder: built(builder, disk.request([1], [0])))
    assert part is not None and opened(part) == {1: disk.blocks[0]}


def test_a_killed_worker_is_replaced_and_the_request_repeated(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(1))

    async def run(builder: ProcessBuilder) -> None:
        (first,) = builder.pids
        os.kill(first, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.05, os.kill, first, signal.SIGKILL)
        assert await built(builder, disk.request([1], [0])) is not None
        (second,) = builder.pids
        assert second != first
        os.kill(second, signal.SIGKILL)  # while idle
        assert await built(builder, disk.request([1], [0])) is not None

    with_builder(disk.path, run)


def test_a_request_that_kills_twice_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def run(builder: ProcessBuilder) -> BuiltPart | None:
        return await built(builder, Disk(tmp_path / "other", random_blocks(1)).request([1], [0]))

    assert with_builder(tmp_path / "missing", run) is None
    assert "FileNotFoundError" in capfd.readouterr().err


def test_the_worker_ignores_the_signals_that_stop_the_daemon(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "device", random_blocks(1))

    async def run(builder: ProcessBuilder) -> None:
        assert await built(builder, disk.request([1], [0])) is not None
        pids = builder.pids
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pids[0], number)
        assert await built(builder, disk.request([1], [0])) is not None
        assert builder.pids == pids

    with_builder(disk.path, run)


def test_the_worker_ends_when_the_daemon_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(BLOCK_SIZE))
    script = (
        "import asyncio, sys\n"
        "from forebay_cache.service.builder import ProcessBuilder\n"
        "async def main():\n"
        "    builder = ProcessBuilder(sys.argv[1], level=1, workers=1, loop=asyncio.get_running_loop())\n"
        "    print(*builder.pids, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        worker = int(daemon.stdout.readline())
        daemon.kill()
    deadline = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_answer_is_as_its_table_says() -> None:
    rows = re.findall(r"^ +(\d+) +(\d+)  u(\d+) +\w+ ", builder_worker.__doc__ or "", re.MULTILINE)
    offsets = [int(offset) for offset, _, _ in rows]
    sizes = [int(size) for _, size, _ in rows]
    assert [int(bits) for _, _, bits in rows] == [size * 8 for size in sizes]
    assert offsets == [sum(sizes[:index]) for index in range(len(sizes))]
    assert sum(sizes) == ANSWER.size
    assert ANSWER.format == "<" + "".join({4: "I", 8: "Q"}[size] for size in sizes)

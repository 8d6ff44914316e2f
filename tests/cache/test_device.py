"""The device port on real files: bytes, order, locks, sizes, and what a failing disk does."""

import asyncio
import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest

from forebay_cache.service import device as device_module
from forebay_cache.service.device import IOV_MAX, NEAR_SIZE_MAX, FileDevice
from forebay_cache.service.device_file import DeviceFile, drop_pages, open_device
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.gathering import rest_of
from forebay_cache.service.ring_reads import RING_ENTRIES
from forebay_cache.service.sync_order import AHEAD_AFTER
from forebay_cache.service.turns import Turns
from forebay_cache.service.uring import Ring
from forebay_core.errors import ForebayError, InUseError, NoSpaceError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, MIB, Buffer

SIZE = 4 * MIB
T = TypeVar("T")


Make = Callable[[DeviceFile], FileDevice]


def mark_of(file: DeviceFile) -> FailureMark:
    return FailureMark(file.path.parent, file.fd)


def threads(file: DeviceFile) -> FileDevice:
    return FileDevice(file, Turns(asyncio.get_running_loop()), mark_of(file), ring=False)


def uring(file: DeviceFile) -> FileDevice:
    return FileDevice(file, Turns(asyncio.get_running_loop()), mark_of(file), ring=True)


@pytest.fixture(params=[threads, uring])
def make(request: pytest.FixtureRequest) -> Make:
    """Both ways to read must pass the same tests."""
    if request.param is uring:
        try:
            Ring(2).close()
        except OSError as error:
            pytest.skip(f"no io_uring here: {error}")
    made: Make = request.param
    return made


def on_device(make: Make, path: Path, test: Callable[[FileDevice], Coroutine[None, None, T]]) -> T:
    async def run() -> T:
        device = make(open_device(path, SIZE))
        try:
            return await test(device)
        finally:
            device.close()

    return asyncio.run(run())


async def completed(start: Callable[[Callable[[T], None]], None]) -> T:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    start(future.set_result)
    assert not future.done(), "completed inside the call"
    return await asyncio.wait_for(future, 30)


async def write(device: FileDevice, offset: int, *buffers: Buffer) -> bool:
    return await completed(lambda done: device.write(offset, buffers, done))


async def read(device: FileDevice, offset: int, size: int) -> Buffer | None:
    return await completed(lambda done: device.read(offset, size, done))


def failing_device(make: Make, path: str, folder: Path) -> FileDevice:
    """Open a device of the kernel as one whose mark is in a folder."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return make(DeviceFile(fd, folder / "device", SIZE, True))


def test_written_blocks_are_read_back(make: Make, tmp_path: Path) -> None:
    blocks = [os.urandom(BLOCK_SIZE) for _ in range(3)]

    async def run(device: FileDevice) -> None:
        assert await write(device, BLOCK_SIZE, blocks[0], memoryview(blocks[1]), bytearray(blocks[2]))
        assert await completed(device.sync)
        assert await read(device, BLOCK_SIZE, 3 * BLOCK_SIZE) == b"".join(blocks)
        assert device.read_now(2 * BLOCK_SIZE, BLOCK_SIZE) == blocks[1]

    on_device(make, tmp_path / "device", run)


def test_a_write_of_more_buffers_than_one_call_takes_is_whole(make: Make, tmp_path: Path) -> None:
    blocks = [bytes([index % 251]) * 512 for index in range(2 * IOV_MAX + 8)]

    async def run(device: FileDevice) -> None:
        assert await write(device, 0, *blocks)
        assert await read(device, 0, len(blocks) * 512) == b"".join(blocks)

    on_device(make, tmp_path / "device", run)


@pytest.mark.parametrize("count", [0, 1, 5, 9, 10, 11, 25])
def test_a_short_write_is_continued_where_it_stopped(count: int) -> None:
    buffers = [b"01234", bytearray(b"56789"), memoryview(b"abcdefghijklmno")]
    whole = b"".join(buffers)
    assert b"".join(rest_of(buffers, count)) == whole[count:]


def test_writes_are_carried_out_and_completed_in_order(make: Make, tmp_path: Path) -> None:
    async def run(device: FileDevice) -> list[int]:
        order: list[int] = []
        finished = asyncio.get_running_loop().create_future()

        def note(index: int) -> None:
            order.append(index)
            if len(order) == 200:
                finished.set_result(None)

        for index in range(200):
            device.write(0, [bytes([index]) * BLOCK_SIZE], lambda ok, index=index: note(index))
        await asyncio.wait_for(finished, 30)
        assert await read(device, 0, BLOCK_SIZE) == bytes([199]) * BLOCK_SIZE
        return order

    assert on_device(make, tmp_path / "device", run) == list(range(200))


def test_completions_run_on_the_thread_of_the_loop(make: Make, tmp_path: Path) -> None:
    async def run(device: FileDevice) -> None:
        here = threading.get_ident()
        assert here == await completed(lambda done: device.sync(lambda _: done(threading.get_ident())))

    on_device(make, tmp_path / "device", run)


def test_closing_completes_what_was_given(make: Make, tmp_path: Path) -> None:
    outcomes: list[bool] = []

    async def run() -> None:
        device = make(open_device(tmp_path / "device", SIZE))
        for index in range(50):
            device.write(index * BLOCK_SIZE, [b"x" * BLOCK_SIZE], outcomes.append)
        device.close()

    asyncio.run(run())
    assert outcomes == [True] * 50


def test_after_a_failed_write_everything_is_refused(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        device = failing_device(make, "/dev/full", tmp_path)
        try:
            assert await read(device, 0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
            reasons: list[str] = []
            device.on_failure = reasons.append
            assert not await write(device, 8 * BLOCK_SIZE, b"x" * BLOCK_SIZE)
            assert device.failed and reasons == ["write failed: No space left on device"]
            assert not await write(device, 0, b"x" * BLOCK_SIZE)
            assert not await completed(device.sync)
            assert await read(device, 0, BLOCK_SIZE) is None
            assert device.read_now(0, BLOCK_SIZE) is None
        finally:
            device.close()

    asyncio.run(run())
    assert "at offset 32768 failed" in caplog.text
    assert "No space left" in caplog.text


def test_after_a_failed_sync_writes_are_refused_and_a_mark_is_left_before_that_is_told(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        device = failing_device(make, "/dev/zero", tmp_path)  # takes writes, can't sync
        try:
            assert await write(device, 0, b"x" * BLOCK_SIZE)
            assert list(tmp_path.iterdir()) == []
            assert await completed(lambda done: device.sync(lambda ok: done((ok, len(list(tmp_path.iterdir())))))) == (
                False,
                1,
            )
            assert not await write(device, 0, b"x" * BLOCK_SIZE)
        finally:
            device.close()

    asyncio.run(run())
    assert "the device is stopped" in caplog.text


class SlowMark(FailureMark):
    """A mark that takes until it is told to end."""

    def __init__(self, folder: Path, fd: int) -> None:
        super().__init__(folder, fd)
        self.begun = threading.Event()
        self.end = threading.Event()

    def set(self) -> None:
        self.begun.set()
        assert self.end.wait(30)
        super().set()


def test_nothing_is_refused_before_the_mark_is_left_and_the_reason_told(tmp_path: Path) -> None:
    told: list[object] = []

    async def run() -> None:
        fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
        mark = SlowMark(tmp_path, fd)
        device = FileDevice(DeviceFile(fd, tmp_path / "device", SIZE, True), Turns(asyncio.get_running_loop()), mark)
        device.on_failure = told.append
        try:
            device.sync(told.append)
            await asyncio.to_thread(mark.begun.wait, 30)
            assert await write(device, 0, b"x" * BLOCK_SIZE)
            assert told == []
            mark.end.set()
            while len(told) < 2:
                await asyncio.sleep(0)
            assert not await write(device, 0, b"x" * BLOCK_SIZE)
        finally:
            mark.end.set()
            device.close()

    asyncio.run(run())
    assert told == ["sync failed: Invalid argument", False]


def test_a_sync_asked_for_while_a_failed_one_is_told_fails_as_well(make: Make, tmp_path: Path) -> None:
    async def run() -> None:
        device = failing_device(make, "/dev/zero", tmp_path)
        try:
            answers = await asyncio.gather(*(completed(device.sync) for _ in range(3)))
            assert answers == [False, False, False]
        finally:
            device.close()

    asyncio.run(run())


def test_small_writes_between_large_ones_stay_in_order(make: Make, tmp_path: Path) -> None:
    large = NEAR_SIZE_MAX // BLOCK_SIZE + 1

    async def run(device: FileDevice) -> None:
        order: list[int] = []
        answers = []
        for index, blocks in enumerate((1, large, 1, 1, large, 1)):
            payload = bytes([index + 1]) * BLOCK_SIZE * blocks
            ended = asyncio.get_running_loop().create_future()
            answers.append(ended)
            device.write(0, [payload], lambda ok, at=index, ended=ended: (order.append(at), ended.set_result(ok)))
        assert all(await asyncio.wait_for(asyncio.gather(*answers), 30))
        assert order == list(range(6))
        assert await read(device, 0, 2 * BLOCK_SIZE) == bytes([6]) * BLOCK_SIZE + bytes([5]) * BLOCK_SIZE

    on_device(make, tmp_path / "device", run)


def test_the_loop_begins_to_write_out_what_one_client_flushes_each_time_not_what_several_do(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(device_module, "NEAR_NS_MAX", 10**12)  # however busy the machine, the loop writes itself
    monkeypatch.setattr(device_module, "begin_writeback", lambda _fd, offset, size: begun.append((offset, size)))
    block = bytes(BLOCK_SIZE)

    async def run(device: FileDevice) -> None:
        for _ in range(AHEAD_AFTER):
            assert await write(device, 0, block, block)
            assert await completed(device.sync)
        assert begun == [], "it could not know that a sync follows"
        for buffers, pushed in ((2, True), (3, False), (7, False), (2, True)):
            begun.clear()
            assert await write(device, MIB, *[block] * buffers)
            assert begun == [(MIB, buffers * BLOCK_SIZE)] * pushed
            assert await completed(device.sync)

    on_device(make, tmp_path / "device", run)


@pytest.mark.parametrize("waits", [True, False])
def test_when_writes_at_once_wait_others_go_to_the_thread_but_not_for_a_busy_processor(
    waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads_seen = []

    def pwritev(fd: int, buffers: list[Buffer], offset: int) -> int:
        threads_seen.append(threading.current_thread().name)
        return sum(map(len, buffers))

    async def run(device: FileDevice) -> None:
        assert await write(device, 0, bytes(BLOCK_SIZE))
        clock, given_away = count(0, device_module.NEAR_NS_MAX + 1), count(7, waits)
        for _ in range(2):  # the first slow one has the others watched
            with monkeypatch.context() as patched:
                patched.setattr("forebay_cache.service.device.time.perf_counter_ns", lambda: next(clock))
                patched.setattr(
                    "forebay_cache.service.device.resource.getrusage",
                    lambda _who: SimpleNamespace(ru_nvcsw=next(given_away)),
                )
                assert await write(device, 0, bytes(BLOCK_SIZE))
        for _ in range(device_module.FAR_WRITES + 1):
            assert await write(device, 0, bytes(BLOCK_SIZE))

    here = threading.current_thread().name
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", pwritev)
        on_device(uring, tmp_path / "device", run)
    there = "device-write" if waits else here
    assert threads_seen == [here, here, here, *[there] * device_module.FAR_WRITES, here]


def test_more_commands_than_a_ring_has_entries_are_all_completed(make: Make, tmp_path: Path) -> None:
    count = 3 * RING_ENTRIES

    async def run(device: FileDevice) -> None:
        assert await write(device, 0, *(index.to_bytes(2, "big") * 2048 for index in range(1024)))
        reads = (read(device, index % 1024 * BLOCK_SIZE, BLOCK_SIZE) for index in range(count))
        writes = (write(device, index % 64 * BLOCK_SIZE, (index % 64).to_bytes(2, "big") * 2048) for index in range(99))
        answers = await asyncio.gather(*reads, *writes, completed(device.sync))
        assert all(answers[count:])
        for index, answer in enumerate(answers[:count]):
            assert answer == (index % 1024).to_bytes(2, "big") * 2048

    on_device(make, tmp_path / "device", run)


def test_blocks_that_are_not_in_memory_are_read(make: Make, tmp_path: Path) -> None:
    blocks = os.urandom(SIZE)

    async def run(device: FileDevice) -> None:
        assert await write(device, 0, blocks)
        assert await completed(device.sync)
        fd = os.open(tmp_path / "device", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        offsets = range(0, SIZE, 16 * BLOCK_SIZE)
        answers = await asyncio.gather(*(read(device, offset, 2 * BLOCK_SIZE) for offset in offsets))
        for offset, answer in zip(offsets, answers, strict=True):
            assert answer == blocks[offset : offset + 2 * BLOCK_SIZE]

    on_device(make, tmp_path / "device", run)


def test_a_read_beyond_the_end_is_an_error(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run(device: FileDevice) -> None:
        assert await read(device, SIZE - BLOCK_SIZE, 2 * BLOCK_SIZE) is None
        assert await read(device, SIZE - BLOCK_SIZE, BLOCK_SIZE) is not None

    on_device(make, tmp_path / "device", run)
    assert f"ends at offset {SIZE}" in caplog.text


def test_a_new_file_is_allocated_in_full(tmp_path: Path) -> None:
    file = open_device(tmp_path / "device", SIZE)
    os.close(file.fd)
    assert file.blank and file.size == SIZE
    assert (tmp_path / "device").stat().st_blocks * 512 >= SIZE


def test_a_sparse_blank_file_is_adopted_and_allocated(tmp_path: Path) -> None:
    path = tmp_path / "device"
    with path.open("wb") as sparse:
        sparse.truncate(SIZE)
    file = open_device(path, None)
    os.close(file.fd)
    assert file.blank and path.stat().st_blocks * 512 >= SIZE


def test_a_file_whose_making_was_interrupted_is_made_whole(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(SIZE // 2))
    file = open_device(path, SIZE)
    os.close(file.fd)
    assert file.size == SIZE == path.stat().st_size


def test_a_used_file_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"FORE" + bytes(SIZE))
    file = open_device(path, None)
    os.close(file.fd)
    assert not file.blank and file.size == SIZE
    with pytest.raises(WrongUsageError, match="leave --size out"):
        open_device(path, 2 * SIZE)
    assert path.stat().st_size == SIZE + 4


def test_a_missing_file_without_size_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(WrongUsageError, match="give --size"):
        open_device(tmp_path / "device", None)
    assert not (tmp_path / "device").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    too_much = (free.f_bavail * free.f_frsize // BLOCK_SIZE + 1024 * 1024) * BLOCK_SIZE
    with pytest.raises(NoSpaceError, match="no space for a cache"):
        open_device(tmp_path / "device", too_much)
    assert not (tmp_path / "device").exists()


def test_pages_that_were_dropped_are_read_from_the_disk(tmp_path: Path) -> None:
    file_system = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, check=True).stdout
    if file_system.strip() == b"tmpfs":
        pytest.skip("a tmpfs is nothing but pages")
    path = tmp_path / "device"
    path.write_bytes(os.urandom(SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapped:
        assert resident(mapped) == SIZE // BLOCK_SIZE
        drop_pages(file.fileno())
        assert resident(mapped) == 0


def resident(mapped: mmap.mmap) -> int:
    """Return how many pages are in memory."""
    flags = (ctypes.c_ubyte * (SIZE // BLOCK_SIZE))()
    first = ctypes.c_char.from_buffer(mapped)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(SIZE), flags) == 0
    del first
    return sum(flag & 1 for flag in flags)


def test_a_folder_or_a_character_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForebayError, match="can't be opened"):
        open_device(tmp_path, SIZE)
    with pytest.raises(WrongUsageError, match="neither a regular file nor a block device"):
        open_device(Path("/dev/null"), SIZE)


def test_a_device_that_an_ended_process_still_holds_is_waited_for(tmp_path: Path) -> None:
    """As the kernel does behind a kill: what io_uring had begun holds the file until it is done."""
    path = tmp_path / "device"
    holding, letting_go = os.pipe()
    script = (
        "import os, pathlib, subprocess, sys\n"
        "from forebay_cache.service.device_file import open_device\n"
        f"fd = open_device(pathlib.Path(sys.argv[1]), {SIZE}).fd\n"
        "subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], pass_fds=[fd])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], stdin=holding, check=True)
    os.close(holding)
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    timer = threading.Timer(0.2, os.close, (letting_go,))
    timer.start()
    os.close(open_device(path, SIZE).fd)
    timer.join()


def test_a_device_in_use_names_the_process(tmp_path: Path) -> None:
    path = tmp_path / "device"
    script = (
        "import sys, pathlib\n"
        "from forebay_cache.service.device_file import open_device\n"
        f"open_device(pathlib.Path(sys.argv[1]), {SIZE})\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(InUseError, match=r"in use by (process \d+|another process)"):
            open_device(path, SIZE)
    os.close(open_device(path, SIZE).fd)

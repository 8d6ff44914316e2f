"""The loop front for real: block devices over files of the FUSE front, with file systems, writers and deaths."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fronts import loop_missing, take_loop_away
from e2e_fuse import end_front, front_pid, tidy
from e2e_rig import Rig

from forebay_cache.service import loop_device
from forebay_core.units import KIB, MIB

SIZE = 32 * MIB
WRITERS = 16
NAME = f"loop-{os.getpid()}"
LINK = Path("/dev/forebay", NAME)


pytestmark = pytest.mark.skipif(bool(loop_missing()), reason=loop_missing())


@pytest.fixture
def loop(rig: Rig) -> Iterator[Rig]:
    """A rig whose volume NAME is attached as a loop device."""
    with tidy(rig):
        rig.cache_size = "96MiB"
        rig.start()
        rig.create(NAME, SIZE)
        answer = json.loads(rig.run("attach", NAME, "--front", "loop"))
        assert answer == {"path": str(LINK.resolve()), "link": str(LINK)}
        try:
            yield rig
        finally:
            take_away(rig)


def take_away(rig: Rig) -> None:
    """Take away whatever of ours is left: mount, device, link."""
    subprocess.run(["umount", "--lazy", rig.folder / "mnt"], stderr=subprocess.DEVNULL, check=False)
    take_loop_away(rig, NAME)


def run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("kills", [False, True])
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_parallel_direct_writers_are_read_back_as_they_wrote(loop: Rig, rounds: int, kills: bool) -> None:
    """With `kills` the daemon dies while they write, and another one goes on."""
    share = SIZE // WRITERS
    for number in range(rounds):
        contents = [random.Random(number * WRITERS + writer).randbytes(share) for writer in range(WRITERS)]
        files = []
        for writer, content in enumerate(contents):
            file = loop.folder / f"writer{writer}"
            file.write_bytes(content)
            files.append(file)
        writers = []
        for writer, file in enumerate(files):
            block = random.Random(writer).choice([4, 16, 64, 256, 1024]) * KIB
            words = [f"if={file}", f"of={LINK}", f"bs={block}", f"seek={writer * share // block}"]
            flags = ["oflag=direct", "conv=notrunc,fsync"]
            writers.append(subprocess.Popen(["dd", *words, *flags], stderr=subprocess.DEVNULL))
        if kills:
            before = loop.status().volumes[0].sequence
            loop.wait_status(lambda status, before=before: status.volumes[0].sequence > before + WRITERS)
            loop.kill_cache()
            loop.start_cache()
        assert [writer.wait(60) for writer in writers] == [0] * WRITERS
        run("blockdev", "--flushbufs", LINK)
        for content, at in zip(contents, range(0, SIZE, share), strict=True):
            assert read(at, share) == content, f"round {number}: different at {at}"


def read(offset: int, size: int) -> bytes:
    words = [
        "dd",
        f"if={LINK}",
        "bs=64K",
        "iflag=direct",
        f"skip={offset // (64 * KIB)}",
        f"count={size // (64 * KIB)}",
    ]
    return subprocess.run(words, capture_output=True, check=True, timeout=60).stdout


def test_a_file_system_gives_the_space_of_deleted_files_back_in_the_store(loop: Rig) -> None:
    mount = loop.folder / "mnt"
    mount.mkdir()
    run("mkfs.ext4", "-q", LINK)
    run("mount", "-o", "discard", LINK, mount)
    (mount / "file").write_bytes(os.urandom(8 * MIB))
    run("sync", "-f", mount)
    said = loop.run("detach", NAME, code=1)
    assert f"mounted at {mount}" in said and said.count("\n") == 1
    assert drained_bytes(loop) > 8 * MIB
    (mount / "file").unlink()
    run("sync", "-f", mount)  # before that nothing is free; what is free then ext4 discards in a work of its own
    run("fstrim", mount)
    loop.wait_status(lambda _status: drained_bytes(loop) < 2 * MIB)
    run("umount", mount)
    run("fsck.ext4", "-fn", LINK)
    loop.run("detach", NAME)
    assert not LINK.is_symlink() and front_pid(loop) == 0


def drained_bytes(rig: Rig) -> int:
    rig.drain(NAME)
    return live_bytes(rig)


def live_bytes(rig: Rig) -> int:
    status = json.loads(rig.run("status", "--json"))
    return int(status["store"]["live_bytes"])


def test_a_front_that_is_killed_gets_its_device_back(loop: Rig) -> None:
    run("dd", f"if={__file__}", f"of={LINK}", "conv=fsync,notrunc")
    first = front_pid(loop)
    end_front(loop, signal.SIGKILL)
    loop.wait_status(lambda _status: front_pid(loop) not in (0, first) and is_readable())
    with LINK.open("rb") as device:
        assert device.read(100) == Path(__file__).read_bytes()[:100]


def is_readable() -> bool:
    try:
        number = os.open(LINK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return len(os.pread(number, 512, 0)) == 512
    except OSError:
        return False
    finally:
        os.close(number)


def test_a_device_comes_back_when_daemon_and_front_have_died(loop: Rig) -> None:
    run("dd", f"if={__file__}", f"of={LINK}", "conv=fsync,notrunc")
    loop.kill_cache()
    end_front(loop, signal.SIGKILL)
    loop.start_cache()
    assert is_readable()


def test_a_daemon_that_stops_leaves_a_device_in_use_and_takes_one_that_is_not(loop: Rig) -> None:
    assert loop.cache is not None
    with LINK.open("rb", buffering=0):
        assert loop.cache.stop() == 0
        assert loop_device.backing_of(int(LINK.resolve().name[4:]))
        loop.start_cache()
        assert is_readable()
    assert loop.cache.stop() == 0
    end_front(loop)  # only waits: it was told to end
    assert not LINK.is_symlink()
    loop.start_cache()
    assert is_readable()


def test_an_open_device_is_not_detached_and_the_text_says_who_has_it(loop: Rig) -> None:
    with LINK.open("rb", buffering=0):
        said = loop.run("detach", NAME, code=1)
    assert f"process {os.getpid()}" in said and said.count("\n") == 1
    assert is_readable()


def test_a_grown_volume_is_a_grown_device(loop: Rig) -> None:
    loop.run("volume", "resize", NAME, "48MiB")
    loop.wait_status(lambda _status: int(run("blockdev", "--getsize64", LINK)) == 48 * MIB)


def test_a_snapshot_is_a_device_that_nobody_writes(loop: Rig) -> None:
    run("dd", f"if={__file__}", f"of={LINK}", "conv=fsync,notrunc")
    loop.run("snapshot", "create", f"{NAME}@then", "--wait")
    path = json.loads(loop.run("attach", f"{NAME}@then", "--front", "loop"))["path"]
    assert run("blockdev", "--getro", path) == "1\n"
    with open(path, "rb") as device:
        assert device.read(100) == Path(__file__).read_bytes()[:100]
    loop.run("detach", f"{NAME}@then")

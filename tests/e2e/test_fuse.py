"""The FUSE front for real: files of volumes, and what becomes of them when the daemon or the front dies."""

import ctypes
import errno
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fuse import end_front, front_pid, fuse_missing, tidy
from e2e_rig import Rig

from forebay_cache.service import fuse_mount
from forebay_core.units import MIB

pytestmark = pytest.mark.skipif(bool(fuse_missing()), reason=fuse_missing())
SIZE = 16 * MIB
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@pytest.fixture
def fuse(rig: Rig) -> Iterator[Rig]:
    """A rig whose volume `disk` is attached by FUSE."""
    with tidy(rig):
        rig.start()
        rig.create("disk", SIZE)
        answer = rig.run("attach", "disk", "--front", "fuse")
        assert json.loads(answer) == {"path": str(disk(rig))}
        yield rig


def disk(rig: Rig, name: str = "disk") -> Path:
    return rig.run_dir / "volumes" / name


def is_shown(rig: Rig) -> bool:
    try:
        return stat.S_ISREG(disk(rig).stat().st_mode)
    except OSError:  # of a dead mount there are several
        return False


def put(rig: Rig, content: bytes) -> None:
    with disk(rig).open("r+b", buffering=0) as file:
        file.write(content)


def fallocate(number: int, mode: int, offset: int, length: int) -> int:
    return 0 if LIBC.fallocate(number, mode, offset, length) == 0 else ctypes.get_errno()


def test_a_volume_is_a_file_that_keeps_what_is_written(fuse: Rig) -> None:
    found = disk(fuse).stat()
    assert stat.S_ISREG(found.st_mode) and found.st_size == SIZE
    content = os.urandom(3 * MIB)
    with disk(fuse).open("r+b", buffering=0) as file:
        file.seek(777)
        assert file.write(content) == len(content)
        os.fsync(file.fileno())
        file.seek(777)
        assert file.read(len(content)) == content
    fuse.run("detach", "disk")
    assert fuse.exported("disk")[777 : 777 + len(content)] == content
    assert not disk(fuse).exists()


def test_holes_are_punched_found_and_zero(fuse: Rig) -> None:
    number = os.open(disk(fuse), os.O_RDWR)
    try:
        os.pwrite(number, b"x" * 65536, MIB)
        assert (os.lseek(number, 0, os.SEEK_DATA), os.lseek(number, MIB, os.SEEK_HOLE)) == (MIB, MIB + 65536)
        assert fallocate(number, PUNCH_HOLE | KEEP_SIZE, MIB, 32768) == 0
        assert fallocate(number, ZERO_RANGE | KEEP_SIZE, MIB + 65536 - 512, 512) == 0
        assert os.pread(number, 65536, MIB) == bytes(32768) + b"x" * (32768 - 512) + bytes(512)
        assert os.lseek(number, 0, os.SEEK_DATA) == MIB + 32768
        assert fallocate(number, 0, 0, SIZE) == errno.EOPNOTSUPP
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(number, 2 * MIB, os.SEEK_DATA)
    finally:
        os.close(number)


def test_neither_size_nor_names_can_be_changed_in_the_folder(fuse: Rig) -> None:
    with pytest.raises(PermissionError):
        os.truncate(disk(fuse), 0)
    with pytest.raises(PermissionError):
        disk(fuse).unlink()
    with pytest.raises(PermissionError):
        disk(fuse, "other").write_bytes(b"")
    with disk(fuse).open("r+b", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        os.pwrite(file.fileno(), b"xy", SIZE - 1)


def test_a_snapshot_is_a_file_that_nobody_writes(fuse: Rig) -> None:
    put(fuse, b"before")
    fuse.run("snapshot", "create", "disk@then", "--wait")
    put(fuse, b"behind")
    fuse.run("attach", "disk@then", "--front", "fuse")
    assert sorted(os.listdir(disk(fuse).parent)) == ["disk", "disk@then"]
    with disk(fuse, "disk@then").open("rb") as file:
        assert file.read(6) == b"before"
    with pytest.raises(OSError, match="Read-only file system"):
        os.open(disk(fuse, "disk@then"), os.O_RDWR)
    fuse.run("detach", "disk@then")


def test_an_open_volume_is_not_detached_and_the_text_says_who_has_it(fuse: Rig) -> None:
    with disk(fuse).open("rb"):
        said = fuse.run("detach", "disk", code=1)
    assert f"process {os.getpid()}" in said and str(disk(fuse)) in said and said.count("\n") == 1
    fuse.run("detach", "disk")
    assert front_pid(fuse) == 0
    assert not fuse_mount.is_mounted(disk(fuse).parent)


def test_a_grown_volume_is_a_grown_file(fuse: Rig) -> None:
    with disk(fuse).open("r+b", buffering=0) as file:
        fuse.run("volume", "resize", "disk", "24MiB")
        fuse.wait_status(lambda _status: disk(fuse).stat().st_size == 24 * MIB)
        assert os.pwrite(file.fileno(), b"new", 20 * MIB) == 3
        assert os.pread(file.fileno(), 4, 20 * MIB) == b"new\0"


def test_a_daemon_that_stops_leaves_an_open_file_waiting_for_the_next_one(fuse: Rig) -> None:
    assert fuse.cache is not None
    with disk(fuse).open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"before", 0)
        assert fuse.cache.stop() == 0
        reader = subprocess.Popen(["head", "-c", "6", disk(fuse)], stdout=subprocess.PIPE)
        fuse.start_cache()
        assert reader.communicate(timeout=60)[0] == b"before"
        assert os.pread(file.fileno(), 6, 0) == b"before"


def test_who_waits_for_a_dead_daemon_can_be_killed(fuse: Rig) -> None:
    fuse.kill_cache()
    reader = subprocess.Popen(["cat", disk(fuse)], stdout=subprocess.DEVNULL)
    reader.kill()
    assert reader.wait(20) == -signal.SIGKILL


def test_a_daemon_that_stops_takes_the_front_with_it_when_nothing_is_open(fuse: Rig) -> None:
    assert fuse.cache is not None
    assert fuse.cache.stop() == 0
    end_front(fuse)  # only waits: it was told to end
    assert not fuse_mount.is_mounted(disk(fuse).parent)
    fuse.start_cache()
    assert disk(fuse).stat().st_size == SIZE


@pytest.mark.parametrize("daemon_runs", [True, False])
def test_a_front_that_is_killed_is_restored(fuse: Rig, daemon_runs: bool) -> None:
    put(fuse, b"kept")
    first = front_pid(fuse)
    if not daemon_runs:
        fuse.kill_cache()
    end_front(fuse, signal.SIGKILL)
    if not daemon_runs:
        assert not is_shown(fuse)
        fuse.start_cache()
    fuse.wait_status(lambda _status: front_pid(fuse) not in (0, first) and is_shown(fuse))
    with disk(fuse).open("rb", buffering=0) as file:
        assert file.read(4) == b"kept"


def test_a_mount_point_that_holds_something_is_refused(rig: Rig) -> None:
    with tidy(rig):
        rig.start()
        rig.create("disk", SIZE)
        disk(rig).parent.mkdir()
        disk(rig, "mine").write_text("precious")
        said = rig.run("attach", "disk", "--front", "fuse", code=1)
        assert "is not empty" in said and said.count("\n") == 1
        assert disk(rig, "mine").read_text() == "precious"
        assert [volume.name for volume in rig.status().volumes] == []


def test_a_run_directory_that_takes_no_files_is_one_line(rig: Rig) -> None:
    with tidy(rig):
        rig.start()
        rig.create("disk", SIZE)
        (rig.run_dir / "fuse.pid").mkdir()  # as a full or read-only disk: root may write everywhere
        said = rig.run("attach", "disk", "--front", "fuse", code=1)
        assert "can't be used by the FUSE front" in said and said.count("\n") == 1
        (rig.run_dir / "fuse.pid").rmdir()
        rig.run("attach", "disk", "--front", "fuse")
        rig.run("detach", "disk")

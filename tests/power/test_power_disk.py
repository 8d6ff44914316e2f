"""The file system that loses its power, under small programs: proper ones lose nothing, forgetful ones are caught."""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from power_disk import PowerDisk
from undo import Undo

CUTS = 40
Replace = Callable[[Path, bytes], None]


def replace_properly(path: Path, content: bytes) -> None:
    """Replace a file so that a power cut shows the old or the new one, and the new one once this returns."""
    replace(path, content, sync_file=True, sync_folder=True)


def forget_the_file(path: Path, content: bytes) -> None:
    replace(path, content, sync_file=False, sync_folder=True)


def forget_the_folder(path: Path, content: bytes) -> None:
    replace(path, content, sync_file=True, sync_folder=False)


def replace(path: Path, content: bytes, *, sync_file: bool, sync_folder: bool) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        if sync_file:
            os.fsync(file.fileno())
    temporary.rename(path)
    if sync_folder:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def cuts_survived(disk: PowerDisk, replace: Replace) -> int:
    """Return in how many cuts the file was what the program had said was safe."""
    path = disk.folder / "file"
    replace_properly(path, b"")
    survived = 0
    for seed in range(CUTS):
        content = seed.to_bytes(2) * 3000
        replace(path, content)
        disk.power_cycle(seed)
        survived += path.exists() and path.read_bytes() == content
    return survived


def test_a_program_that_syncs_all_loses_nothing(disk: PowerDisk) -> None:
    assert cuts_survived(disk, replace_properly) == CUTS
    assert disk.syncs >= 2 * CUTS


@pytest.mark.parametrize("forgetful", [forget_the_file, forget_the_folder])
def test_a_program_that_forgets_a_sync_is_caught(disk: PowerDisk, forgetful: Replace) -> None:
    assert cuts_survived(disk, forgetful) < CUTS


def test_a_disk_that_ignores_syncs_is_caught(disk: PowerDisk) -> None:
    disk.ignore_sync(True)
    assert cuts_survived(disk, replace_properly) < CUTS


def test_direct_and_synchronous_writes_and_mapped_reads_work(disk: PowerDisk) -> None:
    page = mmap.mmap(-1, 4096)
    page.write(b"d" * 4096)
    path = disk.folder / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 4 * 4096)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    assert os.pwritev(direct, [page], 4096) == 4096  # O_DSYNC: covers the size as well
    os.pwrite(fd, b"lost", 0)
    with mmap.mmap(fd, 4 * 4096, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        assert mapped[:8] == b"lost\0\0\0\0"
        assert mapped[4096:8192] == b"d" * 4096
    os.close(fd)
    os.close(direct)
    folder = os.open(disk.folder, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    shown = set()
    for seed in range(8):
        disk.power_cycle(seed)
        content = path.read_bytes()
        assert len(content) == 4 * 4096
        assert content[4096:8192] == b"d" * 4096
        shown.add(content[:4])
        with path.open("r+b") as file:
            file.write(b"lost")
    assert b"\0\0\0\0" in shown


def test_an_unlinked_file_stays_open(disk: PowerDisk) -> None:
    with (disk.folder / "file").open("w+b") as file:
        file.write(b"content")
        file.flush()
        (disk.folder / "file").unlink()
        file.truncate(4)
        file.seek(0)
        assert file.read() == b"cont"
        assert os.listdir(disk.folder) == []


def test_lmdb_keeps_what_it_synced(disk: PowerDisk) -> None:
    for seed in range(10):
        with lmdb.open(str(disk.folder / "index"), map_size=1 << 24) as environment:
            with environment.begin() as reader:
                assert reader.stat()["entries"] == 50 * seed
            with environment.begin(write=True) as writer:
                for number in range(50):
                    writer.put(b"%d %d" % (seed, number), os.urandom(300))
        for folder in (disk.folder, disk.folder / "index"):
            fd = os.open(folder, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        disk.power_cycle(seed)


KILLED = """
import os, signal, sys
from pathlib import Path
from power_disk import PowerDisk
from undo import Undo
disk = PowerDisk(Path(sys.argv[1]))
Undo().note("rm", sys.argv[2])
assert os.path.ismount(sys.argv[1])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_test_run_leaves_no_mount_and_undoes_its_steps(disk: PowerDisk, tmp_path: Path) -> None:
    folder, mark = tmp_path / "other", tmp_path / "mark"
    folder.mkdir()
    mark.touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(mark)], env=environment, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while os.path.ismount(folder) or mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.path.ismount(disk.folder)


def test_steps_that_were_undone_already_are_left_alone(tmp_path: Path) -> None:
    kept, undone = tmp_path / "kept", tmp_path / "undone"
    kept.touch()
    undone.touch()
    undo = Undo()
    key = undo.note("rm", str(kept))
    undo.note("rm", str(undone))
    undo.forget(key)
    undo.close()
    assert (kept.exists(), undone.exists()) == (True, False)

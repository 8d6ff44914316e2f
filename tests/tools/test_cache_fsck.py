"""`forebay cache fsck` on real device files: exit codes, --json, devices in use, and that it never writes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from forebay_cache.service.device_file import open_device
from forebay_cache.service.failure_mark import FailureMark
from forebay_cache.service.opening import recover_device
from forebay_core.units import MIB

FOREBAY = (sys.executable, "-m", "forebay_tools.main")


def make(path: Path) -> Path:
    file = open_device(path, 8 * MIB)
    recover_device(file, zone_size=256 * 1024, format_anew=False, mark=FailureMark(path.parent, file.fd))
    os.close(file.fd)
    return path


def fsck(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*FOREBAY, "cache", "fsck", "--device", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_a_clean_device_is_clean(tmp_path: Path) -> None:
    done = fsck(make(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (0, "") and "nothing wrong" in done.stdout
    done = fsck(tmp_path / "cache", "--json", "--headers-only")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_damage_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    device = make(tmp_path / "cache")
    content = bytearray(device.read_bytes())
    content[50] ^= 1
    device.write_bytes(content)
    before = hashlib.sha256(content).digest()
    done = fsck(device, "--json")
    assert done.returncode == 1
    assert [one["code"] for one in json.loads(done.stdout)] == ["superblock-bad"]
    done = fsck(device)
    assert done.returncode == 1 and done.stdout.startswith("superblock-bad: superblock A at offset 0:")
    assert hashlib.sha256(device.read_bytes()).digest() == before


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    assert fsck(tmp_path / "none").returncode == 2
    assert fsck(tmp_path).returncode == 2
    device = make(tmp_path / "cache")
    file = open_device(device, None)
    try:
        done = fsck(device)
        assert done.returncode == 1
        assert done.stderr == (
            f"forebay: cache fsck: {device}: is in use by process {os.getpid()}; stop it first or use another device\n"
        )
    finally:
        os.close(file.fd)


def test_a_foreign_file_is_no_cache_device(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(os.urandom(MIB))
    done = fsck(tmp_path / "cache", "--json")
    assert done.returncode == 1
    assert {one["code"] for one in json.loads(done.stdout)} == {"superblock-bad", "state-unchecked"}

"""Hosts that lack what a daemon or a front needs: one line that says what, and nothing is left behind."""

import os
import subprocess
from pathlib import Path

import pytest
from e2e_rig import FOREBAY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount something for a process alone")
CHECKS = {
    "fuse_mount.check_fuse": "this host has no FUSE: /dev/fuse is missing; modprobe fuse",
    "loop_device.check_loop": "this host has no loop devices: /dev/loop-control is missing; modprobe loop",
}


def apart(script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a mount namespace of its own, behind a script that changes that."""
    command = ["unshare", "--mount", "sh", "-ec", f'{script}\nexec "$@"', "sh", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_run_directory_on_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    words = ["cache", "serve", "--device", str(tmp_path / "device"), "--size", "80MiB", "--store", "127.0.0.1:1"]
    done = apart(f"mount -t tmpfs -o ro none {run_dir}", *FOREBAY, *words, "--run-dir", str(run_dir))
    assert done.returncode == 1
    assert done.stderr == f"forebay: cache serve: {run_dir}: can't be used as run directory (Read-only file system)\n"
    assert not (tmp_path / "device").exists()


@pytest.mark.parametrize("check", CHECKS)
def test_a_host_without_the_devices_of_a_front_is_told_which_and_what_to_do(tmp_path: Path, check: str) -> None:
    hide = f"mount -t tmpfs none {tmp_path}; mknod {tmp_path}/null c 1 3; mknod {tmp_path}/urandom c 1 9"
    module = check.partition(".")[0]
    code = f"from forebay_cache.service import {module}\ntry: {check}()\nexcept Exception as error: print(error)"
    done = apart(f"{hide}; mount --bind {tmp_path} /dev", FOREBAY[0], "-c", code)
    assert done.stdout.startswith(CHECKS[check]) and done.stdout.count("\n") == 1

"""The FUSE front in the tests: why it can't be had, how its process is found, and that nothing of it is left."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e_rig import Rig

from forebay_cache.service import fuse_mount
from forebay_cache.service.fuse_calls import LOCK, VOLUMES

END_TIMEOUT_S = 20.0


def fuse_missing() -> str:
    """Say why there is no FUSE here; empty if there is."""
    if not os.path.exists("/dev/fuse"):
        return "no FUSE: there is no /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no FUSE: no permission to open /dev/fuse"
    return "" if shutil.which("fusermount3") else "no FUSE: the program fusermount3 is missing"


def front_pid(rig: Rig) -> int:
    """Return the process of the front; 0 if none runs."""
    try:
        number = int((rig.run_dir / LOCK).read_text())
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return 0
    return number if os.fsencode(rig.run_dir) in words else 0


def end_front(rig: Rig, number: int = signal.SIGTERM) -> None:
    """End the front, and wait until it is gone."""
    pid = front_pid(rig)
    if pid:
        os.kill(pid, number)
        deadline = time.monotonic() + END_TIMEOUT_S
        while front_pid(rig) == pid:
            assert time.monotonic() < deadline, "the FUSE front does not end"
            time.sleep(0.01)


@contextmanager
def tidy(rig: Rig) -> Iterator[Rig]:
    """End daemon and front of a rig at last, and take the mount away."""
    try:
        yield rig
    finally:
        rig.stop()
        end_front(rig)
        fuse_mount.unmount(rig.run_dir / VOLUMES)

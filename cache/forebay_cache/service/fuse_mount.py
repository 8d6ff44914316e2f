"""Mounts the folder of the FUSE front, and takes away what a dead front left of it.

Only mounts that carry our name are ever unmounted. `fusermount3` mounts, as it does for libfuse: it needs no root.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError

DEVICE: Final = Path("/dev/fuse")
PROGRAM: Final = "fusermount3"
NAME: Final = "forebay"
OPTIONS: Final = f"rw,nosuid,nodev,noexec,noatime,default_permissions,fsname={NAME},subtype={NAME}"
MOUNT_TIMEOUT_S: Final = 20.0
_TYPE: Final = f"fuse.{NAME}"
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


def check_fuse() -> None:
    """Look whether this host can mount.

    Raises:
        ForebayError: it can't; the text says what is missing.
    """
    if not DEVICE.exists():
        raise ForebayError(f"this host has no FUSE: {DEVICE} is missing; modprobe fuse, or use another --front")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise ForebayError(f"no permission to open {DEVICE}; run the cache daemon as root or change its mode")
    if shutil.which(PROGRAM) is None:
        raise ForebayError(f"the program {PROGRAM} is missing; apt-get install fuse3")


def is_mounted(folder: Path) -> bool:
    """Tell whether a mount of ours, living or dead, covers the folder."""
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            words = line.split()
            after = words.index("-")
            place = _ESCAPE.sub(lambda found: chr(int(found[1], 8)), words[4])
            if place == str(folder) and words[after + 1] == _TYPE:
                return True
    return False


def unmount(folder: Path) -> None:
    """Take our mount away, at once for new names; who has a file open keeps it as long as a front answers."""
    while is_mounted(folder):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [PROGRAM, "-u", "-z", "--", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
                timeout=MOUNT_TIMEOUT_S,
            )
            if done.returncode == 0:
                continue
        raise ForebayError(f"{folder}: can't be unmounted; see who uses it and run {PROGRAM} -u {folder}")


def mount(folder: Path) -> int:
    """Mount the folder, which is made if need be; return the descriptor to serve it by.

    Raises:
        ForebayError: the host says no, or the folder holds something.
    """
    check_fuse()
    unmount(folder)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if any(folder.iterdir()):
            raise ForebayError(f"{folder}: is not empty, so it can't be mounted over; empty it")
    except OSError as error:
        raise ForebayError(f"{folder}: can't be used as mount point ({error.strerror})") from error
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [PROGRAM, "-o", OPTIONS, "--", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            check=False,
            timeout=MOUNT_TIMEOUT_S,
        )
        theirs.close()
        found = socket.recv_fds(ours, 1, 1)[1] if done.returncode == 0 else []
    if not found:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ForebayError(f"{folder}: can't be mounted ({said[-1] if said else PROGRAM + ' failed'})")
    os.set_blocking(found[0], False)
    os.set_inheritable(found[0], False)
    return found[0]

"""Loop devices over files of the FUSE front. All of it blocks.

`losetup` does it all, as a process of its own: making a device syncs its file, and opening one waits for who makes one.
The daemon answers that, so a thread of the daemon that waited for it could not be killed, and would hold its locks.
It dies with the daemon: one that went on would make a device that the next start does not know of.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError

CONTROL: Final = Path("/dev/loop-control")
PROGRAM: Final = "losetup"
WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")
TIMEOUT_S: Final = 30.0
_SYS_BLOCK: Final = Path("/sys/block")


def check_loop() -> None:
    """Look whether this host can make loop devices.

    Raises:
        ForebayError: it can't; the text says what is missing.
    """
    if not CONTROL.exists():
        raise ForebayError(
            f"this host has no loop devices: {CONTROL} is missing; modprobe loop, or use another --front"
        )
    if not os.access(CONTROL, os.R_OK | os.W_OK):
        raise ForebayError(f"no permission to open {CONTROL}; run the cache daemon as root, or use --front fuse")
    for program, package in ((PROGRAM, "mount"), (WITH_US[0], "util-linux")):
        if shutil.which(program) is None:
            raise ForebayError(f"the program {program} is missing; apt-get install {package}")


def path_of(number: int) -> str:
    """Return the node of a device."""
    return f"/dev/loop{number}"


def devices_of(file: Path) -> list[int]:
    """Return the devices that are over a file, whoever made them."""
    found = [int(folder.name[4:]) for folder in _SYS_BLOCK.glob("loop*") if folder.name[4:].isdigit()]
    return sorted(number for number in found if backing_of(number) == str(file))


def backing_of(number: int) -> str:
    """Return the file that a device is over; empty if it is over none."""
    try:
        return (_SYS_BLOCK / f"loop{number}" / "loop" / "backing_file").read_text().rstrip("\n")
    except OSError:
        return ""


def is_dead(number: int) -> bool:
    """Tell whether a device is over a file whose file system is gone: only then it can't tell the file's number."""
    try:
        number_of_file = _losetup("--noheadings", "--list", "--output", "BACK-INO", path_of(number)).strip()
    except ForebayError:
        return False
    return not number_of_file and bool(backing_of(number))


def make(file: Path, *, read_only: bool) -> int:
    """Make a device with direct I/O over a file and return its number.

    Raises:
        ForebayError: it can't be made; nothing is left of it.
    """
    flags = ["--read-only"] if read_only else []
    path = _losetup("--find", "--show", "--direct-io=on", *flags, str(file)).strip()
    number = int(path.removeprefix("/dev/loop"))
    direct = (_SYS_BLOCK / f"loop{number}" / "loop" / "dio").read_text().strip()
    if direct != "1":
        remove(number)
        raise ForebayError(f"{path}: this kernel does no direct I/O over {file}; use another --front")
    return number


def remove(number: int) -> bool:
    """Take a device away; tell whether it is gone: one that somebody still has open goes when he closes it."""
    with contextlib.suppress(ForebayError):
        _losetup("--detach", path_of(number))
    return not backing_of(number)


def adopt_size(number: int) -> None:
    """Let a device see that its file has grown.

    Raises:
        ForebayError: it does not.
    """
    _losetup("--set-capacity", path_of(number))


def _losetup(*words: str) -> str:
    try:
        child = subprocess.Popen(
            [*WITH_US, PROGRAM, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise ForebayError(f"{PROGRAM} can't be started ({error.strerror})") from error
    try:
        said, complaint = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        raise ForebayError(
            f"{PROGRAM} {' '.join(words)} takes too long; is the store away and the device new?"
        ) from None
    if child.returncode:
        reason = complaint.strip().splitlines()[-1:] or [f"{PROGRAM} ended with {child.returncode}"]
        raise ForebayError(f"no loop device: {reason[0]}")
    return said

"""Who uses a block device: mounts and swap, devices made of it, and processes that have it open. All of it blocks.

What another user of the host does in between is not excluded; what can be, an exclusive opener, the caller excludes.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from forebay_cache.service.loop_device import devices_of
from forebay_cache.service.processes import link_target, names_in, openers, pids

SHOWN_MAX: Final = 5
_SYS_BLOCK: Final = Path("/sys/block")


def users_of(device: str) -> list[str]:
    """Return who uses `/dev/NAME` or a partition of it, as words for people; at most SHOWN_MAX and how many more."""
    name = Path(device).name
    numbers = _numbers(name)
    users = sorted({*_holders(name), *_mounts(numbers), *_openers(numbers), *_swaps(name)})
    more = len(users) - SHOWN_MAX
    return [*users[:SHOWN_MAX], f"{more} more"] if more > 0 else users


def _numbers(name: str) -> set[int]:
    """Return the device numbers of a disk and of its partitions."""
    numbers = set()
    for path in (_SYS_BLOCK / name, *_partitions(name)):
        try:
            major, minor = (path / "dev").read_text().split(":")
        except (OSError, ValueError):
            continue
        numbers.add(os.makedev(int(major), int(minor)))
    return numbers


def _partitions(name: str) -> list[Path]:
    return [path for path in (_SYS_BLOCK / name).glob(f"{name}*") if (path / "partition").exists()]


def _holders(name: str) -> Iterator[str]:
    for path in (_SYS_BLOCK / name, *_partitions(name)):
        for holder in names_in(path / "holders"):
            yield f"part of {holder}"
        for number in devices_of(Path("/dev", path.name)):
            yield f"part of loop{number}"


def _mounts(numbers: set[int]) -> Iterator[str]:
    """Yield where it is mounted, in whatever mount namespace."""
    seen = set()
    for pid in pids():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            lines = Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split(" ")
            major, _, minor = fields[2].partition(":")
            if os.makedev(int(major), int(minor)) in numbers:
                yield f"mounted at {fields[4]}"


def _openers(numbers: set[int]) -> Iterator[str]:
    for pid, name in openers(lambda link: _is_open(link, numbers)):
        yield f"open in {name} (process {pid})"


def _is_open(link: str, numbers: set[int]) -> bool:
    # Only what lies in /dev is looked at: a file of a server that is gone would not answer.
    if not link_target(link).startswith("/dev/"):
        return False
    try:
        status = os.stat(link)
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev in numbers


def _swaps(name: str) -> Iterator[str]:
    names = {f"/dev/{name}", *(f"/dev/{path.name}" for path in _partitions(name))}
    try:
        lines = Path("/proc/swaps").read_text().splitlines()
    except OSError:
        return
    for line in lines[1:]:
        if line.split()[0] in names:
            yield "used as swap"

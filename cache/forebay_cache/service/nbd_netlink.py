"""The kernel's NBD client, asked over generic netlink (linux/nbd-netlink.h) and sysfs. All of it blocks a little.

The sockets are named by their descriptors in this process, so it has to be this one that sends the message.

Invariant: no thread of this process ever waits for a device that this process serves; see `_run_apart`.
"""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from forebay_cache.engine.kernel_device import DEAD_LINK_TIMEOUT_S, IO_TIMEOUT_MS, Connect, Found, Mend, Resize
from forebay_cache.service.device_users import users_of
from forebay_cache.service.memory_guard import guard_memory
from forebay_core.errors import ForebayError

SYS_BLOCK: Final = Path("/sys/block")
APART_TIMEOUT_S: Final = 5.0
_CLAIM: Final = """
import os, sys
try:
    os.fsync(os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL))
except OSError as error:
    sys.exit(error.errno)
"""
_NOTHING_LEFT: Final = {errno.EIO, errno.ENOSPC, errno.ENOENT, errno.ENXIO, errno.ENODEV}
"""What claiming a device may say when there is nothing to wait for: its volume takes no more, or it has gone."""

_CONNECT: Final = 1
_DISCONNECT: Final = 2
_RECONFIGURE: Final = 3
_CAP_SYS_ADMIN: Final = 21
_SECTOR: Final = 512
_DEVICES_MAX: Final = 4096


class KernelPort(Protocol):
    """What the kernel front asks of the kernel; a refusal is an OSError."""

    def check(self) -> None:
        """Raise a ForebayError if this host has no NBD client, or does not let us use it."""

    def devices(self) -> Sequence[Found]:
        """Return the devices that exist, connected or not."""

    def connect(self, command: Connect, socket_fd: int) -> int:
        """Make a device and return its number."""

    def mend(self, command: Mend, socket_fd: int) -> None:
        """Give a device a socket if it has none."""

    def resize(self, command: Resize) -> None:
        """Tell a device its size."""

    def disconnect(self, number: int) -> None:
        """End a device; what it still asks for fails."""

    def tune(self, number: int) -> None:
        """Let a live device ask soon whether its socket was replaced."""

    def has_appeared(self, number: int, size: int) -> bool:
        """Tell whether programs can open a device, and see its size."""

    def users(self, number: int) -> Sequence[str]:
        """Return who uses a device, as words for people; if nobody does, all that they wrote is with us."""

    def guard(self) -> None:
        """A device is about to be served: be ready for a host that runs short of memory."""


class NbdNetlink:
    """Implements KernelPort for the kernel that runs."""

    def check(self) -> None:
        """See KernelPort."""
        if not Path("/sys/module/nbd").is_dir():
            raise ForebayError("this kernel has no nbd; load it: modprobe nbd")
        status = Path("/proc/self/status").read_text()
        capabilities = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
        if not capabilities >> _CAP_SYS_ADMIN & 1:
            raise ForebayError(
                "the kernel lets only root make block devices (CAP_SYS_ADMIN); run the cache daemon as root"
            )

    def devices(self) -> Sequence[Found]:
        """See KernelPort."""
        found = []
        for path in sorted(SYS_BLOCK.glob("nbd*"))[:_DEVICES_MAX]:
            number = path.name.removeprefix("nbd")
            if number.isdigit():
                connected = (path / "pid").exists()
                size = int(_read(path / "size") or "0") * _SECTOR
                found.append(Found(int(number), connected, _read(path / "backend") if connected else "", size))
        return found

    def connect(self, command: Connect, socket_fd: int) -> int:
        """See KernelPort."""
        attributes: list[object] = [
            ["NBD_ATTR_SIZE_BYTES", command.size],
            ["NBD_ATTR_BLOCK_SIZE_BYTES", command.block_size],
            ["NBD_ATTR_TIMEOUT", 0],
            ["NBD_ATTR_SERVER_FLAGS", command.flags],
            ["NBD_ATTR_DEAD_CONN_TIMEOUT", DEAD_LINK_TIMEOUT_S],
            _sockets(socket_fd),
            ["NBD_ATTR_BACKEND_IDENTIFIER", command.identifier],
        ]
        if command.number is not None:
            attributes.append(["NBD_ATTR_INDEX", command.number])
        number = _ask(_CONNECT, attributes)
        if number is None:
            raise OSError(errno.EIO, "the kernel did not say which device it made")
        return number

    def mend(self, command: Mend, socket_fd: int) -> None:
        """See KernelPort."""
        attributes: list[object] = [
            ["NBD_ATTR_INDEX", command.number],
            ["NBD_ATTR_DEAD_CONN_TIMEOUT", DEAD_LINK_TIMEOUT_S],
            _sockets(socket_fd),
        ]
        if _read(SYS_BLOCK / f"nbd{command.number}" / "backend"):
            attributes.append(["NBD_ATTR_BACKEND_IDENTIFIER", command.identifier])
        _ask(_RECONFIGURE, attributes)

    def resize(self, command: Resize) -> None:
        """See KernelPort."""
        known = _read(SYS_BLOCK / f"nbd{command.number}" / "backend")
        words = [str(command.number), str(command.size), *([command.identifier] if known else [])]
        code = _run_apart([sys.executable, "-m", "forebay_cache.service.nbd_messages", *words])
        if code:
            raise OSError(code, os.strerror(code))

    def disconnect(self, number: int) -> None:
        """See KernelPort."""
        _ask(_DISCONNECT, [["NBD_ATTR_INDEX", number]])

    def tune(self, number: int) -> None:
        """See KernelPort."""
        path = SYS_BLOCK / f"nbd{number}" / "queue" / "io_timeout"
        if _read(path) != str(IO_TIMEOUT_MS):
            path.write_text(f"{IO_TIMEOUT_MS}\n")

    def has_appeared(self, number: int, size: int) -> bool:
        """See KernelPort."""
        try:
            is_node = stat.S_ISBLK(os.stat(f"/dev/nbd{number}").st_mode)
        except OSError:
            return False
        return is_node and int(_read(SYS_BLOCK / f"nbd{number}" / "size") or "0") * _SECTOR == size

    def users(self, number: int) -> Sequence[str]:
        """See KernelPort."""
        path = f"/dev/nbd{number}"
        return users_of(path) or _claim(path)

    def guard(self) -> None:
        """See KernelPort."""
        guard_memory()


def _sockets(fd: int) -> list[object]:
    return ["NBD_ATTR_SOCKETS", {"attrs": [["NBD_SOCK_ITEM", {"attrs": [["NBD_SOCK_FD", fd]]}]]}]


def _ask(command: int, attributes: list[object]) -> int | None:
    # Imported with the first device: it costs 140 ms and 11 MB (2026-11), which a start without devices need not pay.
    from forebay_cache.service.nbd_messages import ask

    return ask(command, attributes)


def _claim(path: str) -> list[str]:
    """Have everything written that is in memory for a device; return who keeps us from claiming it for that."""
    code = _run_apart([sys.executable, "-I", "-S", "-c", _CLAIM, path])
    if code == 0 or code in _NOTHING_LEFT:
        return []
    known = {errno.EBUSY: "claimed by the kernel", errno.ETIMEDOUT: "still being written"}
    return [known.get(code, f"not to be claimed ({errno.errorcode.get(code, str(code))})")]


def _run_apart(command: Sequence[str]) -> int:
    """Run what may wait for a device of ours in a process of its own, for a while; return the errno that it ends with.

    A thread of this process that waits for it would keep a killed daemon from ending: its sockets would stay open,
    the device would wait for answers from them, and the thread for the device.
    """
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError as error:
        return error.errno or errno.EAGAIN
    try:
        return child.wait(APART_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return errno.ETIMEDOUT  # it ends when the device answers


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

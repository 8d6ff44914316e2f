"""The run directory of a daemon: its lock and its sockets. Only the daemon's user may enter.

A group may be let through to the NBD socket; all else in there stays closed to it by modes of its own.

Invariant: while a RunFolder is open no other daemon uses the directory.
Crash: the kernel drops the lock; the next daemon replaces the sockets.
"""

import fcntl
import grp
import os
from pathlib import Path
from typing import Final
from urllib.parse import quote

from forebay_core.errors import ForebayError, InUseError, WrongUsageError

LOCK: Final = "lock"
NBD_SOCKET: Final = "nbd.sock"
CONTROL_SOCKET: Final = "control.sock"
SOCKET_PATH_SIZE_MAX: Final = 107
"""Bytes of a Unix socket's path, as Linux has it."""


class RunFolder:
    """A locked run directory."""

    def __init__(self, path: Path, group: int | None = None) -> None:
        """Make the directory if need be, lock it, and let a group through.

        Raises:
            InUseError: another daemon uses it.
            WrongUsageError: sockets in it would have names that are too long.
            ForebayError: the operating system says no.
        """
        self.path = path.absolute()
        self.group = group
        if len(os.fsencode(self.path / CONTROL_SOCKET)) > SOCKET_PATH_SIZE_MAX:
            raise WrongUsageError(f"{path}: too long for sockets inside; choose a shorter --run-dir")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ForebayError(f"{path}: can't be used as run directory ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise InUseError(f"{path}: another cache daemon uses it; stop that one or choose another") from None
        if group is not None:
            self._let_through(group)

    @property
    def nbd_socket(self) -> str:
        """Where NBD clients connect."""
        return str(self.path / NBD_SOCKET)

    @property
    def control_socket(self) -> str:
        """Where commands connect."""
        return str(self.path / CONTROL_SOCKET)

    def uri(self, export: str) -> str:
        """Return the URI by which local clients reach an export."""
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(self.nbd_socket, safe='/')}"

    def close(self) -> None:
        """Unlock the directory."""
        os.close(self._lock)

    def _let_through(self, group: int) -> None:
        try:
            os.chown(self.path, -1, group)
            self.path.chmod(0o710)
        except OSError as error:
            os.close(self._lock)
            reason = f"can't be given to the group of cache.nbd_group ({error.strerror})"
            raise ForebayError(f"{self.path}: {reason}; run as root or as one of its members") from error


def group_number(name: str | None) -> int | None:
    """Return the number of a group.

    Raises:
        WrongUsageError: there is none of this name.
    """
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise WrongUsageError(f"cache.nbd_group = {name}: no such group; make it (groupadd) or name another") from None

"""The sockets on which NBD clients knock: Unix, TCP, or inherited from systemd.

Crash: a socket file stays behind. If systemd kept the socket, the next start inherits it with all who knocked
meanwhile; else it finds that nobody listens there and replaces it.
"""

import asyncio
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from typing import Final

from forebay_core.errors import ForebayError, InUseError, WrongUsageError

BACKLOG: Final = 128
INHERITED_MAX: Final = 64
_FIRST_INHERITED_FD: Final = 3
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


def unix_listener(path: str, group: int | None) -> socket.socket:
    """Return a socket that listens at `path`, for its owner and a group; a stale socket there is replaced.

    Raises:
        InUseError: another process listens there.
        ForebayError: the path is too long, is something else than a socket, or can't be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        open_to(path, group)  # before listen: until then nobody can connect
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ForebayError(f"NBD socket {path}: {error}") from error
    except ForebayError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def open_to(path: str, group: int | None) -> None:
    """Let the owner of a socket connect, and the members of a group.

    Raises:
        ForebayError: the operating system says no.
    """
    try:
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, 0o600 if group is None else 0o660)
    except OSError as error:
        raise ForebayError(f"NBD socket {path}: {error}") from error


async def tcp_listener(host: str, port: int, *, allow_remote: bool) -> socket.socket:
    """Return a socket that listens on a TCP address; port 0 takes any free one.

    Raises:
        WrongUsageError: the address is not loopback and `allow_remote` is not set.
        ForebayError: the address can't be resolved or is taken.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ForebayError(f"NBD address {host}:{port}: {error}") from error
    family, kind, protocol, _name, address = found[0]
    if not allow_remote and not _is_loopback(address):
        raise WrongUsageError(f"NBD address {host}:{port} is not loopback; anyone who reaches it could write volumes")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ForebayError(f"NBD address {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener


def inherited_listeners(environment: MutableMapping[str, str], pid: int, *, allow_remote: bool) -> list[socket.socket]:
    """Return the listening sockets that systemd (or a test suite) passed; none if they are not for this process.

    The variables are removed, so that children don't take the sockets for theirs.

    Raises:
        WrongUsageError: the variables are malformed, or a socket is none that NBD clients may connect to.
    """
    count_text = environment.pop("LISTEN_FDS", None)
    pid_text = environment.pop("LISTEN_PID", None)
    environment.pop("LISTEN_FDNAMES", None)
    if count_text is None or pid_text != str(pid):
        return []
    if not (count_text.isascii() and count_text.isdigit() and 1 <= int(count_text[:4]) <= INHERITED_MAX):
        raise WrongUsageError(f"LISTEN_FDS={count_text[:20]}: use a number from 1 to {INHERITED_MAX}")
    listeners: list[socket.socket] = []
    for fd in range(_FIRST_INHERITED_FD, _FIRST_INHERITED_FD + int(count_text)):
        try:
            listeners.append(_inherited_listener(fd, allow_remote=allow_remote))
        except WrongUsageError as error:
            for other in listeners:
                other.close()
            raise WrongUsageError(f"LISTEN_FDS={count_text}: descriptor {fd} {error}") from error
    return listeners


def _inherited_listener(fd: int, *, allow_remote: bool) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise WrongUsageError(f"is no socket: {error}") from error
    try:
        _check_inherited(listener, allow_remote=allow_remote)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _check_inherited(listener: socket.socket, *, allow_remote: bool) -> None:
    stream = listener.type == socket.SOCK_STREAM and listener.family in _FAMILIES
    if not (stream and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        raise WrongUsageError("is no Unix or TCP socket that listens; use ListenStream= with Accept=no in the unit")
    address = listener.getsockname()
    if listener.family != socket.AF_UNIX and not allow_remote and not _is_loopback(address):
        raise WrongUsageError(
            f"listens on {address[0]} port {address[1]}, which is not loopback; anyone who reaches it could write "
            "volumes; use 127.0.0.1, or give cache.nbd_allow_remote"
        )


def _is_loopback(address: Sequence[object]) -> bool:
    return ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


def remove_own_socket(listener: socket.socket, inode: tuple[int, int] | None) -> None:
    """Remove the socket file of a Unix listener unless somebody replaced it meanwhile."""
    path = listener.getsockname()
    if inode is not None and isinstance(path, str) and socket_inode(path) == inode:
        os.unlink(path)


def socket_inode(path: str) -> tuple[int, int] | None:
    """Return what identifies the file at `path`; None if there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def leads_somewhere(path: str) -> bool:
    """Tell whether a socket listens behind the file at `path`."""
    return socket_inode(path) is not None and _knock(path) != errno.ECONNREFUSED


def _knock(path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ForebayError(f"NBD socket {path}: there is something that is not a socket; remove it or choose another")
    if _knock(path) != errno.ECONNREFUSED:
        raise InUseError(f"NBD socket {path}: another process listens there")
    os.unlink(path)

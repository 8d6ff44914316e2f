"""Sockets as the wire wants them: connected, listening, tuned to notice a dead peer.

All are non-blocking. A Unix socket is connectable only by its owner: its mode is set before it listens.
"""

import asyncio
import errno
import os
import socket
import stat
from typing import Final

from forebay_core.errors import ForebayError, InUseError, StoreUnreachableError, WrongUsageError
from forebay_core.peers import peer_of
from forebay_wire.address import Address, UnixPath, is_loopback
from forebay_wire.limits import (
    KEEPALIVE_IDLE_S,
    KEEPALIVE_INTERVAL_S,
    KEEPALIVE_PROBES,
    LISTEN_BACKLOG,
    PEER_DEAD_AFTER_MS,
    SOCKET_BUFFER_SIZE,
)

_UNIX_MODE: Final = 0o600


async def connect(address: Address | UnixPath) -> socket.socket:
    """Return a connected socket.

    Raises:
        StoreUnreachableError: nobody answers there; the text names the address and the system's reason.
    """
    if not isinstance(address, Address):
        return await _connect_one(socket.AF_UNIX, address, f"unix:{address}")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host or "localhost", address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise StoreUnreachableError(f"{address}: {_reason(error)}") from error
    refusal = StoreUnreachableError(f"{address}: the name has no address")
    for family, _, _, _, target in found:
        try:
            return await _connect_one(family, target, str(address))
        except StoreUnreachableError as error:
            refusal = error
    raise refusal


async def _connect_one(family: int, target: object, name: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        # asyncio.sock_connect resolves names again; these targets are numbers or paths already.
        await asyncio.get_running_loop().sock_connect(sock, target)  # type: ignore[arg-type]
    except OSError as error:
        sock.close()
        raise StoreUnreachableError(f"{name}: {_reason(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def tune(sock: socket.socket) -> None:
    """Set what the wire needs: no delay, and a dead peer is noticed within 15 s, idle or not."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_SIZE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_SIZE)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_DEAD_AFTER_MS)


async def listening_tcp(address: Address, *, authenticated: bool) -> socket.socket:
    """Return a listening TCP socket; an empty host means every address of this host.

    Raises:
        WrongUsageError: the address is not this host's, or others can reach it and there is no key.
        InUseError: another process listens there.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise WrongUsageError(f"listen on {address}: {_reason(error)}") from error
    if not authenticated and not all(is_loopback(str(target[0])) for *_, target in found):
        raise WrongUsageError(
            f"listen on {address}: others can reach it, so a key file is needed; without one use 127.0.0.1"
        )
    # Of localhost's two addresses IPv4 is taken; of the wildcards IPv6, which takes IPv4 clients as well.
    found.sort(key=lambda row: (row[0] == socket.AF_INET6) != (address.host == ""))
    refusal: ForebayError = WrongUsageError(f"listen on {address}: the name has no address")
    for family, _, _, _, target in found:
        try:
            return _listen_on(family, target, address)
        except ForebayError as error:
            refusal = error
    raise refusal


def _listen_on(family: int, target: tuple[object, ...], address: Address) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise WrongUsageError(f"listen on {address}: {_reason(error)}") from error
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address.host == "" else 1)
        sock.bind(target)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise InUseError(f"listen on {address}: another process listens there") from error
        raise WrongUsageError(f"listen on {address}: {_reason(error)}") from error
    return sock


def listening_unix(path: UnixPath) -> socket.socket:
    """Return a listening Unix socket that only this user can connect to; a socket file nobody listens on is replaced.

    Raises:
        InUseError: another process listens there.
        WrongUsageError: the path can't be used, or something else than a socket is there.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(path)
        os.chmod(path, _UNIX_MODE)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise WrongUsageError(f"listen on unix:{path}: {_reason(error)}") from error
    return sock


def _remove_stale(path: UnixPath) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise WrongUsageError(f"listen on unix:{path}: something that is not a socket is there; remove it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            outcome = probe.connect_ex(path)
        if outcome != errno.ECONNREFUSED:
            raise InUseError(f"listen on unix:{path}: another process listens there")
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise WrongUsageError(f"listen on unix:{path}: {_reason(error)}") from error


def remote_name(sock: socket.socket) -> str:
    """Return who is at the other end, for people: address and port, or the process at a Unix socket."""
    if sock.family == socket.AF_UNIX:
        return f"process {peer_of(sock).pid}"
    try:
        host, port = sock.getpeername()[:2]
    except OSError:  # gone already
        return "unknown"
    return str(Address(host, port))


def _reason(error: OSError | UnicodeError) -> str:
    """Return the system's words for an error; asyncio and the resolver put others in its text."""
    if isinstance(error, socket.gaierror) or not isinstance(error, OSError) or error.errno is None:
        return str(getattr(error, "strerror", None) or error)
    return os.strerror(error.errno)

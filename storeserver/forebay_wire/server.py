"""The answering end: listens, authenticates, and lets `answer` work on many requests of many clients at once.

    async def answer(peer: Peer, message: AnyMessage, payload: memoryview) -> tuple[AnyMessage, Sequence[Buffer]]: ...

What `answer` raises becomes Failed: a RefusedError with its own code, other ForebayErrors with a code that fits,
anything else (a bug) is logged with its traceback and answered FAILED. Ping is answered here.

Invariants:
    A peer is in _handshakes until it is authenticated, then in _peers until it is gone and its last request ended.
    A limited number of connections is not authenticated, each for a limited time (one more drops the oldest: silent
    ones can't keep others out); a limited number is.
    _size == sum of the peers' sizes; at its limit only peers without anything in flight may start, and each may have
    one answer made. Who was denied room is in _denied and is resumed when there is some, the first one first.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

from forebay_core.errors import AuthenticationError, ForebayError, ProtocolError
from forebay_wire.address import Address, UnixPath
from forebay_wire.connection import Connection
from forebay_wire.greeting import NONCE_SIZE, Role
from forebay_wire.limits import (
    ACCEPT_RETRY_S,
    CLOSE_GRACE_S,
    CONNECTIONS_MAX,
    CONNECTIONS_MIN,
    HANDSHAKE_TIMEOUT_S,
    HANDSHAKES_MAX,
    LISTEN_BACKLOG,
    PROGRESS_TIMEOUT_S,
    SERVER_BYTES_IN_FLIGHT_MAX,
)
from forebay_wire.link import Link
from forebay_wire.peer import Answerer, Peer
from forebay_wire.sockets import listening_tcp, listening_unix, remote_name, tune

_LOG: Final = logging.getLogger("forebay.wire")


class ServerLimits(NamedTuple):
    """Bounds of one server."""

    connections: int = CONNECTIONS_MAX
    handshakes: int = HANDSHAKES_MAX
    bytes_in_flight: int = SERVER_BYTES_IN_FLIGHT_MAX
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    progress_timeout_s: float = PROGRESS_TIMEOUT_S


def limits_within(files: int) -> ServerLimits:
    """Return the bounds of a server whose connections may use so many files, a fifth of them before they authenticate.

    Raises:
        ForebayError: that is too few to serve anybody.
    """
    handshakes = min(HANDSHAKES_MAX, files // 5)
    connections = min(CONNECTIONS_MAX, files - handshakes)
    if connections < CONNECTIONS_MIN:
        raise ForebayError(
            f"{max(0, files)} open files are left for connections, at least {CONNECTIONS_MIN * 5 // 4} are needed; "
            "raise the limit (ulimit -n)"
        )
    return ServerLimits(connections=connections, handshakes=handshakes)


class _Handshake(NamedTuple):
    peer: Peer
    timer: asyncio.TimerHandle


class _UnixSocket(NamedTuple):
    path: UnixPath
    inode: int


class WireServer:
    """Answers requests. Made and used inside one running loop."""

    def __init__(
        self,
        answer: Answerer,
        *,
        key: bytes | None,
        node: bytes,
        on_connect: Callable[[Peer], None] | None = None,
        on_disconnect: Callable[[Peer], None] | None = None,
        limits: ServerLimits = ServerLimits(),  # noqa: B008
    ) -> None:
        """`on_connect` is called for each peer when it is authenticated, before its first request is answered;
        `on_disconnect` once for each of those that goes, and its requests may still be in work."""
        self._answer = answer
        self._key = key
        self._node = node
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._listeners: list[socket.socket] = []
        self._unix_sockets: list[_UnixSocket] = []
        self._handshakes: dict[int, _Handshake] = {}
        self._peers: dict[int, Peer] = {}
        self._next_id = 1
        self._size = 0
        self._denied: dict[int, Peer] = {}
        self._resuming = False
        self._closing = False
        self._drained = asyncio.Event()
        self._progress_timer: asyncio.TimerHandle | None = None

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The authenticated peers, oldest first, with those that are gone but have requests in work."""
        return tuple(self._peers.values())

    async def listen_tcp(self, address: Address) -> Address:
        """Listen on a TCP address, and return it with the real port.

        Raises:
            WrongUsageError: it is not this host's, or not loopback while there is no key.
            InUseError: another process listens there.
        """
        listener = await listening_tcp(address, authenticated=self._key is not None)
        self._listen(listener)
        return Address(address.host, listener.getsockname()[1])

    async def listen_unix(self, path: UnixPath) -> None:
        """Listen on a Unix socket that only this user can connect to; a socket file of a dead server is replaced.

        Raises:
            InUseError: another process listens there.
            WrongUsageError: the path can't be used.
        """
        listener = listening_unix(path)
        self._unix_sockets.append(_UnixSocket(path, os.lstat(path).st_ino))
        self._listen(listener)

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Stop listening, let requests in work end and their answers be read for `grace_s`, then close. Idempotent."""
        self._closing = True
        self._stop_listening()
        if self._progress_timer is not None:
            self._progress_timer.cancel()
        for handshake in tuple(self._handshakes.values()):
            handshake.peer.disconnect("the server is closing")
        deadline = self._loop.time() + grace_s
        for peer in self.peers:
            peer.resume()  # which stops it, now that nothing may start
        tasks = {task for peer in self.peers for task in peer.tasks}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self._wait_drained(deadline)
        for peer in self.peers:
            peer.disconnect("the server is closing")

    @property
    def accepting(self) -> bool:
        """Whether requests are taken; not while it is closing."""
        return not self._closing

    def may_start(self, peer: Peer) -> bool:
        """Tell whether a peer may start another request."""
        if self._closing:
            return False
        return peer.size == 0 or self.has_room(peer, 1)

    def has_room(self, peer: Peer, size: int) -> bool:
        """Tell whether so many bytes fit; if not, the peer is resumed when there may be room."""
        if self._size + size <= self._limits.bytes_in_flight:
            return True
        self._denied[peer.id] = peer
        return False

    def on_size(self, change: int) -> None:
        """Count bytes in flight; when there is room again, those who waited for it go on."""
        self._size += change
        if change < 0 and self._denied and not self._resuming:
            self._resuming = True
            self._loop.call_soon(self._resume_denied)
        if self._closing and self._size == 0:
            self._drained.set()

    def on_ready(self, peer: Peer) -> None:
        """Count an authenticated peer."""
        self._handshakes.pop(peer.id).timer.cancel()
        self._peers[peer.id] = peer
        if self._on_connect is not None:
            self._on_connect(peer)
        if self._progress_timer is None:
            self._watch_progress()
        if len(self._peers) > self._limits.connections:
            peer.disconnect("too many connections")

    def on_lost(self, peer: Peer, error: ForebayError) -> None:
        """Forget a peer that did not authenticate, report one that did."""
        handshake = self._handshakes.pop(peer.id, None)
        if handshake is not None:
            handshake.timer.cancel()
        if isinstance(error, ProtocolError | AuthenticationError):
            _LOG.warning("closed the connection of %s: %s", peer.address, error)
        else:
            _LOG.debug("connection of %s ended: %s", peer.address, error)
        if peer.id in self._peers and self._on_disconnect is not None:
            self._on_disconnect(peer)

    def on_idle(self, peer: Peer) -> None:
        """Forget a peer whose last request ended after it was gone."""
        self._denied.pop(peer.id, None)
        self._peers.pop(peer.id, None)

    def _listen(self, listener: socket.socket) -> None:
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._accept, listener)

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        for path, inode in self._unix_sockets:
            try:
                if os.lstat(path).st_ino == inode:
                    os.unlink(path)
            except OSError as error:
                _LOG.warning("could not remove %s: %s", path, error.strerror)
        self._unix_sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(LISTEN_BACKLOG):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of file descriptors or memory: the listener stays readable, so pause instead of spinning.
                _LOG.warning("could not accept a connection: %s", error.strerror)
                self._loop.remove_reader(listener)
                self._loop.call_later(ACCEPT_RETRY_S, self._accept_again, listener)
                return
            self._welcome(sock)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def _welcome(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            tune(sock)
            address = remote_name(sock)
        except OSError as error:
            _LOG.debug("connection ended before it began: %s", error.strerror)
            sock.close()
            return
        connection = Connection(Role.SERVER, key=self._key, node=self._node, nonce=secrets.token_bytes(NONCE_SIZE))
        if len(self._peers) >= self._limits.connections:
            _LOG.warning("refused %s: more than %d connections", address, self._limits.connections)
            _refuse_busy(sock, connection)
            return
        if len(self._handshakes) >= self._limits.handshakes:
            next(iter(self._handshakes.values())).peer.disconnect("too many connections that do not authenticate")
        peer = Peer(self._next_id, address, connection, self._answer, self)
        self._next_id += 1
        timer = self._loop.call_later(
            self._limits.handshake_timeout_s, peer.disconnect, "it did not authenticate in time"
        )
        self._handshakes[peer.id] = _Handshake(peer, timer)
        peer.attach(Link(sock, connection, peer))

    def _watch_progress(self) -> None:
        for peer in self.peers:
            if not peer.closed:
                peer.check_progress()
        self._progress_timer = self._loop.call_later(self._limits.progress_timeout_s, self._watch_progress)

    def _resume_denied(self) -> None:
        self._resuming = False
        denied, self._denied = self._denied, {}
        for peer in denied.values():
            peer.resume()

    async def _wait_drained(self, deadline: float) -> None:
        if self._size == 0:
            return
        self._drained.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self._drained.wait()
        except TimeoutError:
            _LOG.debug("closed with %d bytes that nobody read", self._size)


def _refuse_busy(sock: socket.socket, connection: Connection) -> None:
    connection.refuse_busy()
    try:
        sock.send(b"".join(connection.take_outgoing()))
    except OSError as error:
        _LOG.debug("could not tell a client that we are busy: %s", error.strerror)
    finally:
        sock.close()

"""The NBD server: listeners, the connections they bring, and the limits that hold over all of them.

Invariants:
    _negotiating and _serving are disjoint; a connection leaves both when its socket closes.
    _connections holds every connection until the volume has answered all of its requests.
Crash: clients see their sockets close and connect again.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from forebay_cache.engine.front import Exports, FrontVolume
from forebay_cache.engine.nbd_budget import Budget
from forebay_cache.engine.nbd_limits import (
    ACCEPTS_PER_TURN,
    BUDGET_SIZE,
    CLOSE_GRACE_S,
    CONNECTIONS_MAX,
    HANDSHAKE_TIMEOUT_S,
    LINGER_TIMEOUT_S,
    NEGOTIATING_MAX,
    STALL_TIMEOUT_S,
)
from forebay_cache.engine.nbd_negotiation import ReplyStyle, Session
from forebay_cache.service.nbd_buffers import BufferPool
from forebay_cache.service.nbd_connection import NbdConnection, Shared
from forebay_cache.service.nbd_listeners import (
    inherited_listeners,
    leads_somewhere,
    open_to,
    remove_own_socket,
    socket_inode,
    tcp_listener,
    unix_listener,
)
from forebay_cache.service.nbd_sockets import Sockets
from forebay_cache.service.receiver import Receiver
from forebay_cache.service.turns import Turns
from forebay_core.notify import keep, let_go
from forebay_core.units import MIB

KEPT_NAME: Final = "nbd"
"""What systemd calls the Unix socket that it keeps while the daemon is away: who knocks then waits, and is not sent
away. A qemu that is sent away tries again after 1, 2, 4, 8, 16 s (5 s too late for an outage of 10)."""

_SEND_BUFFER_SIZE: Final = 1 * MIB
_SO_SNDBUFFORCE: Final = 32
_ACCEPT_PAUSE_S: Final = 0.1  # after a lack of descriptors; a listener that stays readable would spin
_KEEPALIVE_IDLE_S: Final = 60


@dataclass(frozen=True, slots=True)
class NbdSettings:
    """Limits that a configuration may change; times in seconds."""

    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    linger_timeout_s: float = LINGER_TIMEOUT_S
    stall_timeout_s: float = STALL_TIMEOUT_S
    connections_max: int = CONNECTIONS_MAX
    negotiating_max: int = NEGOTIATING_MAX
    budget_bytes: int = BUDGET_SIZE
    socket_group: int | None = None  # who may open the Unix socket beside its owner


class NbdServer:
    """Serves the volumes of `exports` to NBD clients."""

    def __init__(self, exports: Exports, settings: NbdSettings | None = None, turns: Turns | None = None) -> None:
        self._settings = settings or NbdSettings()
        self._budget = Budget(self._settings.budget_bytes)
        self._loop = asyncio.get_running_loop()
        turns = turns or Turns(self._loop)
        self._sockets = Sockets(turns)
        linger_timeout_s = self._settings.linger_timeout_s
        self._receiver = Receiver(turns)
        pool = BufferPool()
        self._shared = Shared(exports, self._budget, pool, self, turns, self._sockets, self._receiver, linger_timeout_s)
        self._listeners: dict[socket.socket, tuple[int, int] | None] = {}
        self._connections: set[NbdConnection] = set()
        self._negotiating: dict[NbdConnection, asyncio.TimerHandle] = {}
        self._serving: dict[str, set[NbdConnection]] = {}
        self._adopted: dict[NbdConnection, Callable[[], None]] = {}  # the kernel's, and who hears of their end
        self._stall_timer: asyncio.TimerHandle | None = None
        self._closing = False

    async def listen_unix(self, path: str) -> None:
        """Listen on a Unix socket at `path`: on the one that systemd kept of the last start, or a new one.

        Raises:
            InUseError: another process listens there.
            ForebayError: the socket can't be made.
        """
        group = self._settings.socket_group
        listener = next((one for one in self._listeners if one.getsockname() == path), None)
        if listener is not None and not leads_somewhere(path):  # nobody finds it any more
            self._leave(listener)
            let_go(KEPT_NAME)
            listener = None
        if listener is None:
            listener = unix_listener(path, group)
        else:
            open_to(path, group)
        kept = keep(KEPT_NAME, listener.fileno())
        self._listen(listener, None if kept else socket_inode(path))

    async def listen_tcp(self, host: str, port: int, *, allow_remote: bool = False) -> int:
        """Listen on a TCP address and return the port.

        Raises:
            WrongUsageError: the address is not loopback and `allow_remote` is not set.
            ForebayError: the address can't be used.
        """
        listener = await tcp_listener(host, port, allow_remote=allow_remote)
        self._listen(listener, None)
        return int(listener.getsockname()[1])

    async def listen_inherited(self, *, own: str = "", allow_remote: bool = False) -> int:
        """Listen on the sockets that systemd passed (LISTEN_FDS); return how many there are beside that at `own`.

        Raises:
            WrongUsageError: the variables are malformed, or a socket is none that NBD clients may connect to.
        """
        listeners = inherited_listeners(os.environ, os.getpid(), allow_remote=allow_remote)
        for listener in listeners:
            self._listen(listener, None)
        return sum(listener.getsockname() != own for listener in listeners)

    def connection_count(self, name: str) -> int:
        """Return how many clients have this export open."""
        return len(self._serving.get(name, ()))

    def resized(self, name: str) -> None:
        """An export became larger; clients that have it open may use that at once."""
        for connection in self._serving.get(name, ()):
            connection.resized()

    def adopt(
        self, ours: socket.socket, theirs: socket.socket, volume: FrontVolume, lost: Callable[[], None]
    ) -> Callable[[], None]:
        """Serve the kernel over one end of a socket pair, without a handshake; return what closes it.

        Such a client is never dropped for being slow. `lost` is called once the connection is closed, by whomever.
        """
        for end in (ours, theirs):
            _tune(end)
        theirs.setblocking(True)
        connection = NbdConnection(ours, self._shared, Session(volume, ReplyStyle.SIMPLE, ()))
        self._connections.add(connection)
        self._adopted[connection] = lost
        connection.start()
        return connection.abort

    async def close_export(self, name: str, grace_s: float = CLOSE_GRACE_S) -> None:
        """Disconnect the clients of an export that `exports` no longer names; what is in flight is finished first.

        What is not finished after `grace_s` is answered ESHUTDOWN.
        """
        await _close_all(list(self._serving.get(name, ())), grace_s)

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Stop: no new clients; what is in flight is finished, or answered ESHUTDOWN after `grace_s`; then close."""
        self._closing = True
        for listener, inode in list(self._listeners.items()):
            remove_own_socket(listener, inode)
            self._leave(listener)
        await _close_all(list(self._connections), grace_s)
        self._receiver.close()
        self._sockets.close()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def connection_opened(self, connection: NbdConnection) -> None:
        """See Owner."""
        assert connection.session is not None
        if (timer := self._negotiating.pop(connection, None)) is not None:
            timer.cancel()
        self._serving.setdefault(connection.session.volume.name, set()).add(connection)
        if self._stall_timer is None:
            self._watch_stalls()

    def connection_closed(self, connection: NbdConnection) -> None:
        """See Owner."""
        timer = self._negotiating.pop(connection, None)
        if timer is not None:
            timer.cancel()
        if connection.session is not None:
            name = connection.session.volume.name
            self._serving[name].discard(connection)
            if not self._serving[name]:
                del self._serving[name]

        if (lost := self._adopted.pop(connection, None)) is not None:
            lost()

    def connection_drained(self, connection: NbdConnection) -> None:
        """See Owner."""
        self._connections.discard(connection)

    def _listen(self, listener: socket.socket, inode: tuple[int, int] | None) -> None:
        self._listeners[listener] = inode
        self._loop.add_reader(listener.fileno(), partial(self._accept, listener))

    def _leave(self, listener: socket.socket) -> None:
        self._loop.remove_reader(listener.fileno())
        listener.close()
        del self._listeners[listener]

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                client, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._pause(listener)
                return
            self._welcome(client)

    def _pause(self, listener: socket.socket) -> None:
        """No descriptor is left: make room by dropping who negotiates longest, and try again soon."""
        self._drop_oldest_negotiation()
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(_ACCEPT_PAUSE_S, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener.fileno(), partial(self._accept, listener))

    def _welcome(self, client: socket.socket) -> None:
        if len(self._negotiating) >= self._settings.negotiating_max:
            self._drop_oldest_negotiation()
        if len(self._connections) >= self._settings.connections_max:
            client.close()
            return
        _tune(client)
        connection = NbdConnection(client, self._shared)
        self._connections.add(connection)
        timer = self._loop.call_later(self._settings.handshake_timeout_s, connection.abort)
        self._negotiating[connection] = timer
        connection.start()

    def _drop_oldest_negotiation(self) -> None:
        oldest = next(iter(self._negotiating), None)
        if oldest is not None:
            oldest.abort()

    def _watch_stalls(self) -> None:
        """From time to time, if somebody waits for budget, drop who holds it and does too little for it."""
        now_s, period_s = self._loop.time(), self._settings.stall_timeout_s
        waited_for = self._budget.contended
        # All are judged each time, or one that fell silent long before would begin a new period when others come.
        stalled = [c for c in self._connections if not c.closed and c.stalled(now_s=now_s, period_s=period_s)]
        for connection in stalled if waited_for else ():
            if connection not in self._adopted:
                connection.abort()
        self._stall_timer = None
        if self._serving:
            self._stall_timer = self._loop.call_later(period_s / 4, self._watch_stalls)


async def _close_all(connections: list[NbdConnection], grace_s: float) -> None:
    for connection in connections:
        connection.stop()
    waiting = [connection.drained for connection in connections if not connection.drained.done()]
    if waiting:
        await asyncio.wait(waiting, timeout=grace_s)
    for connection in connections:
        connection.give_up()


def _tune(client: socket.socket) -> None:
    client.setblocking(False)
    if client.family in (socket.AF_INET, socket.AF_INET6):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    # Room for a whole batch of large replies; without the privilege, as much as the system allows.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_SIZE)
    with contextlib.suppress(PermissionError):
        client.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_SIZE)

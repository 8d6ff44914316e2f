"""The FUSE front: a process of its own that holds the mount, so that the daemon's death is a wait for whoever uses it.

    python -m forebay_cache.service.fuse_front RUN_DIR

It is the daemon that starts it and tells it what to serve (`fuse_calls`); it ends when nothing is served any more.

Invariants:
    One front per run directory, by a lock. One thread; nothing waits but the poll.
    A connection that ends is made again, every RECONNECT_S, until its file is closed.
    What is read into `_slots` is in the memory that a connection made now would share.
Crash: the mount is dead; the daemon sees its end, takes the mount away and starts another one.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from forebay_cache.engine.fuse_folder import FuseFolder, VolumeFile
from forebay_cache.engine.fuse_requests import FuseRequests
from forebay_cache.engine.nbd_client import NbdClient, NbdPeerError, State
from forebay_cache.engine.payload_slots import SLOTS, Memory, PayloadSlots
from forebay_cache.format import fuse, nbd
from forebay_cache.service import fuse_mount
from forebay_cache.service.fuse_calls import LOCK, READY, SOCKET, VOLUMES, CallServer
from forebay_cache.service.gathering import rest_of
from forebay_cache.service.memory_guard import guard_allocations, guard_memory
from forebay_cache.service.run_folder import NBD_SOCKET
from forebay_cache.service.shared_memory import make_memory
from forebay_core.errors import ForebayError
from forebay_core.starting import tell_parent
from forebay_core.units import KIB, MIB, Buffer

RECONNECT_S: Final = 0.05
RECEIVE_SIZE: Final = 4 * MIB
ROOM_MIN: Final = fuse.WRITE_SIZE_MAX + 4 * KIB
"""Bytes of the longest reply: a READ is no larger than a WRITE."""

LOCK_WAIT_S: Final = 5.0
REQUESTS_PER_TURN: Final = 32
PARTS_MAX: Final = 512
SOCKET_BUFFER_SIZE: Final = 4 * MIB
_SO_SNDBUFFORCE: Final = 32
_GONE: Final = (errno.ENODEV, errno.ECONNABORTED)
"""The kernel's words for a mount that was taken away."""


class Poll:
    """What happens when a descriptor is ready."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._calls: dict[int, Callable[[int], None]] = {}

    def watch(self, number: int, call: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call with the events, until `leave`."""
        self._calls[number] = call
        self._poll.register(number, events)

    def change(self, number: int, events: int) -> None:
        """Watch for something else."""
        self._poll.modify(number, events)

    def leave(self, number: int) -> None:
        """Watch no more."""
        del self._calls[number]
        self._poll.unregister(number)

    def turn(self, timeout_s: float) -> None:
        """Wait once and call who is ready."""
        for number, events in self._poll.poll(timeout_s):
            call = self._calls.get(number)
            if call is not None:
                call(events)


class Line:
    """One client's connection to the daemon, made anew when it ends."""

    def __init__(self, client: NbdClient, path: str, poll: Poll, slots: "Slots") -> None:
        self.client = client
        self._slots = slots
        self.retry_s = 0.0
        self._path = path
        self._poll = poll
        self._memory: Memory | None = None  # that the connection was offered
        self._socket: socket.socket | None = None
        self._buffer = bytearray(RECEIVE_SIZE)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._writing = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection, or one is not wanted."""
        return self._socket is not None or self.client.state is State.GONE

    def connect(self) -> None:
        """Try once."""
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            line.connect(self._path)
        except OSError:
            line.close()
            self.retry_s = time.monotonic() + RECONNECT_S
            return
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_SIZE)
        with contextlib.suppress(PermissionError):
            line.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BUFFER_SIZE)
        self._socket = line
        self._start = self._end = 0
        self._writing = False
        self._memory = self._slots.memory
        self.client.begin(self._memory)
        self._poll.watch(line.fileno(), self._ready)

    def renew(self) -> None:
        """Connect anew for a memory that came since, if nothing is under way."""
        if self.client.state is State.READY and not self.client.pending and self._memory != self._slots.memory:
            self.close()
            self.connect()

    def close(self) -> None:
        """Say goodbye if that works at once, and end."""
        if self._socket is not None and self.client.state is State.READY:
            with contextlib.suppress(OSError):
                self._socket.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_DISC, 0, 0, 0))
        self._drop()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        waiting = self.client.outgoing
        while waiting and self._socket is not None:
            try:
                sent = self._socket.sendmsg(waiting[:PARTS_MAX])
            except BlockingIOError:
                self._write_later()
                return
            except OSError:
                self._drop()
                return
            waiting[:] = rest_of(waiting, sent)
        if self._writing and self._socket is not None:
            self._writing = False
            self._poll.change(self._socket.fileno(), select.EPOLLIN)

    def _write_later(self) -> None:
        assert self._socket is not None
        if not self._writing:
            self._writing = True
            self._poll.change(self._socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _ready(self, events: int) -> None:
        if events & ~select.EPOLLOUT:
            self._receive()

    def _receive(self) -> None:
        assert self._socket is not None
        if len(self._view) - self._end < ROOM_MIN:
            size = self._end - self._start
            self._buffer[:size] = self._buffer[self._start : self._end]
            self._start, self._end = 0, size
        try:
            count = self._socket.recv_into(self._view[self._end :])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._drop()
            return
        self._end += count
        try:
            self._start += self.client.received(self._view[self._start : self._end])
        except NbdPeerError as error:
            with contextlib.suppress(OSError):
                print(f"forebay: FUSE front: {error}", file=sys.stderr)  # noqa: T201
            self._drop()
            return
        if self._start == self._end:
            self._start = self._end = 0

    def _drop(self) -> None:
        """Close; everything that was not answered is asked again over the next connection."""
        if self._socket is not None:
            self._poll.leave(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self.retry_s = time.monotonic() + RECONNECT_S
        self._slots.connection_ended(self.client)
        if self.client.state is not State.GONE:
            self.client.begin()


class Slots:
    """The slots that payloads are read into, in the memory that the daemon is offered."""

    def __init__(self) -> None:
        self._begin()

    @property
    def memory(self) -> Memory | None:
        """What a new connection shares, if there is memory for it."""
        return self._slots.memory

    def connection_ended(self, client: NbdClient) -> None:
        """Make a new memory if the daemon may still be at work on something in this one."""
        if self.memory is None:
            self._begin()
        elif client.uses(self.memory.key):
            os.close(self.memory.number)
            self._begin()

    def _begin(self) -> None:
        memory, view = None, memoryview(b"")
        with contextlib.suppress(OSError):  # then everything goes through the socket
            number, view = make_memory("forebay-fuse", SLOTS * fuse.WRITE_SIZE_MAX)
            memory = Memory(os.fstat(number).st_ino, number)
        self._slots = PayloadSlots(memory, view, fuse.WRITE_SIZE_MAX)
        self.take, self.give, self.renewed = self._slots.take, self._slots.give, self._slots.renewed


class FuseFront:
    """The process."""

    def __init__(self, run_dir: Path, descriptor: int) -> None:
        self._nbd = str(run_dir / NBD_SOCKET)
        self._descriptor = descriptor
        self._poll = Poll()
        self._lines: dict[NbdClient, Line] = {}
        self.folder = FuseFolder(uid=os.geteuid(), gid=os.getegid())
        self.requests = FuseRequests(self.folder, self, self._reply)
        self._slots = Slots()
        self._head = bytearray(fuse.PAYLOAD_OFFSET)
        self._slot = self._slots.take()
        self._reading = True
        self.ended = False
        self._poll.watch(descriptor, self._take)
        self._calls = CallServer(str(run_dir / SOCKET), self.folder, self._poll.watch, self._poll.leave)

    def run(self) -> None:
        """Serve until the mount is gone, or nothing is to be served any more."""
        while not (self.ended or self.requests.ended or self._calls.ended or self.folder.deserted):
            self._poll.turn(self._timeout_s())
            self._flush()
            self._connect()
            self._pause()
        self._calls.close()

    # --- Connections ------------------------------------------------------------------------------------------

    def open(self, file: VolumeFile, *, statuses: bool) -> NbdClient:
        """See Connections."""
        client = NbdClient(file.name, self.requests.answered, statuses=statuses)
        self._lines[client] = Line(client, self._nbd, self._poll, self._slots)
        self._lines[client].connect()
        return client

    def close(self, client: NbdClient) -> None:
        """See Connections."""
        self._lines.pop(client).close()

    # --- inside -----------------------------------------------------------------------------------------------

    def _take(self, _events: int) -> None:
        """Read requests of the kernel: each read is one."""
        requests = self.requests
        for _ in range(REQUESTS_PER_TURN):
            try:
                size = os.readv(self._descriptor, (self._head, self._slot.view))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    self.ended = True
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # taken back by who asked
                    continue
                raise
            if requests.take(self._head, self._slot, size):
                self._slot = self._slots.take()
                self._flush()  # the daemon works on it while the next one is read
            if requests.full:
                return

    def _flush(self) -> None:
        for line in self._lines.values():
            if line.client.outgoing:
                line.flush()

    def _reply(self, parts: Sequence[Buffer]) -> None:
        try:
            os.writev(self._descriptor, parts)
        except OSError as error:
            if error.errno in _GONE:
                self.ended = True
            elif error.errno != errno.ENOENT:  # the request was taken back
                raise

    def _connect(self) -> None:
        now_s = time.monotonic()
        for line in self._lines.values():
            line.renew()
            if not line.connected and line.retry_s <= now_s:
                line.connect()

    def _pause(self) -> None:
        """Use the slots that came back; read no more while too much is in flight."""
        for slot in self.requests.given_back:
            self._slots.give(slot)
        self.requests.given_back.clear()
        self._slot = self._slots.renewed(self._slot)
        if self.requests.full == self._reading:
            self._reading = not self._reading
            self._poll.change(self._descriptor, select.EPOLLIN if self._reading else 0)

    def _timeout_s(self) -> float:
        return -1 if all(line.connected for line in self._lines.values()) else RECONNECT_S


def main(run_dir: Path) -> int:
    """Mount, tell the parent that this worked or why it didn't, and serve; the exit code."""
    try:
        lock = _lock(run_dir)  # held as long as we live
        descriptor = fuse_mount.mount(run_dir / VOLUMES)
    except (ForebayError, OSError) as error:
        tell_parent(_reason(run_dir, error))
        return 1
    try:
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        guard_allocations()
        guard_memory()
        front = FuseFront(run_dir, descriptor)
        tell_parent(READY)
        front.run()
    except OSError as error:
        tell_parent(_reason(run_dir, error))
        raise
    finally:
        os.close(descriptor)
        with contextlib.suppress(ForebayError):
            fuse_mount.unmount(run_dir / VOLUMES)
        os.close(lock)
    return 0


def _lock(run_dir: Path) -> int:
    """Be the only front of a run directory, once one that is ending has ended.

    Raises:
        ForebayError: another one goes on.
        OSError: the directory can't be used.
    """
    lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                raise ForebayError(f"{run_dir}: another FUSE front serves it") from None
            time.sleep(RECONNECT_S)
        else:
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
            return lock


def _reason(run_dir: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{run_dir}: can't be used by the FUSE front ({error.strerror})"
    return str(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

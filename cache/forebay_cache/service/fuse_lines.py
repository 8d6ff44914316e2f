"""The connections of the FUSE front to the daemon, and the memory that they share with it.

Invariants:
    A connection that ends is made again, every RECONNECT_S, until its file is closed.
    What is read into the slots is in the memory that a connection made now would share.
Crash: the mount is dead with the process; see `fuse_front`.
"""

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

from forebay_cache.engine.nbd_client import NbdClient, NbdPeerError, State
from forebay_cache.engine.payload_slots import SLOTS, Memory, PayloadSlots, Slot
from forebay_cache.format import fuse, nbd
from forebay_cache.service.gathering import rest_of
from forebay_cache.service.shared_memory import make_memory
from forebay_core.units import KIB, MIB

RECONNECT_S: Final = 0.05
RECEIVE_SIZE: Final = 4 * MIB
ROOM_MIN: Final = fuse.WRITE_SIZE_MAX + 4 * KIB
"""Bytes of the longest reply: a READ is no larger than a WRITE."""

PARTS_MAX: Final = 512
SOCKET_BUFFER_SIZE: Final = 4 * MIB
_SO_SNDBUFFORCE: Final = 32


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

    def take(self) -> Slot:
        """See PayloadSlots."""
        return self._slots.take()

    def give(self, slot: Slot) -> None:
        """See PayloadSlots."""
        self._slots.give(slot)

    def renewed(self, slot: Slot) -> Slot:
        """See PayloadSlots."""
        return self._slots.renewed(slot)

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

"""A socket and its connection: receives, gathers what is sent into few system calls, and ends exactly once.

asyncio's own transports copy what the kernel does not take at once; here buffers stay as they are until they are sent.

Invariants:
    unsent_bytes == sum of the sizes in _unsent.
    The socket is read only while the owner may receive: what it does not take stays in the kernel and slows the peer.
    on_lost is called exactly once, after which nothing else is called.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Protocol

from forebay_core.errors import AuthenticationError, ForebayError, ProtocolError, StoreUnreachableError
from forebay_core.units import Buffer
from forebay_wire.connection import Connection, Event, State
from forebay_wire.limits import BUFFERS_PER_SEND_MAX

_SMALL_SEND: Final = 16 * 1024
_LAST_READS_MAX: Final = 8


class LinkOwner(Protocol):
    """Whom a link reports to. None of these may block or await."""

    def may_receive(self) -> bool:
        """Tell whether the next message may be taken."""

    def on_event(self, event: Event) -> None:
        """Take an event of the connection."""

    def on_received(self) -> None:
        """What arrived was taken, as far as it may be; a large message may have begun or grown."""

    def on_sent(self) -> None:
        """Some unsent bytes were sent."""

    def on_lost(self, error: ForebayError) -> None:
        """The link is gone, for this reason."""


class Link:
    """One connected socket. Made inside a running loop; owns the socket."""

    def __init__(self, sock: socket.socket, connection: Connection, owner: LinkOwner) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._connection = connection
        self._owner = owner
        self._unsent: deque[memoryview] = deque()
        self._flush_due = False
        self._writing = False
        self._reading = False
        self.unsent_bytes = 0
        self.received_bytes = 0
        self.closed = False

    @property
    def receiving(self) -> bool:
        """Whether the socket is read now."""
        return self._reading

    def start(self) -> None:
        """Send the greeting and begin to receive."""
        self.send(self._connection.take_outgoing())
        self._set_reading(True)

    def send(self, buffers: Sequence[Buffer], *, now: bool = False) -> None:
        """Queue buffers; what is queued in one step of the loop goes out together. They must not change until sent.

        With `now` they are sent at once: for the last of a batch, which nothing will follow soon.
        """
        if self.closed:
            return
        for buffer in buffers:
            view = memoryview(buffer)
            if view.nbytes:
                self._unsent.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
                self.unsent_bytes += view.nbytes
        if self._writing:
            return
        if now:
            self._flush()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def resume(self) -> None:
        """Take what has arrived, as far as the owner may receive; then receive on, or not."""
        try:
            while not self.closed and self._owner.may_receive():
                event = self._connection.next_event()
                if event is None:
                    break
                self._owner.on_event(event)
        except (ProtocolError, AuthenticationError, StoreUnreachableError) as error:
            self.lose(error)
            return
        if not self.closed:
            if self._connection.has_outgoing:
                self.send(self._connection.take_outgoing())
            self._owner.on_received()
            self._set_reading(self._owner.may_receive())

    def lose(self, error: ForebayError) -> None:
        """Close at once, after telling the peer what the handshake wants it to know. Idempotent."""
        if self.closed:
            return
        for buffer in self._connection.take_outgoing():
            self._unsent.append(memoryview(buffer))
            self.unsent_bytes += len(buffer)
        if self._connection.state is not State.READY and self._unsent:
            self._send_some()
        self._set_reading(False)
        self._set_writing(False)
        self.closed = True
        self._connection.end()
        self._unsent.clear()
        self.unsent_bytes = 0
        self._sock.close()
        self._owner.on_lost(error)

    def _readable(self) -> None:
        try:
            count = self._sock.recv_into(self._connection.receive_buffer())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.lose(StoreUnreachableError(f"the connection broke: {error.strerror}"))
            return
        if count == 0:
            self.lose(StoreUnreachableError("the peer closed the connection"))
            return
        self.received_bytes += count
        self._connection.received(count)
        self.resume()

    def _flush(self) -> None:
        self._flush_due = False
        if self.closed or not self._unsent:
            return
        error = self._send_some()
        if error is not None:
            self._lose_unsendable(error)
            return
        self._set_writing(bool(self._unsent))
        self._owner.on_sent()

    def _send_some(self) -> OSError | None:
        """Send as much as the kernel takes now; an error means that nothing will be sent any more."""
        try:
            while self._unsent:
                asked, sent = self._send_once()
                self._drop_sent(sent)
                if sent < asked:
                    break
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            return error
        return None

    def _send_once(self) -> tuple[int, int]:
        unsent = self._unsent
        if len(unsent) == 1:
            return unsent[0].nbytes, self._sock.send(unsent[0])
        gathered = list(islice(unsent, BUFFERS_PER_SEND_MAX))
        asked = self.unsent_bytes if len(gathered) == len(unsent) else sum(view.nbytes for view in gathered)
        if asked <= _SMALL_SEND:
            return asked, self._sock.send(b"".join(gathered))
        return asked, self._sock.sendmsg(gathered)

    def _drop_sent(self, count: int) -> None:
        self.unsent_bytes -= count
        unsent = self._unsent
        while count:
            first = unsent[0]
            if count < first.nbytes:
                unsent[0] = first[count:]
                return
            count -= first.nbytes
            unsent.popleft()

    def _lose_unsendable(self, error: OSError) -> None:
        """Lose the link, but first read what the peer may have said before it closed (why it refused us)."""
        self._unsent.clear()
        self.unsent_bytes = 0
        self._set_writing(False)
        for _ in range(_LAST_READS_MAX):
            if self.closed or self._connection.state is State.READY:
                break
            self._readable()
        self.lose(StoreUnreachableError(f"the connection broke: {error.strerror}"))

    def _set_reading(self, reading: bool) -> None:
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._loop.remove_reader(self._sock)

    def _set_writing(self, writing: bool) -> None:
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._sock, self._flush)
            else:
                self._loop.remove_writer(self._sock)

"""One NBD client: a non-blocking socket, receives as large as they come, one gathered send per batch of replies.

Not asyncio streams: those copy every byte and cost two to three times the CPU per request (measured: 8.3 against
4.7 us, 2 cores, see bench/). Everything runs in callbacks of the event loop; nothing awaits.

Invariants:
    _buffer.view[_start:_end] is what was received and not taken yet; nothing else writes into the buffer, but for
    the receiver behind `_end`: then `_receiving` is set, and the socket stays open and the buffer ours, even if closed.
    The socket is read only while the engine can take more and memory for it is granted.
    The connection is kept, without its socket, until the volume has answered everything (its memory is in use).
Crash: the client sees the socket close and connects again.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from forebay_cache.engine.front import Exports
from forebay_cache.engine.nbd_budget import Account, Budget
from forebay_cache.engine.nbd_limits import FLOOR, IN_FLIGHT_MAX, LINGER_TIMEOUT_S, OPTION_SIZE_MAX, RECEIVE_SIZE
from forebay_cache.engine.nbd_negotiation import Negotiation, Session
from forebay_cache.engine.nbd_progress import Progress
from forebay_cache.engine.nbd_transmission import ReceiveBuffer, Transmission
from forebay_cache.format.nbd_options import OPTION
from forebay_cache.service.nbd_buffers import BufferPool, buffer_size
from forebay_cache.service.nbd_outbox import Outbox
from forebay_cache.service.nbd_sockets import Sockets
from forebay_cache.service.receiver import Receiver
from forebay_cache.service.shared_memory import memory_of_peer
from forebay_cache.service.turns import Turns
from forebay_core.errors import ProtocolError
from forebay_core.units import KIB

if TYPE_CHECKING:
    from forebay_cache._receiver import Receive

_log = logging.getLogger(__name__)
_ROOM_MIN: Final = 64 * KIB  # with less room behind what was received, the rest moves to a fresh buffer
_PEEK_SIZE: Final = 4 * KIB  # received behind a large write: likely the header of the next, whose rest isn't copied
_OPTION_WANT: Final = OPTION.size + OPTION_SIZE_MAX
_RECEIVES_PER_TURN: Final = 8  # a write of 1 MiB: its header, six times what a Unix socket holds, and the next header
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError)


class Owner(Protocol):
    """What a connection asks of its server."""

    def connection_opened(self, connection: "NbdConnection") -> None:
        """Negotiation is over, requests begin."""

    def connection_closed(self, connection: "NbdConnection") -> None:
        """The socket is closed; requests may still be in flight."""

    def connection_drained(self, connection: "NbdConnection") -> None:
        """Closed, and nothing is in flight any more."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all connections of a server use together."""

    exports: Exports
    budget: Budget
    pool: BufferPool
    owner: Owner
    turns: Turns
    sockets: Sockets
    receiver: Receiver
    linger_timeout_s: float = LINGER_TIMEOUT_S


class NbdConnection:
    """One client's connection, from the greeting to the last answer of the volume."""

    def __init__(self, client: socket.socket, shared: Shared, session: Session | None = None) -> None:
        """`session`: what was agreed without a handshake."""
        self._socket = client
        self._fd = client.fileno()
        self._shared = shared
        self._turns = shared.turns
        self._loop = asyncio.get_running_loop()
        self._account = Account(self._granted)
        self._outbox = Outbox(client)
        negotiation = Negotiation(shared.exports, partial(memory_of_peer, client)) if session is None else None
        self._negotiation: Negotiation | None = negotiation
        self._session = session
        self._transmission: Transmission | None = None
        self._buffer: ReceiveBuffer | None = None
        self._start = 0
        self._end = 0
        self._peek = False
        self._starved = False
        self._scheduled = False
        self._reading = False
        self._writing = False
        self._at_end = False
        self._stopping = False
        self._linger: asyncio.TimerHandle | None = None
        self._received = 0
        self._receiving: Receive | None = None  # the rest of a large write, elsewhere
        self._progress = Progress(self._loop.time())
        self.closed = False
        self.drained: asyncio.Future[None] = self._loop.create_future()

    @property
    def session(self) -> Session | None:
        """What was negotiated; None before."""
        return self._session

    def start(self) -> None:
        """Send the greeting, if there is one, and begin to listen."""
        self._guarded(self._negotiate if self._negotiation is not None else self._begin)

    def stop(self) -> None:
        """Answer what has arrived and still arrives with ESHUTDOWN, and close when nothing is in flight."""
        if self._transmission is None:
            self.abort()
            return
        self._transmission.refuse()
        self._stopping = True
        self._guarded(self._receive if self._reading else self._advance)

    def give_up(self) -> None:
        """Answer what is in flight with ESHUTDOWN and close now."""
        if self._transmission is not None and not self.closed:
            self._transmission.give_up()
            self._guarded(partial(self._flush, self._transmission))
        self.abort()

    def resized(self) -> None:
        """The volume became larger: take requests for what is new."""
        if self._transmission is not None:
            self._transmission.resized()

    def stalled(self, *, now_s: float, period_s: float) -> bool:
        """Tell whether the client alone keeps budget in use and does too little for it; ask several times per period.

        What is not used is given back here: else it would stay with a client that brings no event.
        """
        self._shared.budget.settle(self._account)
        partly_received = self._in_large_write() and self._start < self._end
        receiving = self._receiving
        waits_for_client = bool(self._outbox.batches) or receiving is not None or (partly_received and self._reading)
        keeps = self._account.granted - FLOOR if waits_for_client else 0
        received = self._received + (receiving.count if receiving is not None else 0)
        return self._progress.stalled(received + self._outbox.sent, keeps=keeps, now_s=now_s, period_s=period_s)

    def abort(self) -> None:
        """Close the socket at once; what the volume still answers is dropped."""
        if self.closed:
            return
        self.closed = True
        self._listen(reading=False, writing=False)
        if self._linger is not None:
            self._linger.cancel()
        if self._receiving is None:
            self._socket.close()
            self._retire_buffer()
        else:  # that ends it, and only then the buffer is free
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._outbox.clear()
        if self._transmission is not None and self._session is not None:
            self._transmission.mute()
            self._session.volume.disconnected()
        self._shared.owner.connection_closed(self)
        self._drain()

    def _drain(self) -> None:
        """After the close: give everything back once the volume has answered all."""
        if self._receiving is not None or (self._transmission is not None and self._transmission.in_flight):
            return
        if not self.drained.done():
            self._shared.budget.close(self._account)
            self._shared.owner.connection_drained(self)
            self.drained.set_result(None)

    def _guarded(self, step: Callable[[], None]) -> None:
        if not self.closed:
            try:
                step()
            except BaseException as error:
                self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """A client that breaks the rules, or a bug, ends this connection and no other."""
        self.abort()
        if isinstance(error, ProtocolError):
            _log.info("NBD client dropped: %s", error)
        elif isinstance(error, OSError):
            _log.debug("NBD client gone: %s", error)
        else:
            raise error

    def on_readable(self) -> None:
        """See Polled."""
        transmission = self._transmission
        if self.closed or (transmission is not None and transmission.more):
            return  # a batch waits for its turn, this comes after it
        try:  # as `_guarded`, without its call
            self._receive()
        except BaseException as error:
            self._failed(error)

    def on_writable(self) -> None:
        """See Polled."""
        self._guarded(self._advance)

    def _on_turn(self) -> None:
        self._scheduled = False
        if self.closed:
            self._drain()
            return
        transmission = self._transmission
        try:  # as `_guarded`, without its call
            nothing_waits = self._reading and self._start == self._end and not (self._outbox.batches or self._stopping)
            if nothing_waits and transmission is not None and transmission.out and self._account.granted <= FLOOR:
                self._answer(transmission)
            else:
                self._advance()
        except BaseException as error:
            self._failed(error)

    def _answer(self, transmission: Transmission) -> None:
        """Send answers when that is all there is to do, as behind nearly every small request; `_advance` in short."""
        self._account.held -= self._outbox.put(*transmission.take_out())
        buffer = self._buffer
        if buffer is not None and (buffer.charge or not buffer.payloads):
            self._release_idle_buffer(buffer)
        if self._outbox.batches:
            self._settle()

    def _woken(self) -> None:
        """Replies came, or there is room again: gather until the round is over."""
        if not self._scheduled:
            self._scheduled = True
            self._turns.soon(self._on_turn)

    def _give_way(self) -> None:
        """There is more to be taken: others have their turn first."""
        if not self._scheduled:
            self._scheduled = True
            self._turns.later(self._on_turn)

    def _granted(self) -> None:
        self._starved = False
        self._woken()

    def _receive(self, *, here: bool = False) -> None:
        """Receive once, or have it done elsewhere unless it must be `here`; of a large write several times, because its
        sender goes on while we receive."""
        for _ in range(_RECEIVES_PER_TURN):
            room = self._room()
            if room is None:
                break
            buffer = self._buffer
            assert buffer is not None
            is_large = buffer.charge > 0
            if is_large and not (here or self._receives_here(room)):
                break
            try:
                count = self._socket.recv_into(room)
            except _WOULD_BLOCK:
                if self._start == self._end:
                    self._release_idle_buffer(buffer)
                    self._peek = len(room) == _PEEK_SIZE  # as before
                break
            if count == 0:
                self._at_end = True
                break
            self._end += count
            self._received += count
            if is_large and self._missing() > 0:
                continue
            self._take()
            # Behind a large write the next one is begun before the volume works on this one.
            if not is_large and (self._start == self._end or self._missing() < _ROOM_MIN):
                break
            if self._is_stuck():
                break
        self._settle()

    def _receives_here(self, room: memoryview) -> bool:
        """Tell that the rest of a large write is to be received here: not while the volume is at work on another one.
        That has been begun elsewhere."""
        missing = self._missing()
        if missing > 0 and self._transmission is not None and self._transmission.in_flight:
            self._receiving = self._shared.receiver.receive(self._fd, room, missing, self._arrived)
        return self._receiving is None

    def _arrived(self, count: int) -> None:
        """So much was received elsewhere; if that is not all, what ended it is found here."""
        self._receiving = None
        self._end += count
        self._received += count
        if self.closed:
            self._socket.close()
            self._retire_buffer()
            self._drain()
        else:
            self._guarded(self._go_on)

    def _go_on(self) -> None:
        here = self._missing() > 0
        self._take()
        if self._is_stuck():
            self._settle()
        else:
            self._receive(here=here)

    def _missing(self) -> int:
        """Return how many bytes of the first request that is not taken are still to come, as far as is known; 0 if
        nothing of it is here."""
        here = self._end - self._start
        return self._transmission.want - here if here and self._transmission is not None else 0

    def _in_large_write(self) -> bool:
        """Tell whether the buffer was taken for a large write: it holds a part of that, or little that came behind."""
        return self._buffer is not None and self._buffer.charge > 0

    def _advance(self) -> None:
        """Take requests, and listen for what is possible next."""
        self._take()
        self._settle()

    def _take(self) -> None:
        """Send what waits, take requests, send their answers."""
        transmission, account = self._transmission, self._account
        if transmission is None:
            self._negotiate()
            transmission = self._transmission
            if transmission is None:
                return
        self._starved = account.need > 0
        if transmission.out or self._outbox.batches:
            self._flush(transmission)
        while self._start < self._end and not (transmission.leaving or self._receiving):
            assert self._buffer is not None
            self._start = transmission.accept(self._buffer, self._start, self._end)
            if transmission.out:
                self._flush(transmission)
            if transmission.more:
                self._give_way()
                break
            if not transmission.blocked or not self._may_go_on(transmission):
                break
        buffer = self._buffer
        if buffer is not None and self._start == self._end and (buffer.charge or not buffer.payloads):
            self._release_idle_buffer(buffer)
        if account.granted > FLOOR:
            self._shared.budget.settle(account)

    def _negotiate(self) -> None:
        negotiation = self._negotiation
        assert negotiation is not None
        while True:
            self._queue(negotiation.take_output())
            if self._outbox.batches or negotiation.over:
                break
            buffer = self._buffer
            taken = negotiation.receive(buffer.view[self._start : self._end]) if buffer is not None else 0
            self._start += taken
            if taken == 0:
                break
        if negotiation.over and not self._outbox.batches:
            self._open(negotiation.session)
        else:
            self._listen(reading=not self._outbox.batches, writing=bool(self._outbox.batches))

    def _queue(self, output: bytes) -> None:
        self._outbox.send()
        if output:
            self._outbox.put([output], len(output), 0)

    def _open(self, session: Session | None) -> None:
        self._negotiation = None
        if session is None:
            self.abort()
            return
        self._session = session
        self._account.volume = session.volume.name
        kick = partial(self._turns.kick, session.volume)
        self._transmission = Transmission(session, self._account, wake=self._woken, kick=kick, reuse=self._reuse)
        session.volume.connected()
        self._shared.owner.connection_opened(self)

    def _begin(self) -> None:
        self._open(self._session)
        self._settle()

    def _may_go_on(self, transmission: Transmission) -> bool:
        """Tell whether the limit that blocked the engine is gone already."""
        if transmission.short:
            return self._request(transmission.short)
        return transmission.in_flight < IN_FLIGHT_MAX and not self._outbox.batches

    def _flush(self, transmission: Transmission) -> None:
        """Send replies as far as the client takes them."""
        outbox, account = self._outbox, self._account
        if outbox.batches:
            account.held -= outbox.send()
        while transmission.out and not outbox.batches:
            account.held -= outbox.put(*transmission.take_out())

    def _request(self, size: int) -> bool:
        if self._shared.budget.request(self._account, size):
            self._starved = False
            return True
        self._starved = True
        return False

    def _room(self) -> memoryview | None:
        """Return where to receive, or None as long as memory for it is not granted."""
        buffer = self._buffer
        if buffer is None:
            self._buffer = buffer = self._shared.pool.take(RECEIVE_SIZE)
            self._start = self._end = 0
            if not self._peek:
                return buffer.view
        want = self._transmission.want if self._transmission is not None else _OPTION_WANT
        want = max(want, self._end - self._start + 1)  # never no room, which would look like an end
        if not self._fits(buffer, want):
            if not self._move(buffer, want):
                return None
            buffer = self._buffer
            assert buffer is not None
        if buffer.charge:
            return buffer.view[self._end : self._start + want + _PEEK_SIZE]
        end = self._end + _PEEK_SIZE if self._peek else RECEIVE_SIZE
        self._peek = False
        return buffer.view[self._end : end]

    def _fits(self, buffer: ReceiveBuffer, want: int) -> bool:
        """Tell whether `want` bytes from `_start` on are to be received into this buffer."""
        size = len(buffer.view)
        if buffer.charge:  # for large writes, and nothing else
            return want > RECEIVE_SIZE and self._start + want <= size
        # What was moved to the front has all the room there is.
        return self._start + want <= size and (self._start == 0 or size - self._end >= _ROOM_MIN)

    def _move(self, buffer: ReceiveBuffer, want: int) -> bool:
        """Move what is not taken yet to the front of a buffer with room for `want` bytes."""
        size = buffer_size(want)
        if buffer.payloads == 0 and len(buffer.view) == size:
            left = self._end - self._start
            buffer.view[:left] = buffer.view[self._start : self._end]
            self._start, self._end = 0, left
            return True
        large = size > RECEIVE_SIZE
        retiring = buffer.payloads > 0 and not buffer.charge
        need = (size if large else 0) + (len(buffer.view) if retiring else 0)
        if need and not self._request(need):
            if buffer.charge:  # who waits keeps no memory but what the volume needs
                self._replace(buffer, self._shared.pool.take(RECEIVE_SIZE))
                self._shared.budget.settle(self._account)
            return False
        fresh = self._shared.pool.take(size)
        if large:
            self._charge(fresh)
        if retiring:
            self._charge(buffer)
        self._replace(buffer, fresh)
        return True

    def _replace(self, buffer: ReceiveBuffer, fresh: ReceiveBuffer) -> None:
        left = self._end - self._start
        fresh.view[:left] = buffer.view[self._start : self._end]
        self._retire_buffer()
        self._buffer, self._start, self._end = fresh, 0, left

    def _charge(self, buffer: ReceiveBuffer) -> None:
        buffer.charge = len(buffer.view)
        self._account.held += buffer.charge

    def _retire_buffer(self) -> None:
        buffer = self._buffer
        if buffer is not None:
            self._buffer = None
            self._start = self._end = 0
            buffer.retired = True
            if buffer.payloads == 0:
                self._reuse(buffer)

    def _release_idle_buffer(self, buffer: ReceiveBuffer) -> None:
        """An idle connection keeps no memory."""
        if buffer.charge:
            self._peek = True
            self._retire_buffer()
        elif not buffer.payloads:
            self._peek = False
            self._buffer = None
            self._start = self._end = 0
            self._shared.pool.give(buffer)

    def _reuse(self, buffer: ReceiveBuffer) -> None:
        self._account.held -= buffer.charge
        buffer.charge = 0
        self._shared.pool.give(buffer)

    def _settle(self) -> None:
        """Listen for what is possible next, and close if all is done."""
        transmission = self._transmission
        if transmission is None or self.closed:
            if self._at_end:
                self.abort()
            return
        waits = transmission.blocked or self._starved or self._receiving
        reading = not (waits or self._at_end or transmission.leaving)
        writing = bool(self._outbox.batches)
        if self._reading is not reading or self._writing is not writing:
            self._listen(reading=reading, writing=writing)
        if (self._at_end or self._stopping or transmission.leaving) and not transmission.in_flight:
            self._finish(transmission)

    def _is_stuck(self) -> bool:
        """Tell whether nothing is to be received now."""
        transmission = self._transmission
        if transmission is None:
            return self.closed
        return transmission.blocked or transmission.more or transmission.leaving or self._starved or self._at_end

    def _listen(self, *, reading: bool, writing: bool) -> None:
        self._reading, self._writing = reading, writing
        self._shared.sockets.watch(self._fd, self, reading=reading, writing=writing)

    def _finish(self, transmission: Transmission) -> None:
        """Close when all is sent, or after a while."""
        if not transmission.out and not self._outbox.batches:
            self.abort()
        elif self._linger is None:
            self._linger = self._loop.call_later(self._shared.linger_timeout_s, self.abort)

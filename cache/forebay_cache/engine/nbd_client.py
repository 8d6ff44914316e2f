"""The client's side of one NBD export: what a front of a process of its own asks of the daemon, through its outages.

The shell feeds what it received and sends what is in `outgoing`. A connection that ended is begun anew with `begin`:
then everything that was not answered is asked again, in its order. That is right because a write, a zeroing or a flush
that nobody was told of may be done twice, and because nobody can have changed the same blocks in between: who
waits for an answer is asked about by the kernel, not by us.

Invariants:
    A request is in `pending` until `answered` was called for it, exactly once; its payload is not touched before.
    ESHUTDOWN is no answer: the daemon is on its way out, and the next one is asked.
Crash: the front dies, and whoever waits gets an error of the kernel.
"""

import enum
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from forebay_cache.engine.payload_slots import Memory, Place
from forebay_cache.format import nbd, nbd_options
from forebay_core.errors import ForebayError
from forebay_core.units import Buffer

EIO: Final = 5
OPTION_REPLY_SIZE_MAX: Final = 64 * 1024
CHUNK_SIZE_MAX: Final = 1024 * 1024
COPY_SIZE_MAX: Final = 16 * 1024
"""Payloads up to this are joined with their request: one part to send is cheaper than two."""

ALLOCATION: Final = "base:allocation"
_STATUS_WORDS: Final = struct.Struct(">II")


class NbdPeerError(ForebayError):
    """The server breaks the rules."""


class Request(NamedTuple):
    """One request; `offset` and `length` in bytes. `payload` is what is written, or where a READ may put its bytes: it
    is left alone until the answer, and may be seen by the daemon at its `place`."""

    cookie: int
    command: int
    offset: int
    length: int
    payload: Buffer = b""
    flags: int = 0
    place: Place | None = None


class Status(NamedTuple):
    """One extent of an answer to BLOCK_STATUS."""

    length: int
    hole: bool


class State(enum.Enum):
    """Where a connection is."""

    GREETING = enum.auto()
    OPTIONS = enum.auto()
    READY = enum.auto()
    GONE = enum.auto()
    """The server does not know the export any more."""


Answered = Callable[[Request, int, Buffer], None]
"""Told of each request once: an errno or 0, and the bytes of a READ or the descriptors of a BLOCK_STATUS."""


class NbdClient:
    """One export; with `statuses` a connection that only asks where the holes are."""

    def __init__(self, export: str, answered: Answered, *, statuses: bool = False) -> None:
        self.pending: dict[int, Request] = {}
        self.outgoing: list[Buffer] = []
        self.state = State.GREETING
        self._export = export
        self._answered = answered
        self._statuses = statuses
        self._body: dict[int, bytes] = {}
        self._memory: Memory | None = None  # that is offered to the daemon
        self._shared_key = 0  # of the memory that it has accepted

    def begin(self, memory: Memory | None = None) -> None:
        """A new connection: nothing of the last one counts, and `pending` is asked again when it is ready.

        Payloads in `memory` are not sent if the daemon accepts it.
        """
        self.state = State.GREETING
        self._memory = None if self._statuses else memory
        self._shared_key = 0
        self.outgoing.clear()
        self._body.clear()

    def submit(self, request: Request) -> None:
        """Ask; the answer may come from a later connection."""
        assert request.cookie not in self.pending
        self.pending[request.cookie] = request
        if self.state is State.READY:
            self._send(request)
        elif self.state is State.GONE:
            self.fail(EIO)

    def fail(self, error: int) -> None:
        """Answer everything that waits with an error."""
        waiting = list(self.pending.values())
        self.pending.clear()
        for request in waiting:
            self._answered(request, error, b"")

    def uses(self, key: int) -> bool:
        """Tell whether something that was not answered is in this memory, and the daemon may be at work on it."""
        return self._shared_key == key and any(map(self._is_in_memory, self.pending.values()))

    def _is_in_memory(self, request: Request) -> bool:
        return request.place is not None and request.place.key == self._shared_key

    def abandon(self, cookie: int) -> bool:
        """Forget a request that was not sent over a living connection; tell whether it was one."""
        if self.state is State.READY or cookie not in self.pending:
            return False
        del self.pending[cookie]
        return True

    def received(self, view: memoryview) -> int:
        """Take what is whole of the received bytes; return how many that were.

        Raises:
            NbdPeerError: the connection must be closed.
        """
        at = 0
        while self.state is not State.READY:
            if self.state is State.GONE:
                return len(view)
            taken = self._greeted(view[at:]) if self.state is State.GREETING else self._negotiated(view[at:])
            if not taken:
                return at
            at += taken
        return at + (self._chunks(view[at:]) if self._statuses else self._replies(view[at:]))

    # --- transmission -----------------------------------------------------------------------------------------

    def _send(self, request: Request) -> None:
        cookie, command, offset, length, payload, flags, place = request
        if place is not None and self._is_in_memory(request):
            flags |= nbd.CMD_FLAG_IN_MEMORY
            payload = nbd.PLACE.pack(place.offset)
        elif command == nbd.CMD_READ:
            payload = b""
        header = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length)
        if not payload:
            self.outgoing.append(header)
        elif len(payload) <= COPY_SIZE_MAX:
            self.outgoing.append(header + payload)
        else:
            self.outgoing += (header, payload)

    def _replies(self, view: memoryview) -> int:
        at, end = 0, len(view)
        pending, header_size = self.pending, nbd.SIMPLE_REPLY.size
        while end - at >= header_size:
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(view, at)
            request = pending.get(cookie)
            if magic != nbd.SIMPLE_REPLY_MAGIC or request is None:
                raise NbdPeerError(f"the daemon sent reply {cookie:#x} with magic {magic:#x}, nothing that was asked")
            behind = at + header_size
            if request.command == nbd.CMD_READ and not error and not self._is_in_memory(request):
                if end - behind < request.length:
                    break
                at = behind + request.length
                del pending[cookie]
                self._answered(request, 0, view[behind:at])
                continue
            at = behind
            self._settle(request, error, request.payload if request.command == nbd.CMD_READ and not error else b"")
        return at

    def _settle(self, request: Request, error: int, body: Buffer) -> None:
        if error == nbd.NbdError.ESHUTDOWN:
            return
        del self.pending[request.cookie]
        self._answered(request, error, body)

    def _chunks(self, view: memoryview) -> int:
        """Take chunks of BLOCK_STATUS answers."""
        at, header = 0, nbd.STRUCTURED_CHUNK
        while len(view) - at >= header.size:
            magic, flags, kind, cookie, size = header.unpack_from(view, at)
            request = self.pending.get(cookie)
            if magic != nbd.STRUCTURED_REPLY_MAGIC or request is None or size > CHUNK_SIZE_MAX:
                raise NbdPeerError(f"the daemon sent chunk {cookie:#x} of {size} bytes with magic {magic:#x}")
            if len(view) - at - header.size < size:
                break
            body = bytes(view[at + header.size : at + header.size + size])
            at += header.size + size
            self._chunk(request, kind, body)
            if flags & nbd.REPLY_FLAG_DONE:
                self._chunked(request)
        return at

    def _chunk(self, request: Request, kind: int, body: bytes) -> None:
        if kind == nbd.REPLY_TYPE_BLOCK_STATUS and len(body) >= 4:
            self._body[request.cookie] = body[4:]
        elif kind in (nbd.REPLY_TYPE_ERROR, nbd.REPLY_TYPE_ERROR_OFFSET) and len(body) >= 4:
            self._body[request.cookie] = body[:4]

    def _chunked(self, request: Request) -> None:
        body = self._body.pop(request.cookie, b"")
        if len(body) == 4:
            self._settle(request, int.from_bytes(body), b"")
        else:
            self._settle(request, 0 if body else EIO, body)

    # --- negotiation ------------------------------------------------------------------------------------------

    def _greeted(self, view: memoryview) -> int:
        size = nbd_options.GREETING.size
        if len(view) < size:
            return 0
        magic, option_magic, flags = nbd_options.GREETING.unpack_from(view)
        wanted = nbd_options.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd_options.HANDSHAKE_FLAG_NO_ZEROES
        if magic != nbd_options.NBD_MAGIC or option_magic != nbd_options.OPTION_MAGIC or flags & wanted != wanted:
            raise NbdPeerError("whoever listens there is no NBD server of ours")
        self.outgoing.append(nbd_options.CLIENT_FLAGS.pack(wanted))
        name = self._export.encode()
        named = len(name).to_bytes(4) + name
        options = [(nbd_options.OPT_GO, named + bytes(2))]
        if self._memory is not None:
            options.insert(0, (nbd_options.OPT_MEMORY, nbd_options.MEMORY.pack(self._memory.number, self._memory.key)))
        if self._statuses:
            query = ALLOCATION.encode()
            context = named + (1).to_bytes(4) + len(query).to_bytes(4) + query
            options[:0] = [(nbd_options.OPT_STRUCTURED_REPLY, b""), (nbd_options.OPT_SET_META_CONTEXT, context)]
        for option, body in options:
            self.outgoing.append(nbd_options.OPTION.pack(nbd_options.OPTION_MAGIC, option, len(body)) + body)
        self.state = State.OPTIONS
        return size

    def _negotiated(self, view: memoryview) -> int:
        header = nbd_options.OPTION_REPLY
        if len(view) < header.size:
            return 0
        magic, option, kind, size = header.unpack_from(view)
        if magic != nbd_options.OPTION_REPLY_MAGIC or size > OPTION_REPLY_SIZE_MAX:
            raise NbdPeerError(f"the daemon sent an option's reply with magic {magic:#x} and {size} bytes")
        if len(view) - header.size < size:
            return 0
        if option == nbd_options.OPT_MEMORY:
            if kind == nbd_options.REP_ACK and self._memory is not None:
                self._shared_key = self._memory.key
        elif kind == nbd_options.REP_ERR_UNKNOWN:
            self.state = State.GONE
            self.fail(EIO)
        elif kind & 0x80000000:
            raise NbdPeerError(f"the daemon refused option {option} with {kind:#x}")
        elif option == nbd_options.OPT_GO and kind == nbd_options.REP_ACK:
            self.state = State.READY
            for request in self.pending.values():
                self._send(request)
        return header.size + int(size)


def decode_statuses(body: Buffer) -> Sequence[Status]:
    """Return the extents of an answer to BLOCK_STATUS.

    Raises:
        NbdPeerError: they are none.
    """
    if len(body) % _STATUS_WORDS.size:
        raise NbdPeerError(f"{len(body)} bytes of extents")
    found = [Status(length, bool(flags & nbd.STATE_ZERO)) for length, flags in _STATUS_WORDS.iter_unpack(body)]
    if any(status.length == 0 for status in found):
        raise NbdPeerError("the daemon sent an extent of 0 bytes")
    return found

"""The transmission phase of one NBD connection, without I/O: requests in, calls to the volume, replies out.

Requests are read out of the receive buffer in place: a payload is a view into it, and the buffer is not reused
while a volume still has such a view. Replies gather in `out` until the shell sends them.

Invariants:
    _open holds the reply of exactly the requests that the volume has not answered yet.
    A request is given to the volume only when all of it has arrived; a refused payload is consumed.
    account.held covers the length of every READ that is open or unsent, and of every WRITE from a client's memory.
Crash: a client connects again; what was acknowledged is the volume's promise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from forebay_cache.engine.front import Allocation, Change, Chunk, IoError
from forebay_cache.engine.nbd_budget import Account
from forebay_cache.engine.nbd_limits import (
    BATCH_MAX,
    IN_FLIGHT_MAX,
    OUT_BUFFERS_MAX,
    SIZE_SHIFT,
    STATUS_DESCRIPTORS_MAX,
)
from forebay_cache.engine.nbd_negotiation import ReplyStyle, Session
from forebay_cache.engine.nbd_replies import ExtendedReplies, ReplyEncoder, SimpleReplies, StructuredReplies
from forebay_cache.engine.nbd_requests import Refused, Request, check_request
from forebay_cache.format.nbd import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_IN_MEMORY,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    PLACE,
    REQUEST,
    REQUEST_MAGIC,
    STATE_DIRTY,
    STATE_HOLE,
    STATE_ZERO,
    NbdError,
)
from forebay_cache.format.nbd_options import PAYLOAD_SIZE_MAX
from forebay_core.errors import ProtocolError
from forebay_core.units import Buffer

_ENCODERS: Final[dict[ReplyStyle, Callable[[], ReplyEncoder]]] = {
    ReplyStyle.SIMPLE: SimpleReplies,
    ReplyStyle.STRUCTURED: StructuredReplies,
    ReplyStyle.EXTENDED: ExtendedReplies,
}
_FAILURES: Final = {
    IoError.IO: (NbdError.EIO, "the volume could not do it; the daemon's log says why"),
    IoError.READ_ONLY: (NbdError.EPERM, "the volume is read-only"),
    IoError.SHUTDOWN: (NbdError.ESHUTDOWN, "the server is stopping"),
    IoError.NO_SPACE: (NbdError.ENOSPC, "no space left"),
}
_STOPPING: Final = Refused(NbdError.ESHUTDOWN, "the server is stopping")


class ReceiveBuffer:
    """Memory that a socket receives into. It may be reused once it is not received into and `payloads` is 0."""

    __slots__ = ("charge", "payloads", "retired", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.charge = 0  # bytes of it that the connection's account holds
        self.payloads = 0  # writes that the volume still holds views of
        self.retired = False  # no more is received into it


class Transmission:
    """One connection's requests and replies.

    `wake` is called when a reply came that no running call will return with; `kick` when the volume was given
    requests, and must come to kick it; `reuse` when a retired buffer has no payload left in use.
    """

    def __init__(
        self,
        session: Session,
        account: Account,
        *,
        wake: Callable[[], None],
        kick: Callable[[], None],
        reuse: Callable[[ReceiveBuffer], None],
    ) -> None:
        self._volume = session.volume
        self._size = session.volume.size
        self._read_only = session.volume.read_only
        self._extended = session.style is ReplyStyle.EXTENDED
        self._fragments = session.style is not ReplyStyle.SIMPLE
        self._contexts = session.contexts
        self._memory = session.memory
        self._encoder = _ENCODERS[session.style]()
        self._account = account
        self._wake = wake
        self._kick = kick
        self._reuse = reuse
        self._magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        self._request = EXTENDED_REQUEST if self._extended else REQUEST
        # With extended headers a write ought to say that it has a payload; qemu (8.2 to 10) doesn't, and it always has.
        self._other_flags = ~(CMD_FLAG_FUA | (CMD_FLAG_PAYLOAD_LEN if self._extended else 0))
        self._open: dict[int, partial[None]] = {}
        self._serial = 0
        self._skip = 0
        self._skipped: tuple[int, int, Refused] | None = None
        self._gathering = False
        self._refusing = False
        self._muted = False
        self.out: list[Buffer] = []
        self.out_size = 0
        self.out_held = 0
        self.want = self._request.size
        self.short = 0
        self.blocked = False
        self.more = False
        self.leaving = False

    @property
    def in_flight(self) -> int:
        """Requests that the volume has not answered yet."""
        return len(self._open)

    def resized(self) -> None:
        """The volume became larger."""
        self._size = self._volume.size

    def refuse(self) -> None:
        """Answer every further request with ESHUTDOWN."""
        self._refusing = True

    def give_up(self) -> None:
        """Answer what is in flight with ESHUTDOWN; what the volume says later is dropped."""
        self._refusing = self._muted = True
        for reply in self._open.values():
            _serial, cookie, offset = reply.args[:3]
            self._refuse(cookie, offset, _STOPPING)

    def mute(self) -> None:
        """The client is gone: drop every further reply."""
        self._refusing = self._muted = True

    def take_out(self) -> tuple[list[Buffer], int, int]:
        """Return the gathered buffers, their bytes, and how much of `account.held` is free once they are sent."""
        out = self.out, self.out_size, self.out_held
        self.out = []
        self.out_size = self.out_held = 0
        return out

    def accept(self, buffer: ReceiveBuffer, at: int, end: int) -> int:
        """Give the volume the whole requests in `buffer.view[at:end]`; return where the first one left begins.

        Afterwards `want` is how many bytes that one has as far as is known; `blocked` says that a limit stops it
        until replies come or are sent, with `short` when it is this many bytes of budget; `more` that others should
        have their turn first; `leaving` that the client said goodbye.

        Raises:
            ProtocolError: the client broke the rules; close the connection.
        """
        self.want = self._request.size
        self.short = 0
        self.blocked = self.more = False
        before = self._serial
        self._gathering = True
        try:
            if self._skip:
                at += self._consume(end - at)
            return self._take(buffer, at, end)
        finally:
            if self._serial != before:
                self._kick()
            self._gathering = False

    def _take(self, buffer: ReceiveBuffer, at: int, end: int) -> int:
        """The hot loop: what it uses again and again is a local name; limits are looked at once per batch."""
        if len(self.out) >= OUT_BUFFERS_MAX:
            self.blocked = True
            return at
        view, volume, open_, account = buffer.view, self._volume, self._open, self._account
        unpack, header_size, wanted_magic = self._request.unpack_from, self._request.size, self._magic
        read_replied, write_replied, replied = self._read_replied, self._write_replied, self._replied
        size = 0 if self._refusing else self._size
        other_flags, refused_flags = self._other_flags, -1 if self._read_only else 0
        serial = self._serial
        last = serial + min(BATCH_MAX, IN_FLIGHT_MAX - len(open_))
        while end - at >= header_size:
            magic, flags, command, cookie, offset, length = unpack(view, at)
            if magic != wanted_magic:
                raise ProtocolError(f"request magic {magic:#x}")
            if serial >= last:
                self.blocked = len(open_) >= IN_FLIGHT_MAX
                self.more = not self.blocked
                break
            plain = 0 < length <= PAYLOAD_SIZE_MAX and offset + length <= size
            self._serial = serial = serial + 1
            if command == CMD_READ and plain and flags == 0:
                if account.held + length > account.granted:
                    self.short, self.blocked = length, True
                    break
                account.held += length
                last -= length >> SIZE_SHIFT
                at += header_size
                open_[serial] = read_reply = partial(read_replied, serial, cookie, offset, length)
                volume.read(offset, length, read_reply)
            elif command == CMD_WRITE and plain and flags & other_flags == refused_flags:
                stop = at + header_size + length
                if stop > end:
                    self.want = header_size + length
                    break
                payload = view[at + header_size : stop]
                at = stop
                buffer.payloads += 1
                open_[serial] = reply = partial(write_replied, serial, cookie, offset, buffer)
                volume.write(offset, payload, flags & CMD_FLAG_FUA != 0, reply)
            elif command == CMD_FLUSH and size and not (flags or offset or length):
                at += header_size
                open_[serial] = reply = partial(replied, serial, cookie, 0)
                volume.flush(reply)
            elif flags & CMD_FLAG_IN_MEMORY and self._memory is not None:
                taken = self._accept_in_memory(view[at:end], self._memory)
                if not taken:
                    break
                at += taken
                last -= length >> SIZE_SHIFT
            elif self._accept_rare(Request(flags, command, cookie, offset, length)):
                at += header_size
                if self.leaving:
                    break
                at += self._consume(end - at)
            else:
                break
        return at

    def _accept_rare(self, request: Request) -> bool:
        """Take a request that is neither a plain read nor a plain write; return False if it must wait."""
        if request.command == CMD_DISC:
            self.leaving = True
            return True
        payload_size = self._payload_size(request)
        if payload_size > PAYLOAD_SIZE_MAX:
            raise ProtocolError(f"a payload of {payload_size} bytes; at most {PAYLOAD_SIZE_MAX}")
        refused = self._check(request)
        if refused is not None:
            self._refuse_request(request, payload_size, refused)
        elif request.command == CMD_READ and request.length:
            return self._read(request)
        elif request.command == CMD_READ:
            self.out_size += self._encoder.read_nothing(self.out, request.cookie, request.offset)
        elif request.command == CMD_FLUSH:
            self._volume.flush(self._opened(request))
        elif request.length == 0:
            self._done(request.cookie, request.offset)
        else:
            self._submit(request)
        return True

    def _check(self, request: Request) -> Refused | None:
        if self._refusing:
            return _STOPPING
        return check_request(
            request,
            size=self._size,
            read_only=self._read_only,
            extended=self._extended,
            fragments=self._fragments,
            status=bool(self._contexts),
        )

    def _accept_in_memory(self, received: memoryview, memory: memoryview) -> int:
        """Take a READ or WRITE whose bytes are in the client's memory, which leaves them alone until the reply; return
        the bytes of the request, or 0 if it must wait."""
        size = self._request.size + PLACE.size
        if len(received) < size:
            self.want = size
            return 0
        _magic, flags, command, cookie, offset, length = self._request.unpack_from(received)
        (place,) = PLACE.unpack_from(received, self._request.size)
        if command not in (CMD_READ, CMD_WRITE) or length > PAYLOAD_SIZE_MAX or place + length > memory.nbytes:
            raise ProtocolError(f"command {command} with {length} bytes at {place} of {memory.nbytes} in memory")
        request = Request(flags & ~CMD_FLAG_IN_MEMORY, command, cookie, offset, length)
        refused = self._check(request)
        if refused is not None:
            self._refuse(cookie, offset, refused)
        elif length == 0:
            self._done(cookie, offset)
        elif not self._submit_in_memory(request, memory[place : place + length]):
            return 0
        return size

    def _submit_in_memory(self, request: Request, view: memoryview) -> bool:
        """Read into the view, or write what it shows; return False if that must wait for budget."""
        flags, command, cookie, offset, length = request
        if not self._hold(length):
            return False
        serial = self._serial
        if command == CMD_READ:
            self._open[serial] = read_reply = partial(self._read_into_replied, serial, cookie, offset, length, view)
            self._volume.read(offset, length, read_reply)
        else:
            self._open[serial] = reply = partial(self._write_from_replied, serial, cookie, offset, length)
            self._volume.write(offset, view, flags & CMD_FLAG_FUA != 0, reply)
        return True

    def _hold(self, length: int) -> bool:
        """Count bytes as held; return False if the request must wait for budget."""
        account = self._account
        if account.held + length > account.granted:
            self.short, self.blocked = length, True
            return False
        account.held += length
        return True

    def _submit(self, request: Request) -> None:
        volume, offset, length = self._volume, request.offset, request.length
        fua = request.flags & CMD_FLAG_FUA != 0
        if request.command == CMD_TRIM:
            volume.trim(offset, length, fua, self._opened(request))
        elif request.command == CMD_WRITE_ZEROES:
            volume.write_zeroes(offset, length, fua, self._opened(request))
        elif request.command == CMD_CACHE:
            volume.prefetch(offset, length, self._opened(request))
        else:
            assert request.command == CMD_BLOCK_STATUS
            self._ask_status(request)

    def _ask_status(self, request: Request) -> None:
        _flags, _command, cookie, offset, length = request
        one = request.flags & CMD_FLAG_REQ_ONE != 0
        found: dict[int, list[tuple[int, int]]] = {}
        reply = partial(self._status_replied, self._serial, cookie, offset, length, one, found)
        self._open[self._serial] = reply
        for context in self._contexts:
            if context.snapshot:
                self._volume.changes(context.snapshot, offset, length, partial(reply, context.id))
            else:
                self._volume.allocation(offset, length, partial(reply, context.id))

    def _read(self, request: Request) -> bool:
        _flags, _command, cookie, offset, length = request
        if not self._hold(length):
            return False
        replied = self._whole_read_replied if request.flags & CMD_FLAG_DF else self._read_replied
        self._open[self._serial] = reply = partial(replied, self._serial, cookie, offset, length)
        self._volume.read(offset, length, reply)
        return True

    def _opened(self, request: Request) -> Callable[[IoError], None]:
        reply = partial(self._replied, self._serial, request.cookie, request.offset)
        self._open[self._serial] = reply
        return reply

    def _read_replied(
        self, serial: int, cookie: int, offset: int, length: int, error: IoError, chunks: Sequence[Chunk]
    ) -> None:
        if self._open.pop(serial, None) is None:
            return
        if error or self._muted:
            self._held_ended(cookie, offset, length, error)
            return
        self.out_size += self._encoder.read(self.out, cookie, offset, length, chunks)
        self.out_held += length
        if not self._gathering:
            self._wake()

    def _whole_read_replied(
        self, serial: int, cookie: int, offset: int, length: int, error: IoError, chunks: Sequence[Chunk]
    ) -> None:
        if self._open.pop(serial, None) is None:
            return
        if error or self._muted:
            self._held_ended(cookie, offset, length, error)
            return
        self.out_size += self._encoder.read_whole(self.out, cookie, offset, length, chunks)
        self.out_held += length
        self._woken()

    def _read_into_replied(
        self,
        serial: int,
        cookie: int,
        offset: int,
        length: int,
        view: memoryview,
        error: IoError,
        chunks: Sequence[Chunk],
    ) -> None:
        if self._open.pop(serial, None) is None:
            return
        if not (error or self._muted):
            at = 0
            for size, buffer in chunks:
                view[at : at + size] = bytes(size) if buffer is None else buffer
                at += size
        self._held_ended(cookie, offset, length, error)

    def _write_from_replied(self, serial: int, cookie: int, offset: int, length: int, error: IoError) -> None:
        if self._open.pop(serial, None) is not None:
            self._held_ended(cookie, offset, length, error)

    def _held_ended(self, cookie: int, offset: int, length: int, error: IoError) -> None:
        self._account.held -= length
        self._finished(cookie, offset, error)

    def _write_replied(self, serial: int, cookie: int, offset: int, buffer: ReceiveBuffer, error: IoError) -> None:
        if self._open.pop(serial, None) is None:
            return
        buffer.payloads -= 1
        if buffer.retired and buffer.payloads == 0:
            self._reuse(buffer)
        self._finished(cookie, offset, error)

    def _replied(self, serial: int, cookie: int, offset: int, error: IoError) -> None:
        if self._open.pop(serial, None) is None:
            return
        self._finished(cookie, offset, error)

    def _status_replied(
        self,
        serial: int,
        cookie: int,
        offset: int,
        length: int,
        one: bool,
        found: dict[int, list[tuple[int, int]]],
        context: int,
        error: IoError,
        extents: Sequence[Allocation | Change],
    ) -> None:
        """The volume answered for one context: answer the client when it has for all, or failed for one."""
        if serial not in self._open:
            return
        if error or self._muted:
            del self._open[serial]
            self._finished(cookie, offset, error)
            return
        flags = [(run.length, _flags_of(run)) for run in extents]
        found[context] = clip_extents(flags, length, count_max=1 if one else STATUS_DESCRIPTORS_MAX)
        if len(found) < len(self._contexts):
            return
        del self._open[serial]
        self.out_size += self._encoder.status(self.out, cookie, offset, dict(sorted(found.items())))
        self._woken()

    def _finished(self, cookie: int, offset: int, error: IoError) -> None:
        if not self._muted:
            if error:
                self._refuse(cookie, offset, Refused(*_FAILURES[error]))
            else:
                self.out_size += self._encoder.done(self.out, cookie, offset)
        if not self._gathering:
            self._wake()

    def _woken(self) -> None:
        if not self._gathering:
            self._wake()

    def _done(self, cookie: int, offset: int) -> None:
        self.out_size += self._encoder.done(self.out, cookie, offset)

    def _refuse(self, cookie: int, offset: int, refused: Refused) -> None:
        self.out_size += self._encoder.error(self.out, cookie, offset, refused.error, refused.text)

    def _payload_size(self, request: Request) -> int:
        announced = self._extended and request.flags & CMD_FLAG_PAYLOAD_LEN
        return request.length if announced or request.command == CMD_WRITE else 0

    def _refuse_request(self, request: Request, payload_size: int, refused: Refused) -> None:
        """Answer with an error, once the payload that comes with the request has gone by."""
        if payload_size:
            self._skip = payload_size
            self._skipped = request.cookie, request.offset, refused
        else:
            self._refuse(request.cookie, request.offset, refused)

    def _consume(self, available: int) -> int:
        """Skip what has arrived of a refused payload; return how much that was."""
        taken = min(self._skip, available)
        self._skip -= taken
        if self._skipped is not None and self._skip == 0:
            self._refuse(*self._skipped)
            self._skipped = None
        return taken


def _flags_of(run: Allocation | Change) -> int:
    if isinstance(run, Change):
        return STATE_DIRTY if run.changed else 0
    return STATE_HOLE | STATE_ZERO if run.hole else 0


def clip_extents(extents: Sequence[tuple[int, int]], length: int, *, count_max: int) -> list[tuple[int, int]]:
    """Join neighbours of one state, end where the request ends, and keep at most `count_max`."""
    clipped: list[tuple[int, int]] = []
    for extent_length, flags in extents:
        assert extent_length > 0
        size = min(extent_length, length)
        if clipped and clipped[-1][1] == flags:
            clipped[-1] = (clipped[-1][0] + size, flags)
        elif len(clipped) == count_max:
            break
        else:
            clipped.append((size, flags))
        length -= size
        if length == 0:
            break
    assert clipped
    return clipped

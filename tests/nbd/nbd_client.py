"""A blunt NBD client over a raw socket, which can also misbehave, and a server in a thread to talk to."""

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple, TypeVar

from ram_volume import RamExports, RamVolume

from forebay_cache.engine.nbd_negotiation import ReplyStyle
from forebay_cache.format import nbd, nbd_options
from forebay_cache.service.nbd_server import NbdServer, NbdSettings

T = TypeVar("T")
TIMEOUT_S = 20.0
SIMPLE, STRUCTURED, EXTENDED = ReplyStyle.SIMPLE, ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED


class ServerThread:
    """An NbdServer on a Unix socket with its event loop in a thread of its own."""

    def __init__(self, path: str, *volumes: RamVolume, settings: NbdSettings | None = None) -> None:
        self.path = path
        self.exports = RamExports(*volumes)
        self._settings = settings
        self._started = threading.Event()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self.errors: list[dict[str, object]] = []

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        assert self.errors == [], self.errors

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.server = NbdServer(self.exports, self._settings)
        await self.server.listen_unix(self.path)
        self._started.set()
        await self._stopped.wait()
        await self.server.close(grace_s=1)

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await something in the server's loop."""

        async def awaited() -> T:
            return await make()

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(TIMEOUT_S)

    def call(self, function: Callable[[], T]) -> T:
        """Call something in the server's loop."""

        async def called() -> T:
            return function()

        return self.run(called)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds in the server's loop."""

        async def wait() -> None:
            async with asyncio.timeout(TIMEOUT_S):
                while not condition():
                    await asyncio.sleep(0.002)

        self.run(wait)

    def client(self) -> "Client":
        """Return a connected client that has not said a word."""
        return Client.unix(self.path)


class OptionReply(NamedTuple):
    """One reply to an option."""

    option: int
    type: int
    data: bytes


class Answer(NamedTuple):
    """All of what came for one request. `pieces`: (offset, bytes or hole size); `extents`: (length, flags), all of the
    context `base:allocation`; `others` those of other contexts, by their ids."""

    cookie: int
    error: int
    text: str
    pieces: list[tuple[int, bytes | int]]
    extents: list[tuple[int, int]]
    others: dict[int, list[tuple[int, int]]]

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Put the pieces together; they must cover the request exactly once."""
        found = bytearray(length)
        covered = 0
        for at, piece in self.pieces:
            size = piece if isinstance(piece, int) else len(piece)
            assert offset <= at and at + size <= offset + length
            covered += size
            if not isinstance(piece, int):
                found[at - offset : at - offset + size] = piece
        assert covered == length
        return bytes(found)


class Client:
    """The client's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(TIMEOUT_S)
        self.style = SIMPLE
        self.size = 0
        self.flags = 0
        self._cookie = 100
        self._reads: dict[int, tuple[int, int]] = {}
        self._offsets: dict[int, int] = {}

    @classmethod
    def unix(cls, path: str) -> "Client":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def take(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.socket.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def at_end(self) -> bool:
        """Read until the server closes; tell whether nothing more came."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def greet(self, flags: int = 3) -> None:
        magic, option_magic, server_flags = nbd_options.GREETING.unpack(self.take(18))
        assert (magic, option_magic, server_flags) == (0x4E42444D41474943, 0x49484156454F5054, 3)
        self.send(struct.pack(">I", flags))

    def option(self, option: int, payload: bytes = b"") -> list[OptionReply]:
        self.send(option_bytes(option, payload))
        return self.option_replies(option)

    def option_replies(self, option: int) -> list[OptionReply]:
        replies = []
        while True:
            magic, answered, kind, size = nbd_options.OPTION_REPLY.unpack(self.take(20))
            assert magic == nbd_options.OPTION_REPLY_MAGIC
            assert answered == option
            replies.append(OptionReply(answered, kind, self.take(size)))
            if kind == nbd_options.REP_ACK or kind & 1 << 31:
                return replies

    def go(
        self, name: str = "", style: ReplyStyle = STRUCTURED, *, allocation: bool = True, memory: int | None = None
    ) -> "Client":
        """Do the whole handshake; share the memory of a descriptor."""
        self.greet()
        if memory is not None:
            replies = self.option(nbd_options.OPT_MEMORY, nbd_options.MEMORY.pack(memory, os.fstat(memory).st_ino))
            assert [reply.type for reply in replies] == [nbd_options.REP_ACK], replies
        if style is not SIMPLE:
            option = nbd_options.OPT_STRUCTURED_REPLY if style is STRUCTURED else nbd_options.OPT_EXTENDED_HEADERS
            assert self.option(option)[-1].type == nbd_options.REP_ACK
            if allocation:
                replies = self.option(nbd_options.OPT_SET_META_CONTEXT, context_query(name, "base:allocation"))
                assert [reply.type for reply in replies] == [nbd_options.REP_META_CONTEXT, nbd_options.REP_ACK]
        replies = self.option(nbd_options.OPT_GO, export_query(name))
        assert replies[-1].type == nbd_options.REP_ACK, replies
        _kind, self.size, self.flags = nbd_options.EXPORT_INFORMATION.unpack(replies[0].data)
        self.style = style
        return self

    def request(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"", magic: int = 0
    ) -> bytes:
        """Return one request; remember what a READ asked for."""
        self._cookie += 1
        self._offsets[self._cookie] = offset
        if command == nbd.CMD_READ:
            self._reads[self._cookie] = offset, length
        if self.style is EXTENDED:
            if command == nbd.CMD_WRITE:
                flags |= nbd.CMD_FLAG_PAYLOAD_LEN
            header = nbd.EXTENDED_REQUEST.pack(
                magic or nbd.EXTENDED_REQUEST_MAGIC, flags, command, self._cookie, offset, length
            )
        else:
            header = nbd.REQUEST.pack(magic or nbd.REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        return header + payload

    @property
    def cookie(self) -> int:
        """Of the last request made."""
        return self._cookie

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Answer:
        """Send one request and return its answer."""
        self.send(self.request(command, offset, length, flags=flags, payload=payload))
        answer = self.answer()
        assert answer.cookie == self._cookie
        return answer

    def read(self, offset: int, length: int) -> bytes:
        answer = self.ask(nbd.CMD_READ, offset, length)
        assert answer.error == 0, answer
        return answer.bytes_at(offset, length)

    def write(self, offset: int, payload: bytes, *, flags: int = 0) -> int:
        return self.ask(nbd.CMD_WRITE, offset, len(payload), flags=flags, payload=payload).error

    def answer(self) -> Answer:
        """Return the answer to one request; its chunks must not be mixed with those of others."""
        (magic,) = struct.unpack(">I", self.take(4))
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            assert self.style is not EXTENDED
            error, cookie = struct.unpack(">IQ", self.take(12))
            offset, length = self._reads.pop(cookie, (0, 0))
            pieces: list[tuple[int, bytes | int]] = []
            if self.style is SIMPLE and not error and length:
                pieces = [(offset, self.take(length))]
            return Answer(cookie, error, "", pieces, [], {})
        answer = Answer(0, 0, "", [], [], {})
        while True:
            flags, kind, cookie, length = self._chunk_header(magic)
            assert answer.cookie in (0, cookie)
            answer = self._chunk(answer._replace(cookie=cookie), kind, self.take(length))
            if flags & nbd.REPLY_FLAG_DONE:
                self._reads.pop(cookie, None)
                return answer
            (magic,) = struct.unpack(">I", self.take(4))

    def _chunk_header(self, magic: int) -> tuple[int, int, int, int]:
        if self.style is EXTENDED:
            assert magic == nbd.EXTENDED_REPLY_MAGIC
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.take(28))
            assert self._offsets.get(cookie, offset) == offset
        else:
            assert magic == nbd.STRUCTURED_REPLY_MAGIC
            assert self.style is STRUCTURED
            flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
        return flags, kind, cookie, length

    def _chunk(self, answer: Answer, kind: int, payload: bytes) -> Answer:
        match kind:
            case nbd.REPLY_TYPE_NONE:
                assert payload == b""
            case nbd.REPLY_TYPE_OFFSET_DATA:
                assert len(payload) > 8
                answer.pieces.append((int.from_bytes(payload[:8], "big"), payload[8:]))
            case nbd.REPLY_TYPE_OFFSET_HOLE:
                answer.pieces.append(nbd.HOLE_PAYLOAD.unpack(payload))
            case nbd.REPLY_TYPE_BLOCK_STATUS:
                self._statuses(answer, payload).extend(nbd.STATUS_DESCRIPTOR.iter_unpack(payload[4:]))
            case nbd.REPLY_TYPE_BLOCK_STATUS_EXT:
                assert struct.unpack(">I", payload[4:8]) == (len(payload) // 16,)
                self._statuses(answer, payload).extend(nbd.EXTENDED_STATUS_DESCRIPTOR.iter_unpack(payload[8:]))
            case nbd.REPLY_TYPE_ERROR:
                error, size = nbd.ERROR_PAYLOAD.unpack_from(payload)
                assert error
                assert size == len(payload) - 6 > 0
                return answer._replace(error=error, text=payload[6:].decode())
            case _:
                raise AssertionError(f"unknown chunk {kind}")
        return answer

    def _statuses(self, answer: Answer, payload: bytes) -> list[tuple[int, int]]:
        """Return the list for the chunk's context; each has one chunk at most."""
        (context,) = struct.unpack(">I", payload[:4])
        found = answer.extents if context == 1 else answer.others.setdefault(context, [])
        assert not found
        return found


def option_bytes(option: int, payload: bytes = b"") -> bytes:
    return nbd_options.OPTION.pack(nbd_options.OPTION_MAGIC, option, len(payload)) + payload


def export_query(name: str, *wanted: int) -> bytes:
    encoded = name.encode()
    return struct.pack(f">I{len(encoded)}sH{len(wanted)}H", len(encoded), encoded, len(wanted), *wanted)


def context_query(name: str, *queries: str) -> bytes:
    parts = [struct.pack(">I", len(name.encode())), name.encode(), struct.pack(">I", len(queries))]
    for query in queries:
        parts += [struct.pack(">I", len(query.encode())), query.encode()]
    return b"".join(parts)

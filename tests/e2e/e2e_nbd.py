"""A small NBD client over a Unix socket: many requests in flight, simple replies; for tests only."""

import socket
import struct
from pathlib import Path
from typing import NamedTuple

READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
TIMEOUT_S = 60.0

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_OPTION_REPLY = 0x3E889045565A9
_OPT_GO = 7
_REP_ACK, _REP_INFO = 1, 3
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


class NbdError(Exception):
    """The server answered an error number."""

    def __init__(self, error: int) -> None:
        super().__init__(f"NBD error {error}")
        self.error = error


class Pending(NamedTuple):
    command: int
    offset: int
    length: int
    flags: int


class NbdClient:
    """One connection. `submit` and `next_reply` for many in flight, the other methods for one."""

    def __init__(self, path: Path | str, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        self.pending: dict[int, Pending] = {}
        self._cookie = 0
        self.size = 0
        try:
            self._socket.connect(str(path))
            self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def submit(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        self._cookie += 1
        self.pending[self._cookie] = Pending(command, offset, length, flags)
        header = _REQUEST.pack(0x25609513, flags, command, self._cookie, offset, length)
        self._socket.sendall(header + payload)
        return self._cookie

    def next_reply(self) -> tuple[int, Pending, bytes]:
        """Return cookie, request and payload; raises NbdError, ConnectionError, TimeoutError."""
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        assert magic == 0x67446698, hex(magic)
        pending = self.pending.pop(cookie)
        if error:
            raise NbdError(error)
        payload = self._receive(pending.length) if pending.command == READ else b""
        return cookie, pending, payload

    def read(self, offset: int, length: int) -> bytes:
        return self._one(READ, offset, length)

    def write(self, offset: int, payload: bytes, *, fua: bool = False) -> None:
        self._one(WRITE, offset, len(payload), payload, FUA if fua else 0)

    def flush(self) -> None:
        self._one(FLUSH, 0, 0)

    def trim(self, offset: int, length: int) -> None:
        self._one(TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._one(WRITE_ZEROES, offset, length)

    def _one(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> bytes:
        assert not self.pending
        self.submit(command, offset, length, payload, flags)
        return self.next_reply()[2]

    def _negotiate(self, export: bytes) -> None:
        magic, option_magic, _ = struct.unpack(">QQH", self._receive(18))
        assert (magic, option_magic) == (_NBDMAGIC, _IHAVEOPT)
        self._socket.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        body = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">QII", _IHAVEOPT, _OPT_GO, len(body)) + body)
        while True:
            magic, _, kind, size = struct.unpack(">QIII", self._receive(20))
            assert magic == _OPTION_REPLY
            reply = self._receive(size)
            if kind == _REP_ACK:
                return
            if kind != _REP_INFO:
                raise ConnectionRefusedError(f"export {export!r}: {reply.decode(errors='replace')}")
            if struct.unpack_from(">H", reply)[0] == 0:
                self.size = struct.unpack_from(">Q", reply, 2)[0]

    def _receive(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._socket.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

"""A small NBD client of one export with extended headers: one request at a time, so one can trim all of 1 TiB."""

import socket
import struct
from pathlib import Path

from fio import BenchError
from forebay_cache.format import nbd, nbd_options

TIMEOUT_S = 120.0


class NbdPeer:
    """Connected to an export over a Unix socket."""

    def __init__(self, path: Path, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(str(path))
        self._take(nbd_options.GREETING.size)
        self._socket.sendall(struct.pack(">I", 3))
        self._option(nbd_options.OPT_EXTENDED_HEADERS, b"")
        self._option(nbd_options.OPT_GO, struct.pack(f">I{len(name)}sH", len(name), name.encode(), 0))
        self._cookie = 0

    def __enter__(self) -> "NbdPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def write(self, offset: int, payload: bytes, *, fua: bool = False) -> None:
        """Write, with `fua` durably, and wait for the answer."""
        flags = nbd.CMD_FLAG_PAYLOAD_LEN | (nbd.CMD_FLAG_FUA if fua else 0)
        self._ask(nbd.CMD_WRITE, flags, offset, len(payload), payload)

    def flush(self) -> None:
        """Flush and wait for the answer."""
        self._ask(nbd.CMD_FLUSH, 0, 0, 0, b"")

    def trim(self, offset: int, length: int) -> None:
        """Trim and wait for the answer."""
        self._ask(nbd.CMD_TRIM, 0, offset, length, b"")

    def _ask(self, command: int, flags: int, offset: int, length: int, payload: bytes) -> None:
        self._cookie += 1
        header = nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        self._socket.sendall(header + payload)
        _, _, kind, _, _, size = nbd.EXTENDED_CHUNK.unpack(self._take(nbd.EXTENDED_CHUNK.size))
        self._take(size)
        if kind != nbd.REPLY_TYPE_NONE:
            raise BenchError(f"NBD command {command} was answered with chunk {kind}")

    def _option(self, option: int, payload: bytes) -> None:
        self._socket.sendall(nbd_options.OPTION.pack(nbd_options.OPTION_MAGIC, option, len(payload)) + payload)
        kind = 0
        while kind != nbd_options.REP_ACK:
            _, _, kind, size = nbd_options.OPTION_REPLY.unpack(self._take(nbd_options.OPTION_REPLY.size))
            text = self._take(size)
            if kind & 1 << 31:
                raise BenchError(f"NBD option {option} was refused: {text.decode(errors='replace')}")

    def _take(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            piece = self._socket.recv(size - len(found))
            if not piece:
                raise BenchError("the daemon closed the connection")
            found += piece
        return found

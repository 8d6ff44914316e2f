"""What the daemon tells the FUSE front, over a socket in the run directory: one JSON object a line, one answer a line.

    {"serve": NAME, "size": BYTES, "read_only": BOOL}   show a volume, or tell its new size     {"open": COUNT}
    {"release": NAME}    show it no longer, unless somebody has it open                         {"open": COUNT}
    {"release": NAME, "hide": true}   the same, even if somebody has it open                    {"open": COUNT}
    {"end": true}        end, unless somebody has something open                                {"open": COUNT}

The front ends when nothing is shown and nothing is open any more. Only who may enter the run directory can connect.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Final

import msgspec

from forebay_cache.engine.fuse_folder import FuseFolder, Served

SOCKET: Final = "fuse.sock"
LOCK: Final = "fuse.pid"
VOLUMES: Final = "volumes"
READY: Final = "READY"
"""What the front says on its standard output when the mount is there; anything else is why it isn't."""

LINE_SIZE_MAX: Final = 4096
CALLERS_MAX: Final = 8


class Call(msgspec.Struct, omit_defaults=True):
    """One line of the daemon."""

    serve: str = ""
    size: int = 0
    read_only: bool = False
    release: str = ""
    hide: bool = False
    end: bool = False


class CallAnswer(msgspec.Struct):
    """How many have the volume open, or anything if it was about all."""

    open: int


class CallServer:
    """The front's end."""

    def __init__(
        self,
        path: str,
        folder: FuseFolder,
        watch: Callable[[int, Callable[[int], None]], None],
        leave: Callable[[int], None],
    ) -> None:
        self.ended = False
        self._path = path
        self._folder = folder
        self._watch = watch
        self._leave = leave
        self._callers: dict[int, tuple[socket.socket, bytearray]] = {}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # a dead front's: we hold the lock
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._listener.bind(path)
        os.chmod(path, 0o600)  # the folder may be open to those who use NBD
        self._listener.listen(CALLERS_MAX)
        watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        for caller, _ in self._callers.values():
            caller.close()

    def _accept(self, _events: int) -> None:
        try:
            caller, _ = self._listener.accept()
        except OSError:
            return
        if len(self._callers) >= CALLERS_MAX:
            caller.close()
            return
        caller.setblocking(False)
        number = caller.fileno()
        self._callers[number] = caller, bytearray()
        self._watch(number, lambda _events: self._read(number))

    def _read(self, number: int) -> None:
        caller, gathered = self._callers[number]
        try:
            received = caller.recv(LINE_SIZE_MAX)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        gathered += received
        *lines, rest = bytes(gathered).split(b"\n")
        gathered[:] = rest
        alive = bool(received) and len(rest) < LINE_SIZE_MAX
        for line in lines if alive else ():
            alive = alive and self._answer(caller, line)
        if not alive:
            self._leave(number)
            caller.close()
            del self._callers[number]

    def _answer(self, caller: socket.socket, line: bytes) -> bool:
        """Do what a line says; tell whether the caller makes sense and listens."""
        try:
            answer = self._obey(msgspec.json.decode(line, type=Call))
            caller.send(msgspec.json.encode(answer) + b"\n")
        except (msgspec.DecodeError, OSError):
            return False
        return True

    def _obey(self, call: Call) -> CallAnswer:
        folder = self._folder
        if call.serve:
            return CallAnswer(folder.serve(call.serve, Served(call.size, call.read_only)).openings)
        if call.release:
            file = folder.names.get(call.release)
            openings = file.openings if file is not None else 0
            if call.hide or not openings:
                folder.release(call.release)
                self.ended = not folder.nodes
            return CallAnswer(openings)
        openings = sum(file.openings for file in folder.nodes.values())
        self.ended = call.end and not openings
        return CallAnswer(openings)

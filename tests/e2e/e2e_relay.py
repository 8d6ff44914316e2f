"""A relay between a cache and its store: it keeps what one connection sent, and brings it when that is long lost."""

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

TIMEOUT_S = 30.0
_CHUNK = 1 << 16


class _Kept(NamedTuple):
    store: socket.socket
    content: bytes


class Relay:
    """Carries bytes both ways. For use as a context manager."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._mark = b""
        self._kept: _Kept | None = None
        self._answered = threading.Event()
        self.keeping = threading.Event()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Relay":
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            _end(one)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def cut(self) -> None:
        """End all connections."""
        for one in self._sockets[1:]:
            _end(one)

    def keep(self, mark: bytes) -> None:
        """Keep the next bytes for the store that `mark` is in; to their sender the connection is lost."""
        self._mark = mark

    def bring(self) -> None:
        """Bring what was kept, and wait for the store's answer."""
        assert self._kept is not None
        self._kept.store.sendall(self._kept.content)
        assert self._answered.wait(TIMEOUT_S)

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                store = socket.create_connection(self._target)
                self._sockets.append(store)
                self._start(self._carry_up, client, store)
                self._start(self._carry_down, store, client)

    def _carry_up(self, client: socket.socket, store: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := client.recv(_CHUNK):
                if self._mark and self._mark in content:
                    self._mark = b""
                    self._kept = _Kept(store, content)
                    _end(client)
                    self.keeping.set()
                    return
                store.sendall(content)
        _end(store)

    def _carry_down(self, store: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := store.recv(_CHUNK):
                if self._kept is not None and self._kept.store is store:
                    self._answered.set()
                    return
                client.sendall(content)
        _end(client)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)

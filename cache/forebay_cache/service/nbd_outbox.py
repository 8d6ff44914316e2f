"""Replies on their way into a socket: many buffers, one sendmsg.

Invariant: the bytes go out exactly once and in order; a batch's `held` is released when its last byte is sent.
"""

import socket
from collections import deque
from typing import Final

from forebay_core.units import Buffer

IOV_MAX: Final = 1024


class _Batch:
    """Buffers that gathered together. The first `index` are sent, and `skip` bytes of the next."""

    __slots__ = ("buffers", "held", "index", "left", "skip")

    def __init__(self, buffers: list[Buffer], size: int, held: int) -> None:
        self.buffers = buffers
        self.left = size
        self.held = held
        self.index = 0
        self.skip = 0

    def rest(self) -> list[Buffer]:
        """Return what one more sendmsg can take."""
        rest = self.buffers[self.index : self.index + IOV_MAX]
        if self.skip:
            rest[0] = memoryview(rest[0])[self.skip :]
        return rest

    def advance(self, sent: int) -> None:
        """Note that this many more bytes are out; sent buffers are let go."""
        self.left -= sent
        sent += self.skip
        while self.index < len(self.buffers) and sent >= len(self.buffers[self.index]):
            sent -= len(self.buffers[self.index])
            self.buffers[self.index] = b""
            self.index += 1
        self.skip = sent


class Outbox:
    """What is not sent yet: `batches`, which only this class changes."""

    def __init__(self, client: socket.socket) -> None:
        self.sent = 0  # bytes that the socket took, ever
        self._client = client
        self.batches: deque[_Batch] = deque()

    def put(self, buffers: list[Buffer], size: int, held: int) -> int:
        """Send buffers of `size` bytes in all, or keep what the socket does not take for `send`.

        Returns `held` if all is out; else 0, and `send` returns it later.

        Raises:
            OSError: the client is gone.
        """
        sent = 0
        if not self.batches and len(buffers) <= IOV_MAX:
            try:
                sent = self._client.send(buffers[0]) if len(buffers) == 1 else self._client.sendmsg(buffers)
            except (BlockingIOError, InterruptedError):
                sent = 0
            self.sent += sent
            if sent == size:
                return held
        batch = _Batch(buffers, size, held)
        batch.advance(sent)
        self.batches.append(batch)
        return self.send()

    def send(self) -> int:
        """Send what was kept, as far as the socket takes it; return how much is no longer held.

        Raises:
            OSError: the client is gone.
        """
        released = 0
        while self.batches:
            batch = self.batches[0]
            try:
                sent = self._client.sendmsg(batch.rest())
            except (BlockingIOError, InterruptedError):
                break
            self.sent += sent
            if sent == batch.left:
                released += batch.held
                self.batches.popleft()
            else:
                batch.advance(sent)
        return released

    def clear(self) -> None:
        """Forget everything: the socket is closed."""
        self.batches.clear()

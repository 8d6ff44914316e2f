"""Messages out of bytes: small ones from a fixed buffer, large ones received straight into memory of their own.

A message that fits the buffer is received there; one that fills it goes on in memory of its full size, of which the
system makes only those pages real that bytes arrive for (growing it by copies cost more than receiving).

Invariants:
    The bytes at [_start, _end) of the buffer have arrived and are not taken yet.
    While a large message is being received, the buffer is empty and takes nothing.
    A payload that was handed out is never written to again: small ones are copied out (4 KiB: 0.1 us; a view would
    keep the whole buffer alive), large ones own their memory.
    Nobody gets more than the buffer without having filled it; `held_size` says how much.
"""

from typing import Final, NamedTuple

import numpy as np
from xxhash import xxh3_64

from forebay_core.checksums import checksum
from forebay_wire.framing import MESSAGE_HEADER, MessageHeader, check_content, decode_header
from forebay_wire.limits import (
    READ_BUFFER_SIZE,
    RECEIVE_SIZE_MAX,
)

_HEADER_SIZE: Final = MESSAGE_HEADER.size
NO_PAYLOAD: Final = memoryview(b"")


class RawMessage(NamedTuple):
    """A message whose checksums are right; the body is not decoded yet. The body is only valid until the next call."""

    header: MessageHeader
    body: memoryview
    payload: memoryview


class MessageReader:
    """Where the bytes of an authenticated connection arrive."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(READ_BUFFER_SIZE))
        self._start = 0
        self._end = 0
        self._large: _LargeMessage | None = None

    @property
    def held_size(self) -> int:
        """Bytes of memory of a message that is being received; 0: it needs none of its own."""
        return 0 if self._large is None else self._large.size

    def receive_buffer(self) -> memoryview:
        """Return where the next bytes go. Never empty if `next_message` returned None since the last `received`."""
        if self._large is not None:
            return self._large.receive_buffer()
        if self._start:
            waiting = self._end - self._start
            self._buffer[:waiting] = self._buffer[self._start : self._end]
            self._start, self._end = 0, waiting
        return self._buffer[self._end :]

    def received(self, count: int) -> None:
        """Note that `count` bytes arrived in the receive buffer."""
        if self._large is not None:
            self._large.received(count)
        else:
            self._end += count
            assert self._end <= READ_BUFFER_SIZE

    def next_message(self) -> RawMessage | None:
        """Return the next message that has arrived whole, or None.

        Raises:
            ProtocolError: the bytes are no message, or damaged. The reader is of no use afterwards.
        """
        if self._large is not None:
            return self._finish_large()
        available = self._end - self._start
        if available < _HEADER_SIZE:
            return None
        header = decode_header(self._buffer, self._start)
        content_offset = self._start + _HEADER_SIZE
        content_size = header.body_size + header.payload_size
        if available >= _HEADER_SIZE + content_size:
            self._start = content_offset + content_size
            content = self._buffer[content_offset : self._start]
            check_content(header, checksum(content))
            return _message(header, content, copy=True)
        if available == READ_BUFFER_SIZE:
            self._large = _LargeMessage(header, self._buffer[content_offset : self._end])
            self._start = self._end = 0
        return None

    def _finish_large(self) -> RawMessage | None:
        large = self._large
        assert large is not None
        if large.missing:
            return None
        self._large = None
        check_content(large.header, large.digest())
        return _message(large.header, large.content(), copy=False)


class _LargeMessage:
    """One message that is received into memory of its own."""

    def __init__(self, header: MessageHeader, begin: memoryview) -> None:
        self.header = header
        self.size = header.body_size + header.payload_size
        # numpy leaves the memory untouched (a bytearray fills it with zeros: 8 MiB 0.4 ms) and asks for huge pages.
        self._memory = np.empty(self.size, np.uint8).data
        self._memory[: begin.nbytes] = begin
        self._filled = begin.nbytes
        # Summed as it arrives: the bytes are still in the processor's cache, and no step takes long.
        self._digest = xxh3_64(begin)

    @property
    def missing(self) -> int:
        """Bytes that have not arrived yet."""
        return self.size - self._filled

    def receive_buffer(self) -> memoryview:
        return self._memory[self._filled : self._filled + RECEIVE_SIZE_MAX]

    def received(self, count: int) -> None:
        end = self._filled + count
        assert end <= self._memory.nbytes
        self._digest.update(self._memory[self._filled : end])
        self._filled = end

    def digest(self) -> int:
        return self._digest.intdigest()

    def content(self) -> memoryview:
        return self._memory


def _message(header: MessageHeader, content: memoryview, *, copy: bool) -> RawMessage:
    body = content[: header.body_size]
    if header.payload_size == 0:
        return RawMessage(header, body, NO_PAYLOAD)
    payload = content[header.body_size :]
    return RawMessage(header, body, memoryview(bytes(payload)) if copy else payload.toreadonly())

"""Replies in the three styles a client may have negotiated: simple, structured chunks, extended chunks.

An encoder appends buffers to a list that one sendmsg sends; data is never copied, zeros come from one static buffer.
Each method returns the bytes it appended. Invariant: every reply ends with exactly one chunk that says DONE.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from forebay_cache.engine.front import Chunk
from forebay_cache.format.nbd import (
    CONTEXT_ID,
    ERROR_PAYLOAD,
    EXTENDED_CHUNK,
    EXTENDED_CONTEXT_ID,
    EXTENDED_DATA,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_STATUS_DESCRIPTOR,
    HOLE_PAYLOAD,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_DESCRIPTOR,
    STRUCTURED_CHUNK,
    STRUCTURED_DATA,
    STRUCTURED_REPLY_MAGIC,
    NbdError,
)
from forebay_core.units import MIB, Buffer

Statuses = Mapping[int, Sequence[tuple[int, int]]]
"""By context id: consecutive extents as bytes and flags."""

_ZEROS: Final = memoryview(bytes(1 * MIB))
_pack_simple = SIMPLE_REPLY.pack
_pack_data = STRUCTURED_DATA.pack
_pack_extended_data = EXTENDED_DATA.pack


class ReplyEncoder(Protocol):
    """One style of replies."""

    def read(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """Answer a READ; the chunks cover its length exactly."""

    def read_whole(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """Answer a READ with one piece of data, zeros spelled out."""

    def read_nothing(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """Answer a READ of no bytes."""

    def done(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """Answer any other request that succeeded."""

    def error(self, out: list[Buffer], cookie: int, offset: int, error: NbdError, text: str) -> int:
        """Answer any request that failed."""

    def status(self, out: list[Buffer], cookie: int, offset: int, statuses: Statuses) -> int:
        """Answer a BLOCK_STATUS: a chunk for each context."""


class SimpleReplies:
    """For clients that negotiated nothing."""

    def read(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """See ReplyEncoder."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
        _append_bytes(out, chunks, length)
        return SIMPLE_REPLY.size + length

    read_whole = read

    def read_nothing(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """See ReplyEncoder."""
        return self.done(out, cookie, offset)

    def done(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """See ReplyEncoder."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
        return SIMPLE_REPLY.size

    def error(self, out: list[Buffer], cookie: int, offset: int, error: NbdError, text: str) -> int:
        """See ReplyEncoder."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, error, cookie))
        return SIMPLE_REPLY.size

    def status(self, out: list[Buffer], cookie: int, offset: int, statuses: Statuses) -> int:
        """See ReplyEncoder."""
        raise AssertionError("BLOCK_STATUS needs structured replies")


class StructuredReplies:
    """For clients that negotiated structured replies; success without data is a simple reply, which is smaller."""

    def read(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """See ReplyEncoder."""
        if len(chunks) == 1:
            buffer = chunks[0].buffer
            if buffer is not None:
                assert len(buffer) == length
                header = _pack_data(
                    STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, cookie, length + 8, offset
                )
                out += (header, buffer)
                return 28 + length
        return self._read_runs(out, cookie, offset, length, chunks)

    def read_whole(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """See ReplyEncoder."""
        self._append_data(out, cookie, REPLY_FLAG_DONE, offset, length)
        _append_bytes(out, chunks, length)
        return STRUCTURED_DATA.size + length

    def read_nothing(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """See ReplyEncoder."""
        out.append(STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0))
        return STRUCTURED_CHUNK.size

    def done(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """See ReplyEncoder."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
        return SIMPLE_REPLY.size

    def error(self, out: list[Buffer], cookie: int, offset: int, error: NbdError, text: str) -> int:
        """See ReplyEncoder."""
        return self._append(out, cookie, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, _error_payload(error, text))

    def status(self, out: list[Buffer], cookie: int, offset: int, statuses: Statuses) -> int:
        """See ReplyEncoder."""
        pack = STATUS_DESCRIPTOR.pack
        size = 0
        for left, (context, extents) in zip(reversed(range(len(statuses))), statuses.items(), strict=True):
            payload = CONTEXT_ID.pack(context) + b"".join(pack(*extent) for extent in extents)
            flags = 0 if left else REPLY_FLAG_DONE
            size += self._append(out, cookie, flags, REPLY_TYPE_BLOCK_STATUS, payload)
        return size

    def _read_runs(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        size = 0
        at = offset
        end = offset + length
        for run_length, run in _runs(chunks):
            flags = REPLY_FLAG_DONE if at + run_length == end else 0
            if run:
                self._append_data(out, cookie, flags, at, run_length)
                _append_bytes(out, run, run_length)
                size += STRUCTURED_DATA.size + run_length
            else:
                size += self._append(out, cookie, flags, REPLY_TYPE_OFFSET_HOLE, HOLE_PAYLOAD.pack(at, run_length))
            at += run_length
        assert at == end
        return size

    def _append_data(self, out: list[Buffer], cookie: int, flags: int, at: int, length: int) -> None:
        out.append(_pack_data(STRUCTURED_REPLY_MAGIC, flags, REPLY_TYPE_OFFSET_DATA, cookie, length + 8, at))

    def _append(self, out: list[Buffer], cookie: int, flags: int, kind: int, payload: bytes) -> int:
        chunk = STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload
        out.append(chunk)
        return len(chunk)


class ExtendedReplies:
    """For clients that negotiated extended headers; every reply is a chunk that repeats the request's offset."""

    def read(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """See ReplyEncoder."""
        size = 0
        at = offset
        end = offset + length
        for run_length, run in _runs(chunks):
            flags = REPLY_FLAG_DONE if at + run_length == end else 0
            if run:
                self._append_data(out, cookie, offset, flags, at, run_length)
                _append_bytes(out, run, run_length)
                size += EXTENDED_DATA.size + run_length
            else:
                payload = HOLE_PAYLOAD.pack(at, run_length)
                size += self._append(out, cookie, offset, flags, REPLY_TYPE_OFFSET_HOLE, payload)
            at += run_length
        assert at == end
        return size

    def read_whole(self, out: list[Buffer], cookie: int, offset: int, length: int, chunks: Sequence[Chunk]) -> int:
        """See ReplyEncoder."""
        self._append_data(out, cookie, offset, REPLY_FLAG_DONE, offset, length)
        _append_bytes(out, chunks, length)
        return EXTENDED_DATA.size + length

    def read_nothing(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """See ReplyEncoder."""
        return self._append(out, cookie, offset, REPLY_FLAG_DONE, REPLY_TYPE_NONE, b"")

    def done(self, out: list[Buffer], cookie: int, offset: int) -> int:
        """See ReplyEncoder."""
        return self._append(out, cookie, offset, REPLY_FLAG_DONE, REPLY_TYPE_NONE, b"")

    def error(self, out: list[Buffer], cookie: int, offset: int, error: NbdError, text: str) -> int:
        """See ReplyEncoder."""
        return self._append(out, cookie, offset, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, _error_payload(error, text))

    def status(self, out: list[Buffer], cookie: int, offset: int, statuses: Statuses) -> int:
        """See ReplyEncoder."""
        pack = EXTENDED_STATUS_DESCRIPTOR.pack
        size = 0
        for left, (context, extents) in zip(reversed(range(len(statuses))), statuses.items(), strict=True):
            payload = EXTENDED_CONTEXT_ID.pack(context, len(extents)) + b"".join(pack(*extent) for extent in extents)
            flags = 0 if left else REPLY_FLAG_DONE
            size += self._append(out, cookie, offset, flags, REPLY_TYPE_BLOCK_STATUS_EXT, payload)
        return size

    def _append_data(self, out: list[Buffer], cookie: int, offset: int, flags: int, at: int, length: int) -> None:
        out.append(
            _pack_extended_data(EXTENDED_REPLY_MAGIC, flags, REPLY_TYPE_OFFSET_DATA, cookie, offset, length + 8, at)
        )

    def _append(self, out: list[Buffer], cookie: int, offset: int, flags: int, kind: int, payload: bytes) -> int:
        chunk = EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload)) + payload
        out.append(chunk)
        return len(chunk)


def _runs(chunks: Sequence[Chunk]) -> list[tuple[int, list[Chunk]]]:
    """Join neighbours of one kind: (bytes, chunks with data), or (bytes, empty list) for zeros."""
    runs: list[tuple[int, list[Chunk]]] = []
    for chunk in chunks:
        assert chunk.length > 0
        has_bytes = chunk.buffer is not None
        if runs and bool(runs[-1][1]) == has_bytes:
            length, run = runs[-1]
            if has_bytes:
                run.append(chunk)
            runs[-1] = (length + chunk.length, run)
        else:
            runs.append((chunk.length, [chunk] if has_bytes else []))
    return runs


def _append_bytes(out: list[Buffer], chunks: Sequence[Chunk], length: int) -> None:
    left = length
    for size, buffer in chunks:
        left -= size
        if buffer is None:
            _append_zeros(out, size)
        else:
            assert len(buffer) == size
            out.append(buffer)
    assert left == 0


def _append_zeros(out: list[Buffer], size: int) -> None:
    while size > len(_ZEROS):
        out.append(_ZEROS)
        size -= len(_ZEROS)
    out.append(_ZEROS[:size])


def _error_payload(error: NbdError, text: str) -> bytes:
    encoded = text.encode()
    return ERROR_PAYLOAD.pack(error, len(encoded)) + encoded

"""Opening a trace: the format is found by content, what is packed is unpacked on the way (`packed`).

Binary formats: our own (`trace_record`), and raw blktrace, whose records the kernel writes:

    offset  size  type  field        meaning
    ------  ----  ----  -----------  ------------------------------
         0     4  u32   magic        0x65617400 and a version below 256
         4     4  u32   sequence
         8     8  u64   time_ns
        16     8  u64   sector
        24     4  u32   bytes
        28     4  u32   action       the lower 16 bits say what, 1 is queued; bits above 16 say which kind of request
        32     4  u32   pid
        36     4  u32   device
        40     4  u32   cpu
        44     2  u16   error
        46     2  u16   pdu_length   bytes that follow
"""

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.errors import ForebayError
from forebay_core.units import LBA_MAX
from forebay_tools.analysis.accesses import BATCH_REQUESTS, REQUEST_BLOCKS_MAX, Batch, Gathering, TraceError
from forebay_tools.analysis.packed import DAMAGED, unpacked
from forebay_tools.analysis.text_traces import SECTOR_SIZE, detect_text, read_text
from forebay_tools.analysis.trace_record import (
    COUNT_MASK,
    HEADER,
    KEY_MAX,
    MAGIC,
    RECORD,
    RECORD_DTYPE,
    WRITE_BIT,
    decode_name,
    name_rows,
)

HEAD_BYTES: Final = 16384
BLKTRACE: Final = struct.Struct("<IIQQIIIIIHH")
BLKTRACE_MAGIC: Final = 0x65617400
_QUEUED: Final = 1
_WRITE: Final = 1 << 17
_NO_DATA: Final = 1 << 25 | 1 << 29  # discards and notes


class Part(NamedTuple):
    """A batch, the names of the volumes so far by key, and how many bytes of the file were read."""

    batch: Batch
    volumes: dict[int, str]
    done: int


def read_trace(path: Path) -> Iterator[Part]:
    """Yield what a trace holds.

    Raises:
        ForebayError: it can't be read, is damaged or foreign; the text names file and record.
    """
    name = str(path)
    requests = 0
    try:
        with path.open("rb") as file:
            stream = unpacked(file)
            head = _read_fully(stream, HEAD_BYTES)
            if not head:
                raise ForebayError(f"{name}: the file is empty")
            whole = io.BufferedReader(_Joined(head, stream), 1 << 18)
            kind, batches = _detect(name, head)
            for batch, volumes in batches(name, whole):
                requests += batch.keys.size
                yield Part(batch, volumes, file.tell())
            if not requests:
                raise ForebayError(f"{name}: this {kind} trace holds no request")
    except DAMAGED as error:
        where = f"somewhere behind request {requests}: " if requests else ""
        raise ForebayError(f"{name}: {where}the compressed trace is damaged ({error})") from error


Reader = Callable[[str, BinaryIO], Iterator[tuple[Batch, dict[int, str]]]]


def _detect(name: str, head: bytes) -> tuple[str, Reader]:
    if head.startswith(MAGIC):
        return "forebay", _read_records
    if len(head) >= 4 and int.from_bytes(head[:4], "little") & 0xFFFFFF00 == BLKTRACE_MAGIC:
        return "blktrace", _read_blktrace
    try:
        text = head.decode() if len(head) < HEAD_BYTES else head[: head.rindex(b"\n") + 1].decode()
    except (UnicodeDecodeError, ValueError):
        text = ""
    kind = detect_text(text)
    if kind is None:
        raise ForebayError(
            f"{name}: record 1: not a trace; known are forebay's own, blktrace, blkparse, fio iolog, and CSV as "
            "described in docs/cache-size.md"
        )
    return kind, lambda file, stream: read_text(file, _lines(file, stream), kind)


def _lines(name: str, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise TraceError(name, number, "is no text") from error


def _read_records(name: str, stream: BinaryIO) -> Iterator[tuple[Batch, dict[int, str]]]:
    if len(_read_fully(stream, HEADER.size)) < HEADER.size:
        raise TraceError(name, 0, "the header is cut short")
    number, names = 0, dict[int, str]()
    while chunk := _read_fully(stream, BATCH_REQUESTS * RECORD.size):
        if len(chunk) % RECORD.size:
            raise TraceError(name, number + len(chunk) // RECORD.size + 1, "is cut short")
        rows = np.frombuffer(chunk, RECORD_DTYPE)
        while (found := np.flatnonzero(rows["count_op"] == 0)).size:
            at = int(found[0])
            yield _batch(name, number, rows[:at]), names
            number += at
            size = name_rows(rows[at]["time_ms"])
            if len(rows) < at + 1 + size:
                more = _read_fully(stream, (at + 1 + size - len(rows)) * RECORD.size)
                rows = np.frombuffer(rows[at:].tobytes() + more[: len(more) // 16 * 16], RECORD_DTYPE)
                at = 0
            key, volume = decode_name(name, number + 1, rows[at : at + 1 + size])
            names = {**names, key: volume}
            rows = rows[at + 1 + size :]
            number += 1 + size
        yield _batch(name, number, rows), names
        number += len(rows)


def _batch(name: str, number: int, rows: npt.NDArray[np.void]) -> Batch:
    """Return the requests of rows, of which the first has this index in the file."""
    keys = rows["key"].astype(np.uint64)
    counts = (rows["count_op"] & np.uint32(COUNT_MASK)).astype(np.uint64)
    ends = (keys & np.uint64(LBA_MAX)) + counts
    keys_max = np.uint64(KEY_MAX)
    if rows.size and not (
        counts.min() > 0 and counts.max() <= REQUEST_BLOCKS_MAX and ends.max() <= LBA_MAX and keys.max() <= keys_max
    ):
        bad = np.flatnonzero((counts == 0) | (counts > REQUEST_BLOCKS_MAX) | (ends > LBA_MAX) | (keys > keys_max))
        raise TraceError(name, number + int(bad[0]) + 1, "no disk is asked for so many blocks there")
    writes = (rows["count_op"] & np.uint32(WRITE_BIT)) != 0
    return Batch(keys, counts, writes, rows["time_ms"].astype(np.uint64))


def _read_blktrace(name: str, stream: BinaryIO) -> Iterator[tuple[Batch, dict[int, str]]]:
    gathering, number = Gathering(name), 0
    while header := _read_fully(stream, BLKTRACE.size):
        number += 1
        if len(header) < BLKTRACE.size:
            raise TraceError(name, number, "is cut short")
        magic, _, time_ns, sector, length, action, _, device, _, _, pdu_length = BLKTRACE.unpack(header)
        if magic & 0xFFFFFF00 != BLKTRACE_MAGIC:
            raise TraceError(name, number, f"does not begin with blktrace's magic but with {magic:#x}")
        if len(_read_fully(stream, pdu_length)) < pdu_length:
            raise TraceError(name, number, "is cut short")
        if action & 0xFFFF == _QUEUED and not action & _NO_DATA:
            volume = f"{device >> 20},{device & 0xFFFFF}"
            gathering.add(number, volume, sector * SECTOR_SIZE, length, bool(action & _WRITE), time_ns // 1_000_000)
            if gathering.is_full:
                yield gathering.take(), gathering.volumes()
    yield gathering.take(), gathering.volumes()


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Joined(io.RawIOBase):
    """What was read already, then the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        """See RawIOBase."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """See RawIOBase."""
        if self._head:
            part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        else:
            part = self._rest.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

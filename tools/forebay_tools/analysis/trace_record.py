"""Our own trace: a header and rows of fixed size, so that 16 bytes are one request.

    offset  size  type  field        meaning
    ------  ----  ----  -----------  ------------------------------
         0     8  s     magic        FBTRACE1
         8     8  u64   started_ns   wall clock at the start, 0 if not known

Each request behind it, little-endian:

    offset  size  type  field        meaning
    ------  ----  ----  -----------  ------------------------------
         0     4  u32   time_ms      milliseconds since the start, modulo 2^32
         4     4  u32   count_op     blocks in the lower 31 bits; the highest bit is set for a write
         8     8  u64   key          volume, below 2^23, in the upper 24 bits, index of the first block in the lower 40

A row with a count_op of 0 names the volume in the upper 24 bits of its key: its time_ms is how many bytes of UTF-8 (1
to 255) follow, in whole rows padded with zeros.
"""

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_core.units import LBA_BITS, LBA_MAX
from forebay_tools.analysis.accesses import Batch, TraceError

MAGIC: Final = b"FBTRACE1"
HEADER: Final = struct.Struct("<8sQ")
RECORD: Final = struct.Struct("<IIQ")
RECORD_DTYPE: Final = np.dtype([("time_ms", "<u4"), ("count_op", "<u4"), ("key", "<u8")])
WRITE_BIT: Final = 1 << 31
COUNT_MASK: Final = WRITE_BIT - 1
KEY_MAX: Final = (1 << 63) - 1
NAME_SIZE_MAX: Final = 255

assert HEADER.size == RECORD.size == RECORD_DTYPE.itemsize == 16


def encode_batch(batch: Batch) -> bytes:
    """Return the rows of requests."""
    rows = np.zeros(batch.keys.size, RECORD_DTYPE)
    rows["time_ms"] = (batch.times_ms & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    rows["count_op"] = batch.counts.astype(np.uint32) | np.where(batch.writes, WRITE_BIT, 0)
    rows["key"] = batch.keys
    return rows.tobytes()


def encode_name(key: int, name: str) -> bytes:
    """Return the rows that name a volume; what is too long for them is left out."""
    content = name.encode()[:NAME_SIZE_MAX].decode(errors="ignore").encode()
    padded = content.ljust(name_rows(len(content)) * RECORD.size, b"\0")
    return RECORD.pack(len(content), 0, key << LBA_BITS) + padded


def name_rows(size: int) -> int:
    """Return how many rows follow one that says that so many bytes of a name do."""
    return -(-min(int(size), NAME_SIZE_MAX) // RECORD.size)


def decode_name(file: str, number: int, rows: npt.NDArray[np.void]) -> tuple[int, str]:
    """Return key and name that rows tell, the first of which is record `number` of the file.

    Raises:
        TraceError: they are no such rows.
    """
    size, key = int(rows[0]["time_ms"]), int(rows[0]["key"])
    content = rows[1:].tobytes()
    if not 0 < size <= NAME_SIZE_MAX or key & LBA_MAX or len(content) < size or any(content[size:]):
        raise TraceError(file, number, "is neither a request nor the name of a volume")
    try:
        name = content[:size].decode()
    except UnicodeDecodeError as error:
        raise TraceError(file, number, "names a volume in no text") from error
    return key >> LBA_BITS, "".join(letter if letter.isprintable() else "?" for letter in name)

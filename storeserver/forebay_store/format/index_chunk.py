"""The payload of an index-chunk record: rows of the index, packed so that they compress well.

Decompressed (zstd), it is groups of rows of one table whose keys and values have the same sizes.

Group header, 12 bytes, little-endian, then the table's name, then the rows:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0     4  u32   row_count   rows
         4     4  u32   value_size  bytes of each value
         8     2  u16   key_size    bytes of each key
        10     2  u16   name_size   bytes of the table's name

The rows of a group are transposed: the first byte of each row, then the second of each, and so on. Neighbours in an
index differ in a few bytes only, which so come to lie together.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import zstandard

from forebay_core.errors import CorruptionError
from forebay_core.units import Buffer
from forebay_store.format.rows import Table

GROUP_HEADER: Final = struct.Struct("<IIHH")
assert GROUP_HEADER.size == 12

IndexRow = tuple[Table, bytes, bytes]
_TABLES: Final = {table.value: table for table in Table}
_LEVEL: Final = 3


def pack_chunk(rows: Iterable[IndexRow]) -> tuple[bytes, int]:
    """Return the payload of some rows, and its size once decompressed."""
    plain = bytearray()
    group: list[bytes] = []
    shape: tuple[Table, int, int] | None = None
    for table, key, value in rows:
        found = (table, len(key), len(value))
        if found != shape:
            _end_group(plain, shape, group)
            group, shape = [], found
        group.append(key)
        group.append(value)
    _end_group(plain, shape, group)
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(bytes(plain)), len(plain)


def unpack_chunk(payload: Buffer, *, plain_size: int, place: str) -> Iterator[IndexRow]:
    """Yield the rows of a payload.

    Raises:
        CorruptionError: it is not as the table says.
    """
    plain = _decompress(payload, plain_size, place)
    offset = 0
    while offset < len(plain):
        if len(plain) - offset < GROUP_HEADER.size:
            raise CorruptionError(place=place, what="rows of the index", expected=GROUP_HEADER.size, found="less")
        row_count, value_size, key_size, name_size = GROUP_HEADER.unpack_from(plain, offset)
        offset += GROUP_HEADER.size
        table = _TABLES.get(plain[offset : offset + name_size].decode(errors="replace"))
        offset += name_size
        size = row_count * (key_size + value_size)
        if table is None or not 0 < size <= len(plain) - offset or not key_size:
            raise CorruptionError(place=place, what="rows of the index", expected="a known table", found=table)
        yield from _rows(table, plain[offset : offset + size], key_size, value_size)
        offset += size


def _end_group(plain: bytearray, shape: tuple[Table, int, int] | None, group: list[bytes]) -> None:
    if shape is None:
        return
    table, key_size, value_size = shape
    name = table.value.encode()
    plain += GROUP_HEADER.pack(len(group) // 2, value_size, key_size, len(name)) + name
    rows = np.frombuffer(b"".join(group), np.uint8).reshape(-1, key_size + value_size)
    plain += rows.T.tobytes()


def _rows(table: Table, packed: bytes, key_size: int, value_size: int) -> Iterator[IndexRow]:
    width = key_size + value_size
    rows = np.frombuffer(packed, np.uint8).reshape(width, -1).T.tobytes()
    for offset in range(0, len(rows), width):
        yield table, rows[offset : offset + key_size], rows[offset + key_size : offset + width]


def _decompress(payload: Buffer, plain_size: int, place: str) -> bytes:
    try:
        declared = zstandard.frame_content_size(bytes(memoryview(payload)[:32]))
        if declared != plain_size:
            raise CorruptionError(place=place, what="size of index rows", expected=plain_size, found=declared)
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=plain_size)
    except zstandard.ZstdError as error:
        raise CorruptionError(place=place, what="index rows", expected="a valid stream", found=str(error)) from error

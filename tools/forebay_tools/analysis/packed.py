"""Traces that gzip or zstd packed, found by content and unpacked on the way.

A zstd file that was cut short looks to its unpacker like one that goes on later, so its frames are walked first:

    offset  size  type  field     meaning
    ------  ----  ----  --------  --------------------------------------------------------------------------
         0     3  u24   header    of a block: 1 bit is set in the last one, 2 bits kind, 21 bits size
         3     -  -     content   one byte for kind 1 (a repeated byte), else as many as the header says
"""

import gzip
import zlib
from typing import BinaryIO, Final

import zstandard

_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_SKIPPABLE: Final = 0x184D2A50
_SKIPPABLE_MASK: Final = 0xFFFFFFF0
_FRAME_HEADER_MAX: Final = 18
_REPEATED: Final = 1
_CHECKSUM_SIZE: Final = 4

DAMAGED: Final = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What reading a damaged one raises."""


def unpacked(file: BinaryIO) -> BinaryIO:
    """Return a stream of what a file holds, read from its start.

    Raises:
        EOFError: it is cut short.
        ZstdError: something else than a frame is in it.
    """
    magic = file.read(4)
    file.seek(0)
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if magic == _ZSTD:
        _walk_frames(file)
        file.seek(0)
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return file


def _walk_frames(file: BinaryIO) -> None:
    size = file.seek(0, 2)
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(_FRAME_HEADER_MAX)
        if int.from_bytes(head[:4], "little") & _SKIPPABLE_MASK == _SKIPPABLE:
            at += 8 + int.from_bytes(head[4:8], "little")
        else:
            at = _end_of_frame(file, at, head)
    if at > size:
        raise EOFError("its end is missing")


def _end_of_frame(file: BinaryIO, at: int, head: bytes) -> int:
    frame = zstandard.get_frame_parameters(head)
    at += zstandard.frame_header_size(head)
    is_last = False
    while not is_last:
        file.seek(at)
        header = file.read(3)
        if len(header) < 3:
            raise EOFError("its end is missing")
        value = int.from_bytes(header, "little")
        is_last, kind = bool(value & 1), value >> 1 & 3
        at += 3 + (1 if kind == _REPEATED else value >> 3)
    return at + _CHECKSUM_SIZE * frame.has_checksum

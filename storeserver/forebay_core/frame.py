"""The frame: up to 16 blocks, compressed together, self-contained, the same bytes on the wire and in segments.

The cache (or an import) builds frames; the store keeps them verbatim and checks only what it can: header and stored
bytes. Whoever opens a frame checks each plain block as well. All-zero blocks are never put in frames: they are holes.

Frame header, 48 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     4  u32   magic         0x52464246, "FBFR"
         4     1  u8    codec         0 raw, 1 zstd
         5     1  u8    cipher        0 none; others reserved for encryption at rest
         6     1  u8    block_count   1 to 16 blocks
         7     1  u8    extent_count  1 to block_count extents
         8     4  u32   key_id        0 without a cipher
        12    12  12s   nonce         zeros without a cipher
        24     4  u32   stored_size   bytes behind the tables
        28     4  u32   reserved      0
        32     8  u64   stored_xxh3   over the stored bytes
        40     8  u64   header_xxh3   over the 40 bytes before it and both tables

then extent_count times (u64 start, u32 count), then block_count times u64, the xxh3-64 of each plain block in the
order of the extents, then the stored bytes.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import zstandard

from forebay_core.checksums import block_checksums, checksum
from forebay_core.errors import CorruptionError
from forebay_core.extents import EXTENT_DTYPE, Extent
from forebay_core.units import BLOCK_SIZE, LBA_MAX, Buffer

FRAME_MAGIC: Final = 0x52464246
FRAME_HEADER: Final = struct.Struct("<IBBBBI12sIIQQ")
FRAME_BLOCKS_MAX: Final = 16
CODEC_RAW: Final = 0
CODEC_ZSTD: Final = 1
FRAME_SIZE_MAX: Final = FRAME_HEADER.size + FRAME_BLOCKS_MAX * (EXTENT_DTYPE.itemsize + 8 + BLOCK_SIZE)
assert FRAME_HEADER.size == 48

_PREFIX_SIZE: Final = 40
_NO_NONCE: Final = bytes(12)
_ZSTD_LEVEL: Final = 1
_U64: Final = struct.Struct("<Q")


class FrameHeader(NamedTuple):
    """The checked header and tables of one frame."""

    codec: int
    cipher: int
    key_id: int
    nonce: bytes
    extents: tuple[Extent, ...]
    checksums: tuple[int, ...]
    stored_offset: int  # from the start of the frame
    stored_size: int
    stored_xxh3: int

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return self.stored_offset + self.stored_size

    @property
    def block_count(self) -> int:
        """Plain blocks inside."""
        return len(self.checksums)


class FrameBuilder:
    """Makes frames; keeps one compressor. Not for use from two threads at once."""

    def __init__(self, level: int = _ZSTD_LEVEL) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)

    def build(self, extents: Sequence[Extent], plain: Buffer, checksums: Sequence[int] | None = None) -> bytes:
        """Return one frame of the plain blocks, which lie in the order of the extents.

        `checksums` are those the blocks carry since they arrived; without them they are made here.
        """
        view = memoryview(plain)
        if checksums is None:
            checksums = block_checksums(view).tolist()
        assert 1 <= len(extents) <= len(checksums) <= FRAME_BLOCKS_MAX
        assert sum(extent.count for extent in extents) * BLOCK_SIZE == view.nbytes == len(checksums) * BLOCK_SIZE
        packed = self._compressor.compress(view)
        codec = CODEC_ZSTD if len(packed) < view.nbytes - view.nbytes // 16 else CODEC_RAW
        stored: Buffer = packed if codec == CODEC_ZSTD else view
        return encode_frame(codec, extents, checksums, stored)


def encode_frame(codec: int, extents: Sequence[Extent], checksums: Sequence[int], stored: Buffer) -> bytes:
    """Return the frame's bytes around bytes that are stored as they are."""
    stored_view = memoryview(stored)
    tables = np.array(extents, EXTENT_DTYPE).tobytes() + np.array(checksums, "<u8").tobytes()
    header = FRAME_HEADER.pack(
        FRAME_MAGIC,
        codec,
        0,
        len(checksums),
        len(extents),
        0,
        _NO_NONCE,
        stored_view.nbytes,
        0,
        checksum(stored_view),
        0,
    )[:_PREFIX_SIZE]
    return b"".join((header, _U64.pack(checksum(header + tables)), tables, stored_view))


def decode_header(buffer: Buffer, offset: int = 0, *, place: str) -> FrameHeader:
    """Return the checked header and tables of the frame at `offset`; the stored bytes are not looked at.

    Raises:
        CorruptionError: anything is not as the table above says, or the buffer is too short.
    """
    view = memoryview(buffer)[offset:]
    if view.nbytes < FRAME_HEADER.size:
        raise CorruptionError(place=place, what="frame length", expected=FRAME_HEADER.size, found=view.nbytes)
    fields = FRAME_HEADER.unpack_from(view)
    magic, codec, cipher, blocks, extent_count, key_id, nonce, stored_size, reserved, stored_xxh3, header_xxh3 = fields
    if magic != FRAME_MAGIC:
        raise CorruptionError(place=place, what="frame magic", expected=FRAME_MAGIC, found=magic)
    if not 1 <= extent_count <= blocks <= FRAME_BLOCKS_MAX:
        raise CorruptionError(
            place=place, what="frame counts", expected=f"1..{FRAME_BLOCKS_MAX}", found=(extent_count, blocks)
        )
    sums_offset = FRAME_HEADER.size + extent_count * EXTENT_DTYPE.itemsize
    stored_offset = sums_offset + blocks * 8
    found = checksum(bytes(view[:_PREFIX_SIZE]) + bytes(view[FRAME_HEADER.size : stored_offset]))
    if found != header_xxh3:
        raise CorruptionError(place=place, what="frame header checksum", expected=header_xxh3, found=found)
    extents = tuple(
        Extent(start, count)
        for start, count in np.frombuffer(view[FRAME_HEADER.size : sums_offset], EXTENT_DTYPE).tolist()
    )
    sums = struct.unpack_from(f"<{blocks}Q", view, sums_offset)
    header = FrameHeader(codec, cipher, key_id, nonce, extents, sums, stored_offset, stored_size, stored_xxh3)
    _check_meaning(header, reserved, place)
    return header


def check_stored(header: FrameHeader, buffer: Buffer, offset: int = 0, *, place: str) -> memoryview:
    """Return the stored bytes of the frame at `offset` after comparing their checksum.

    Raises:
        CorruptionError: they are cut short or differ from what was written.
    """
    stored = memoryview(buffer)[offset + header.stored_offset : offset + header.size]
    if stored.nbytes != header.stored_size:
        raise CorruptionError(place=place, what="frame stored size", expected=header.stored_size, found=stored.nbytes)
    found = checksum(stored)
    if found != header.stored_xxh3:
        raise CorruptionError(place=place, what="frame stored checksum", expected=header.stored_xxh3, found=found)
    return stored


def open_frame(header: FrameHeader, stored: Buffer, *, place: str) -> bytes:
    """Return the plain blocks in the order of the extents; each is compared with its checksum.

    Raises:
        CorruptionError: the codec or cipher is unknown, the bytes do not decompress, or a block differs.
    """
    size = header.block_count * BLOCK_SIZE
    if header.cipher != 0 or header.codec not in (CODEC_RAW, CODEC_ZSTD):
        raise CorruptionError(
            place=place, what="frame codec", expected="0 or 1, no cipher", found=(header.codec, header.cipher)
        )
    if header.codec == CODEC_RAW:
        plain = bytes(stored)
    else:
        plain = _decompress(stored, size, place)
    if len(plain) != size:
        raise CorruptionError(place=place, what="frame plain size", expected=size, found=len(plain))
    for index, found in enumerate(block_checksums(plain).tolist()):
        if found != header.checksums[index]:
            raise CorruptionError(
                place=f"{place} block {index}", what="block checksum", expected=header.checksums[index], found=found
            )
    return plain


def _check_meaning(header: FrameHeader, reserved: int, place: str) -> None:
    if sum(extent.count for extent in header.extents) != header.block_count or 0 in (e.count for e in header.extents):
        raise CorruptionError(place=place, what="frame extents", expected=header.block_count, found=header.extents)
    end = 0
    for extent in header.extents:
        if extent.start < end or extent.end > LBA_MAX + 1:
            raise CorruptionError(
                place=place, what="frame extents", expected=f"sorted, disjoint, up to {LBA_MAX}", found=header.extents
            )
        end = extent.end
    if reserved != 0 or header.stored_size > header.block_count * BLOCK_SIZE or header.stored_size == 0:
        raise CorruptionError(
            place=place,
            what="frame stored size",
            expected=f"1..{header.block_count * BLOCK_SIZE}",
            found=header.stored_size,
        )


def _decompress(stored: Buffer, size: int, place: str) -> bytes:
    try:
        declared = zstandard.frame_content_size(bytes(memoryview(stored)[:32]))
        if declared != size:
            raise CorruptionError(place=place, what="frame plain size", expected=size, found=declared)
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=size)
    except zstandard.ZstdError as error:
        raise CorruptionError(
            place=place, what="frame zstd stream", expected="a valid stream", found=str(error)
        ) from error

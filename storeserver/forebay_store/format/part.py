"""The table of a part's frames: which blocks lie where in the payload, so that a commit needs no look at the frames.

Part entry, 24 bytes, little-endian, one for each extent of each frame:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     8  u64   start         first block in the volume
         8     4  u32   count         blocks
        12     4  u32   frame_offset  of the frame, from the start of the payload
        16     4  u32   frame_size    bytes of the frame
        20     1  u8    block         index of the first block among the frame's plain blocks
        21     1  u8    frame_blocks  plain blocks of the frame
        22     2  u16   reserved      0

The same table comes out of the payload whenever it is parsed: when it arrives, and at replay from the segment.
"""

import struct
from typing import Final, NamedTuple

from forebay_core.errors import CorruptionError, ProtocolError
from forebay_core.frame import FrameHeader, check_stored, decode_header
from forebay_core.units import Buffer

PART_ENTRY: Final = struct.Struct("<QIIIBBH")
assert PART_ENTRY.size == 24


class PartEntry(NamedTuple):
    """Where an extent's blocks lie in the payload."""

    start: int
    length: int
    frame_offset: int
    frame_size: int
    block: int
    frame_blocks: int


class PartTable(NamedTuple):
    """The packed entries of one part, and what the engine checks before it takes the part."""

    entries: bytes
    blocks_end: int  # first block behind the highest extent
    payload_size: int


def parse_part(payload: Buffer, *, place: str, stored: bool, entries_max: int | None = None) -> PartTable:
    """Return the table of a payload of whole frames; with `stored` the stored bytes are compared as well.

    Raises:
        CorruptionError: a frame is cut short or damaged.
        ProtocolError: there are more than `entries_max` extents; found before the rest is looked at.
    """
    view = memoryview(payload)
    entries = bytearray()
    offset = 0
    blocks_end = 0
    while offset < view.nbytes:
        frame_place = f"{place} offset {offset}"
        header = decode_header(view, offset, place=frame_place)
        if stored:
            check_stored(header, view, offset, place=frame_place)
        elif offset + header.size > view.nbytes:
            raise CorruptionError(
                place=frame_place, what="frame size", expected=f"at most {view.nbytes - offset}", found=header.size
            )
        blocks_end = max(blocks_end, _add_entries(entries, header, offset))
        if entries_max is not None and len(entries) > entries_max * PART_ENTRY.size:
            raise ProtocolError(f"{place}: more than {entries_max} extents; stage larger frames or smaller parts")
        offset += header.size
    return PartTable(bytes(entries), blocks_end, view.nbytes)


def unpack_entries(entries: bytes) -> list[PartEntry]:
    """Return the entries of a packed table."""
    return [PartEntry(*fields[:6]) for fields in PART_ENTRY.iter_unpack(entries)]


def _add_entries(entries: bytearray, header: FrameHeader, offset: int) -> int:
    block = 0
    blocks_end = 0
    blocks = header.block_count
    for start, count in header.extents:
        entries += PART_ENTRY.pack(start, count, offset, header.size, block, blocks, 0)
        block += count
        blocks_end = max(blocks_end, start + count)
    return blocks_end

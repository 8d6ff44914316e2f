"""The change that a cut ends with: a snapshot or a resize, in NOTE records and in checkpoints.

It has a sequence number of its own, and what came before it is upstream as it was then, whatever came since.

CutEnd, 192 bytes, little-endian:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  ---------------------------------------------------------------
         0     4  u32   volume_key  see VolumeNote
         4     2  u16   kind        1 SNAPSHOT, 2 RESIZE
         6     2  u16   name_size   bytes of the name, 1 to 128; RESIZE: 0
         8     8  u64   version     of the change
        16     8  u64   size        bytes of the volume from this change on, whole blocks
        24     8  u64   taken_ns    wall clock, Unix nanoseconds; RESIZE: 0
        32    16  16s   snapshot    id of the snapshot; RESIZE: zeros
        48   128  128s  name        of the snapshot, ASCII, padded with zeros; RESIZE: zeros
       176    16  16x   reserved    0
"""

import struct
from typing import Final, NamedTuple

from forebay_cache.format.volume_note import VOLUME_KEY_MAX
from forebay_core.errors import CorruptionError
from forebay_core.names import NAME_SIZE_MAX, is_name
from forebay_core.units import BLOCK_SIZE, ID_SIZE, VOLUME_SIZE_MAX, Buffer

CUT_END: Final = struct.Struct("<IHHQQQ16s128s16x")
SNAPSHOT: Final = 1
RESIZE: Final = 2
assert CUT_END.size == 192
assert NAME_SIZE_MAX <= 128

_NO_ID: Final = bytes(ID_SIZE)


class CutEnd(NamedTuple):
    """A snapshot or resize; `size` in bytes."""

    volume_key: int
    kind: int
    version: int
    size: int
    taken_ns: int = 0
    snapshot: bytes = _NO_ID
    name: str = ""


def encode_cut_end(end: CutEnd) -> bytes:
    """Return its 192 bytes."""
    assert _is_valid(end), end
    name = end.name.encode("ascii")
    return CUT_END.pack(end.volume_key, end.kind, len(name), end.version, end.size, end.taken_ns, end.snapshot, name)


def decode_cut_end(row: Buffer, *, place: str) -> CutEnd:
    """Return the row; its bytes were covered by a checksum that the caller has compared.

    Raises:
        CorruptionError: a field is not as the table above says.
    """
    if len(row) != CUT_END.size:
        raise CorruptionError(place=place, what="cut end size", expected=CUT_END.size, found=len(row))
    volume_key, kind, name_size, version, size, taken_ns, snapshot, padded = CUT_END.unpack(row)
    name = padded[:name_size].decode("ascii", errors="replace")
    end = CutEnd(volume_key, kind, version, size, taken_ns, snapshot, name)
    unused = any(padded[name_size:]) or any(bytes(row)[-16:])
    if not _is_valid(end) or name_size != len(name) or unused:
        raise CorruptionError(place=place, what="cut end", expected="as its table says", found=end)
    return end


def _is_valid(end: CutEnd) -> bool:
    if end.kind == SNAPSHOT:
        own = len(end.snapshot) == ID_SIZE and any(end.snapshot) and is_name(end.name)
    else:
        own = end.kind == RESIZE and (end.snapshot, end.name, end.taken_ns) == (_NO_ID, "", 0)
    in_range = 0 < end.volume_key <= VOLUME_KEY_MAX and end.version > 0
    return own and in_range and end.size % BLOCK_SIZE == 0 and end.size <= VOLUME_SIZE_MAX

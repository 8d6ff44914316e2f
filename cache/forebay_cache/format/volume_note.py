"""One row of the device's volume table, in NOTE records and in checkpoints.

A volume key is never given to another volume while the log or a checkpoint still names it.

VolumeNote, 352 bytes, little-endian:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0     4  u32   volume_key  1 to 2**24 - 1: the volume's number on this device
         4     2  u16   flags       bit 0 READ_ONLY, bit 1 LEFT_DIRTY (detached, not drained),
                                   bit 2 CLOSED (detached and released), bit 3 SNAPSHOT (what only serves reads
                                   of a snapshot: no history of its own, nothing of it is ever dirty)
         6     2  u16   name_size   bytes of the name, 1 to 257
         8    16  16s   volume_id   id in the store
        24     8  u64   size        bytes, whole blocks
        32     8  u64   epoch       0 for read-only volumes, else as given by the store
        40   257  257s  name        `volume` or `volume@snapshot`, ASCII, padded with zeros
       297     1  u8    front       0 NBD clients only, 1 kernel, 2 FUSE, 3 loop: what else is attached of it
       298     2  u16   block_size  sector size of a kernel device, 512 or 4096; else 0
       300     4  u32   number      1 + the number of its block device; 0: it has none, or none yet
       304     8  u64   average     bytes per second that destaging may take; 0: not set, RATE_UNLIMITED: no limit
       312     8  u64   peak        the same for its peak; not set if and only if `average` is not
       320    16  16s   store       UUID, not zeros, of the store that the volume lives in; nothing cached is of another
       336    16  16s   origin      id of the snapshot that reads go on to where the volume has no entry; zeros: none
"""

import enum
import struct
from typing import Final, NamedTuple

from forebay_core.errors import CorruptionError
from forebay_core.names import NAME_SIZE_MAX, is_name
from forebay_core.units import BLOCK_SIZE, EPOCH_MAX, ID_SIZE, VOLUME_SIZE_MAX, Buffer

VOLUME_NOTE: Final = struct.Struct("<IHH16sQQ257sBHIQQ16s16s")
VOLUME_KEY_MAX: Final = (1 << 24) - 1
READ_ONLY: Final = 1
LEFT_DIRTY: Final = 2
CLOSED: Final = 4
SNAPSHOT: Final = 8
NO_ORIGIN: Final = bytes(ID_SIZE)
EXPORT_NAME_SIZE_MAX: Final = 2 * NAME_SIZE_MAX + 1
assert VOLUME_NOTE.size == 352
assert EXPORT_NAME_SIZE_MAX == 257


class FrontKind(enum.IntEnum):
    """How a volume is attached, besides being served to NBD clients."""

    NBD = 0
    KERNEL = 1
    FUSE = 2
    LOOP = 3


class Front(NamedTuple):
    """How a volume is attached; `number` is that of its block device plus one, 0 if it has none yet."""

    kind: FrontKind = FrontKind.NBD
    block_size: int = 0
    number: int = 0


NBD_ONLY: Final = Front()
SECTOR_SIZES: Final = (512, 4096)
"""What a kernel device may have."""

_KINDS: Final = frozenset(FrontKind)


class VolumeNote(NamedTuple):
    """What the device keeps of one volume; `size` in bytes."""

    volume_key: int
    flags: int
    volume_id: bytes
    size: int
    epoch: int
    name: str
    store: bytes
    average: int = 0
    peak: int = 0
    origin: bytes = NO_ORIGIN
    front: Front = NBD_ONLY


def encode_volume_note(note: VolumeNote) -> bytes:
    """Return the row's 352 bytes."""
    name = note.name.encode("ascii")
    assert _is_valid(note), note
    return VOLUME_NOTE.pack(
        note.volume_key,
        note.flags,
        len(name),
        note.volume_id,
        note.size,
        note.epoch,
        name,
        *note.front,
        note.average,
        note.peak,
        note.store,
        note.origin,
    )


def decode_volume_note(row: Buffer, *, place: str) -> VolumeNote:
    """Return the row; its bytes were covered by a checksum that the caller has compared.

    Raises:
        CorruptionError: a field is not as the table above says.
    """
    if len(row) != VOLUME_NOTE.size:
        raise CorruptionError(place=place, what="volume row size", expected=VOLUME_NOTE.size, found=len(row))
    volume_key, flags, name_size, volume_id, size, epoch, padded, *front, average, peak, store, origin = (
        VOLUME_NOTE.unpack(row)
    )
    name = padded[:name_size].decode("ascii", errors="replace")
    kind = FrontKind(front[0]) if front[0] in _KINDS else FrontKind.NBD
    note = VolumeNote(
        volume_key, flags, volume_id, size, epoch, name, store, average, peak, origin, Front(kind, *front[1:])
    )
    if kind != front[0] or not _is_valid(note) or name_size != len(name) or any(padded[name_size:]):
        raise CorruptionError(place=place, what="volume row", expected="as its table says", found=note)
    return note


def is_limit(average: int, peak: int) -> bool:
    """Tell whether these two are both not set, or an average that the peak allows."""
    return average == peak == 0 or 0 < average <= peak


def _is_valid(note: VolumeNote) -> bool:
    return (
        0 < note.volume_key <= VOLUME_KEY_MAX
        and 0 <= note.flags <= READ_ONLY | LEFT_DIRTY | CLOSED | SNAPSHOT
        and len(note.volume_id) == len(note.store) == len(note.origin) == ID_SIZE
        and any(note.store)
        and note.size % BLOCK_SIZE == 0
        and note.size <= VOLUME_SIZE_MAX
        and note.epoch <= EPOCH_MAX
        and is_limit(note.average, note.peak)
        and _is_front(note.front)
        and _is_export_name(note.name)
    )


def _is_front(front: Front) -> bool:
    sizes = SECTOR_SIZES if front.kind is FrontKind.KERNEL else (0,)
    has_device = front.kind in (FrontKind.KERNEL, FrontKind.LOOP)
    return front.block_size in sizes and (front.number == 0 or has_device)


def _is_export_name(name: str) -> bool:
    volume, at, snapshot = name.partition("@")
    return is_name(volume) and (is_name(snapshot) if at else True)

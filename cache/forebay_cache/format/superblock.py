"""The superblock: what a cache device is and where its parts lie. Two copies, in blocks 0 and 1.

The copy with the higher valid generation wins. A new one is written over the older copy, so one is always whole.
Crash: a torn copy fails its checksum and the other one is used.

Device: superblock A | superblock B | checkpoint area A | checkpoint area B | zones

Superblock, 96 bytes, little-endian, then zeros up to 4096:

    offset  size  type  field                meaning
    ------  ----  ----  -------------------  ------------------------------------------------------
         0     8  u64   magic                0x3130594142524f46, "FORBAY01"
         8     2  u16   format_version       2
        10     6  6x    reserved             0
        16    16  16s   device               random id of the device
        32     8  u64   generation           raised at each rewrite; 1 when formatted
        40     4  u32   zone_blocks          blocks of a zone, 64 to 4096
        44     4  u32   zone_count           zones, at least 16
        48     8  u64   checkpoint_offset_a  bytes
        56     8  u64   checkpoint_offset_b  bytes
        64     8  u64   checkpoint_size      bytes of each area
        72     8  u64   zones_offset         bytes
        80     8  u64   created_ns           wall clock at formatting, Unix nanoseconds
        88     8  u64   superblock_xxh3      over these 4096 bytes with this field as 0
"""

import enum
import struct
from typing import Final, NamedTuple

from forebay_cache.format.checkpoint import PLACE_SIZE, area_size
from forebay_core.checksums import ZERO_BLOCK, checksum
from forebay_core.errors import CorruptionError, ForebayError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, ID_SIZE, Buffer, format_size

SUPERBLOCK_MAGIC: Final = int.from_bytes(b"FORBAY01", "little")
SUPERBLOCK_FORMAT_VERSION: Final = 2
SUPERBLOCK: Final = struct.Struct("<QH6x16sQIIQQQQQQ")
SUPERBLOCK_COUNT: Final = 2
ZONE_BLOCKS_MIN: Final = 64
ZONE_BLOCKS_MAX: Final = 4096
ZONE_BLOCKS_DEFAULT: Final = 1024
ZONE_COUNT_MIN: Final = 16
PLACE_COUNT_MAX: Final = (1 << 32) - 3
assert SUPERBLOCK.size == 96

_XXH3_OFFSET: Final = 88
_U64: Final = struct.Struct("<Q")


class Geometry(NamedTuple):
    """Where the parts of a device lie; offsets and `checkpoint_size` in bytes."""

    zone_blocks: int
    zone_count: int
    checkpoint_offsets: tuple[int, int]
    checkpoint_size: int
    zones_offset: int

    @property
    def place_count(self) -> int:
        """Blocks of all zones."""
        return self.zone_count * self.zone_blocks

    @property
    def size(self) -> int:
        """Bytes of the device that are used."""
        return self.zones_offset + self.place_count * BLOCK_SIZE


class Superblock(NamedTuple):
    """A device's root: `Superblock(device, generation, *geometry, created_ns)`."""

    device: bytes
    generation: int
    zone_blocks: int
    zone_count: int
    checkpoint_offsets: tuple[int, int]
    checkpoint_size: int
    zones_offset: int
    created_ns: int

    @property
    def geometry(self) -> Geometry:
        """Where the parts lie."""
        return Geometry(*self[2:7])


class Refusal(enum.Enum):
    """Why a device is not opened."""

    BLANK = "blank"
    FOREIGN = "foreign"
    DAMAGED = "damaged"
    OTHER_VERSION = "other version"


class DeviceRefusedError(ForebayError):
    """The superblocks are not ours to use; `refusal` says why. The device was not changed."""

    def __init__(self, refusal: Refusal, text: str) -> None:
        super().__init__(text)
        self.refusal = refusal


def plan_geometry(device_size: int, zone_blocks: int = ZONE_BLOCKS_DEFAULT) -> Geometry:
    """Return how a device of so many bytes is divided; a rest smaller than a zone is not used.

    Raises:
        WrongUsageError: the zone size is not allowed, or the device is too small or too large.
    """
    if not ZONE_BLOCKS_MIN <= zone_blocks <= ZONE_BLOCKS_MAX:
        allowed = f"{format_size(ZONE_BLOCKS_MIN * BLOCK_SIZE)} to {format_size(ZONE_BLOCKS_MAX * BLOCK_SIZE)}"
        raise WrongUsageError(f"zone size {format_size(zone_blocks * BLOCK_SIZE)}: use {allowed}")
    # No zone costs less than its blocks and twice its places' share of a checkpoint: begin above and come down.
    zone_count = device_size // (zone_blocks * (BLOCK_SIZE + 2 * PLACE_SIZE))
    while zone_count >= ZONE_COUNT_MIN and _geometry(zone_blocks, zone_count).size > device_size:
        excess = _geometry(zone_blocks, zone_count).size - device_size
        zone_count -= max(1, excess // (zone_blocks * BLOCK_SIZE * 2))
    if zone_count < ZONE_COUNT_MIN:
        needed = _geometry(zone_blocks, ZONE_COUNT_MIN).size
        raise WrongUsageError(
            f"a cache device of {format_size(device_size)} is too small: with zones of "
            f"{format_size(zone_blocks * BLOCK_SIZE)} it needs at least {needed} bytes ({format_size(needed)})"
        )
    if zone_count * zone_blocks > PLACE_COUNT_MAX:
        raise WrongUsageError(
            f"a cache device of {format_size(device_size)} is too large: use at most "
            f"{format_size(PLACE_COUNT_MAX * BLOCK_SIZE)}"
        )
    return _geometry(zone_blocks, zone_count)


def encode_superblock(superblock: Superblock) -> bytes:
    """Return one copy, 4096 bytes."""
    assert len(superblock.device) == ID_SIZE
    assert superblock.generation > 0
    block = bytearray(BLOCK_SIZE)
    SUPERBLOCK.pack_into(
        block,
        0,
        SUPERBLOCK_MAGIC,
        SUPERBLOCK_FORMAT_VERSION,
        superblock.device,
        superblock.generation,
        superblock.zone_blocks,
        superblock.zone_count,
        *superblock.checkpoint_offsets,
        superblock.checkpoint_size,
        superblock.zones_offset,
        superblock.created_ns,
        0,
    )
    _U64.pack_into(block, _XXH3_OFFSET, checksum(block))
    return bytes(block)


def decode_superblock(block: Buffer, *, place: str) -> Superblock:
    """Return one copy.

    Raises:
        DeviceRefusedError: it is blank, foreign, damaged or of another format version.
    """
    if block == ZERO_BLOCK:
        raise DeviceRefusedError(Refusal.BLANK, f"{place}: blank, not a forebay cache device yet")
    copy = bytearray(block)
    if len(copy) != BLOCK_SIZE:
        raise CorruptionError(place=place, what="superblock size", expected=BLOCK_SIZE, found=len(copy))
    fields = SUPERBLOCK.unpack_from(copy)
    magic, format_version, device, generation, zone_blocks, zone_count, area_a, area_b, *rest, stored = fields
    if magic != SUPERBLOCK_MAGIC:
        raise DeviceRefusedError(
            Refusal.FOREIGN,
            f"{place}: holds something else (expected magic {SUPERBLOCK_MAGIC:#x}, found {magic:#x}); "
            "if its contents may go, wipe or format it",
        )
    _U64.pack_into(copy, _XXH3_OFFSET, 0)
    found = checksum(copy)
    if found != stored:
        raise DeviceRefusedError(
            Refusal.DAMAGED, f"{place}: damaged superblock (expected checksum {stored:#x}, found {found:#x})"
        )
    if format_version != SUPERBLOCK_FORMAT_VERSION:
        raise DeviceRefusedError(
            Refusal.OTHER_VERSION,
            f"{place}: format version {format_version}, this program knows {SUPERBLOCK_FORMAT_VERSION}; "
            "drain it with the version of forebay that made it",
        )
    superblock = Superblock(device, generation, zone_blocks, zone_count, (area_a, area_b), *rest)
    _check(superblock, copy, place)
    return superblock


class Chosen(NamedTuple):
    """The superblock that counts, and by their index the copies that are not valid."""

    superblock: Superblock
    refused: dict[int, DeviceRefusedError]


def choose(block_a: Buffer | None, block_b: Buffer | None, *, place: str = "cache device") -> Superblock:
    """Return the newer of two copies, as `choose_copy` does."""
    return choose_copy(block_a, block_b, place=place).superblock


def choose_copy(block_a: Buffer | None, block_b: Buffer | None, *, place: str = "cache device") -> Chosen:
    """Return the newer of two copies; None is one that can't be read.

    Raises:
        DeviceRefusedError: neither is valid. Of two reasons the one that says most about a device of ours is given.
    """
    found: list[Superblock] = []
    refused: dict[int, DeviceRefusedError] = {}
    for index, block in enumerate((block_a, block_b)):
        try:
            found.append(_decode_copy(block, place=f"{place} superblock {'AB'[index]}"))
        except DeviceRefusedError as error:
            refused[index] = error
    if found:
        return Chosen(max(found, key=lambda superblock: superblock.generation), refused)
    order = (Refusal.OTHER_VERSION, Refusal.DAMAGED, Refusal.FOREIGN, Refusal.BLANK)
    raise min(refused.values(), key=lambda error: order.index(error.refusal))


def _decode_copy(block: Buffer | None, *, place: str) -> Superblock:
    if block is None:
        raise DeviceRefusedError(Refusal.DAMAGED, f"{place}: can't be read")
    return decode_superblock(block, place=place)


def check_fits(superblock: Superblock, device_size: int, *, place: str) -> None:
    """Compare the geometry with the device as it is now.

    Raises:
        DeviceRefusedError: the device has become smaller.
    """
    if superblock.geometry.size > device_size:
        raise DeviceRefusedError(
            Refusal.DAMAGED,
            f"{place}: was cut short (expected {superblock.geometry.size} bytes, found {device_size})",
        )


def _check(superblock: Superblock, copy: bytearray, place: str) -> None:
    """Check what the rest of the program trusts; the checksum held, so this only meets bugs and forgeries."""
    geometry = superblock.geometry
    if superblock.generation == 0 or not _is_sane(geometry):
        raise DeviceRefusedError(
            Refusal.DAMAGED, f"{place}: geometry contradicts itself (expected parts side by side, found {geometry})"
        )
    if any(copy[10:16]) or any(copy[SUPERBLOCK.size :]):
        raise DeviceRefusedError(Refusal.DAMAGED, f"{place}: reserved bytes are in use (expected zeros, found others)")


def _is_sane(geometry: Geometry) -> bool:
    first = SUPERBLOCK_COUNT * BLOCK_SIZE
    return (
        ZONE_BLOCKS_MIN <= geometry.zone_blocks <= ZONE_BLOCKS_MAX
        and geometry.zone_count >= ZONE_COUNT_MIN
        and geometry.place_count <= PLACE_COUNT_MAX
        and geometry.checkpoint_size % BLOCK_SIZE == 0
        and geometry.checkpoint_size >= area_size(geometry.place_count, geometry.zone_count)
        and geometry.checkpoint_offsets == (first, first + geometry.checkpoint_size)
        and geometry.zones_offset == first + 2 * geometry.checkpoint_size
    )


def _geometry(zone_blocks: int, zone_count: int) -> Geometry:
    checkpoint_size = area_size(zone_count * zone_blocks, zone_count)
    first = SUPERBLOCK_COUNT * BLOCK_SIZE
    return Geometry(
        zone_blocks, zone_count, (first, first + checkpoint_size), checkpoint_size, first + 2 * checkpoint_size
    )

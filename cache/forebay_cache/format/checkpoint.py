"""The checkpoint: a durable image of map, zones and volumes; replay starts where it says.

An area holds one checkpoint; there are two areas, used in turn. Body chunks come first, then the chunk table, then an
fdatasync, and the header last: so a header that is valid names only chunks that were durable. It is fuzzy: each chunk
is true for the moment it was copied, all of them at or after the log position that replay starts from.
Crash: a checkpoint without its header never was; the other area still holds the one before, until its first chunk is
overwritten, and that is when the newer one has long been durable. A damaged one is told by its checksums.

Area, every part padded with zeros to 4096 bytes:

    header | volume chunks | zone chunks | place chunks | chunk table

The chunk table is the u64 xxh3 of each padded chunk, in order, then one byte for each place chunk: 1 if it may hold a
block that was newer than `acknowledged` of its volume's row, else 0. So a start reads those with a 1 and the records
behind the checkpoint, and knows all that is not upstream; the rest, all clean, may be read later.

A chunk holds at most CHUNK_SIZE bytes (places: PLACE_CHUNK_SIZE), the last of each kind less:
    volume chunks  the volume table cut into pieces: all rows, then all holes, then all CutEnds, then the origin maps
                   of clones, those of the first volume first. The holes of a volume: those of now, then those of each
                   closed cut that has a CutEnd, in their order; a closed cut's are those of its versions, so they tell
                   whose they are.
    zone chunks    zone rows, 16 bytes each
    place chunks   of n places (`chunk_places`, or the rest): n keys u64, n versions u64, n checksums u64, n counts u8.
                   Key 0: empty. Count 0: a pinned version, else it is at least 1. A place's four values belong
                   together, because a chunk is copied in one step.
Places from `place_count` on are empty; so the checkpoint of a blank device has none.

Header, 120 bytes, little-endian, then zeros up to 4096:

    offset  size  type  field               meaning
    ------  ----  ----  ------------------  --------------------------------------------------------
         0     4  u32   magic               0x504b4346, "FCKP"
         4     2  u16   format_version      4
         6     2  2x    reserved            0
         8    16  16s   device              device id
        24     8  u64   sequence            counts checkpoints; the highest valid one wins
        32     8  u64   log_position        record that replay starts with
        40     8  u64   previous_xxh3       header_xxh3 of the record before it; 0 for the first
        48     4  u32   replay_zone         zone of that record
        52     4  u32   replay_block        block of that record in its zone
        56     4  u32   replay_incarnation  incarnation of that zone
        60     4  u32   place_count         places in the body
        64     4  u32   zone_count          zone rows
        68     4  u32   volume_count        volume rows
        72     4  u32   hole_count          holes of all volumes
        76     4  u32   chunk_places        places of each place chunk but the last, 1 to 4096
        80     8  u64   table_xxh3          over the padded chunk table
        88     8  u64   limit_average       bytes per second that destaging all volumes may take, as in VolumeNote
        96     8  u64   limit_peak          the same for its peak
       104     4  u32   end_count           CutEnds of all volumes
       108     4  u32   origin_size         bytes of all origin maps
       112     8  u64   header_xxh3         over these 4096 bytes with this field as 0

Volume row, 392 bytes, little-endian:

    offset  size  type  field              meaning
    ------  ----  ----  -----------------  ------------------------------------------------
         0   352  352s  note               VolumeNote
       352     8  u64   version            newest change
       360     8  u64   acknowledged       cuts are upstream through it
       368     4  u32   hole_count         holes of this volume, without those of closed cuts
       372     4  u32   closed_hole_count  holes of its closed cuts
       376     4  u32   end_count          its snapshots and resizes that are not upstream, in their order
       380     4  u32   origin_pages       pages of its origin map; 0: it has none
       384     8  u64   origin_asked       block up to which the store was asked for that map

Origin map: a state for each page of 32768 blocks, u8: 0 no block is known to read as the origin does, 1 some, 2 all.
Then for each page with state 1 a bit for each block, the first in the lowest bit of the first byte: 4096 bytes.

Hole, 24 bytes, little-endian: start u64, count u64, version u64 since which the extent reads as zeros.

Zone row, 16 bytes, little-endian: first_position u64 (log position at which it was opened), incarnation u32, state u8,
three bytes 0.
"""

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.format.cut_end import CUT_END, CutEnd, decode_cut_end, encode_cut_end
from forebay_cache.format.volume_note import VOLUME_NOTE, VolumeNote, decode_volume_note, encode_volume_note, is_limit
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE, ID_SIZE, LBA_MAX, Buffer

CHECKPOINT_MAGIC: Final = 0x504B4346
CHECKPOINT_FORMAT_VERSION: Final = 4
HEADER: Final = struct.Struct("<IH2x16sQQQIIIIIIIIQQQIIQ")
VOLUME_ROW: Final = struct.Struct(f"<{VOLUME_NOTE.size}sQQIIIIQ")
HOLE_DTYPE: Final = np.dtype([("start", "<u8"), ("count", "<u8"), ("version", "<u8")])
NO_HOLES: Final = np.zeros(0, HOLE_DTYPE)
ZONE_DTYPE: Final = np.dtype(
    [("first_position", "<u8"), ("incarnation", "<u4"), ("state", "u1"), ("reserved", "u1", 3)]
)
assert HEADER.size == 120
assert VOLUME_ROW.size == 392
assert HOLE_DTYPE.itemsize == 24
assert ZONE_DTYPE.itemsize == 16

PLACE_SIZE: Final = 25
CHUNK_PLACES: Final = 4096
"""Places of a chunk, at most: so 16 MiB of blocks are loaded in one step."""

PLACE_CHUNK_SIZE: Final = CHUNK_PLACES * PLACE_SIZE
CHUNK_SIZE: Final = 8 * PLACE_CHUNK_SIZE
CHUNK_ZONES: Final = CHUNK_SIZE // ZONE_DTYPE.itemsize
VOLUME_COUNT_MAX: Final = 1024
HOLES_MIN: Final = 65536
END_COUNT_MAX: Final = 256
PLACES_PER_HOLE: Final = 16
ORIGIN_PAGE_SIZE: Final = 4096
ORIGIN_SIZE_MIN: Final = 1 << 14
ORIGIN_SIZE_MAX: Final = 1 << 26
ORIGIN_BYTES_PER_PLACE: Final = 16
assert CHUNK_SIZE % BLOCK_SIZE == PLACE_CHUNK_SIZE % BLOCK_SIZE == 0
assert CHUNK_PLACES * 8 % BLOCK_SIZE == 0  # the keys of a whole chunk can be read alone
assert CHUNK_SIZE % ZONE_DTYPE.itemsize == 0

U64Array = npt.NDArray[np.uint64]
U8Array = npt.NDArray[np.uint8]
RowArray = npt.NDArray[np.void]

_XXH3_OFFSET: Final = 112
_U64: Final = struct.Struct("<Q")


class CheckpointHeader(NamedTuple):
    """The fixed fields in their order on disk; `header_xxh3` is made when encoding."""

    device: bytes
    sequence: int
    log_position: int
    previous_xxh3: int
    replay_zone: int
    replay_block: int
    replay_incarnation: int
    place_count: int
    zone_count: int
    volume_count: int
    hole_count: int
    chunk_places: int
    table_xxh3: int
    limit_average: int = 0
    limit_peak: int = 0
    end_count: int = 0
    origin_size: int = 0
    header_xxh3: int = 0

    @property
    def layout(self) -> "CheckpointLayout":
        """Where the parts lie."""
        return CheckpointLayout(
            place_count=self.place_count,
            zone_count=self.zone_count,
            volume_count=self.volume_count,
            hole_count=self.hole_count,
            chunk_places=self.chunk_places,
            end_count=self.end_count,
            origin_size=self.origin_size,
        )


class Chunk(NamedTuple):
    """One piece of the body: units `[first, first + count)` of its kind at `offset` of the area.

    A unit is a byte of the volume table, a zone, or a place. `size` in bytes is not padded, `padded_size` is.
    """

    first: int
    count: int  # type: ignore[assignment]
    offset: int
    size: int

    @property
    def padded_size(self) -> int:
        """Bytes on the device."""
        return _padded(self.size)


class CheckpointLayout(NamedTuple):
    """Offsets inside an area, from the counts alone."""

    place_count: int
    zone_count: int
    volume_count: int
    hole_count: int
    chunk_places: int = CHUNK_PLACES
    end_count: int = 0
    origin_size: int = 0

    @property
    def volume_size(self) -> int:
        """Bytes of the volume table."""
        holes_size = self.hole_count * HOLE_DTYPE.itemsize
        return self.volume_count * VOLUME_ROW.size + holes_size + self.end_count * CUT_END.size + self.origin_size

    @property
    def volume_chunks(self) -> list[Chunk]:
        """Chunks of the volume table."""
        return _chunks(self.volume_size, CHUNK_SIZE, 1, BLOCK_SIZE)

    @property
    def zone_chunks(self) -> list[Chunk]:
        """Chunks of the zone rows."""
        return _chunks(self.zone_count, CHUNK_ZONES, ZONE_DTYPE.itemsize, self._zones_offset)

    @property
    def place_chunks(self) -> list[Chunk]:
        """Chunks of the places."""
        return _chunks(self.place_count, self.chunk_places, PLACE_SIZE, self._places_offset)

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks in the order of the chunk table."""
        return [*self.volume_chunks, *self.zone_chunks, *self.place_chunks]

    @property
    def chunk_count(self) -> int:
        """How many chunks there are."""
        return -(-self.volume_size // CHUNK_SIZE) - (-self.zone_count // CHUNK_ZONES) + self.place_chunk_count

    @property
    def place_chunk_count(self) -> int:
        """How many of them hold places; they come last."""
        return -(-self.place_count // self.chunk_places)

    @property
    def table(self) -> Chunk:
        """The chunk table, which lies behind the chunks and is not one of them."""
        whole, rest = divmod(self.place_count, self.chunk_places)
        offset = self._places_offset + whole * _padded(self.chunk_places * PLACE_SIZE) + _padded(rest * PLACE_SIZE)
        return Chunk(0, self.chunk_count, offset, self.chunk_count * _U64.size + self.place_chunk_count)

    @property
    def size(self) -> int:
        """Bytes from the start of the area to the end of the table."""
        table = self.table
        return table.offset + table.padded_size

    # Chunks of CHUNK_SIZE and CHUNK_PLACES are whole blocks, so a kind takes no more than its own bytes, padded.

    @property
    def _zones_offset(self) -> int:
        return BLOCK_SIZE + _padded(self.volume_size)

    @property
    def _places_offset(self) -> int:
        return self._zones_offset + _padded(self.zone_count * ZONE_DTYPE.itemsize)


class OriginPages(NamedTuple):
    """A clone's origin map: the state of each page, and the bits of the pages with state 1, in order."""

    states: bytes
    bits: list[bytearray]
    asked_to: int

    @property
    def size(self) -> int:
        """Bytes in a checkpoint."""
        return len(self.states) + len(self.bits) * ORIGIN_PAGE_SIZE


class VolumeState(NamedTuple):
    """One volume of a checkpoint. `holes`, and those of its closed cuts, are arrays of HOLE_DTYPE."""

    note: VolumeNote
    version: int
    acknowledged: int
    holes: RowArray
    closed_holes: RowArray = NO_HOLES
    ends: tuple[CutEnd, ...] = ()
    origins: OriginPages | None = None


def hole_count_max(place_count: int) -> int:
    """Return how many holes the area of a device has room for."""
    return max(HOLES_MIN, place_count // PLACES_PER_HOLE)


def origin_size_max(place_count: int) -> int:
    """Return how many bytes of origin maps the area of a device has room for."""
    return min(ORIGIN_SIZE_MAX, max(ORIGIN_SIZE_MIN, place_count * ORIGIN_BYTES_PER_PLACE))


def area_size(place_count: int, zone_count: int) -> int:
    """Return the bytes of an area that takes every checkpoint of a device."""
    return CheckpointLayout(
        place_count,
        zone_count,
        VOLUME_COUNT_MAX,
        hole_count_max(place_count),
        end_count=END_COUNT_MAX,
        origin_size=origin_size_max(place_count),
    ).size


# Volumes.


def encode_volumes(volumes: Sequence[VolumeState]) -> bytes:
    """Return the volume table without the origin maps that follow: all rows, then all holes, then all ends of cuts."""
    assert len(volumes) <= VOLUME_COUNT_MAX
    rows = [
        VOLUME_ROW.pack(
            encode_volume_note(volume.note),
            volume.version,
            volume.acknowledged,
            volume.holes.size,
            volume.closed_holes.size,
            len(volume.ends),
            0 if volume.origins is None else len(volume.origins.states),
            0 if volume.origins is None else volume.origins.asked_to,
        )
        for volume in volumes
    ]
    holes = [part.tobytes() for volume in volumes for part in (volume.holes, volume.closed_holes)]
    return b"".join((*rows, *holes, *(encode_cut_end(end) for volume in volumes for end in volume.ends)))


def decode_volumes(table: Buffer, layout: CheckpointLayout, *, place: str) -> list[VolumeState]:
    """Return the volumes of the joined volume chunks, without padding.

    Raises:
        CorruptionError: counts, keys, extents or versions contradict each other.
    """
    rows_size = layout.volume_count * VOLUME_ROW.size
    holes = np.frombuffer(table, HOLE_DTYPE, layout.hole_count, rows_size)
    _check_holes(holes, place)
    origin_at = layout.volume_size - layout.origin_size
    ends = memoryview(table)[rows_size + holes.nbytes : origin_at]
    volumes: list[VolumeState] = []
    at = end_at = 0
    for packed, version, acknowledged, *counts in VOLUME_ROW.iter_unpack(memoryview(table)[:rows_size]):
        hole_count, closed_count, end_count, page_count, asked_to = counts
        note = decode_volume_note(packed, place=place)
        part = ends[end_at * CUT_END.size : (end_at + end_count) * CUT_END.size]
        own = tuple(
            decode_cut_end(part[i : i + CUT_END.size], place=place) for i in range(0, part.nbytes, CUT_END.size)
        )
        closed_at, at = at + hole_count, at + hole_count + closed_count
        state = VolumeState(note, version, acknowledged, holes[closed_at - hole_count : closed_at], holes[closed_at:at])
        origins = _origin_pages(memoryview(table)[origin_at : layout.volume_size], page_count, asked_to, place)
        volumes.append(state._replace(ends=own, origins=origins))
        end_at += end_count
        origin_at += 0 if origins is None else origins.size
    keys = [volume.note.volume_key for volume in volumes]
    found = (at, end_at, origin_at)
    if found != (layout.hole_count, layout.end_count, layout.volume_size) or len(set(keys)) != len(keys):
        raise CorruptionError(
            place=place,
            what="checkpoint volumes",
            expected=f"{layout.hole_count} holes, {layout.end_count} ends of cuts, {layout.volume_size} bytes, "
            "distinct keys",
            found=(*found, keys),
        )
    for volume in volumes:
        _check_ends(volume, place)
    return volumes


def _origin_pages(rest: memoryview, page_count: int, asked_to: int, place: str) -> OriginPages | None:
    """Return the origin map that `rest` begins with."""
    if page_count == 0:
        return None
    states = bytes(rest[:page_count])
    mixed = states.count(1)
    if len(states) != page_count or max(states) > 2 or page_count + mixed * ORIGIN_PAGE_SIZE > rest.nbytes:
        raise CorruptionError(
            place=place, what="origin map", expected=f"{page_count} states and their pages", found=rest.nbytes
        )
    starts = range(page_count, page_count + mixed * ORIGIN_PAGE_SIZE, ORIGIN_PAGE_SIZE)
    return OriginPages(states, [bytearray(rest[at : at + ORIGIN_PAGE_SIZE]) for at in starts], asked_to)


def _check_ends(volume: VolumeState, place: str) -> None:
    versions = [end.version for end in volume.ends]
    in_order = all(one < other for one, other in pairwise([volume.acknowledged, *versions]))
    known = all(end.volume_key == volume.note.volume_key for end in volume.ends)
    closed = int(volume.closed_holes["version"].max(initial=0)) <= max(versions, default=0)
    if not (in_order and known and closed and max(versions, default=0) <= volume.version):
        raise CorruptionError(
            place=place,
            what="checkpoint ends of cuts",
            expected=f"of volume {volume.note.volume_key}, ascending from {volume.acknowledged}",
            found=volume.ends,
        )


def _check_holes(holes: RowArray, place: str) -> None:
    starts, counts = holes["start"], holes["count"]
    limit = np.uint64(LBA_MAX + 1)
    if bool(((starts >= limit) | (counts == 0) | (counts > limit - np.minimum(starts, limit))).any()):
        raise CorruptionError(
            place=place, what="checkpoint holes", expected="extents of a volume", found="an empty or too large one"
        )


# Zones and places.


def encode_zones(rows: RowArray) -> bytes:
    """Return the chunk of zone rows (ZONE_DTYPE), padded."""
    assert rows.dtype == ZONE_DTYPE
    assert rows.size <= CHUNK_ZONES
    return rows.tobytes().ljust(_padded(rows.nbytes), b"\0")


def decode_zones(chunk: Buffer, count: int) -> RowArray:
    """Return the rows of a verified chunk of zone rows."""
    return np.frombuffer(chunk, ZONE_DTYPE, count)


def encode_places(keys: U64Array, versions: U64Array, checksums: U64Array, counts: U8Array) -> bytes:
    """Return the chunk of equally long slices of the four arrays, padded: the copy that a fuzzy checkpoint makes."""
    assert keys.size == versions.size == checksums.size == counts.size <= CHUNK_PLACES
    padding = bytes(_padded(keys.size * PLACE_SIZE) - keys.size * PLACE_SIZE)
    return b"".join((keys.data, versions.data, checksums.data, counts.data, padding))


def decode_places(chunk: Buffer, count: int) -> tuple[U64Array, U64Array, U64Array, U8Array]:
    """Return keys, versions, checksums and use counts of a verified chunk of places, as views of it."""
    view = memoryview(chunk)
    keys, versions, checksums = (np.frombuffer(view, "<u8", count, 8 * count * part) for part in range(3))
    return keys, versions, checksums, np.frombuffer(view, np.uint8, count, 24 * count)


# Checksums.


def encode_table(chunk_sums: Sequence[int], dirty: bytes) -> bytes:
    """Return the chunk table, padded, from the xxh3 of each padded chunk in order and a byte for each place chunk."""
    packed = struct.pack(f"<{len(chunk_sums)}Q", *chunk_sums) + dirty
    return packed.ljust(_padded(len(packed)), b"\0")


def decode_table(table: Buffer, header: CheckpointHeader, *, place: str) -> tuple[tuple[int, ...], bytes]:
    """Return the xxh3 of each chunk, and which place chunks may hold dirty blocks, after comparing the padded table
    with the header.

    Raises:
        CorruptionError: the table is not the one that the header was written for.
    """
    found = checksum(table)
    if found != header.table_xxh3:
        raise CorruptionError(place=place, what="checkpoint chunk table", expected=header.table_xxh3, found=found)
    layout = header.layout
    sums: tuple[int, ...] = struct.unpack_from(f"<{layout.chunk_count}Q", table)
    at = layout.chunk_count * _U64.size
    return sums, bytes(memoryview(table)[at : at + layout.place_chunk_count])


def verify_chunk(chunk: Buffer, expected_xxh3: int, *, place: str) -> None:
    """Compare a padded chunk with its sum in the chunk table.

    Raises:
        CorruptionError: it differs.
    """
    found = checksum(chunk)
    if found != expected_xxh3:
        raise CorruptionError(place=place, what="checkpoint chunk", expected=expected_xxh3, found=found)


# The header.


def encode_checkpoint_header(header: CheckpointHeader) -> bytes:
    """Return the block that makes a checkpoint valid; write it when all else is durable."""
    assert header.volume_count <= VOLUME_COUNT_MAX
    block = bytearray(BLOCK_SIZE)
    fields = header._replace(header_xxh3=0)
    HEADER.pack_into(block, 0, CHECKPOINT_MAGIC, CHECKPOINT_FORMAT_VERSION, *fields)
    _U64.pack_into(block, _XXH3_OFFSET, checksum(block))
    return bytes(block)


def decode_checkpoint_header(block: Buffer, *, device: bytes, size_max: int, place: str) -> CheckpointHeader:
    """Return the header of an area of `size_max` bytes.

    Raises:
        CorruptionError: no header, a damaged one, that of another device, or one that does not fit the area.
    """
    copy = bytearray(block)
    if len(copy) != BLOCK_SIZE:
        raise CorruptionError(place=place, what="checkpoint header size", expected=BLOCK_SIZE, found=len(copy))
    magic, format_version, *fields = HEADER.unpack_from(copy)
    header = CheckpointHeader(*fields)
    if magic != CHECKPOINT_MAGIC:
        raise CorruptionError(place=place, what="checkpoint magic", expected=CHECKPOINT_MAGIC, found=magic)
    _U64.pack_into(copy, _XXH3_OFFSET, 0)
    found = checksum(copy)
    if found != header.header_xxh3:
        raise CorruptionError(place=place, what="checkpoint header checksum", expected=header.header_xxh3, found=found)
    if (format_version, header.device) != (CHECKPOINT_FORMAT_VERSION, device):
        raise CorruptionError(
            place=place,
            what="checkpoint format version and device",
            expected=(CHECKPOINT_FORMAT_VERSION, device.hex()),
            found=(format_version, header.device.hex()),
        )
    layout = header.layout
    chunk_ok = 0 < header.chunk_places <= CHUNK_PLACES
    counts_ok = header.volume_count <= VOLUME_COUNT_MAX and header.end_count <= END_COUNT_MAX
    if not (counts_ok and chunk_ok) or layout.size > size_max:
        raise CorruptionError(place=place, what="checkpoint counts", expected=f"at most {size_max} bytes", found=layout)
    if not is_limit(header.limit_average, header.limit_peak):
        found_limit = (header.limit_average, header.limit_peak)
        raise CorruptionError(place=place, what="checkpoint limit", expected="average <= peak", found=found_limit)
    if any(copy[6:8]) or any(copy[HEADER.size :]):
        raise CorruptionError(place=place, what="checkpoint unused bytes", expected="zeros", found="others")
    return header


def choose_checkpoints(
    blocks: Sequence[Buffer], *, device: bytes, size_max: int, places: Sequence[str]
) -> list[tuple[int, CheckpointHeader]]:
    """Return area index and header of each valid checkpoint, newest first; the caller goes on to the next if the
    body of one is damaged.

    Raises:
        CorruptionError: no area has a valid header; it is that of the first.
    """
    assert len(device) == ID_SIZE
    found: list[tuple[int, CheckpointHeader]] = []
    errors: list[CorruptionError] = []
    for index, (block, place) in enumerate(zip(blocks, places, strict=True)):
        try:
            found.append((index, decode_checkpoint_header(block, device=device, size_max=size_max, place=place)))
        except CorruptionError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return sorted(found, key=lambda one: one[1].sequence, reverse=True)


def _chunks(count: int, chunk_count: int, unit_size: int, offset: int) -> list[Chunk]:
    """Cut `count` units into chunks, each padded to whole blocks, from `offset` on."""
    return [
        Chunk(
            first,
            min(chunk_count, count - first),
            offset + first // chunk_count * _padded(chunk_count * unit_size),
            min(chunk_count, count - first) * unit_size,
        )
        for first in range(0, count, chunk_count)
    ]


def _padded(size: int) -> int:
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE

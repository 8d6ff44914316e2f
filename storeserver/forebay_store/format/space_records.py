"""The records of checkpoints and cleaning: bodies of `forebay_store.format.records`, little-endian.

A checkpoint is the index as it was when it showed segment A and none behind: chunks with its rows, then the record that
completes it. Whoever makes the index anew loads the newest whole one and applies the segments behind A; those up to A
are then needed for their frames only. Chunks without the record that completes them mean nothing.

index-chunk, 32 bytes; the payload is `forebay_store.format.index_chunk`:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     8  u64   checkpoint    random number of the checkpoint
         8     4  u32   chunk_index   from 0
        12     4  u32   row_count     rows of the index in it
        16     8  u64   plain_size    bytes of the payload once decompressed
        24     8  u64   payload_xxh3  over the payload

checkpoint-complete, 48 bytes:

    offset  size  type  field        meaning
    ------  ----  ----  -----------  --------------------------------------------------------
         0     8  u64   checkpoint   whose chunks 0 to chunk_count - 1 were written before
         8     4  u32   chunk_count  how many
        12     4  u32   incarnation  of segment A: the newest whose records the rows show
        16     8  u64   number       of segment A
        24     8  u64   row_count    rows of all chunks
        32     8  u64   chunks_xxh3  over the payload_xxh3 of all chunks, in order
        40     8  u64   stored_size  bytes of all payloads

cleaned-part, 32 bytes, then old_count times (u32 incarnation, u64 number), then move_count moves; the payload is frames
of blocks that lay in older segments:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0    16  16s   volume      its id
        16     8  u64   written     age of the youngest of the older segments, as in the table `segments`
        24     4  u32   old_count   older segments, 1 to 256
        28     4  u32   move_count  extents that were copied

Move, 36 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     8  u64   start         first block in the volume
         8     8  u64   version       of the entry that was copied
        16     4  u32   count         blocks
        20     4  u32   old_offset    of the frame in the older segment
        24     4  u32   frame_offset  of the new frame, from the start of the payload
        28     4  u32   frame_size    bytes of the new frame
        32     1  u8    old_block     index of the first block among the old frame's plain blocks
        33     1  u8    block         the same in the new frame
        34     1  u8    frame_blocks  plain blocks of the new frame
        35     1  u8    old_index     which of the older segments

segments-deleted, 4 bytes, then name_count times (u32 incarnation, u64 number):

    offset  size  type  field       meaning
    ------  ----  ----  ----------  --------------------------------------------------------
         0     4  u32   name_count  segments that nothing needs any more; their files go after this record is durable
"""

import struct
from typing import Final, NamedTuple

from forebay_store.format.segment import SegmentName

INDEX_CHUNK_BODY: Final = struct.Struct("<QIIQQ")
CHECKPOINT_COMPLETE_BODY: Final = struct.Struct("<QIIQQQQ")
CLEANED_PART_BODY: Final = struct.Struct("<16sQII")
MOVE: Final = struct.Struct("<QQIIIIBBBB")
SEGMENTS_DELETED_BODY: Final = struct.Struct("<I")
NAME: Final = struct.Struct("<IQ")
OLDS_MAX: Final = 256
assert MOVE.size == 36


class IndexChunk(NamedTuple):
    """Rows of the index, in the payload."""

    checkpoint: int
    chunk_index: int
    row_count: int
    plain_size: int
    payload_xxh3: int


class CheckpointComplete(NamedTuple):
    """The chunks of this checkpoint hold the index as it was at segment `shows`."""

    checkpoint: int
    chunk_count: int
    shows: SegmentName
    row_count: int
    chunks_xxh3: int
    stored_size: int


class CleanedPart(NamedTuple):
    """Blocks of one volume lie in this payload too; `olds` and `moves` are packed. It changes no content."""

    volume: bytes
    written: int
    olds: bytes
    moves: bytes


class SegmentsDeleted(NamedTuple):
    """Nothing needs these segments; `names` is packed."""

    names: bytes


class Move(NamedTuple):
    """One extent that was copied: the place that it had, and the one that it has now."""

    start: int
    version: int
    length: int
    old_offset: int
    frame_offset: int
    frame_size: int
    old_block: int
    block: int
    frame_blocks: int
    old_index: int

    @property
    def end(self) -> int:
        """First block behind it."""
        return self.start + self.length


SpaceRecord = IndexChunk | CheckpointComplete | CleanedPart | SegmentsDeleted


def pack_moves(moves: list[Move]) -> bytes:
    """Return the packed moves."""
    return b"".join(MOVE.pack(*move) for move in moves)


def unpack_moves(packed: bytes) -> list[Move]:
    """Return the moves of a packed list."""
    return [Move(*fields) for fields in MOVE.iter_unpack(packed)]


def pack_names(names: list[SegmentName]) -> bytes:
    """Return the packed names."""
    return b"".join(NAME.pack(*name) for name in names)


def unpack_names(packed: bytes) -> list[SegmentName]:
    """Return the names of a packed list."""
    return [SegmentName(*fields) for fields in NAME.iter_unpack(packed)]


def encode_space_body(record: SpaceRecord) -> bytes:
    """Return the body of a record."""
    match record:
        case IndexChunk():
            return INDEX_CHUNK_BODY.pack(*record)
        case CheckpointComplete():
            return CHECKPOINT_COMPLETE_BODY.pack(record.checkpoint, record.chunk_count, *record.shows, *record[3:])
        case CleanedPart():
            old_count, move_count = len(record.olds) // NAME.size, len(record.moves) // MOVE.size
            fixed = CLEANED_PART_BODY.pack(record.volume, record.written, old_count, move_count)
            return fixed + record.olds + record.moves
        case SegmentsDeleted():
            return SEGMENTS_DELETED_BODY.pack(len(record.names) // NAME.size) + record.names


def decode_index_chunk(body: bytes) -> IndexChunk:
    """Return the record of a body; struct.error if it is none."""
    return IndexChunk(*INDEX_CHUNK_BODY.unpack(body))


def decode_complete(body: bytes) -> CheckpointComplete:
    """Return the record of a body; struct.error if it is none."""
    checkpoint, chunk_count, incarnation, number, row_count, xxh3, stored_size = CHECKPOINT_COMPLETE_BODY.unpack(body)
    return CheckpointComplete(checkpoint, chunk_count, SegmentName(incarnation, number), row_count, xxh3, stored_size)


def decode_cleaned(body: bytes) -> CleanedPart:
    """Return the record of a body; struct.error if it is none."""
    volume, written, old_count, _ = CLEANED_PART_BODY.unpack_from(body)
    olds = body[CLEANED_PART_BODY.size : CLEANED_PART_BODY.size + old_count * NAME.size]
    moves = body[CLEANED_PART_BODY.size + old_count * NAME.size :]
    if any(move.old_index >= old_count for move in unpack_moves(moves)):
        raise struct.error("a move from a segment that is not listed")
    return CleanedPart(volume, written, olds, moves)


def decode_deleted(body: bytes) -> SegmentsDeleted:
    """Return the record of a body; struct.error if it is none."""
    names = body[SEGMENTS_DELETED_BODY.size :]
    unpack_names(names)
    return SegmentsDeleted(names)

"""The rows of the index that tell what the cleaner may delete.

Table `meta`, key `checkpoint`: the newest complete checkpoint in the log.

Checkpoint mark, 40 bytes, little-endian:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------------------
         0     4  u32   incarnation    of the newest segment that it shows
         4     8  u64   number         of that segment
        12     4  u32   complete_inc   incarnation of the segment with the record that completes it
        16     8  u64   complete_num   number of that segment
        24     8  u64   stored_size    bytes of its chunks
        32     8  u64   row_count      rows of the index in it

Table `leaving`, key as in `segments`, value empty: the segments that the newest record of the kind segments-deleted
names. They have no row in `segments`; their files go, or are gone.
"""

import struct
from typing import Final, NamedTuple

from forebay_store.format.segment import SegmentName

CHECKPOINT_MARK: Final = struct.Struct("<IQIQQQ")
CHECKPOINT_KEY: Final = b"checkpoint"
assert CHECKPOINT_MARK.size == 40


class CheckpointMark(NamedTuple):
    """The newest complete checkpoint; fields as in the table above."""

    shows: SegmentName
    segment: SegmentName
    stored_size: int
    row_count: int


def encode_mark(mark: CheckpointMark) -> bytes:
    """Return the value of the mark."""
    return CHECKPOINT_MARK.pack(*mark.shows, *mark.segment, mark.stored_size, mark.row_count)


def decode_mark(value: bytes) -> CheckpointMark:
    """Return the mark of a value."""
    fields = CHECKPOINT_MARK.unpack(value)
    return CheckpointMark(SegmentName(*fields[:2]), SegmentName(*fields[2:4]), *fields[4:])

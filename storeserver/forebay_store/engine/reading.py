"""Reads of heads and snapshots: which frames answer them, where in segments those are, and whether they are right.

Invariant: a frame leaves the store only when its header, its stored checksum and its blocks' places are as the index
says; anything else is an error that names segment and offset.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from forebay_core.errors import CorruptionError, ProtocolError, RefusedError
from forebay_core.extents import EXTENT_DTYPE, Extent, unpack
from forebay_core.frame import check_stored, decode_header
from forebay_core.units import Buffer
from forebay_store.engine.changes import expect_epoch
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.queries import check_blocks
from forebay_store.engine.views import expect_view, walk
from forebay_store.format.entries import DATA, HOLE, HeadEntry
from forebay_store.format.rows import VolumeState
from forebay_store.format.segment import SegmentName
from forebay_store.limits import READ_GAP_MAX
from forebay_wire import messages
from forebay_wire.limits import EXTENTS_MAX, READ_BLOCKS_MAX
from forebay_wire.messages import HOLE_FRAME, ORIGIN_FRAME, PIECE_DTYPE

_ONE_EXTENT: Final = struct.Struct("<QI")
assert _ONE_EXTENT.size == EXTENT_DTYPE.itemsize


class FramePlace(NamedTuple):
    """A frame in a segment."""

    segment: SegmentName
    offset: int
    size: int


class WantedFrame(NamedTuple):
    """A frame, and the entries of the index that it must hold."""

    place: FramePlace
    entries: list[HeadEntry]


class SegmentRead(NamedTuple):
    """One read of a segment, for the frames of these indexes."""

    segment: SegmentName
    offset: int
    size: int
    frames: list[int]


class ReadPlan(NamedTuple):
    """How to answer a Read."""

    pieces: bytes
    frames: list[WantedFrame]
    reads: list[SegmentRead]


def plan_read(reader: IndexReader, message: messages.Read) -> ReadPlan:
    """Return how to answer a Read.

    Raises:
        RefusedError: no such volume, an epoch that is over, behind `min_version`, or a malformed extent list.
    """
    view = expect_view(reader, message.volume)
    if view.snapshot is None:
        _check_head(view.row, message)
    entries: list[HeadEntry] = []
    for extent in _extents(message.extents):
        check_blocks(view, extent.start, extent.end)
        walked = walk(reader, view, extent.start, extent.end, through=message.through)
        entries += [entry for entry in walked if entry is not None]
    return plan_entries(entries)


def plan_entries(entries: Sequence[HeadEntry]) -> ReadPlan:
    """Return how to read these entries."""
    pieces: list[tuple[int, int, int, int, int]] = []
    frames: list[WantedFrame] = []
    known: dict[FramePlace, int] = {}
    for entry in entries:
        if entry.kind == DATA:
            frame = _frame_index(known, frames, entry)
        else:
            frame = HOLE_FRAME if entry.kind == HOLE else ORIGIN_FRAME
        pieces.append((entry.start, entry.length, frame, entry.block, entry.version))
    return ReadPlan(np.array(pieces, PIECE_DTYPE).tobytes(), frames, _gather(frames))


def _check_head(row: VolumeState, message: messages.Read) -> None:
    if message.epoch:
        expect_epoch(row, message.epoch)
    if row.version < message.min_version:
        raise RefusedError(
            messages.STORE_BEHIND,
            f"volume {row.name} stands at version {row.version:#x} here, {message.min_version:#x} was asked for",
        )


def check_frames(plan: ReadPlan, buffers: Sequence[Buffer]) -> list[Buffer]:
    """Return the frames in the order of their indexes, from what the plan's reads brought.

    Raises:
        CorruptionError: a frame is damaged, or is not the one that the index means.
    """
    found: dict[int, memoryview] = {}
    for read, buffer in zip(plan.reads, buffers, strict=True):
        view = memoryview(buffer)
        for index in read.frames:
            wanted = plan.frames[index]
            offset = wanted.place.offset - read.offset
            found[index] = _check_frame(wanted, view[offset : offset + wanted.place.size])
    return [found[index] for index in range(len(plan.frames))]


def _extents(packed: bytes) -> list[Extent]:
    if len(packed) == _ONE_EXTENT.size:  # Most reads; the checks below and those of the volume's end suffice.
        extents = [Extent(*_ONE_EXTENT.unpack(packed))]
    else:
        extents = _unpack_many(packed)
    count = sum(extent.count for extent in extents)
    if not 0 < count <= READ_BLOCKS_MAX:
        raise RefusedError(messages.BAD_REQUEST, f"a read of {count} blocks; 1 to {READ_BLOCKS_MAX} are allowed")
    return extents


def _unpack_many(packed: bytes) -> list[Extent]:
    try:
        return unpack(packed, count_max=EXTENTS_MAX)
    except ProtocolError as error:
        raise RefusedError(messages.BAD_REQUEST, str(error)) from error


def _frame_index(known: dict[FramePlace, int], frames: list[WantedFrame], entry: HeadEntry) -> int:
    place = FramePlace(entry.segment, entry.frame_offset, entry.frame_size)
    index = known.setdefault(place, len(frames))
    if index == len(frames):
        frames.append(WantedFrame(place, []))
    frames[index].entries.append(entry)
    return index


def _gather(frames: Sequence[WantedFrame]) -> list[SegmentRead]:
    """Join frames that lie near each other in a segment into one read."""
    reads: list[SegmentRead] = []
    for index in sorted(range(len(frames)), key=lambda index: frames[index].place):
        segment, offset, size = frames[index].place
        last = reads[-1] if reads else None
        if last and last.segment == segment and offset - (last.offset + last.size) <= READ_GAP_MAX:
            end = max(last.offset + last.size, offset + size)
            reads[-1] = SegmentRead(segment, last.offset, end - last.offset, [*last.frames, index])
        else:
            reads.append(SegmentRead(segment, offset, size, [index]))
    return reads


def _check_frame(wanted: WantedFrame, frame: memoryview) -> memoryview:
    place = f"segment {wanted.place.segment.text} offset {wanted.place.offset}"
    header = decode_header(frame, place=place)
    if header.size != wanted.place.size:
        raise CorruptionError(place=place, what="frame size", expected=wanted.place.size, found=header.size)
    check_stored(header, frame, place=place)
    for entry in wanted.entries:
        if not holds(header.extents, entry):
            raise CorruptionError(
                place=place, what="frame extents", expected=Extent(entry.start, entry.length), found=header.extents
            )
    return frame


def holds(extents: Sequence[Extent], entry: HeadEntry) -> bool:
    """Tell whether the entry's blocks are where it says among the frame's plain blocks."""
    block = 0
    for extent in extents:
        if block <= entry.block and entry.block + entry.length <= block + extent.count:
            return entry.start == extent.start + entry.block - block
        block += extent.count
    return False

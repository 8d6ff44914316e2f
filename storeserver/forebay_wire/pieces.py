"""What a store answered to Read and MapExtents, checked and made plain. Pure.

The store is a peer: nothing it says is trusted before it is compared. After `plain_pieces` returns, the pieces cover
the requested extents exactly and in order, every frame was whole and its blocks match their checksums and lie at the
addresses asked for. An answer that breaks the rules of the table is a `ProtocolError`; a frame that is not what was
written, or holds other blocks than the piece says, is a `CorruptionError`. Bounded: at most one frame is opened per
requested block, so at most 16 times the requested bytes are held.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from forebay_core.errors import CorruptionError, ProtocolError
from forebay_core.extents import Extent
from forebay_core.frame import FrameHeader, check_stored, decode_header, open_frame
from forebay_core.units import BLOCK_SIZE, LBA_MAX, Buffer
from forebay_wire.limits import PIECES_MAX
from forebay_wire.messages import HOLE_FRAME, ORIGIN_FRAME, PIECE_DTYPE

DATA_FRAME: Final = 0
"""`frame` of a piece without payload that stands for data."""


class PlainPiece(NamedTuple):
    """One answered extent. `plain` is None for a hole; else the blocks, whose xxh3-64 are `checksums`.

    With `origin` it is neither: of a clone, it reads as its origin does.
    """

    extent: Extent
    plain: memoryview | None
    version: int
    checksums: tuple[int, ...]
    origin: bool = False


class MappedPiece(NamedTuple):
    """One extent and whether it reads as zeros without being stored, or with `origin` as its origin does."""

    extent: Extent
    hole: bool
    version: int
    origin: bool = False


class ChangedPiece(NamedTuple):
    """One extent that was written or trimmed; `frame` tells what it is now: DATA_FRAME, HOLE_FRAME or ORIGIN_FRAME."""

    extent: Extent
    frame: int


class _Frame(NamedTuple):
    header: FrameHeader
    plain: memoryview


def plain_pieces(pieces: Buffer, payload: Buffer, requested: Sequence[Extent], *, place: str) -> list[PlainPiece]:
    """Return the answer to a Read of the `requested` extents; `place` names the store and volume in errors.

    Raises:
        ProtocolError: the pieces do not answer the request exactly, or frames are missing or left over.
        CorruptionError: a frame is damaged or holds other blocks than its piece says.
    """
    rows = _rows(pieces)
    _check_coverage(rows, requested)
    frames = _open_frames(payload, sum(extent.count for extent in requested), place)
    used: set[int] = set()
    answer: list[PlainPiece] = []
    for start, count, index, block, version in rows:
        extent = Extent(start, count)
        if index in (HOLE_FRAME, ORIGIN_FRAME):
            if block != 0:
                raise ProtocolError(f"piece at block {start} has no frame but block index {block}")
            answer.append(PlainPiece(extent, None, version, (), index == ORIGIN_FRAME))
            continue
        if index >= len(frames):
            raise ProtocolError(f"piece at block {start} names frame {index} of {len(frames)}")
        used.add(index)
        answer.append(_cut_piece(extent, frames[index], block, version, f"{place} frame {index}"))
    if len(used) != len(frames):
        raise ProtocolError(f"answer holds {len(frames)} frames but its pieces use {len(used)}")
    return answer


def mapped_pieces(pieces: Buffer, requested: Extent) -> list[MappedPiece]:
    """Return the answer to MapExtents of `requested`; it begins at its start and may end early, never empty.

    Raises:
        ProtocolError: the pieces have gaps, overlap, or lie outside.
    """
    rows = _rows(pieces)
    if not rows:
        raise ProtocolError("the map of an extent is empty")
    end = rows[-1][0] + rows[-1][1]
    if not requested.start < end <= requested.end:
        raise ProtocolError(f"the map ends at block {end}, outside of {requested.start}..{requested.end}")
    _check_coverage(rows, [Extent(requested.start, end - requested.start)])
    answer: list[MappedPiece] = []
    for start, count, frame, block, version in rows:
        if frame not in (DATA_FRAME, HOLE_FRAME, ORIGIN_FRAME) or block != 0:
            raise ProtocolError(f"mapped piece at block {start} has frame {frame} and block {block}")
        answer.append(MappedPiece(Extent(start, count), frame == HOLE_FRAME, version, frame == ORIGIN_FRAME))
    return answer


def changed_extents(pieces: Buffer, start: int, next_start: int) -> list[Extent]:
    """Return one page of an answer to Changed that was asked from block `start` on; the next page is at `next_start`.

    Raises:
        ProtocolError: the pieces are not sorted, lie outside of the page, or the next page leads nowhere.
    """
    return [piece.extent for piece in changed_pieces(pieces, start, next_start)]


def changed_pieces(pieces: Buffer, start: int, next_start: int) -> list[ChangedPiece]:
    """Return the same page with what each extent is now; raises as `changed_extents`."""
    end = next_start if next_start >= 0 else LBA_MAX + 1
    if not start < end <= LBA_MAX + 1:
        raise ProtocolError(f"the page of changes from block {start} goes on at block {next_start}")
    found: list[ChangedPiece] = []
    at = start
    for piece_start, count, frame, _block, _version in _rows(pieces):
        if piece_start < at or count == 0 or piece_start + count > end:
            raise ProtocolError(f"changed piece {piece_start}+{count} lies outside of blocks {at}..{end}")
        if frame not in (DATA_FRAME, HOLE_FRAME, ORIGIN_FRAME):
            raise ProtocolError(f"changed piece at block {piece_start} has frame {frame}")
        found.append(ChangedPiece(Extent(piece_start, count), frame))
        at = piece_start + count
    return found


def _rows(pieces: Buffer) -> list[tuple[int, int, int, int, int]]:
    size = memoryview(pieces).nbytes
    if size % PIECE_DTYPE.itemsize or size > PIECES_MAX * PIECE_DTYPE.itemsize:
        raise ProtocolError(f"piece table of {size} bytes is malformed or longer than {PIECES_MAX} pieces")
    rows: list[tuple[int, int, int, int, int]] = np.frombuffer(pieces, PIECE_DTYPE).tolist()
    return rows


def _check_coverage(rows: list[tuple[int, int, int, int, int]], requested: Sequence[Extent]) -> None:
    remaining = iter(requested)
    at = end = 0
    for start, count, _frame, _block, _version in rows:
        if at == end:
            extent = next(remaining, None)
            if extent is None:
                raise ProtocolError(f"piece at block {start} was not asked for")
            at, end = extent.start, extent.end
        if start != at or count == 0 or start + count > end or start + count > LBA_MAX + 1:
            raise ProtocolError(f"piece {start}+{count} does not answer block {at} of an extent that ends at {end}")
        at += count
    if at != end or next(remaining, None) is not None:
        raise ProtocolError(f"the answer ends at block {at}, before what was asked for")


def _open_frames(payload: Buffer, count_max: int, place: str) -> list[_Frame]:
    view = memoryview(payload)
    frames: list[_Frame] = []
    offset = 0
    while offset < view.nbytes:
        if len(frames) == count_max:
            raise ProtocolError(f"answer to {count_max} blocks holds more than {count_max} frames")
        frame_place = f"{place} frame {len(frames)}"
        header = decode_header(view, offset, place=frame_place)
        stored = check_stored(header, view, offset, place=frame_place)
        frames.append(_Frame(header, memoryview(open_frame(header, stored, place=frame_place))))
        offset += header.size
    return frames


def _cut_piece(extent: Extent, frame: _Frame, block: int, version: int, place: str) -> PlainPiece:
    end = block + extent.count
    if end > frame.header.block_count:
        raise ProtocolError(f"piece at block {extent.start} names blocks {block}..{end} of {frame.header.block_count}")
    found = _extent_at(frame.header, block)
    if found.start != extent.start or found.count < extent.count:
        raise CorruptionError(place=f"{place} block {block}", what="block address", expected=extent, found=found)
    plain = frame.plain[block * BLOCK_SIZE : end * BLOCK_SIZE]
    return PlainPiece(extent, plain, version, frame.header.checksums[block:end])


def _extent_at(header: FrameHeader, block: int) -> Extent:
    """Return the volume's blocks that lie in a row in the frame from `block` on, joined over touching extents."""
    start = end = -1
    before = 0
    for extent in header.extents:
        if start >= 0:
            if extent.start != end:
                break
            end = extent.end
        elif block < before + extent.count:
            start, end = extent.start + block - before, extent.end
        before += extent.count
    assert start >= 0
    return Extent(start, end - start)

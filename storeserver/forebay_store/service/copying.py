"""Reading blocks of a clone's origin and framing them anew, for the clone itself.

Everything is verified on the way: the frames that are read, and each plain block; damage ends the copy with an error.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from forebay_core.extents import Extent
from forebay_core.frame import FRAME_BLOCKS_MAX, FrameBuilder
from forebay_core.units import BLOCK_SIZE
from forebay_store.engine.background import Copied, CopyOrigin
from forebay_store.engine.flatten import wanted
from forebay_store.engine.ports import Index, SegmentBackend, SegmentMissingError
from forebay_store.engine.reading import check_frames, plan_entries
from forebay_store.engine.volumes import find_volume
from forebay_store.format.part import parse_part
from forebay_wire.pieces import PlainPiece, plain_pieces

MOVED_MAX: Final = 8
"""How often blocks may move away while they are copied; then a segment is truly missing."""


def copy_origin(index: Index, backend: SegmentBackend, command: CopyOrigin) -> Copied | None:
    """Return the frames of one step; None if the volume is gone or has no origin.

    Raises:
        ForebayError: the origin can't be read.
    """
    for _ in range(MOVED_MAX):
        try:
            return _copy(index, backend, command)
        except SegmentMissingError:
            continue  # The cleaner moved the blocks and deleted the segment behind the view: look where they are now.
    return _copy(index, backend, command)


def _copy(index: Index, backend: SegmentBackend, command: CopyOrigin) -> Copied | None:
    with index.view() as reader:
        row = find_volume(reader, command.volume)
        if row is None or not row.flattening:
            return None
        entries, next_start = wanted(reader, row, command.start)
    plan = plan_entries(entries)
    buffers = [backend.read_range(read.segment.text, read.offset, read.size) for read in plan.reads]
    payload = b"".join(check_frames(plan, buffers))
    place = f"origin of volume {row.name}"
    extents = [Extent(entry.start, entry.length) for entry in entries]
    frames = build_frames(plain_pieces(plan.pieces, payload, extents, place=place))
    table = parse_part(b"".join(frames), place=place, stored=False)
    return Copied(tuple(frames), table, next_start)


def build_frames(pieces: Sequence[PlainPiece]) -> list[bytes]:
    """Return frames of the blocks of pieces, each as full as it gets."""
    builder = FrameBuilder()
    blocks = enumerate(_blocks(pieces))
    return [
        _build(builder, [block for _, block in group])
        for _, group in groupby(blocks, lambda numbered: numbered[0] // FRAME_BLOCKS_MAX)
    ]


def _blocks(pieces: Sequence[PlainPiece]) -> Iterator[tuple[int, memoryview, int]]:
    """Yield address, content and checksum of each block."""
    for piece in pieces:
        assert piece.plain is not None
        for index, checksum in enumerate(piece.checksums):
            yield piece.extent.start + index, piece.plain[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE], checksum


def _build(builder: FrameBuilder, blocks: Sequence[tuple[int, memoryview, int]]) -> bytes:
    extents: list[Extent] = []
    for lba, _, _ in blocks:
        if extents and extents[-1].end == lba:
            extents[-1] = Extent(extents[-1].start, extents[-1].count + 1)
        else:
            extents.append(Extent(lba, 1))
    plain = b"".join(content for _, content, _ in blocks)
    return builder.build(extents, plain, [checksum for _, _, checksum in blocks])

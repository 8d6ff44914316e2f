"""Copying what lives in old segments: which blocks those are, checked on the way, in new frames.

Pure but for the ports: it reads segments and views of the index, and returns records for the log. What changes
after a view was taken is told apart when the record is applied (`forebay_store.engine.moving`).

Invariants:
    a block is copied only if its frame's checksums and its own are right; damage is reported and stays where it is.
    frames that are encrypted are copied whole, as they are.
Crash: before the records are durable nothing has happened.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent
from forebay_core.frame import FRAME_BLOCKS_MAX, FrameBuilder, FrameHeader, check_stored, decode_header, open_frame
from forebay_core.units import BLOCK_SIZE
from forebay_store.engine.finding import Found, live_entries
from forebay_store.engine.live import find_segment
from forebay_store.engine.ports import Index, SegmentBackend
from forebay_store.engine.reading import holds
from forebay_store.engine.replay import LoadedSegment, load_segment
from forebay_store.format.entries import HeadEntry
from forebay_store.format.layout import PlacedRecord, payload_of
from forebay_store.format.records import FRAME_RECORDS
from forebay_store.format.segment import SegmentName
from forebay_store.format.space_records import OLDS_MAX, CleanedPart, Move, pack_moves, pack_names
from forebay_store.limits import COPY_BLOCKS_MAX, COPY_SIZE, MOVES_MAX


class DamagedPlace(NamedTuple):
    """Bytes of a segment that are not as they were written; `size` 0: to its end."""

    segment: SegmentName
    offset: int
    size: int
    text: str


class Copied(NamedTuple):
    """What a step copied: records with their payloads, and damage that it met."""

    parts: list[tuple[CleanedPart, bytes]]
    damaged: list[DamagedPlace]
    size: int


class _Piece(NamedTuple):
    """Plain blocks, or a whole encrypted frame, and the entries that show them."""

    start: int
    plain: bytes
    checksums: tuple[int, ...]
    old: SegmentName
    old_offset: int
    entries: list[HeadEntry]
    whole: FrameHeader | None


@dataclass(slots=True)
class _Copy:
    """What is copied so far, by volume."""

    pieces: dict[bytes, list[_Piece]] = field(default_factory=dict)
    written: dict[SegmentName, int] = field(default_factory=dict)
    damaged: list[DamagedPlace] = field(default_factory=list)
    size_max: int = COPY_SIZE
    block_count: int = 0
    stored_size: int = 0

    @property
    def full(self) -> bool:
        """Whether one step has enough."""
        return self.block_count >= COPY_BLOCKS_MAX or self.stored_size >= self.size_max


def copy_live(
    index: Index,
    backend: SegmentBackend,
    victims: Sequence[SegmentName],
    *,
    store: bytes,
    builder: FrameBuilder,
    size_max: int = COPY_SIZE,
) -> Copied:
    """Copy what lives in these segments, up to about `size_max` bytes. A view is open only while entries are sought:
    as long as one is, LMDB reuses nothing.
    """
    copy = _Copy(size_max=size_max)
    for name in victims[:OLDS_MAX]:
        if copy.full:
            break
        try:
            segment = load_segment(backend.read(name.text), name, store=store)
        except CorruptionError as error:
            copy.damaged.append(DamagedPlace(name, 0, 0, str(error)))
            continue
        with index.view() as reader:
            row = find_segment(reader, name)
            found = {} if row is None else live_entries(reader, segment, row.live)
        copy.written[name] = 0 if row is None else row.written
        for placed in segment.decoded.placed:
            if isinstance(placed.record, FRAME_RECORDS) and not copy.full:
                _copy_payload(copy, segment, placed, placed.record.volume, found)
    parts = [part for volume, pieces in sorted(copy.pieces.items()) for part in _parts(copy, volume, pieces, builder)]
    return Copied(parts, copy.damaged, sum(len(payload) for _, payload in parts))


def _copy_payload(copy: _Copy, segment: LoadedSegment, placed: PlacedRecord, volume: bytes, found: Found) -> None:
    payload = payload_of(segment.buffer, placed)
    offset = 0
    while offset < payload.nbytes and not copy.full:
        frame_offset = placed.payload_offset + offset
        place = f"{segment.place} offset {frame_offset}"
        try:
            header = decode_header(payload, offset, place=place)
        except CorruptionError as error:
            copy.damaged.append(DamagedPlace(segment.name, frame_offset, payload.nbytes - offset, str(error)))
            return  # Where the next frame begins is no longer known.
        entries = found.get(frame_offset)
        if entries:
            frame = payload[offset : offset + header.size]
            try:
                pieces = _pieces(header, frame, segment.name, frame_offset, entries, place)
            except CorruptionError as error:
                copy.damaged.append(DamagedPlace(segment.name, frame_offset, header.size, str(error)))
            else:
                copy.pieces.setdefault(volume, []).extend(pieces)
                copy.block_count += header.block_count
                copy.stored_size += header.size
        offset += header.size


def _pieces(
    header: FrameHeader, frame: memoryview, segment: SegmentName, offset: int, entries: list[HeadEntry], place: str
) -> list[_Piece]:
    """Return what entries show of a frame, after checking all of it."""
    for entry in entries:
        if not holds(header.extents, entry):
            raise CorruptionError(
                place=place, what="frame extents", expected=Extent(entry.start, entry.length), found=header.extents
            )
    stored = check_stored(header, frame, place=place)
    if header.cipher != 0:
        return [_Piece(header.extents[0].start, bytes(frame), header.checksums, segment, offset, entries, header)]
    plain = open_frame(header, stored, place=place)
    shown: dict[tuple[int, int], list[HeadEntry]] = {}
    for entry in entries:
        shown.setdefault((entry.start, entry.length), []).append(entry)
    return [
        _Piece(
            start,
            plain[alike[0].block * BLOCK_SIZE : (alike[0].block + length) * BLOCK_SIZE],
            header.checksums[alike[0].block : alike[0].block + length],
            segment,
            offset,
            alike,
            None,
        )
        for (start, length), alike in sorted(shown.items())
    ]


def _parts(
    copy: _Copy, volume: bytes, pieces: list[_Piece], builder: FrameBuilder
) -> Iterator[tuple[CleanedPart, bytes]]:
    """Yield the records of one volume's pieces."""
    olds = sorted({piece.old for piece in pieces})
    indexes = {old: index for index, old in enumerate(olds)}
    written = max(copy.written[old] for old in olds)
    frames: list[bytes] = []
    moves: list[Move] = []
    size = 0
    for group in _groups(sorted(pieces, key=lambda piece: piece.start)):
        fresh = sum(len(piece.entries) for piece in group)
        if moves and len(moves) + fresh > MOVES_MAX:
            yield CleanedPart(volume, written, pack_names(olds), pack_moves(moves)), b"".join(frames)
            frames, moves, size = [], [], 0
        whole = group[0].whole
        frame = group[0].plain if whole is not None else _build(builder, group)
        moves += _moves(group, indexes, size, len(frame))
        frames.append(frame)
        size += len(frame)
    yield CleanedPart(volume, written, pack_names(olds), pack_moves(moves)), b"".join(frames)


def _groups(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Group sorted pieces into frames: no block twice, no more than a frame holds, an encrypted one alone."""
    group: list[_Piece] = []
    count = end = 0
    for piece in pieces:
        length = len(piece.checksums)
        alone = piece.whole is not None or (group and group[0].whole is not None)
        if group and (alone or piece.start < end or count + length > FRAME_BLOCKS_MAX):
            yield group
            group, count = [], 0
        group.append(piece)
        count += length
        end = piece.start + length
    if group:
        yield group


def _build(builder: FrameBuilder, group: Sequence[_Piece]) -> bytes:
    extents: list[Extent] = []
    for piece in group:
        length = len(piece.checksums)
        if extents and extents[-1].end == piece.start:
            extents[-1] = Extent(extents[-1].start, extents[-1].count + length)
        else:
            extents.append(Extent(piece.start, length))
    plain = b"".join(piece.plain for piece in group)
    return builder.build(extents, plain, [one for piece in group for one in piece.checksums])


def _moves(
    group: Sequence[_Piece], indexes: dict[SegmentName, int], frame_offset: int, frame_size: int
) -> Iterator[Move]:
    frame_blocks = sum(len(piece.checksums) for piece in group)
    at = 0
    for piece in group:
        for entry in piece.entries:
            yield Move(
                entry.start,
                entry.version,
                entry.length,
                piece.old_offset,
                frame_offset,
                frame_size,
                entry.block,
                entry.block if piece.whole is not None else at,
                frame_blocks,
                indexes[piece.old],
            )
        at += len(piece.checksums)

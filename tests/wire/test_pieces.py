"""Answers of a store: right ones become plain blocks, wrong ones never do."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from forebay_core.checksums import block_checksums
from forebay_core.errors import CorruptionError, ForebayError, ProtocolError
from forebay_core.extents import Extent
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE
from forebay_wire.limits import PIECES_MAX
from forebay_wire.messages import HOLE_FRAME, PIECE_DTYPE
from forebay_wire.pieces import mapped_pieces, plain_pieces

Row = tuple[int, int, int, int, int]
PLACE = "store s volume v"


def blocks(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count * BLOCK_SIZE)


def frame(extents: Sequence[tuple[int, int]], seed: int = 1) -> bytes:
    found = [Extent(*extent) for extent in extents]
    return FrameBuilder().build(found, blocks(sum(extent.count for extent in found), seed))


def table(*rows: Row) -> bytes:
    return np.array(list(rows), PIECE_DTYPE).tobytes()


def test_pieces_come_out_plain_with_version_and_checksums() -> None:
    payload = frame([(10, 2), (20, 4)], seed=1) + frame([(12, 1)], seed=2)
    pieces = table((10, 2, 0, 0, 7), (12, 1, 1, 0, 8), (13, 3, HOLE_FRAME, 0, 0), (21, 2, 0, 3, 7))
    answer = plain_pieces(pieces, payload, [Extent(10, 6), Extent(21, 2)], place=PLACE)
    first, second = blocks(6, 1), blocks(1, 2)
    assert [piece.extent for piece in answer] == [Extent(10, 2), Extent(12, 1), Extent(13, 3), Extent(21, 2)]
    assert [piece.version for piece in answer] == [7, 8, 0, 7]
    assert answer[0].plain == first[: 2 * BLOCK_SIZE]
    assert answer[1].plain == second
    assert answer[2].plain is None
    assert answer[3].plain == first[3 * BLOCK_SIZE : 5 * BLOCK_SIZE]
    assert list(answer[3].checksums) == block_checksums(first)[3:5].tolist()


def test_a_piece_may_run_over_touching_extents_of_its_frame() -> None:
    answer = plain_pieces(table((5, 4, 0, 0, 1)), frame([(5, 2), (7, 2)]), [Extent(5, 4)], place=PLACE)
    assert answer[0].plain == blocks(4)


@pytest.mark.parametrize(
    ("rows", "frames", "requested"),
    [
        ([], [], [(0, 1)]),
        ([(0, 1, HOLE_FRAME, 0, 0)], [], [(0, 2)]),
        ([(0, 2, HOLE_FRAME, 0, 0)], [], [(0, 1)]),
        ([(1, 1, HOLE_FRAME, 0, 0)], [], [(0, 2)]),
        ([(0, 1, HOLE_FRAME, 0, 0), (2, 1, HOLE_FRAME, 0, 0)], [], [(0, 3)]),
        ([(0, 1, HOLE_FRAME, 0, 0), (0, 1, HOLE_FRAME, 0, 0)], [], [(0, 2)]),
        ([(0, 1, HOLE_FRAME, 0, 0)], [], [(0, 1), (5, 1)]),
        ([(0, 1, HOLE_FRAME, 0, 0), (5, 1, HOLE_FRAME, 0, 0)], [], [(0, 1)]),
        ([(0, 0, HOLE_FRAME, 0, 0), (0, 1, HOLE_FRAME, 0, 0)], [], [(0, 1)]),
        ([(0, 1, HOLE_FRAME, 3, 0)], [], [(0, 1)]),
        ([(0, 1, 0, 0, 0)], [], [(0, 1)]),
        ([(0, 1, 1, 0, 0)], [(0, 1)], [(0, 1)]),
        ([(0, 2, 0, 0, 0)], [(0, 1)], [(0, 2)]),
        ([(0, 1, 0, 1, 0)], [(0, 1)], [(0, 1)]),
        ([(0, 1, HOLE_FRAME, 0, 0)], [(0, 1)], [(0, 1)]),
        ([(0, 1, 0, 0, 0)], [(0, 1), (0, 1)], [(0, 1)]),
        ([(2**64 - 1, 1, HOLE_FRAME, 0, 0)], [], [(2**64 - 1, 1)]),
    ],
)
def test_an_answer_to_another_question_is_refused(
    rows: list[Row], frames: list[tuple[int, int]], requested: list[tuple[int, int]]
) -> None:
    payload = b"".join(frame([extent]) for extent in frames)
    with pytest.raises(ProtocolError):
        plain_pieces(table(*rows), payload, [Extent(*extent) for extent in requested], place=PLACE)


@pytest.mark.parametrize("held", [[(4, 1)], [(6, 1)], [(5, 1), (7, 1)], [(4, 1), (5, 1)]])
def test_a_frame_that_holds_other_blocks_is_corruption(held: list[tuple[int, int]]) -> None:
    count = sum(extent[1] for extent in held)
    with pytest.raises(CorruptionError, match="block address in store s volume v frame 0"):
        plain_pieces(table((5, count, 0, 0, 1)), frame(held), [Extent(5, count)], place=PLACE)


def test_no_flipped_bit_of_a_frame_gets_through() -> None:
    payload = frame([(5, 1)])
    pieces = table((5, 1, 0, 0, 1))
    for at in (*range(100), *range(100, len(payload), 97)):
        for bit in range(8):
            bad = bytearray(payload)
            bad[at] ^= 1 << bit
            with pytest.raises(CorruptionError):
                plain_pieces(pieces, bad, [Extent(5, 1)], place=PLACE)


def test_a_payload_cut_anywhere_is_refused() -> None:
    payload = frame([(5, 1)])
    for size in (*range(100), len(payload) - 1):
        with pytest.raises(ForebayError):
            plain_pieces(table((5, 1, 0, 0, 1)), payload[:size], [Extent(5, 1)], place=PLACE)


def test_more_frames_than_blocks_are_refused_before_they_are_opened() -> None:
    small = FrameBuilder().build([Extent(0, 16)], bytes(16 * BLOCK_SIZE))
    with pytest.raises(ProtocolError, match="more than 1 frames"):
        plain_pieces(table((0, 1, 0, 0, 1)), small * 1000, [Extent(0, 1)], place=PLACE)


def test_tables_of_odd_or_absurd_size_are_refused() -> None:
    row = table((0, 1, HOLE_FRAME, 0, 0))
    with pytest.raises(ProtocolError, match="malformed"):
        plain_pieces(row[:-1], b"", [Extent(0, 1)], place=PLACE)
    with pytest.raises(ProtocolError, match="longer than"):
        plain_pieces(row * (PIECES_MAX + 1), b"", [Extent(0, 1)], place=PLACE)


def test_a_map_may_end_early_but_has_no_gaps() -> None:
    answer = mapped_pieces(table((4, 2, 0, 0, 9), (6, 10, HOLE_FRAME, 0, 0)), Extent(4, 100))
    assert [(piece.extent, piece.hole) for piece in answer] == [(Extent(4, 2), False), (Extent(6, 10), True)]
    bad: list[list[Row]] = [
        [],
        [(5, 1, 0, 0, 0)],
        [(4, 1, 0, 0, 0), (6, 1, 0, 0, 0)],
        [(4, 101, 0, 0, 0)],
        [(4, 1, 3, 0, 0)],
        [(4, 1, 0, 1, 0)],
        [(4, 0, 0, 0, 0)],
    ]
    for rows in bad:
        with pytest.raises(ProtocolError):
            mapped_pieces(table(*rows), Extent(4, 100))

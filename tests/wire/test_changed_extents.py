"""Pages of changes: what a store may answer to Changed."""

import numpy as np
import pytest

from forebay_core.errors import ProtocolError
from forebay_core.extents import Extent
from forebay_core.units import LBA_MAX
from forebay_wire.messages import HOLE_FRAME, ORIGIN_FRAME, PIECE_DTYPE
from forebay_wire.pieces import DATA_FRAME, changed_extents, changed_pieces


def page(*rows: tuple[int, int]) -> bytes:
    return np.array([(start, count, 0, 0, 1) for start, count in rows], PIECE_DTYPE).tobytes()


def test_a_page_lists_extents_between_where_it_starts_and_goes_on() -> None:
    assert changed_extents(page((5, 1), (6, 2), (9, 1)), 5, 10) == [Extent(5, 1), Extent(6, 2), Extent(9, 1)]
    assert changed_extents(page((LBA_MAX, 1)), 0, -1) == [Extent(LBA_MAX, 1)]
    assert changed_extents(b"", 7, -1) == []


@pytest.mark.parametrize(
    ("rows", "start", "next_start"),
    [
        ([(4, 1)], 5, -1),
        ([(5, 2), (6, 1)], 5, -1),
        ([(6, 1), (5, 1)], 5, -1),
        ([(5, 0)], 5, -1),
        ([(5, 3)], 5, 7),
        ([], 5, 5),
        ([], 5, 4),
        ([], 5, LBA_MAX + 2),
        ([(LBA_MAX, 2)], 5, -1),
    ],
)
def test_a_page_that_breaks_the_rules_is_refused(rows: list[tuple[int, int]], start: int, next_start: int) -> None:
    with pytest.raises(ProtocolError):
        changed_extents(page(*rows), start, next_start)


def test_a_piece_tells_what_its_blocks_are_now() -> None:
    rows = [(1, 2, DATA_FRAME, 0, 9), (3, 4, HOLE_FRAME, 0, 8), (9, 1, ORIGIN_FRAME, 0, 7)]
    found = changed_pieces(np.array(rows, PIECE_DTYPE).tobytes(), 0, -1)
    assert found == [(Extent(1, 2), DATA_FRAME), (Extent(3, 4), HOLE_FRAME), (Extent(9, 1), ORIGIN_FRAME)]
    with pytest.raises(ProtocolError, match="has frame 5"):
        changed_pieces(np.array([(1, 2, 5, 0, 9)], PIECE_DTYPE).tobytes(), 0, -1)

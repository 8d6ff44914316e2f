"""An image to lay over a volume: parts with the blocks that it holds, as data or as holes; the rest is left alone.

A raw image holds every block. Of a qcow2 image the clusters that are not allocated are left out, see `qcow2_map`; its
content was made a raw file before. Blocks of zeros become holes, wherever they come from.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from forebay_core.checksums import zero_blocks
from forebay_core.extents import Extent, from_blocks, merge
from forebay_core.frame import FRAME_BLOCKS_MAX, FrameBuilder
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_tools.qcow2_map import Run
from forebay_tools.source import PART_SIZE, Part, RawSource, build_chosen_frames
from forebay_wire.limits import HOLES_PER_PART_MAX

WINDOW_BLOCKS: Final = MIB // BLOCK_SIZE
"""Blocks looked at in one step: few, since scattered blocks have a window each."""

PART_HOLES_MAX: Final = 16384
assert WINDOW_BLOCKS % FRAME_BLOCKS_MAX == 0
assert PART_HOLES_MAX + WINDOW_BLOCKS + 1 <= HOLES_PER_PART_MAX


class Overlay:
    """The blocks of a raw file that belong to the image. `runs` gives them anew each time; `finish` checks at the end
    that the image is what it was when they were first given."""

    def __init__(self, raw: RawSource, runs: Callable[[], Iterator[Run]], finish: Callable[[], None]) -> None:
        self._raw = raw
        self._runs = runs
        self._finish = finish
        self.size = raw.size
        self.padding_size = raw.padding_size
        self.data_size = sum(run.extent.count for run in runs() if not run.zero) * BLOCK_SIZE

    def parts(self) -> Iterator[Part]:
        """Return the parts in order. Reads and computes: for a thread of its own.

        Raises:
            ForebayError: the image changed under our hands.
            OSError: it can't be read.
        """
        gathered = _Gathered(self._raw)
        for extent, zero in self._runs():
            for piece in (extent,) if zero else _by_windows(extent):
                gathered.add(piece, zero=zero)
                if gathered.full:
                    yield gathered.take()
        rest = gathered.take()
        if rest.frames or rest.holes:
            yield rest
        self._raw.check_unchanged()
        self._finish()


class _Gathered:
    """What the next part will hold: frames and holes, and the pieces of one window of which neither were made yet."""

    def __init__(self, raw: RawSource) -> None:
        self._raw = raw
        self._builder = FrameBuilder()
        self._buffer = memoryview(bytearray(WINDOW_BLOCKS * BLOCK_SIZE))
        self._window = 0
        self._pieces: list[Extent] = []
        self._frames: list[bytes] = []
        self._holes: list[Extent] = []
        self._blocks = 0
        self._done = 0

    @property
    def full(self) -> bool:
        """Whether another window might not fit."""
        return (
            self._blocks + 2 * WINDOW_BLOCKS > PART_SIZE // BLOCK_SIZE
            or len(self._holes) + WINDOW_BLOCKS >= PART_HOLES_MAX
        )

    def add(self, piece: Extent, *, zero: bool) -> None:
        """Add blocks behind those before: zeros, or blocks of one window to be read."""
        if zero:
            self._holes.append(piece)
            return
        window = piece.start // WINDOW_BLOCKS
        if window != self._window:
            self._build()
            self._window = window
        self._pieces.append(piece)

    def take(self) -> Part:
        """Return all as a part and begin the next."""
        self._build()
        part = Part(self._frames, self._blocks, self._done, merge(self._holes))
        self._frames, self._holes, self._blocks = [], [], 0
        return part

    def _build(self) -> None:
        first = self._window * WINDOW_BLOCKS
        chosen = np.zeros(WINDOW_BLOCKS, bool)
        for piece in self._pieces:
            at = piece.start - first
            self._raw.fill(self._buffer[at * BLOCK_SIZE : (at + piece.count) * BLOCK_SIZE], piece.start * BLOCK_SIZE)
            chosen[at : at + piece.count] = True
            self._done += piece.count * BLOCK_SIZE
        if self._pieces:
            zeros = zero_blocks(self._buffer)
            data = np.flatnonzero(chosen & ~zeros)
            self._blocks += build_chosen_frames(self._builder, first, self._buffer, data, self._frames)
            self._holes += from_blocks(np.flatnonzero(chosen & zeros).astype(np.uint64) + np.uint64(first))
        self._pieces = []


def raw_runs(raw: RawSource) -> Iterator[Run]:
    """Yield all blocks of a raw image: what may hold data, and the holes of the file between."""
    at = 0
    for start, end in raw.runs():
        if at < start:
            yield Run(_blocks(at, start), zero=True)
        yield Run(_blocks(start, end), zero=False)
        at = end
    if at < raw.size:
        yield Run(_blocks(at, raw.size), zero=True)


def _blocks(start: int, end: int) -> Extent:
    return Extent(start // BLOCK_SIZE, (end - start) // BLOCK_SIZE)


def _by_windows(extent: Extent) -> Iterator[Extent]:
    at = extent.start
    while at < extent.end:
        end = min(extent.end, (at // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS)
        yield Extent(at, end - at)
        at = end

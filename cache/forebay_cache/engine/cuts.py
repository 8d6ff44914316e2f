"""One closed cut: which changes it holds, and how far handing it over has come.

It holds of each block the newest version in (`floor`, `last_version`], which lies where the map says, or where a place
is held if the block was changed again since. Closing one costs nothing: `runs` lists blocks that may have such a
version, and they are merged and looked up chunk by chunk while the cut is sent. What is built goes upstream in slices,
each of them a part of the cut.

Invariants:
    Every block with a version in the range is listed; of others, which were trimmed since they were listed, nothing
    is found.
    `holes` is what was trimmed in the range and not written since, within it.
    Slices are numbered in the order they are sent, `sent` of them so far; each is sent once per attempt.
Crash: nothing of this is kept but the change that it ends with, if that is a snapshot or a resize, and the versions
that it needs; the rest belongs to the cut behind it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from forebay_cache.engine.dirty import MergedRuns
from forebay_cache.engine.holes import Hole, HoleMap
from forebay_cache.engine.ports import CutIdentity, U64Array
from forebay_cache.format.cut_end import CutEnd
from forebay_core.extents import EXTENT_DTYPE, Extent
from forebay_core.frame import FRAME_BLOCKS_MAX, FRAME_HEADER
from forebay_core.units import BLOCK_SIZE, Buffer, Version

HOLE_SIZE: Final = EXTENT_DTYPE.itemsize
FRAME_OF_BLOCK_SIZE_MAX: Final = BLOCK_SIZE + 128
assert FRAME_HEADER.size + EXTENT_DTYPE.itemsize + 8 <= 128


class Slice(NamedTuple):
    """What goes in one message; `size` in bytes is what limits count."""

    frames: Sequence[Buffer]
    holes: Sequence[Extent]
    plain_size: int
    size: int
    chunk_blocks: int = 0  # of the chunk it was built with; only the last slice of a chunk has them


class Cut:
    """One closed cut. Nobody sends it before `begin`."""

    __slots__ = (
        "_holes_left",
        "_next_hole",
        "block_count",
        "building",
        "closed_position",
        "closed_wall_ns",
        "durable",
        "end",
        "floor",
        "holes",
        "identity",
        "last_version",
        "limited_blocks",
        "merging",
        "next_block",
        "opened_ns",
        "parts",
        "ready",
        "resting",
        "runs",
        "sent",
        "slices",
        "staged",
    )

    def __init__(
        self,
        runs: list[U64Array],
        holes: HoleMap,
        *,
        floor: Version,
        last_version: Version,
        end: CutEnd | None,
        opened_ns: int,
        closed_wall_ns: int,
        closed_position: int,
    ) -> None:
        assert floor < last_version
        self.runs = runs
        self.block_count = sum(run.size for run in runs)  # at most
        self.holes = holes
        self.floor = floor
        self.last_version = last_version
        self.end = end
        self.opened_ns = opened_ns  # when its oldest change came
        self.closed_wall_ns = closed_wall_ns
        self.closed_position = closed_position  # in the log: it and the cuts before hold all that was logged before
        self.durable = False  # a sync has covered it; it is not sent before
        self.resting = True  # nobody sends it: others come first, or the volume failed, was refused or detached
        self.ready: deque[Slice] = deque()  # built, not sent yet
        self.parts = self.slices = self.limited_blocks = 0  # what it has of the bounds in Destage
        self.identity: CutIdentity | None = None
        self._rewind()

    def begin(self, identity: CutIdentity, *, acknowledged: Version) -> None:
        """Hand it over from the start, under another attempt; what is upstream already is left out."""
        self.identity = identity
        self.floor = max(self.floor, acknowledged)
        self.resting = False
        self._rewind()

    def _rewind(self) -> None:
        self.ready.clear()
        self.merging = MergedRuns(self.runs)
        self._holes_left: Iterator[Hole] = iter(self.holes)
        self._next_hole = next(self._holes_left, None)
        self.next_block = 0
        self.sent = self.staged = 0
        self.building = 0

    @property
    def attempt(self) -> int:
        """The random number of this try at handing it over; 0 before the first."""
        return self.identity.attempt if self.identity is not None else 0

    @property
    def has_unbuilt(self) -> bool:
        """Whether blocks or holes are left for another chunk."""
        return self.merging.left or self._next_hole is not None

    @property
    def size_left_max(self) -> int:
        """Bytes that the rest may come to, built."""
        return (self.block_count - self.next_block) * FRAME_OF_BLOCK_SIZE_MAX + len(self.holes) * HOLE_SIZE

    @property
    def is_staged(self) -> bool:
        """Whether the store has every part: at least one, unless the cut is only its end."""
        if self.has_unbuilt or self.building or self.ready or self.staged != self.sent:
            return False
        return self.sent > 0 or self.end is not None

    def next_lbas(self, count: int) -> U64Array:
        """Take the next blocks that may have a version in the cut."""
        lbas = self.merging.take(count)
        self.next_block += lbas.size
        return lbas

    def next_holes(self, count: int) -> list[Extent]:
        """Take the next holes."""
        if self._next_hole is None:
            return []
        found = [self._next_hole, *islice(self._holes_left, count - 1)]
        self._next_hole = next(self._holes_left, None)
        # What a resize added reads as zeros since, and the store knows that by the size.
        own = self.end.version if self.end is not None else 0
        return [
            Extent(hole.start, hole.end - hole.start)
            for hole in found
            if hole.version > self.floor and hole.version != own
        ]


def whole_slice(frames: Sequence[Buffer], holes: Sequence[Extent], plain_size: int) -> Slice:
    """Return all of a chunk as one slice."""
    return Slice(frames, holes, plain_size, sum(map(len, frames)) + len(holes) * HOLE_SIZE)


def slices(frames: Sequence[Buffer], holes: Sequence[Extent], *, plain_size: int, size_max: int) -> Iterator[Slice]:
    """Yield frames and holes in slices of at most `size_max` bytes, or of one frame or hole; at least one slice."""
    per_slice = max(1, size_max // HOLE_SIZE)
    for at in range(0, len(holes), per_slice):
        some = holes[at : at + per_slice]
        yield Slice((), some, 0, len(some) * HOLE_SIZE)
    group: list[Buffer] = []
    size = 0
    total = sum(map(len, frames))
    for frame in frames:
        if group and size + len(frame) > size_max:
            yield Slice(group, (), plain_size * size // total, size)
            group, size = [], 0
        group.append(frame)
        size += len(frame)
    if group or not holes:
        yield Slice(group, (), plain_size * size // total if total else 0, size)


def blocks_of(size_max: int, chunk_blocks_max: int) -> int:
    """Return how many blocks to build at a time so that their frames can be cut into slices of `size_max` bytes.

    Frames are whole in a slice. So while one of 16 blocks is larger than a slice, no more blocks than fit even if each
    gets a frame of its own; else several slices' worth, because compressed they may be one.
    """
    if size_max < 2 * FRAME_BLOCKS_MAX * BLOCK_SIZE:
        return max(1, size_max // FRAME_OF_BLOCK_SIZE_MAX)
    return min(chunk_blocks_max, 4 * size_max // BLOCK_SIZE)

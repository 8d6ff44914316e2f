"""One closed cut: which versions it holds, and how far handing it over has come.

Blocks are built into frames chunk by chunk; what is built goes upstream in slices, each of them a part of the cut.

Invariants:
    `lbas` and `versions` never change; `pinned[i]` is the place of version `versions[i]` once it was overwritten.
    Slices are numbered in the order they are sent, `sent` of them so far; each is sent once per attempt.
Crash: nothing of this is kept; what the store did not acknowledge belongs to the open cut again.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.ports import CutIdentity, U64Array
from forebay_core.extents import EXTENT_DTYPE, Extent
from forebay_core.frame import FRAME_BLOCKS_MAX, FRAME_HEADER
from forebay_core.units import BLOCK_SIZE, Buffer, make_version

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
    """One closed cut."""

    __slots__ = (
        "building",
        "closed_position",
        "durable",
        "first_version",
        "holes",
        "identity",
        "last_version",
        "lba_view",
        "lbas",
        "limited_blocks",
        "next_block",
        "next_hole",
        "opened_ns",
        "parts",
        "pinned",
        "ready",
        "resting",
        "sent",
        "slices",
        "staged",
        "versions",
    )

    def __init__(
        self,
        identity: CutIdentity,
        lbas: U64Array,
        versions: U64Array,
        holes: list[Extent],
        *,
        opened_ns: int,
        closed_position: int,
    ) -> None:
        self.identity = identity
        self.lbas = lbas
        self.lba_view = lbas.data
        self.versions = versions
        self.last_version = make_version(identity.epoch, identity.last)
        self.first_version = int(versions.min()) if versions.size else self.last_version
        self.pinned: npt.NDArray[np.int64] = np.full(lbas.size, -1, np.int64)
        self.holes = holes
        self.closed_position = closed_position  # in the log: it and the cuts before hold all that was logged before
        self.opened_ns = opened_ns  # when its oldest change came
        self.durable = False  # a sync has covered it; it is not sent before
        self.resting = False  # nobody sends it: the volume failed, was refused or detached
        self.ready: deque[Slice] = deque()  # built, not sent yet
        self.parts = self.slices = self.limited_blocks = 0  # what it has of the bounds in Destage
        self.begin(identity)

    def begin(self, identity: CutIdentity) -> None:
        """Hand it over from the start, under another attempt."""
        self.identity = identity
        self.ready.clear()
        self.next_block = self.next_hole = 0
        self.sent = self.staged = 0
        self.building = 0

    @property
    def block_count(self) -> int:
        """Blocks with data."""
        return int(self.lbas.size)

    @property
    def has_unbuilt(self) -> bool:
        """Whether blocks or holes are left for another chunk."""
        return self.next_block < self.block_count or self.next_hole < len(self.holes)

    @property
    def size_left_max(self) -> int:
        """Bytes that the rest may come to, built."""
        return (self.block_count - self.next_block) * FRAME_OF_BLOCK_SIZE_MAX + len(self.holes) * HOLE_SIZE

    @property
    def is_staged(self) -> bool:
        """Whether the store has every part, at least one."""
        return not (self.has_unbuilt or self.building or self.ready) and self.staged == self.sent > 0

    def index_of(self, lba: int) -> int:
        """Return where a block stands in the cut, or -1."""
        index = bisect_left(self.lba_view, lba)
        return index if index < len(self.lba_view) and self.lba_view[index] == lba else -1


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

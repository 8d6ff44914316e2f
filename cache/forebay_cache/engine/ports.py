"""What the engine asks of its shell: a device, a store upstream, and a builder of frames.

A call is a command; its `done` is the completion and runs on the engine's thread, later or (only where said so) at
once. The shell decides nothing: no retry that could reorder, no write that was not asked for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from forebay_cache.format.cut_end import CutEnd
from forebay_core.extents import Extent
from forebay_core.units import Buffer, Epoch, Version, VolumeId
from forebay_core.units import Sequence as ChangeSequence

U64Array = npt.NDArray[np.uint64]


class Device(Protocol):
    """The SSD. Offsets and sizes are whole blocks of 4096 bytes."""

    def read_now(self, offset: int, size: int) -> Buffer | None:
        """Return the bytes if that needs no waiting (they are in memory), else None; never an error."""

    def read_into_now(self, offset: int, view: memoryview) -> bool:
        """Fill the view if that needs no waiting; False leaves anything in it."""

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        """Read, waiting elsewhere if need be; None is a read error."""

    def write(self, offset: int, buffers: Sequence[Buffer], done: Callable[[bool], None]) -> None:
        """Write the buffers one behind the other; they stay unchanged until `done`. False: failed.

        Writes are carried out in the order given.
        """

    def sync(self, done: Callable[[bool], None]) -> None:
        """fdatasync; covers every write whose `done` ran before this call. At most one is under way."""


class FetchedPiece(NamedTuple):
    """One part of a fetch's answer; `plain` None: a hole, or with `origin` what reads as the clone's origin does.
    Plain blocks were compared with their checksums."""

    extent: Extent
    plain: Buffer | None
    version: Version
    checksums: Sequence[int]
    origin: bool = False


class ChangedPage(NamedTuple):
    """What changed of a volume: all of its blocks below `next_start` that did, from the block that was asked for on;
    `next_start` is -1 at the end."""

    extents: Sequence[Extent]
    next_start: int


class CutIdentity(NamedTuple):
    """Which cut a part belongs to."""

    volume: VolumeId
    epoch: Epoch
    attempt: int
    first: ChangeSequence
    last: ChangeSequence


class UpstreamRefusal(NamedTuple):
    """The store's final no. `code` as in forebay_wire.messages; FENCED, PARTS_MISSING, OUT_OF_ORDER, CORRUPT, ..."""

    code: str
    text: str


class Upstream(Protocol):
    """The store. It reconnects and repeats for as long as needed: a dead network is a late `done`, never an error.

    A full disk of the store is waited out as well.
    """

    def fetch(
        self,
        volume: VolumeId,
        extents: Sequence[Extent],
        min_version: Version,
        done: Callable[[Sequence[FetchedPiece] | UpstreamRefusal], None],
    ) -> None:
        """Read at most READ_BLOCKS_MAX blocks in sorted extents; the pieces cover them exactly, in order."""

    def allocation(
        self,
        volume: VolumeId,
        extent: Extent,
        done: Callable[[Sequence[FetchedPiece] | UpstreamRefusal], None],
        *,
        through: bool,
    ) -> None:
        """Ask which blocks are holes: pieces from the start of `extent` on, with `plain` b"" for data, None for a
        hole. May end before the extent does. `through`: of a clone's blocks that are not its own say what its origin
        has there, instead of that they are the origin's."""

    def changed(
        self, volume: VolumeId, since: VolumeId, start: int, done: Callable[[ChangedPage | UpstreamRefusal], None]
    ) -> None:
        """Ask what was written or trimmed from block `start` on since the snapshot with the id `since`."""

    def stage(
        self,
        cut: CutIdentity,
        index: int,
        frames: Sequence[Buffer],
        holes: Sequence[Extent],
        done: Callable[[UpstreamRefusal | None], None],
    ) -> None:
        """Stage one part durably."""

    def commit(
        self,
        cut: CutIdentity,
        part_count: int,
        committed_ns: int,
        end: CutEnd | None,
        done: Callable[[UpstreamRefusal | None], None],
    ) -> None:
        """Commit, with the snapshot or resize that is the cut's last change; None: the store stands at the end of the
        cut, and nowhere else."""


class BuildRequest(NamedTuple):
    """Blocks of one part, sorted by lba: where they lie on the device and what they must sum to."""

    lbas: U64Array
    offsets: U64Array
    checksums: U64Array


class BuiltPart(NamedTuple):
    """Frames of a part, or the blocks that are corrupt on the device."""

    frames: Sequence[Buffer]
    holes: Sequence[Extent]  # blocks that were all zeros
    plain_size: int  # bytes of blocks inside the frames
    corrupt: Sequence[int]  # lbas whose bytes do not match their checksum; then there are no frames
    found: Sequence[int]  # what those summed to


class Builder(Protocol):
    """Reads blocks from the device, compares them with their checksums and makes frames, off the engine's thread."""

    def build(self, request: BuildRequest, done: Callable[[BuiltPart | None], None]) -> None:
        """None: the device could not be read."""

"""What a front (NBD, later FUSE) sees of the cache: volumes that answer block requests by callback.

A callback may come before the call returns (a hit in memory) or later, in any order between requests. Ranges are
checked by the front: every call lies inside the volume, `length` is positive, and offsets need no alignment.
Payloads and read buffers are never copied per block: a payload must stay unchanged until its reply.
"""

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from forebay_core.units import Buffer


class IoError(enum.IntEnum):
    """Outcome of a request; fronts translate it to their own numbers."""

    OK = 0
    IO = 5  # checksum error with no other copy, or the volume stopped
    READ_ONLY = 1
    SHUTDOWN = 108
    NO_SPACE = 28


class Chunk(NamedTuple):
    """Consecutive bytes of a read answer; `buffer` is None for zeros that a sparse answer may leave out."""

    length: int
    buffer: Buffer | None


class Allocation(NamedTuple):
    """Consecutive bytes with one allocation state. A true `hole` always reads as zeros."""

    length: int
    hole: bool


class Change(NamedTuple):
    """Consecutive bytes that changed, or that did not."""

    length: int
    changed: bool


Reply = Callable[[IoError], None]
ReadReply = Callable[[IoError, Sequence[Chunk]], None]
AllocationReply = Callable[[IoError, Sequence[Allocation]], None]
ChangesReply = Callable[[IoError, Sequence[Change]], None]


class FrontVolume(Protocol):
    """One attached volume, shared by all connections to it."""

    @property
    def name(self) -> str:
        """Export name: the volume's, or `volume@snapshot`."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Whether writes, trims and zeroes are refused."""

    def read(self, offset: int, length: int, reply: ReadReply) -> None:
        """Read; the chunks cover `length` exactly."""

    def write(self, offset: int, payload: Buffer, fua: bool, reply: Reply) -> None:
        """Write; replied when it would survive kill -9, with `fua` when it would survive a power cut."""

    def flush(self, reply: Reply) -> None:
        """Make every write acknowledged so far, on any connection, survive a power cut."""

    def trim(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        """Discard the whole blocks inside; they read as zeros from the reply on. Costs no time per byte."""

    def write_zeroes(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        """Zero every byte; whole blocks become holes. Costs no time per byte."""

    def prefetch(self, offset: int, length: int, reply: Reply) -> None:
        """Bring the blocks into the cache."""

    def allocation(self, offset: int, length: int, reply: AllocationReply) -> None:
        """Tell data from holes; the answer covers at least the first byte and may end before or behind `length`."""

    def tracked(self) -> Sequence[str]:
        """Return the names of the snapshots since which changes can be told, sorted."""

    def changes(self, snapshot: str, offset: int, length: int, reply: ChangesReply) -> None:
        """Tell what was written or discarded since a snapshot; the answer covers what one about allocation does."""

    def kick(self) -> None:
        """End of a batch of requests: submit what was gathered."""

    def connected(self) -> None:
        """A client opened the volume."""

    def disconnected(self) -> None:
        """A client is gone."""


class Exports(Protocol):
    """The volumes that are attached now."""

    def find(self, name: str) -> FrontVolume | None:
        """Return the volume of this export name; the empty name is the only volume, if there is exactly one."""

    def names(self) -> Sequence[str]:
        """Return the export names, sorted."""

"""What the cleaner does next: delete dead segments, take a checkpoint first, copy what lives in poor ones, or rest.

Pure: one look at the segments' sizes and live bytes goes in, one step comes out. Deleting costs nothing but needs a
checkpoint behind the segment's last change; a checkpoint costs its own size, so it waits until what it lets go is
large against it; copying costs what lives, so victims are chosen by cost and benefit: what is won times how old it is
(old blocks will go on living, so what is won there stays won), by what is read and written.

Invariants:
    a segment is deleted only if nothing refers to it and a complete, durable checkpoint shows its last change.
    a segment that is damaged or holds parts of unfinished cuts is no victim.
    damage behind the checkpoint, or in it, is followed by a new one: else nobody could make the index anew.
"""

from collections.abc import Sequence, Set
from typing import Final, NamedTuple

from forebay_core.units import BLOCK_SIZE, KIB
from forebay_store.format.segment import SegmentName
from forebay_store.limits import COPY_SIZE, DELETED_NAMES_MAX

SMALL_SIZE: Final = 256 * KIB
"""Segments below it are small: idle times leave many of them, and they are merged."""

CHECKPOINT_SPARE: Final = 4 * BLOCK_SIZE
"""Bytes on the disk that a checkpoint always costs: its segment, and the one that says what is deleted."""


class SegmentSpace(NamedTuple):
    """One segment as the index counts it."""

    name: SegmentName
    size: int
    live: int
    written: int  # bytes of all segments before its blocks were written: their age
    cost: float = 1.0  # bytes that a copy takes for each live one: records and lists of moves come on top

    @property
    def needed(self) -> float:
        """Bytes that a copy of what lives would take."""
        return min(self.live * self.cost, self.size)

    @property
    def disk_size(self) -> int:
        """Bytes that it takes on a disk of whole blocks."""
        return -(-self.size // BLOCK_SIZE) * BLOCK_SIZE


class Space(NamedTuple):
    """What one look at the index found."""

    segments: Sequence[SegmentSpace]
    covered: SegmentName  # the newest segment that the last complete checkpoint shows
    applied: SegmentName
    checkpoint_size: int  # bytes of the next checkpoint, about
    barred: Set[SegmentName]  # no victims: damaged, or with parts of unfinished cuts
    damaged: Set[SegmentName] = frozenset()


class DiskRoom(NamedTuple):
    """Bytes of the disk under the store."""

    free: int
    total: int


class Pressure(NamedTuple):
    """How hard to clean. Ratios are of bytes on the disk over live ones."""

    ratio_max: float  # copy while there is more
    live_share_max: float  # but nothing that lives to a larger share
    checkpoint_share: float  # a checkpoint may cost that share of what it lets go
    small_count_max: int  # merge when there are more small segments


BUSY: Final = Pressure(1.33, 0.85, 0.2, 64)
"""While clients write: as late as the space allows, because what is not copied yet may die by itself."""

RESTING: Final = Pressure(1.12, 0.92, 0.5, 8)
"""While nobody writes, or when asked to clean: until hardly anything is won."""


class DeleteSegments(NamedTuple):
    """Nothing refers to these and the checkpoint covers them."""

    names: list[SegmentName]
    size: int


class TakeCheckpoint(NamedTuple):
    """It lets dead segments go."""


class CopyBlocks(NamedTuple):
    """Copy what lives in these."""

    names: list[SegmentName]


class Rest(NamedTuple):
    """Nothing is worth it."""


Step = DeleteSegments | TakeCheckpoint | CopyBlocks | Rest


def next_step(space: Space, pressure: Pressure) -> Step:
    """Return what to do next."""
    dead = [one for one in space.segments if one.live == 0 and one.name <= space.applied]
    free = [one for one in dead if one.name <= space.covered][:DELETED_NAMES_MAX]
    if free:
        return DeleteSegments([one.name for one in free], sum(one.size for one in free))
    if any(one.name in space.damaged and one.name > space.covered for one in space.segments):
        return TakeCheckpoint()
    dead_size = sum(one.disk_size for one in dead)
    if dead_size > space.checkpoint_size / pressure.checkpoint_share + CHECKPOINT_SPARE:
        return TakeCheckpoint()
    victims = _victims(space, pressure, dead_size)
    return CopyBlocks(victims) if victims else Rest()


def _victims(space: Space, pressure: Pressure, dead_size: int) -> list[SegmentName]:
    """Return the segments to copy from: small ones if they are too many, else the best by cost and benefit."""
    living = [one for one in space.segments if one.live and one.name <= space.applied and one.name not in space.barred]
    small = [one for one in living if one.size < SMALL_SIZE]
    if len(small) > pressure.small_count_max:
        return _up_to_copy_size(small)
    size = sum(one.size for one in space.segments) - dead_size
    if size <= pressure.ratio_max * sum(one.needed for one in space.segments):
        return []
    now = max(one.written for one in space.segments)
    worth = [one for one in living if one.needed <= pressure.live_share_max * one.size]
    return _up_to_copy_size(sorted(worth, key=lambda one: (-_benefit(one, now), one.name)))


def _benefit(one: SegmentSpace, now: int) -> float:
    share = one.needed / one.size
    return (1 - share) * (now - one.written + SMALL_SIZE) / (1 + share)


def _up_to_copy_size(segments: Sequence[SegmentSpace]) -> list[SegmentName]:
    names: list[SegmentName] = []
    size = 0
    for one in segments:
        if names and size + one.live > COPY_SIZE:
            break
        names.append(one.name)
        size += one.live
    return names

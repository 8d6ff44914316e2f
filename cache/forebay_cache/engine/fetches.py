"""Fetches under way: blocks that reads miss are asked for once, in aligned units, and offered to the cache.

Invariants:
    What a read asks for is marked as asked for in its unit; `is_kept` marks what was to be brought into the cache.
    A block that was written or trimmed since its unit's fetch began, or that the cache knew better when it began, is
    in `touched`: what the fetch brings for it is given to those who waited before, never inserted, and no later read
    joins the unit for it.
    A unit is in `_units` exactly while its fetch is under way: one that no read may join any more is touched all the
    same. Reads join the newest unit of a key.
    Nothing newer than what the store acknowledged is inserted, where it would count as a change of ours, or given to
    anybody. The end of a closed cut may come before its acknowledgement: it is fetched again. Any other is no version
    of ours.
Crash: nothing is kept; a fetch that was under way never happened.
"""

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from forebay_cache.engine.ports import FetchedPiece, Upstream, UpstreamRefusal
from forebay_core.extents import Extent, from_blocks, merge
from forebay_core.units import BLOCK_SIZE, LBA_BITS
from forebay_wire import messages
from forebay_wire.limits import READ_BLOCKS_MAX

if TYPE_CHECKING:
    from forebay_cache.engine.admission import Admission
    from forebay_cache.engine.volume import CacheVolume

Arrived = Callable[[Sequence[FetchedPiece] | UpstreamRefusal], None]


class Purpose(enum.Enum):
    """What blocks are fetched for."""

    READ = "read"
    PASS = "pass"  # as part of a long sequential read: only what was used before is worth keeping
    KEEP = "keep"  # to have them in the cache
    AHEAD = "ahead"  # because they may be read next


class Unit:
    """One aligned run of blocks being fetched."""

    __slots__ = ("_asked", "_kept", "_passing", "ahead", "extent", "key", "touched", "volume", "waiting")

    def __init__(self, volume: "CacheVolume", key: int, extent: Extent, *, ahead: bool) -> None:
        self.volume = volume
        self.key = key
        self.extent = extent
        self.ahead = ahead  # begun for nobody but whoever comes next
        self.touched = self._asked = self._kept = self._passing = 0  # a bit for each block
        self.waiting: list[tuple[Extent, Arrived]] = []

    def ask(self, extent: Extent, arrived: Arrived, purpose: Purpose) -> None:
        """Tell somebody when these blocks are here."""
        self.waiting.append((extent, arrived))
        if purpose is Purpose.PASS:
            self._passing |= self._bits(extent)
        elif purpose is not Purpose.AHEAD:
            self._asked |= self._bits(extent)
        if purpose is Purpose.KEEP:
            self._kept |= self._bits(extent)

    def is_asked(self, lba: int) -> bool:
        """Whether somebody wants this block."""
        return bool(self._asked >> lba - self.extent.start & 1)

    def is_passing(self, lba: int) -> bool:
        """Whether this block is asked for as part of a long sequential read."""
        return bool(self._passing >> lba - self.extent.start & 1)

    def is_kept(self, lba: int) -> bool:
        """Whether this block was to be brought into the cache."""
        return bool(self._kept >> lba - self.extent.start & 1)

    def touch(self, extent: Extent) -> None:
        """These blocks changed."""
        self.touched |= self._bits(extent)

    def touches(self, extent: Extent) -> bool:
        """Whether a block of the extent changed since the fetch began."""
        return self.touched & self._bits(extent) != 0

    def untouched(self) -> list[Extent]:
        """Return the blocks that did not change."""
        start = self.extent.start
        return from_blocks([start + bit for bit in range(self.extent.count) if not self.touched >> bit & 1])

    def used(self, pieces: Sequence[FetchedPiece]) -> list[FetchedPiece]:
        """Return what of the pieces is to be kept or given out."""
        if not pieces:
            return []
        wanted = [*self.untouched(), *(extent for extent, _ in self.waiting)]
        return [part for extent in wanted for part in clip(pieces, extent)]

    def _bits(self, extent: Extent) -> int:
        common = self.extent.intersect(extent)
        return 0 if common is None else ((1 << common.count) - 1) << common.start - self.extent.start


class Fetches:
    """All units under way. `admission` knows what need not be fetched, and gets each untouched piece that arrives;
    `later` calls after a while."""

    def __init__(
        self,
        upstream: Upstream,
        unit_blocks: int,
        admission: "Admission",
        *,
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        assert READ_BLOCKS_MAX % unit_blocks == 0
        self._upstream = upstream
        self._unit_blocks = unit_blocks
        self._admission = admission
        self._later = later
        self._units: dict[int, list[Unit]] = {}
        self.under_way = 0
        self.fetched_blocks = 0  # that were no holes

    def want(self, volume: "CacheVolume", extent: Extent, arrived: Arrived, *, purpose: Purpose = Purpose.READ) -> int:
        """Fetch the blocks of an extent that is in neither cache nor hole map.

        `arrived` runs once for each unit that the extent touches, later, with pieces clipped to the extent, or with
        a refusal. Returns how many times it will run.
        """
        fresh: list[Unit] = []
        count = 0
        for key, whole in self._units_of(volume, extent):
            wanted = extent.intersect(whole)
            assert wanted is not None
            under_way = self._units.setdefault(key, [])
            if not under_way or under_way[-1].touches(wanted):
                under_way.append(Unit(volume, key, whole, ahead=purpose is Purpose.AHEAD))
                fresh.append(under_way[-1])
            under_way[-1].ask(wanted, arrived, purpose)
            count += 1
        self._touch_known(volume, fresh)
        for at in range(0, len(fresh), READ_BLOCKS_MAX // self._unit_blocks):
            self._fetch(volume, fresh[at : at + READ_BLOCKS_MAX // self._unit_blocks])
        return count

    def _touch_known(self, volume: "CacheVolume", fresh: Sequence[Unit]) -> None:
        """Look once for all fresh units what of them the cache knows better."""
        if not fresh:
            return
        size = self._unit_blocks
        units = {unit.extent.start: unit for unit in fresh}
        whole = Extent(fresh[0].extent.start, fresh[-1].extent.end - fresh[0].extent.start)
        for extent in self._admission.known(volume, whole):
            common = extent.intersect(whole)
            assert common is not None
            for start in range(common.start - common.start % size, common.end, size):
                if start in units:
                    units[start].touch(common)

    def touch(self, volume: "CacheVolume", extent: Extent) -> None:
        """Blocks were written or trimmed: what is under way for them is stale for everybody who comes later."""
        if not self._units:
            return
        if extent.count > self._unit_blocks * len(self._units):
            keys = [key for key, units in self._units.items() if units[0].volume is volume]
        else:
            keys = [key for key, _ in self._units_of(volume, extent)]
        for key in keys:
            for unit in self._units.get(key, ()):
                unit.touch(extent)

    def _units_of(self, volume: "CacheVolume", extent: Extent) -> Iterator[tuple[int, Extent]]:
        size = self._unit_blocks
        for start in range(extent.start - extent.start % size, extent.end, size):
            yield volume.key << LBA_BITS | start, Extent(start, min(size, volume.block_count - start))

    def _fetch(self, volume: "CacheVolume", units: list[Unit]) -> None:
        self.under_way += 1
        self._ask(volume, units)

    def _ask(self, volume: "CacheVolume", units: list[Unit]) -> None:
        extents = merge(unit.extent for unit in units)
        self._upstream.fetch(
            volume.id, extents, volume.acknowledged, lambda answer: self._arrived(volume, units, answer)
        )

    def _arrived(
        self, volume: "CacheVolume", units: list[Unit], answer: Sequence[FetchedPiece] | UpstreamRefusal
    ) -> None:
        if volume.error:
            answer = UpstreamRefusal(messages.FAILED, volume.error)
        if isinstance(answer, UpstreamRefusal):
            self.under_way -= 1
            for unit in units:
                self._refuse(unit, answer)
            return
        cursor = _Pieces(answer)
        early = []
        for unit in units:
            pieces = cursor.take(unit.extent)
            newer = unit.used([piece for piece in pieces if piece.version > volume.acknowledged])
            if not newer:
                self._settle(volume, unit, pieces)
            elif all(piece.version == volume.sent_version for piece in newer):
                early.append(unit)
            else:
                self._refuse(unit, _no_version_of_ours(volume, newer))
        if early:
            self._later(lambda: self._ask(volume, early))
        else:
            self.under_way -= 1

    def _settle(self, volume: "CacheVolume", unit: Unit, pieces: Sequence[FetchedPiece]) -> None:
        self._remove(unit)
        self.fetched_blocks += sum(piece.extent.count for piece in pieces if piece.plain is not None)
        for extent in [unit.extent] if not unit.touched else unit.untouched():
            for piece in clip(pieces, extent):
                self._admission.offer(unit, piece)
        for wanted, arrived in unit.waiting:
            arrived(clip(pieces, wanted))

    def _refuse(self, unit: Unit, refusal: UpstreamRefusal) -> None:
        self._remove(unit)
        for _, arrived in unit.waiting:
            arrived(refusal)

    def _remove(self, unit: Unit) -> None:
        self._units[unit.key].remove(unit)
        if not self._units[unit.key]:
            del self._units[unit.key]


class _Pieces:
    """Hands out the pieces of an answer unit by unit; both are sorted."""

    def __init__(self, pieces: Sequence[FetchedPiece]) -> None:
        self._pieces = pieces
        self._index = 0

    def take(self, extent: Extent) -> list[FetchedPiece]:
        first = self._index
        while self._index < len(self._pieces) and self._pieces[self._index].extent.start < extent.end:
            self._index += 1
        taken = clip(self._pieces[first : self._index], extent)
        if self._index > first and self._pieces[self._index - 1].extent.end > extent.end:
            self._index -= 1  # this one goes on in the next unit
        return taken


def clip(pieces: Sequence[FetchedPiece], extent: Extent) -> list[FetchedPiece]:
    """Return what of the pieces lies inside the extent; no bytes are copied."""
    clipped = []
    for piece in pieces:
        common = piece.extent.intersect(extent)
        if common is not None:
            clipped.append(piece if common == piece.extent else _slice(piece, common))
    return clipped


def _no_version_of_ours(volume: "CacheVolume", newer: Sequence[FetchedPiece]) -> UpstreamRefusal:
    piece = newer[0]
    return UpstreamRefusal(
        messages.CORRUPT,
        f"block {piece.extent.start} came with version {piece.version:#x}, but the store acknowledged no more than "
        f"{volume.acknowledged:#x}: the bytes are not of this volume's history here",
    )


def _slice(piece: FetchedPiece, part: Extent) -> FetchedPiece:
    if piece.plain is None:
        return piece._replace(extent=part)
    first = part.start - piece.extent.start
    plain = memoryview(piece.plain)[first * BLOCK_SIZE : (first + part.count) * BLOCK_SIZE]
    return FetchedPiece(part, plain, piece.version, piece.checksums[first : first + part.count])

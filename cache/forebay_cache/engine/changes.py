"""Telling what changed since a snapshot: what the store lists, and what is only here.

Invariants:
    A block that was written or trimmed since the snapshot, and answered before the question, is told as changed.
    A question about a snapshot that is not in the store yet is answered without it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from forebay_cache.engine.front import Change, ChangesReply, IoError
from forebay_cache.engine.limits import ALLOCATION_BLOCKS_MAX
from forebay_cache.engine.ports import ChangedPage, UpstreamRefusal
from forebay_core.extents import Extent, from_blocks
from forebay_core.units import BLOCK_SHIFT, LBA_BITS, Version, VolumeId
from forebay_wire import messages

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume


class Tracked(NamedTuple):
    """A snapshot since which changes can be told: its id, and the version of the change that it is."""

    id: VolumeId
    version: Version


class Changes:
    """Answers for all volumes."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine

    def changes(self, volume: "CacheVolume", name: str, offset: int, length: int, reply: ChangesReply) -> None:
        """See FrontVolume.changes. Looks at no more than ALLOCATION_BLOCKS_MAX blocks at a time."""
        snapshot = volume.find_tracked(name)
        if snapshot is None or volume.error or self._engine.failed:
            reply(IoError.IO, ())
            return
        start = offset >> BLOCK_SHIFT
        end = min((offset + length - 1 >> BLOCK_SHIFT) + 1, start + ALLOCATION_BLOCKS_MAX)
        extent = Extent(start, end - start)
        stored = volume.acknowledged
        here = self._newer(volume, extent, max(snapshot.version, stored))
        if snapshot.version > stored:
            reply(IoError.OK, _shape(here, extent, offset))
            return

        def answered(answer: ChangedPage | UpstreamRefusal) -> None:
            if isinstance(answer, UpstreamRefusal) and answer.code == messages.HISTORY_GONE:
                answer = ChangedPage([extent], -1)  # nobody knows: copy everything
            if isinstance(answer, UpstreamRefusal):
                if answer.code == messages.NO_SUCH_SNAPSHOT and volume.known_snapshots.get(name) == snapshot:
                    del volume.known_snapshots[name]
                self._engine.read_refused(volume, answer)
            if isinstance(answer, UpstreamRefusal) or volume.error:
                reply(IoError.IO, ())
                return
            known = extent if answer.next_start < 0 else Extent(start, min(end, answer.next_start) - start)
            # A cut that went over meanwhile is in one of the three: what was here before, there, or here now.
            reply(IoError.OK, _shape([*answer.extents, *here, *self._newer(volume, known, stored)], known, offset))

        self._engine.upstream.changed(volume.id, snapshot.id, start, answered)

    def _newer(self, volume: "CacheVolume", extent: Extent, version: Version) -> list[Extent]:
        """Return what of the extent has a newer version here."""
        if not volume.has_changes:
            return []
        places = self._engine.map.find_run(volume.key << LBA_BITS | extent.start, extent.count)
        newer = (places >= 0) & (self._engine.map.version_array.take(np.maximum(places, 0)) > np.uint64(version))
        found = from_blocks((np.flatnonzero(newer) + extent.start).astype(np.uint64))
        holes = volume.holes.overlapping(extent)
        return found + [Extent(hole.start, hole.end - hole.start) for hole in holes if hole.version > version]


def _shape(changed: Sequence[Extent], extent: Extent, offset: int) -> list[Change]:
    """Return runs that cover an extent, from `offset` on, which lies in its first block."""
    runs: list[Change] = []
    end = offset
    for one in sorted(changed):
        common = one.intersect(extent)
        if common is None or common.end << BLOCK_SHIFT <= end:
            continue
        start = max(end, common.start << BLOCK_SHIFT)
        if start > end:
            runs.append(Change(start - end, False))
        end = common.end << BLOCK_SHIFT
        runs.append(Change(end - start, True))
    if end < extent.end << BLOCK_SHIFT:
        runs.append(Change((extent.end << BLOCK_SHIFT) - end, False))
    return runs

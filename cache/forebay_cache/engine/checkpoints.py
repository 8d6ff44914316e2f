"""Writing checkpoints: chunk by chunk while the log goes on, so nobody waits for one.

A checkpoint is fuzzy: what it holds of a place may be newer than the log position that replay starts from, never
older; replaying what came since makes it exact. The two areas are used in turn.

A chunk of places that shows a block newer than its volume's row in the same checkpoint is marked dirty. What becomes
dirty later has a record behind the checkpoint, so marked chunks and replay together know all that is not upstream.

Invariants:
    The header of an area is wiped, durably, before anything else in the area is overwritten: a header that is there
    vouches for its whole area, and damage behind it is bit rot.
    None begins while clean entries of the one before are still being loaded: it would forget them.
    None begins while there are more holes than its area takes; what replay brings back may be more than ever was known.
    The header is written when a sync has covered all chunks, and with them every record that a chunk shows.
    `replay_position` is that of the older of the two checkpoints on the device: either may be needed.
Crash: a checkpoint without its header never was.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.holes import Hole
from forebay_cache.engine.limits import (
    CHECKPOINT_CHUNKS_PER_STEP,
    CHECKPOINT_LOG_BYTES_MAX,
    CHECKPOINT_RECORDS_MAX,
)
from forebay_cache.engine.log import LogPoint, Settled
from forebay_cache.engine.rates import Limit
from forebay_cache.format import checkpoint
from forebay_cache.format.checkpoint import CheckpointHeader, CheckpointLayout, Chunk, VolumeState
from forebay_core.checksums import checksum
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Buffer

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume


class Kept(NamedTuple):
    """A checkpoint that is on the device."""

    sequence: int
    area: int
    position: int
    zone: int


class _Pass:
    """One checkpoint in the making."""

    def __init__(
        self,
        area: int,
        sequence: int,
        point: LogPoint,
        volumes: list[VolumeState],
        place_count: int,
        limit: Limit,
        acknowledged: npt.NDArray[np.uint64],
        chunk_places: int,
    ) -> None:
        self.area = area
        self.sequence = sequence
        self.point = point
        maps = [volume.origins for volume in volumes if volume.origins is not None]
        parts: list[Buffer] = [checkpoint.encode_volumes(volumes)]
        for pages in maps:
            parts += [pages.states, *pages.bits]
        self.volume_table = _Joined(parts)
        self.origin_size = sum(pages.size for pages in maps)
        self.volume_count = len(volumes)
        self.hole_count = sum(volume.holes.size + volume.closed_holes.size for volume in volumes)
        self.end_count = sum(len(volume.ends) for volume in volumes)
        self.place_count = place_count
        self.limit = limit
        self.chunks: list[Chunk] = []
        self.sums: list[int] = []
        self.dirty = bytearray()
        self.acknowledged = acknowledged
        self.chunk_places = chunk_places
        self.settled: list[Settled] = []


class _Joined:
    """Buffers as if they were one behind the other, without a copy of all."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self._buffers = buffers
        self._starts = [0, *accumulate(len(buffer) for buffer in buffers)]

    def part(self, first: int, count: int) -> bytes:
        """Return `count` bytes from `first` on."""
        index = bisect_right(self._starts, first) - 1
        parts = []
        while count > 0:
            at = first - self._starts[index]
            parts.append(memoryview(self._buffers[index])[at : at + count])
            first, count, index = first + parts[-1].nbytes, count - parts[-1].nbytes, index + 1
        return b"".join(parts)


class Checkpoints:
    """Decides when, and writes one at a time."""

    def __init__(self, engine: "CacheEngine", kept: list[Kept]) -> None:
        self._engine = engine
        self._keep(sorted(kept, reverse=True)[:2])
        self._pass: _Pass | None = None
        self._writing = False
        self._wanted = False
        self._settled: list[Settled] = []
        self._log_bytes = 0
        self._records = 0
        zone_bytes = engine.zones.zone_blocks << 12
        self._log_bytes_max = min(CHECKPOINT_LOG_BYTES_MAX, max(1, engine.zones.zone_count // 16) * zone_bytes)

    def _keep(self, kept: list[Kept]) -> None:
        """These are on the device, the newest one first."""
        self._kept = kept
        self.replay_position = kept[-1].position  # zones opened at or behind it are needed for replay
        self.replay_zones = tuple(one.zone for one in kept)  # a replay would begin in one of them

    def want(self, settled: Settled | None = None) -> None:
        """Make a checkpoint soon; `settled` is told of one that begins after this call."""
        self._wanted = True
        if settled is not None:
            self._settled.append(settled)
        if self._engine.failed:
            self.fail()
        else:
            self.step()

    def fail(self) -> None:
        """The device failed: no checkpoint will be, and whoever waits for one is told."""
        waiting, self._settled = self._settled, []
        if self._pass is not None:
            waiting = self._pass.settled + waiting
            self._pass = None
        for settled in waiting:
            settled(False)

    def step(self) -> None:
        """Go one step further; called at every tick, and in a row while somebody wants the checkpoint."""
        engine = self._engine
        if self._writing or engine.failed or engine.loading.active or engine.use_counts.active:
            return
        if self._pass is None:
            if self._wanted or self._is_due():
                self._begin()
            return
        self._write_next(self._pass)

    def _is_due(self) -> bool:
        log = self._engine.log
        return (
            log.bytes_written - self._log_bytes >= self._log_bytes_max
            or log.records_written - self._records >= CHECKPOINT_RECORDS_MAX
        )

    def _begin(self) -> None:
        engine = self._engine
        if not engine.count_holes():
            return  # it is begun at a later tick, when some are upstream; no change that adds one is let in till then
        newest = self._kept[0]
        volumes = self._volume_states()
        used = engine.map.used_zones
        place_count = (int(used[-1]) + 1) * engine.zones.zone_blocks if used.size else 0
        area = 1 - newest.area
        self._pass = _Pass(
            area,
            newest.sequence + 1,
            engine.log.applied,
            volumes,
            place_count,
            engine.own_limit,
            np.append(engine.acknowledged_versions, np.uint64(0)),
            engine.settings.checkpoint_chunk_places,
        )
        layout = self._layout(self._pass)
        assert layout.size <= engine.superblock.checkpoint_size, "more holes than a checkpoint has room for"
        self._pass.chunks = layout.chunks
        self._log_bytes = engine.log.bytes_written
        self._records = engine.log.records_written
        self._wanted = False
        self._pass.settled, self._settled = self._settled, []
        self._write(self._pass, 0, [bytes(BLOCK_SIZE)], lambda: self._sync(self.step))

    def _layout(self, one: _Pass) -> CheckpointLayout:
        zone_count = self._engine.zones.zone_count
        counts = (one.place_count, zone_count, one.volume_count, one.hole_count)
        return CheckpointLayout(*counts, one.chunk_places, one.end_count, one.origin_size)

    def _volume_states(self) -> list[VolumeState]:
        """Return the rows of all volumes, with as much of the origin maps as there is room for."""
        engine = self._engine
        room = checkpoint.origin_size_max(engine.superblock.geometry.place_count)
        states = []
        for volume in engine.volumes.values():
            pages = None if volume.origins is None else volume.origins.freeze(room)
            room -= 0 if pages is None else pages.size
            states.append(_state_of(volume)._replace(origins=pages))
        return states

    def _write_next(self, one: _Pass) -> None:
        if len(one.sums) < len(one.chunks):
            first = one.chunks[len(one.sums)]
            blocks: list[Buffer] = []
            for chunk in one.chunks[len(one.sums) : len(one.sums) + CHECKPOINT_CHUNKS_PER_STEP]:
                blocks.append(self._content(one, chunk))
                one.sums.append(checksum(blocks[-1]))
            self._write(one, first.offset, blocks, self._written)
        else:
            table = checkpoint.encode_table(one.sums, bytes(one.dirty))
            self._write(
                one,
                self._layout(one).table.offset,
                [table],
                lambda: self._sync(lambda: self._write_header(one, checksum(table))),
            )

    def _content(self, one: _Pass, chunk: Chunk) -> bytes:
        engine = self._engine
        layout = self._layout(one)
        if chunk in layout.volume_chunks:
            return one.volume_table.part(chunk.first, chunk.count).ljust(chunk.padded_size, b"\0")
        part = slice(chunk.first, chunk.first + chunk.count)
        if chunk in layout.zone_chunks:
            zones = engine.zones
            rows = np.zeros(chunk.count, checkpoint.ZONE_DTYPE)
            rows["first_position"] = np.frombuffer(zones.first_positions, np.uint64)[part]
            rows["incarnation"] = np.frombuffer(zones.incarnations, np.uint32)[part]
            rows["state"] = np.frombuffer(zones.states, np.uint8)[part]
            return checkpoint.encode_zones(rows)
        table = engine.map
        linked = table.linked_mask(chunk.first, chunk.count)
        keys, versions = table.key_array[part], table.version_array[part]
        # A volume that came since the checkpoint began has 0 here, as the last element: all of it counts as dirty.
        known = np.minimum(keys >> np.uint64(LBA_BITS), np.uint64(one.acknowledged.size - 1)).astype(np.int64)
        newer = (keys != 0) & (versions > one.acknowledged.take(known))
        if table.hidden:  # a closed cut may need one: then it is newer, and listed as if it were held already
            linked &= ~table.hidden_mask(keys, np.arange(part.start, part.stop))
        one.dirty.append(bool(newer.any()))
        keys = np.where(linked | newer, keys, np.uint64(0))
        counts = np.where(linked, np.maximum(engine.policy.states[part], np.uint8(1)), np.uint8(0))
        return checkpoint.encode_places(keys, versions, table.checksum_array[part], counts)

    def _write(self, one: _Pass, offset: int, blocks: list[Buffer], then: Callable[[], None]) -> None:
        self._writing = True

        def done(ok: bool) -> None:
            self._writing = False
            if ok:
                then()
            else:
                self._engine.fail("a checkpoint could not be written")

        self._engine.device.write(self._engine.superblock.checkpoint_offsets[one.area] + offset, blocks, done)

    def _written(self) -> None:
        if self._wanted or (self._pass is not None and self._pass.settled):
            self.step()

    def _sync(self, then: Callable[[], None]) -> None:
        """Wait until all that was written is durable; nothing of the checkpoint is written meanwhile."""
        self._writing = True

        def durable(ok: bool) -> None:
            self._writing = False
            if ok:
                then()

        self._engine.log.barrier(durable)

    def _write_header(self, one: _Pass, table_xxh3: int) -> None:
        engine = self._engine
        header = CheckpointHeader(
            device=engine.superblock.device,
            sequence=one.sequence,
            log_position=one.point.position,
            previous_xxh3=one.point.chain,
            replay_zone=one.point.zone,
            replay_block=one.point.block,
            replay_incarnation=engine.zones.incarnations[one.point.zone],
            place_count=one.place_count,
            zone_count=engine.zones.zone_count,
            volume_count=one.volume_count,
            hole_count=one.hole_count,
            chunk_places=one.chunk_places,
            table_xxh3=table_xxh3,
            limit_average=one.limit.average,
            limit_peak=one.limit.peak,
            origin_size=one.origin_size,
            end_count=one.end_count,
        )
        block = checkpoint.encode_checkpoint_header(header)
        self._write(one, 0, [block], lambda: self._sync(lambda: self._complete(one)))

    def _complete(self, one: _Pass) -> None:
        self._keep([Kept(one.sequence, one.area, one.point.position, one.point.zone), self._kept[0]])
        self._pass = None
        for tell in one.settled:
            tell(True)
        self._engine.reclaim.kick()
        if self._wanted:
            self.step()


def _state_of(volume: "CacheVolume") -> VolumeState:
    """Return the volume as far as the log is applied: a snapshot that is on its way has a record behind."""
    ends = [end for end in volume.ends if end.version <= volume.applied]
    return VolumeState(
        volume.note()._replace(size=volume.size),
        volume.applied,
        volume.acknowledged,
        _rows(volume.holes),
        _rows(hole for cut in volume.lasting_cuts for hole in cut.holes),
        tuple(ends),
    )


def _rows(holes: Iterable[Hole]) -> checkpoint.RowArray:
    return np.array([(h.start, h.end - h.start, h.version) for h in holes], checkpoint.HOLE_DTYPE)

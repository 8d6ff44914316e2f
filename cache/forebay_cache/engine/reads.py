"""Reads: hits from the device, holes without it, misses through a fetch; every block is compared with its checksum.

Invariants:
    A read pins the zones it reads from until the bytes are there, so a place is not filled anew under it.
    A clean block that does not match its checksum leaves the map and is fetched again; a dirty one is an error.
    Where the device can't be read, each block is tried for itself, and the zone is not filled again until a restart.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from forebay_cache.engine.fetches import Purpose
from forebay_cache.engine.front import Chunk, IoError, ReadReply, Reply
from forebay_cache.engine.limits import PREFETCH_STEPS_PER_TURN
from forebay_cache.engine.ports import FetchedPiece, UpstreamRefusal
from forebay_cache.engine.ring import AHEAD, SPARE, Held
from forebay_cache.engine.runs import Run, join_runs
from forebay_core.checksums import U64Array, are_sound_fast, block_checksums, checksum
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX, Buffer
from forebay_wire import messages
from forebay_wire.limits import READ_BLOCKS_MAX

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume

_IN_BLOCK = BLOCK_SIZE - 1
_GONE = (messages.NO_SUCH_SNAPSHOT, messages.NO_SUCH_VOLUME)  # a read names an id, which is either's


class _Read:
    """One read whose parts arrive in any order; `parts` maps a first lba to count and bytes."""

    __slots__ = (
        "again",
        "extent",
        "failed",
        "length",
        "missing",
        "offset",
        "parts",
        "passing",
        "purpose",
        "repeated",
        "reply",
        "volume",
        "waiting",
    )

    def __init__(
        self,
        volume: "CacheVolume",
        extent: Extent,
        offset: int,
        length: int,
        reply: ReadReply,
        purpose: Purpose = Purpose.READ,
    ) -> None:
        self.volume = volume  # whom it was asked of; a part may come from what that one reads through to
        self.extent = extent
        self.offset = offset
        self.length = length
        self.reply = reply
        self.parts: dict[int, tuple[int, Buffer | None]] = {}
        self.purpose = purpose  # unless it is READ, what is cached need not be read
        self.passing = False  # see ReadAhead.passes
        self.missing = 0  # blocks that the store had to bring, now or before anybody asked
        self.waiting = 1
        self.failed = False
        self.again: Callable[[], None] | None = None  # what to do instead of answering
        self.repeated = False

    def arrived(self) -> None:
        """One of the parts that `waiting` counts is here; the last one answers."""
        self.waiting -= 1
        if self.waiting == 0:
            if self.again is not None:
                self.again()
            elif self.failed:
                self.reply(IoError.IO, ())
            else:
                self.reply(IoError.OK, self._chunks())

    def _chunks(self) -> list[Chunk]:
        chunks = []
        skip = self.offset & _IN_BLOCK
        left = self.length
        for lba in sorted(self.parts):
            count, buffer = self.parts[lba]
            length = min(left, (count << BLOCK_SHIFT) - skip)
            if buffer is not None and length != count << BLOCK_SHIFT:
                buffer = memoryview(buffer)[skip : skip + length]
            chunks.append(Chunk(length, buffer))
            left -= length
            skip = 0
        assert left == 0
        return chunks


class Reads:
    """Answers reads of all volumes."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self.corrupt_blocks = 0

    def read(self, volume: "CacheVolume", offset: int, length: int, reply: ReadReply) -> None:
        """See FrontVolume.read."""
        first = offset >> BLOCK_SHIFT
        count = (offset + length - 1 >> BLOCK_SHIFT) - first + 1
        if volume.error or self._engine.failed:
            reply(IoError.IO, ())
        elif count == 1:
            self._read_one(volume, first, offset, length, reply)
        else:
            self._read_many(volume, Extent(first, count), offset, length, reply)

    def prefetch(self, volume: "CacheVolume", offset: int, length: int, reply: Reply) -> None:
        """See FrontVolume.prefetch: fetch what is missing, step by step; the bytes go nowhere else."""
        if volume.error or self._engine.failed:
            reply(IoError.IO)
            return
        end = (offset + length - 1 >> BLOCK_SHIFT) + 1
        self._prefetch(volume, offset >> BLOCK_SHIFT, end, reply)

    def ahead(self, volume: "CacheVolume", extent: Extent, fetched: Callable[[], None]) -> None:
        """Fetch what is missing of an extent into memory, for whoever reads it next."""
        request = _Read(
            volume, extent, 0, extent.count << BLOCK_SHIFT, lambda _error, _chunks: fetched(), Purpose.AHEAD
        )
        self._begin(request)

    # --- hits -------------------------------------------------------------------------------------------------

    def _read_one(self, volume: "CacheVolume", lba: int, offset: int, length: int, reply: ReadReply) -> None:
        """Answer a read inside one block: the hottest path of the daemon."""
        engine = self._engine
        place = engine.map.find(volume.key << LBA_BITS | lba)
        if place < 0 and volume.source is not None:
            place = engine.sources.find(volume, lba)
        if place < 0:
            if not self._give_one(volume, lba, offset, length, reply):
                self._begin(_Read(volume, Extent(lba, 1), offset, length, reply))
            return
        buffer = engine.device.read_now(engine.zones_offset + (place << BLOCK_SHIFT), BLOCK_SIZE)
        if buffer is None:
            self._read_one_later(volume, place, offset, length, reply)
        elif checksum(buffer) == engine.map.checksums[place]:
            volume.hit_blocks += 1
            if not volume.temporary:
                engine.policy.hit(place)
            reply(IoError.OK, (_chunk(buffer, offset, length),))
        else:
            self._begin(_Read(volume, Extent(lba, 1), offset, length, reply))

    def _give_one(self, volume: "CacheVolume", lba: int, offset: int, length: int, reply: ReadReply) -> bool:
        """Answer a read inside one block that is held in memory, as `_begin` would; tell whether that was so."""
        engine = self._engine
        key = volume.key << LBA_BITS | lba
        held = engine.admission.ring.blocks.get(key)
        if held is None or engine.loading.active or checksum(held.plain) != held.checksum:
            return False
        passing = engine.read_ahead.passes(volume, lba, 1)
        if not volume.temporary:
            engine.policy.missed(key, 1, passes=passing)
        pool, plain = held.pool, held.plain
        if pool == AHEAD:
            volume.miss_blocks += 1
        else:
            volume.hit_blocks += 1
        engine.admission.take(key, [held], passing=passing)
        if pool in (AHEAD, SPARE):
            engine.read_ahead.missed(volume, lba, 1, 1)
        reply(IoError.OK, (_chunk(plain, offset, length),))
        return True

    def _read_one_later(self, volume: "CacheVolume", place: int, offset: int, length: int, reply: ReadReply) -> None:
        """Read one block that is not in memory; whatever is wrong with it is left to the long way."""
        engine = self._engine
        expected = engine.map.checksums[place]
        readers = engine.zones.readers
        zone = place // engine.zones.zone_blocks
        readers[zone] += 1

        def done(answer: Buffer | None) -> None:
            readers[zone] -= 1
            if answer is not None and checksum(answer) == expected:
                volume.hit_blocks += 1
                reply(IoError.OK, (_chunk(answer, offset, length),))
            else:
                self._begin(_Read(volume, Extent(offset >> BLOCK_SHIFT, 1), offset, length, reply))

        if not volume.temporary:
            engine.policy.hit(place)
        engine.device.read(engine.zones_offset + (place << BLOCK_SHIFT), BLOCK_SIZE, done)

    def _read_many(self, volume: "CacheVolume", extent: Extent, offset: int, length: int, reply: ReadReply) -> None:
        """Answer a read of several blocks, at once if all of them are here."""
        engine = self._engine
        key = volume.key << LBA_BITS | extent.start
        if volume.source is None:
            runs = engine.map.find_runs(key, extent.count)
        else:
            places = engine.sources.find_run(volume, extent, engine.map.find_run(key, extent.count))
            runs = join_runs(places.tolist())
        found = self._read_now(runs, extent.count)
        if found is None:
            self._begin(_Read(volume, extent, offset, length, reply))
            return
        volume.hit_blocks += extent.count
        if not volume.temporary:
            for place, count in runs:
                engine.policy.hit_run(place, count)
        skip = offset & _IN_BLOCK
        reply(IoError.OK, (Chunk(length, found[skip : skip + length]),))

    def _read_now(self, runs: Sequence[Run], count: int) -> memoryview | None:
        """Return the blocks of these runs, `count` in all, if they are cached, in memory and sound."""
        if any(place < 0 for place, _ in runs):
            return None
        engine = self._engine
        checksums, zones_offset, read_into_now = engine.map.checksums, engine.zones_offset, engine.device.read_into_now
        buffer = np.empty(count << BLOCK_SHIFT, np.uint8).data  # not zeroed: all of it is read into
        at = 0
        for place, run_count in runs:
            part = buffer[at : at + (run_count << BLOCK_SHIFT)]
            if not read_into_now(zones_offset + (place << BLOCK_SHIFT), part):
                return None
            if not are_sound_fast(part, checksums[place : place + run_count]):
                return None
            at += run_count << BLOCK_SHIFT
        return buffer

    def _begin(self, request: _Read) -> None:
        if request.purpose is Purpose.READ:
            request.passing = self._engine.read_ahead.passes(request.volume, request.extent.start, request.extent.count)
        self._collect(request.volume, request, request.extent, loaded=not self._engine.loading.active)
        if request.missing and request.purpose is Purpose.READ:
            extent = request.extent
            self._engine.read_ahead.missed(request.volume, extent.start, extent.count, request.missing)
        request.arrived()

    def _collect(self, volume: "CacheVolume", request: _Read, extent: Extent, *, loaded: bool) -> None:
        """Read an extent; `loaded`: all that the checkpoint says of it is in the map."""
        engine = self._engine
        at = extent.start
        for place, count in engine.map.find_runs(volume.key << LBA_BITS | at, extent.count):
            part = Extent(at, count)
            if place < 0:
                self._read_absent(volume, request, part, loaded=loaded)
            elif request.purpose is not Purpose.READ:
                request.parts[at] = (count, None)
            else:
                self._read_run(volume, request, part, place)
            at += count

    def _read_unloaded(self, volume: "CacheVolume", request: _Read, part: Extent) -> None:
        """Read blocks that may turn out to be cached: look again when that is known."""
        request.waiting += 1

        def known() -> None:
            if volume.error or self._engine.failed:
                request.failed = True
            else:
                self._collect(volume, request, part, loaded=True)
            request.arrived()

        self._engine.loading.want(volume.key << LBA_BITS | part.start, part.count, known)

    def _read_run(self, volume: "CacheVolume", request: _Read, part: Extent, place: int) -> None:
        """Read blocks that lie one behind the other on the device."""
        engine = self._engine
        request.volume.hit_blocks += part.count
        if not volume.temporary:
            engine.policy.hit_run(place, part.count)
        sums = engine.map.checksum_array[place : place + part.count].copy()
        offset = engine.zones_offset + (place << BLOCK_SHIFT)
        buffer = engine.device.read_now(offset, part.count << BLOCK_SHIFT)
        if buffer is not None and not _mismatches(buffer, sums):
            request.parts[part.start] = (part.count, buffer)
            return
        zone = place // engine.zones.zone_blocks
        engine.zones.readers[zone] += 1
        request.waiting += 1

        def done(answer: Buffer | None) -> None:
            engine.zones.readers[zone] -= 1
            if answer is None and part.count > 1:
                self._reread(volume, request, part)
                request.arrived()
                return
            bad = range(part.count) if answer is None else _mismatches(answer, sums)
            if answer is not None and not bad:
                request.parts[part.start] = (part.count, answer)
            else:
                self._repair(volume, request, part, place, answer, sums)
            request.arrived()

        engine.device.read(offset, part.count << BLOCK_SHIFT, done)

    def _reread(self, volume: "CacheVolume", request: _Read, part: Extent) -> None:
        """A run can't be read as a whole: read its blocks one by one, from wherever they are by now."""
        for lba in range(part.start, part.end):
            place = self._engine.map.find(volume.key << LBA_BITS | lba)
            if place >= 0:
                self._read_run(volume, request, Extent(lba, 1), place)
            else:
                self._read_absent(volume, request, Extent(lba, 1), loaded=not self._engine.loading.active)

    def _repair(
        self,
        volume: "CacheVolume",
        request: _Read,
        part: Extent,
        place: int,
        answer: Buffer | None,
        sums: U64Array,
    ) -> None:
        """Give out the good blocks of a run; forget clean bad ones and fetch them; fail on a dirty bad one."""
        bad = set(range(part.count) if answer is None else _mismatches(answer, sums))
        for i in range(part.count):
            lba = part.start + i
            if i not in bad:
                assert answer is not None
                block = memoryview(answer)[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT]
                request.parts[lba] = (1, block)
                continue
            self._replace(
                volume, request, lba, place + i, int(sums[i]), answer and memoryview(answer)[i << BLOCK_SHIFT :]
            )

    def _replace(
        self, volume: "CacheVolume", request: _Read, lba: int, place: int, expected: int, rest: Buffer | None
    ) -> None:
        """Get a block whose bytes at `place` are bad from wherever it may be good."""
        engine = self._engine
        key = volume.key << LBA_BITS | lba
        mapped = engine.map.find(key)
        block = Extent(lba, 1)
        if mapped < 0:
            self._read_absent(volume, request, block, loaded=True)
        elif mapped != place:
            self._read_run(volume, request, block, mapped)  # it was moved while it was read
        else:
            clean = engine.map.versions[place] <= volume.acknowledged
            found = checksum(memoryview(rest)[:BLOCK_SIZE]) if rest is not None else None
            engine.report_corruption(volume, lba, place, expected, found, clean=clean)
            self.corrupt_blocks += 1
            if found is None:
                engine.retire_zone(place // engine.zones.zone_blocks)
            if clean:
                engine.drop_block(key, place)
                self._read_absent(volume, request, block, loaded=True)
            else:
                request.failed = True

    # --- holes and misses -------------------------------------------------------------------------------------

    def _read_absent(self, volume: "CacheVolume", request: _Read, part: Extent, *, loaded: bool) -> None:
        """Read blocks that have no place: holes that we know, the rest from the origin or the store."""
        at = part.start
        for hole in volume.holes.overlapping(part):
            if hole.start > at:
                self._read_unknown(volume, request, Extent(at, hole.start - at), loaded=loaded)
            start = max(at, hole.start)
            end = min(hole.end, part.end)
            request.parts[start] = (end - start, None)
            if request.purpose is Purpose.READ:
                request.volume.hit_blocks += end - start
            at = end
        if at < part.end:
            self._read_unknown(volume, request, Extent(at, part.end - at), loaded=loaded)

    def _read_unknown(self, volume: "CacheVolume", request: _Read, part: Extent, *, loaded: bool) -> None:
        """Read blocks that are neither cached nor known holes: where the map says so they are the origin's."""
        fetch = self._fetch if loaded else self._read_unloaded
        at = part.start
        for run in volume.origins.overlapping(part) if volume.origins is not None else ():
            if run.start > at:
                fetch(volume, request, Extent(at, run.start - at))
            self._read_origin(volume, request, run)
            at = run.end
        if at < part.end:
            fetch(volume, request, Extent(at, part.end - at))

    def _read_origin(self, volume: "CacheVolume", request: _Read, part: Extent) -> None:
        """Read blocks that are the origin's; behind its end they are zeros."""
        source = volume.source
        if source is None or source.error:
            self._engine.report(f"volume {volume.name}: {source.error if source else 'the store names an origin'}")
            request.failed = True
            return
        end = max(part.start, min(part.end, source.block_count))
        if end > part.start:
            inside = Extent(part.start, end - part.start)
            self._collect(source, request, inside, loaded=not self._engine.loading.active)
        if end < part.end:
            request.parts[end] = (part.end - end, None)

    def _fetch(self, volume: "CacheVolume", request: _Read, part: Extent) -> None:
        """Read blocks that are not on the device: those that are held in memory from there, the rest from the store."""
        key = volume.key << LBA_BITS | part.start
        if request.purpose is Purpose.READ and not volume.temporary:
            self._engine.policy.missed(key, part.count, passes=request.passing)
        at = part.start
        for first, run in self._engine.admission.ring.runs(key, part.count):
            held = Extent(first & LBA_MAX, len(run))
            if held.start > at:
                self._ask(volume, request, Extent(at, held.start - at))
            self._give(volume, request, held, run)
            at = held.end
        if at < part.end:
            self._ask(volume, request, Extent(at, part.end - at))

    def _give(self, volume: "CacheVolume", request: _Read, part: Extent, run: list[Held]) -> None:
        """Answer with held blocks, if they are sound."""
        if request.purpose is Purpose.AHEAD:
            request.parts[part.start] = (part.count, None)
            return
        key = volume.key << LBA_BITS | part.start
        plain = run[0].plain if part.count == 1 else b"".join([held.plain for held in run])
        if block_checksums(plain).tolist() == [held.checksum for held in run]:
            request.parts[part.start] = (part.count, plain)
            ahead = sum(held.pool == AHEAD for held in run)  # they were fetched for this
            request.missing += sum(held.pool in (AHEAD, SPARE) for held in run)
            request.volume.miss_blocks += ahead
            request.volume.hit_blocks += part.count - ahead
            self._engine.admission.take(key, run, passing=request.passing)
            return
        self.corrupt_blocks += 1
        self._engine.report(f"volume {volume.name}: blocks {part.start} to {part.end - 1} went bad in memory")
        self._engine.admission.ring.forget(key, part.count)
        self._ask(volume, request, part)

    def _ask(self, volume: "CacheVolume", request: _Read, part: Extent) -> None:
        """Read blocks from the store."""
        request.missing += part.count
        if request.purpose is not Purpose.AHEAD:
            request.volume.miss_blocks += part.count

        def arrived(answer: Sequence[FetchedPiece] | UpstreamRefusal) -> None:
            if isinstance(answer, UpstreamRefusal):
                self._refused(volume, request, answer)
            else:
                for piece in answer:
                    if piece.origin:
                        self._read_origin(volume, request, piece.extent)
                    else:
                        request.parts[piece.extent.start] = (piece.extent.count, piece.plain)
            request.arrived()

        purpose = Purpose.PASS if request.passing else request.purpose
        request.waiting += self._engine.fetches.want(volume, part, arrived, purpose=purpose)

    def _refused(self, volume: "CacheVolume", request: _Read, refusal: UpstreamRefusal) -> None:
        """The store's no fails the request; but one that only an origin is gone is no end: its clones have all."""
        if request.purpose is Purpose.AHEAD:
            request.failed = True  # who reads it asks again, and is told
            return
        gone = volume.snapshot and refusal.code in _GONE
        if gone and self._engine.sources.gone(volume) and volume is not request.volume and not request.repeated:
            request.again = partial(self._begin_again, request)
        elif request.again is None:
            self._engine.read_refused(volume, refusal)
            request.failed = True

    def _begin_again(self, request: _Read) -> None:
        request.again = None
        request.repeated = True
        request.parts.clear()
        request.waiting = 1
        self._begin(request)

    def _prefetch(self, volume: "CacheVolume", start: int, end: int, reply: Reply) -> None:
        """Fetch what is missing of the blocks, a message's worth at a time; what is there is looked at in turns."""
        for _ in range(PREFETCH_STEPS_PER_TURN):
            if volume.error or self._engine.failed:
                reply(IoError.IO)
                return
            if start == end:
                reply(IoError.OK)
                return
            hole = volume.holes.find(start)
            if hole is not None:
                start = min(end, hole.end)
                continue
            extent = Extent(start, min(READ_BLOCKS_MAX, end - start))
            start = extent.end
            request = _Read(volume, extent, 0, extent.count << BLOCK_SHIFT, _to_nobody, Purpose.KEEP)
            self._collect(volume, request, extent, loaded=not self._engine.loading.active)
            if request.waiting > 1:
                request.reply = partial(self._prefetched, volume, start, end, reply)
                request.arrived()
                return
        self._engine.soon(lambda: self._prefetch(volume, start, end, reply))

    def _prefetched(
        self, volume: "CacheVolume", start: int, end: int, reply: Reply, error: IoError, _: Sequence[Chunk]
    ) -> None:
        if error == IoError.OK:
            self._prefetch(volume, start, end, reply)
        else:
            reply(error)


def _to_nobody(_error: IoError, _chunks: Sequence[Chunk]) -> None:
    """Take the answer to a read whose bytes nobody wants."""


def _chunk(block: Buffer, offset: int, length: int) -> Chunk:
    """Return what a request wants of one block."""
    if length == BLOCK_SIZE:
        return Chunk(length, block)
    skip = offset & _IN_BLOCK
    return Chunk(length, memoryview(block)[skip : skip + length])


def _mismatches(buffer: Buffer, sums: U64Array) -> list[int]:
    found: list[int] = np.flatnonzero(block_checksums(buffer) != sums).tolist()
    return found

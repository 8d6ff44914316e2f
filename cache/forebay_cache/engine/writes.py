"""Changes that guests ask for: writes, trims, zeroes, and the flush that makes them durable.

A change gets its version when it is appended, never while it waits. A partial block is read, merged and written as a
whole block, which is repeated if the block changed meanwhile; changes of other blocks never make it start over.

Invariants:
    `_reading` holds the merges whose block is being read; each change that is appended marks those that it touches.
    `_events` lists the extents of trims and zeroes that are appended but not applied, in log order.
    A request that waits for room holds nothing but its payload; waiting requests keep their order.
Crash: what was not applied was not acknowledged.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.front import Chunk, IoError, Reply
from forebay_cache.engine.limits import SWEEPS_MAX
from forebay_cache.engine.log import Batch, Settled
from forebay_cache.format import record
from forebay_core.checksums import block_checksums, checksum
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, Buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume

_IN_BLOCK = BLOCK_SIZE - 1


class Writes:
    """Appends changes to the log."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._waiting: dict[int, deque[_Parked]] = {}  # by volume key; none is empty
        self._merging: list[_Parked] = []  # wait until a change of their block is applied
        self._reading: list[_Merge] = []
        self._events: deque[tuple[int, Extent]] = deque()
        self._long_event_count = 0  # of them: those that are going to be swept

    # --- requests ---------------------------------------------------------------------------------------------

    def write(self, volume: "CacheVolume", offset: int, payload: Buffer, fua: bool, reply: Reply) -> None:
        """See FrontVolume.write; one whole block, which is the usual request, takes the short way."""
        engine = self._engine
        if (volume.error or volume.closing or volume.read_only or engine.failed) and self._refuse(volume, reply):
            return
        view = memoryview(payload)
        if view.nbytes == BLOCK_SIZE and not offset & _IN_BLOCK and (batch := self._open_batch(volume)) is not None:
            lba = offset >> BLOCK_SHIFT
            engine.log.add_write(batch, volume.key, lba, volume.next_version(), checksum(view))
            self._appended(batch, volume, lba, view, 1)
            if fua:
                batch.settled.append(self._settler(fua, reply))
            else:
                batch.replies.append(reply)
            if batch.room == 0:
                engine.log.seal_if_full()
            return
        settled = self._settler(fua, reply)
        act = self._write_unaligned if (offset | view.nbytes) & _IN_BLOCK else self._append
        if self._is_open(volume):
            act(volume, offset, view, settled)
        else:
            self._park(volume, settled, partial(act, volume, offset, view, settled))

    def trim(self, volume: "CacheVolume", offset: int, length: int, fua: bool, reply: Reply) -> None:
        """See FrontVolume.trim: the blocks that are only partly inside stay."""
        if self._refuse(volume, reply):
            return
        settled = self._settler(fua, reply)
        start = -(-offset >> BLOCK_SHIFT)
        extent = Extent(start, (offset + length >> BLOCK_SHIFT) - start)
        if extent.count > 0:
            self._in_turn(volume, settled, lambda: self._append_event(volume, record.TRIM, extent, settled))
        else:
            settled(True)

    def write_zeroes(self, volume: "CacheVolume", offset: int, length: int, fua: bool, reply: Reply) -> None:
        """See FrontVolume.write_zeroes."""
        if self._refuse(volume, reply):
            return
        settled = self._settler(fua, reply)
        self._in_turn(volume, settled, lambda: self._zero(volume, offset, length, settled))

    def flush(self, volume: "CacheVolume", reply: Reply) -> None:
        """See FrontVolume.flush: what was acknowledged is what is applied."""
        if volume.error or self._engine.failed:
            reply(IoError.IO)
        else:
            self._engine.log.flush(lambda ok: reply(IoError.OK if ok else IoError.IO))

    def resume(self) -> None:
        """There may be room again: carry on with waiting requests, those of each volume in order.

        A volume that has no room, or has failed, keeps nobody else waiting.
        """
        if not self._waiting:
            return
        for key in list(self._waiting):
            # Looking for room may free a zone at once, which resumes: then another turn of this loop has been here.
            queue = self._waiting.pop(key, None)
            if queue is None:
                continue
            for _ in range(len(queue)):
                volume = queue[0].volume
                if not (volume.refuses or self._engine.has_room(volume)):
                    break
                queue.popleft().go_on()
                if key in self._waiting:
                    break
            if key in self._waiting:  # what went on parked its rest, or itself anew: that comes first
                queue.extendleft(reversed(self._waiting.pop(key)))
            if queue:
                self._waiting[key] = queue
        self._engine.log.kick(patient=True)

    def is_waiting(self, volume_key: int) -> bool:
        """Tell whether requests of a volume wait for room."""
        return volume_key in self._waiting

    def applied(self) -> None:
        """Blocks were applied: merges that waited for them go on."""
        if self._merging:
            merging, self._merging = self._merging, []
            for parked in merging:
                parked.go_on()
            self._engine.log.kick()

    def fail(self) -> None:
        """The device failed: everybody who waits is told."""
        parked = [one for queue in self._waiting.values() for one in queue] + self._merging
        self._waiting.clear()
        self._merging.clear()
        for one in parked:
            one.settled(False)

    @property
    def event_count(self) -> int:
        """Trims and zeroes that are appended but not applied."""
        return len(self._events)

    def event_applied(self) -> None:
        """The oldest trim or zeroing is in the map."""
        _, extent = self._events.popleft()
        self._long_event_count -= self._engine.sweeps.is_long(extent.count)

    def changing(self, volume_key: int, extent: Extent) -> list[Extent]:
        """Return what of the extent guests change that is appended but not applied."""
        found = [
            common
            for key, event in self._events
            if key == volume_key and (common := event.intersect(extent)) is not None
        ]
        first = volume_key << LBA_BITS | extent.start
        for batch in self._engine.log.unapplied():
            if batch.data_count:
                rows = batch.data_entries()
                keys = rows["volume_key"].astype(np.uint64) << np.uint64(LBA_BITS) | rows["lba"]
                # A key below the first one wraps around to a huge distance.
                near = rows["lba"][(keys - np.uint64(first) < np.uint64(extent.count)) & (rows["kind"] != record.FILL)]
                found += [Extent(lba, 1) for lba in near.tolist()]
        return found

    def superseded(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell of each key, at most RECORD_ENTRIES_MAX, whether a guest's change of it is appended but not applied."""
        unapplied = self._engine.log.unapplied()
        found = np.zeros(keys.size, np.bool_)
        if not unapplied:
            return found  # a trim that still waits for a zone will stand behind what comes now
        for batch in unapplied:
            for header, count in batch.data_counts():
                record.mark_written_fast(header, count, keys, found)
        for volume_key, extent in self._events:
            # A key below the first one wraps around to a huge distance.
            found |= keys - np.uint64(volume_key << LBA_BITS | extent.start) < np.uint64(extent.count)
        return found

    # --- appending --------------------------------------------------------------------------------------------

    def _append(self, volume: "CacheVolume", offset: int, view: memoryview, settled: Settled) -> None:
        """Append whole blocks, for the first of which there is room."""
        self._append_summed(volume, offset >> BLOCK_SHIFT, view, block_checksums(view), settled)

    def _append_summed(
        self, volume: "CacheVolume", lba: int, view: memoryview, sums: npt.NDArray[np.uint64], settled: Settled
    ) -> None:
        """Append blocks whose checksums are known: one change for each record that they fall into.

        A part that has to wait may fail at once; the payload is used until those before it are written.
        """
        engine, log = self._engine, self._engine.log
        count = sums.size
        at = 0
        while True:
            batch = log.data_batch()
            while at < count and (batch.room or batch.grow()):
                take = min(batch.room, count - at)
                log.add_writes(batch, volume.key, lba + at, volume.next_version(), sums[at : at + take])
                self._appended(batch, volume, lba + at, view[at << BLOCK_SHIFT : (at + take) << BLOCK_SHIFT], take)
                at += take
                if volume.appended_blocks >= volume.appended_max:
                    break
            if at == count:
                batch.settled.append(settled)
                log.seal_if_full()
                return
            log.seal_if_full()
            if not engine.has_room(volume):
                join = _Join(settled)
                batch.settled.append(join.one_more())
                told = join.one_more()
                rest = view[at << BLOCK_SHIFT :]
                go_on = partial(self._append_summed, volume, lba + at, rest, sums[at:], told)
                self._park(volume, told, go_on, first=True)
                join.begun()
                return

    def _appended(self, batch: Batch, volume: "CacheVolume", lba: int, view: memoryview, count: int) -> None:
        """The newest version has its entries: these are the blocks."""
        batch.buffers.append(view)
        engine = self._engine
        if self._reading or engine.fetches.under_way or engine.admission.ring.blocks:
            self._touch(volume, Extent(lba, count))
        volume.appended_blocks += count

    def _append_event(self, volume: "CacheVolume", kind: int, extent: Extent, settled: Settled) -> None:
        is_long = self._engine.sweeps.is_long(extent.count)
        if is_long and self._engine.sweeps.count + self._long_event_count >= SWEEPS_MAX:
            again = partial(self._append_event, volume, kind, extent, settled)
            self._park(volume, settled, again, first=True)
            return
        version = volume.next_version()
        self._touch(volume, extent)
        self._events.append((volume.key, extent))
        self._long_event_count += is_long
        self._engine.hole_count += 1  # now, not when it is applied: the next one must know
        self._engine.log.add_event(kind, volume.key, extent.start, version, extent.count, settled)

    def _touch(self, volume: "CacheVolume", extent: Extent) -> None:
        """Tell those who read blocks of an extent that they change."""
        self._engine.admission.changed(volume, extent)
        for merge in self._reading:
            if merge.volume is volume and extent.start <= merge.lba < extent.end:
                merge.changed = True

    def _write_unaligned(self, volume: "CacheVolume", offset: int, view: memoryview, settled: Settled) -> None:
        end = offset + view.nbytes
        head_end = min(end, (offset + _IN_BLOCK) & ~_IN_BLOCK)
        tail_start = max(head_end, end & ~_IN_BLOCK)
        join = _Join(settled)
        for start, stop in ((offset, head_end), (tail_start, end)):
            if start < stop:
                self._merge(volume, start, view[start - offset : stop - offset], join.one_more())
        if head_end < tail_start:
            middle = view[head_end - offset : tail_start - offset]
            self._append(volume, head_end, middle, join.one_more())
        join.begun()

    def _zero(self, volume: "CacheVolume", offset: int, length: int, settled: Settled) -> None:
        end = offset + length
        head_end = min(end, (offset + _IN_BLOCK) & ~_IN_BLOCK)
        tail_start = max(head_end, end & ~_IN_BLOCK)
        join = _Join(settled)
        for start, stop in ((offset, head_end), (tail_start, end)):
            if start < stop:
                self._merge(volume, start, memoryview(bytes(stop - start)), join.one_more())
        if head_end < tail_start:
            extent = Extent(head_end >> BLOCK_SHIFT, (tail_start - head_end) >> BLOCK_SHIFT)
            self._append_event(volume, record.ZERO, extent, join.one_more())
        join.begun()

    # --- partial blocks ---------------------------------------------------------------------------------------

    def _merge(self, volume: "CacheVolume", offset: int, view: memoryview, settled: Settled) -> None:
        """Write part of one block: wait until nothing changes it, read it, and append it unless it changed."""
        lba = offset >> BLOCK_SHIFT
        if self.changing(volume.key, Extent(lba, 1)):
            self._merging.append(_Parked(volume, settled, lambda: self._merge(volume, offset, view, settled)))
            self._engine.log.kick()
            return
        merge = _Merge(volume, lba)
        self._reading.append(merge)

        def got(error: IoError, chunks: "Sequence[Chunk]") -> None:
            self._reading.remove(merge)
            if error != IoError.OK or volume.refuses or self._engine.failed:
                settled(False)
            elif merge.changed:
                self._merge(volume, offset, view, settled)
            elif not self._engine.has_room(volume):
                self._park(volume, settled, lambda: self._merge(volume, offset, view, settled))
            else:
                self._append(volume, lba << BLOCK_SHIFT, _merged(chunks, offset & _IN_BLOCK, view), settled)
                self._engine.log.kick()

        self._engine.reads.read(volume, lba << BLOCK_SHIFT, BLOCK_SIZE, got)

    # --- waiting ----------------------------------------------------------------------------------------------

    def _open_batch(self, volume: "CacheVolume") -> Batch | None:
        """Return the batch that takes one more block of a volume, None if it has to wait.

        Room is asked for once a batch, as long as that stays in its record: what the answer depends on changes when
        records are applied and when zones are begun, but for the volume's own bound.
        """
        if volume.key in self._waiting:
            return None
        log = self._engine.log
        batch = log.gathered
        if (
            batch is not None
            and batch.admitted_key == volume.key
            and batch.room
            and not batch.changes
            and volume.appended_blocks < volume.appended_max
        ):
            return batch
        if not self._engine.has_room(volume):
            return None
        batch = log.data_batch()
        batch.admitted_key = volume.key
        return batch

    def _in_turn(self, volume: "CacheVolume", settled: Settled, act: Callable[[], None]) -> None:
        if self._is_open(volume):
            act()
        else:
            self._park(volume, settled, act)

    def _is_open(self, volume: "CacheVolume") -> bool:
        return volume.key not in self._waiting and self._engine.has_room(volume)

    def _park(self, volume: "CacheVolume", settled: Settled, act: Callable[[], None], *, first: bool = False) -> None:
        queue = self._waiting.setdefault(volume.key, deque())
        if first:
            queue.appendleft(_Parked(volume, settled, act))
        else:
            queue.append(_Parked(volume, settled, act))

    def _refuse(self, volume: "CacheVolume", reply: Reply) -> bool:
        if volume.refuses or self._engine.failed:
            reply(IoError.SHUTDOWN if volume.closing else IoError.IO)
            return True
        if volume.read_only:
            reply(IoError.READ_ONLY)
            return True
        return False

    def _settler(self, fua: bool, reply: Reply) -> Settled:
        if not fua:
            self._engine.log.group.written(1)
            return lambda ok: reply(IoError.OK if ok else IoError.IO)
        log = self._engine.log

        def settled(ok: bool) -> None:
            if ok:
                log.when_durable(log.applied.position, lambda safe: reply(IoError.OK if safe else IoError.IO))
            else:
                reply(IoError.IO)

        return settled


class _Parked(NamedTuple):
    """A request that waits for room, or for another change of its block."""

    volume: "CacheVolume"
    settled: Settled
    act: Callable[[], None]

    def go_on(self) -> None:
        """Act now, unless the volume has failed meanwhile."""
        if self.volume.refuses:
            self.settled(False)
        else:
            self.act()


class _Merge:
    """A partial block whose rest is being read; `changed` says that what is read may be old by now."""

    __slots__ = ("changed", "lba", "volume")

    def __init__(self, volume: "CacheVolume", lba: int) -> None:
        self.volume = volume
        self.lba = lba
        self.changed = False


class _Join:
    """Settles once, when all its parts have: True if all did."""

    def __init__(self, settled: Settled) -> None:
        self._settled = settled
        self._left = 1
        self._ok = True

    def one_more(self) -> Settled:
        """Return what one more part calls."""
        self._left += 1
        return self._one

    def begun(self) -> None:
        """All parts were begun."""
        self._one(True)

    def _one(self, ok: bool) -> None:
        self._left -= 1
        self._ok = self._ok and ok
        if self._left == 0:
            self._settled(self._ok)


def _merged(chunks: "Sequence[Chunk]", skip: int, view: memoryview) -> memoryview:
    block = bytearray(BLOCK_SIZE)
    at = 0
    for length, buffer in chunks:
        if buffer is not None:
            block[at : at + length] = buffer
        at += length
    block[skip : skip + view.nbytes] = view
    return memoryview(block)

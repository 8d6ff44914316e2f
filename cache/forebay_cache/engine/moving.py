"""Moving blocks to the log's end: those of a victim that are kept are read and appended a slice at a time.

A slice is at most a record's worth of blocks and is one step of the event loop: it is read from the page cache, run by
run, compared with its checksums, and appended by a few calls, without anything done block by block. What is not in
memory is read by the device meanwhile, in spans that reach over gaps, and the slice is appended when all is there.

Invariants:
    `blocks` counts what is to be read, is being read, or is appended and not applied; `promised_zones` are the free
    zones that those will fill: guests and fills leave them alone.
    Moved blocks keep version and checksum; a block that changed while it was moved is not touched.
    No MOVE stands in the log behind a newer change of its block: replay may not know that change any more. Where a
    closed cut needs the older version it is moved by a PIN, which replay never takes for the newest.
    A dirty block that does not match its checksum goes as it is, so it stays an error; a clean one is forgotten.
Crash: a moved block is found at either place; of equal versions the later record wins.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import MOVE_GAP_MAX, MOVE_SPAN_MAX
from forebay_cache.engine.log import Batch
from forebay_cache.format import record
from forebay_core.checksums import block_checksums
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX, Buffer

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine

PlaceArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Run = tuple[int, int]  # of the blocks of a slice: first, and the one behind the last


class _Move:
    """The blocks of one victim on their way."""

    __slots__ = ("rest", "slices", "whole", "zone")

    def __init__(self, zone: int, places: PlaceArray) -> None:
        self.zone = zone
        self.rest = places  # nobody has begun to read them
        self.slices = 0  # begun, not applied
        self.whole = True  # all could be read


class _Slice:
    """Some of these blocks, and their bytes in one buffer."""

    __slots__ = ("content", "is_read", "move", "places", "unread")

    def __init__(self, move: _Move, places: PlaceArray) -> None:
        self.move = move
        self.places = places
        self.content = np.empty(places.size << BLOCK_SHIFT, np.uint8)
        self.is_read = np.ones(places.size, np.bool_)
        self.unread = 0  # reads under way

    def runs(self) -> list[Run]:
        """Return the runs of consecutive places."""
        ends = (np.flatnonzero(np.diff(self.places) != 1) + 1).tolist()
        return list(zip([0, *ends], [*ends, self.places.size], strict=True))


class Moving:
    """Moves blocks; `moved` is told of a zone whose blocks are all applied, and whether all of them could be read."""

    def __init__(self, engine: "CacheEngine", moved: Callable[[int, bool], None]) -> None:
        self._engine = engine
        self._moved = moved
        self._unread: deque[_Move] = deque()
        self.blocks = self.promised_zones = 0
        self.moved_blocks = 0

    def begin(self, zone: int, places: PlaceArray) -> None:
        """Move the blocks at these places, which are in order."""
        self._count(places.size)
        self._unread.append(_Move(zone, places))
        if len(self._unread) == 1:
            self._engine.soon(self._step)

    def _count(self, blocks: int) -> None:
        self.blocks += blocks
        self.promised_zones = -(-self.blocks * 4 // (3 * self._engine.zones.zone_blocks))  # a quarter is for headers

    def _step(self) -> None:
        """Read one slice; what is in memory is appended at once."""
        engine = self._engine
        if engine.failed:
            return
        move = self._unread[0]
        one = _Slice(move, move.rest[: record.RECORD_ENTRIES_MAX])
        move.rest = move.rest[record.RECORD_ENTRIES_MAX :]
        move.slices += 1
        if not move.rest.size:
            self._unread.popleft()
        if self._unread:
            engine.soon(self._step)
        self._read(one)

    # --- reading ----------------------------------------------------------------------------------------------

    def _read(self, one: _Slice) -> None:
        """Read what is in memory run by run, and have the rest read.

        Reading over gaps, or all runs by one native call, was tried: each took less time here, and as much more later.
        """
        device, zones_offset = self._engine.device, self._engine.zones.zones_offset
        view = one.content.data
        places = one.places.tolist()
        absent = [
            (start, end)
            for start, end in one.runs()
            if not device.read_into_now(
                zones_offset + (places[start] << BLOCK_SHIFT), view[start << BLOCK_SHIFT : end << BLOCK_SHIFT]
            )
        ]
        if not absent:
            self._append(one)
            return
        spans = _joined(absent, places)
        one.unread = len(spans)
        for runs in spans:
            self._read_span(one, runs)

    def _read_span(self, one: _Slice, runs: list[Run]) -> None:
        """Read runs and what lies between them."""
        engine = self._engine
        first, behind = int(one.places[runs[0][0]]), int(one.places[runs[-1][1] - 1]) + 1

        def done(answer: Buffer | None) -> None:
            if engine.failed:
                return
            if answer is not None:
                self._take(one, runs, memoryview(answer), first)
            elif len(runs) > 1:  # what can't be read may be a block that nobody wants
                one.unread += len(runs)
                for run in runs:
                    self._read_span(one, [run])
            else:
                self._give_up(one, runs[0])
            one.unread -= 1
            if one.unread == 0:
                self._append(one)

        engine.device.read(engine.zones.offset_of(first), (behind - first) << BLOCK_SHIFT, done)

    def _take(self, one: _Slice, runs: list[Run], answer: memoryview, first: int) -> None:
        view = one.content.data
        for start, end in runs:
            at, size = int(one.places[start]) - first, (end - start) << BLOCK_SHIFT
            begin = start << BLOCK_SHIFT
            view[begin : begin + size] = answer[at << BLOCK_SHIFT : (at << BLOCK_SHIFT) + size]

    def _give_up(self, one: _Slice, run: Run) -> None:
        self._engine.report(f"zone {one.move.zone} can't be read and is left as it is")
        one.move.whole = False
        one.is_read[run[0] : run[1]] = False

    # --- appending --------------------------------------------------------------------------------------------

    def _append(self, one: _Slice) -> None:
        """Append the blocks that are still wanted, and go on when they are applied."""
        log, move, count = self._engine.log, one.move, one.places.size
        last = self._append_wanted(one)

        def applied(ok: bool) -> None:
            self._count(-count)
            move.slices -= 1
            if ok and not (move.rest.size or move.slices):
                self._moved(move.zone, move.whole)

        if last is None:
            applied(True)
        else:
            last.settled.append(applied)
            log.seal_if_full()
            log.kick()

    def _append_wanted(self, one: _Slice) -> Batch | None:
        """Return the batch after which all is moved or superseded, None if that is so now."""
        engine, table, places = self._engine, self._engine.map, one.places
        engine.sweeps.settle_places(places)
        keys = table.key_array.take(places)
        superseded = engine.writes.superseded(keys)
        linked = table.linked_at(places)
        wanted = one.is_read & (keys != 0) & ~(linked & superseded)
        self._look(one, wanted)
        last = self._append_moves(one, wanted, linked) if wanted.any() else None
        return engine.log.unapplied()[-1] if superseded.any() else last

    def _append_moves(self, one: _Slice, wanted: Mask, linked: Mask) -> Batch:
        log, table, places, content = self._engine.log, self._engine.map, one.places, one.content
        if not wanted.all():
            places, linked = places[wanted], linked[wanted]
            content = content.reshape(-1, BLOCK_SIZE)[wanted].reshape(-1)
        kinds = np.where(linked, np.uint8(record.MOVE), np.uint8(record.PIN))
        arrays = (table.key_array, table.version_array, table.checksum_array)
        columns = (kinds, *(array.take(places) for array in arrays), places)
        at, count = 0, places.size
        while True:
            log.seal_if_full()
            batch = log.data_batch()
            end = at + min(batch.room, count - at)
            log.add_moves(batch, *(column[at:end] for column in columns))
            batch.buffers.append(content.data[at << BLOCK_SHIFT : end << BLOCK_SHIFT])
            at = end
            if at == count:
                self.moved_blocks += count
                return batch

    # --- checksums --------------------------------------------------------------------------------------------

    def _look(self, one: _Slice, wanted: Mask) -> None:
        """Compare the wanted blocks with their checksums; those that are bad and in the store are not wanted."""
        sums = block_checksums(one.content.data)
        bad = wanted & (sums != self._engine.map.checksum_array.take(one.places))
        for i in np.flatnonzero(bad).tolist():
            wanted[i] = self._is_only_copy(int(one.places[i]), int(sums[i]))

    def _is_only_copy(self, place: int, found: int) -> bool:
        """Report a bad block; forget it if the store has it."""
        engine, table = self._engine, self._engine.map
        key = table.keys[place]
        volume = engine.volumes[key >> LBA_BITS]
        clean = table.is_linked(place) and table.versions[place] <= volume.acknowledged
        engine.report_corruption(volume, key & LBA_MAX, place, table.checksums[place], found, clean=clean)
        if clean:
            engine.drop_block(key, place)
        return not clean


def _joined(runs: list[Run], places: list[int]) -> list[list[Run]]:
    """Join runs that lie near one another: to read what is between them is cheaper than a read of its own."""
    spans = [[runs[0]]]
    for run in runs[1:]:
        first, last = places[spans[-1][0][0]], places[spans[-1][-1][1] - 1]
        near = places[run[0]] - last <= MOVE_GAP_MAX and places[run[1] - 1] - first < MOVE_SPAN_MAX
        if near:
            spans[-1].append(run)
        else:
            spans.append([run])
    return spans

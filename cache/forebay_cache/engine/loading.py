"""Loading the clean entries of the checkpoint behind the first answers, chunk by chunk.

What is not upstream is known before. A read that finds no place for a block waits until it is known what the chunks
that are left say of it: their keys are searched (8 of 25 bytes, no linking), and a chunk that has the block is loaded
next. It does not ask the store meanwhile, which may be away while the block is here. Searching and loading take turns,
so loading ends however many reads there are.

Invariants:
    An entry is linked only if its key is not in the map, its place is empty, and neither was forgotten meanwhile.
    Whoever waits is called once; when all is loaded nobody waits.
    One chunk is linked for each completion of a read, so no step is long.
Crash: see `unloaded`.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from forebay_cache.engine.limits import SCALAR_KEYS_MAX, SEARCH_READS_MAX, SEARCH_WANTS_MAX, SEARCHED_PER_LOADED
from forebay_cache.engine.unloaded import Unloaded, UnloadedChunk
from forebay_cache.format import checkpoint
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Buffer

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine


class _Want(NamedTuple):
    """Blocks that somebody waits for."""

    key: int
    count: int  # type: ignore[assignment]
    act: Callable[[], None]


class Loading:
    """Loads what recovery left, one chunk after the other."""

    def __init__(self, engine: "CacheEngine", unloaded: Unloaded) -> None:
        self._engine = engine
        self._unloaded = unloaded
        self._waiting: list[_Want] = []  # not searched for yet
        self._searched: list[_Want] = []  # those of the search under way
        self._search: Iterator[int] = iter(())  # chunks whose keys are still to be searched
        self._reading = 0  # reads of the search under way
        self._urgent: dict[int, None] = {}  # chunks that have what is searched
        self._busy = False  # a chunk is being read
        self._loads_due = 0  # chunks to load before the next search
        self._over: list[Callable[[], None]] = []
        self.lost_chunks = 0

    @property
    def active(self) -> bool:
        """Whether clean entries are missing in the map."""
        return bool(self._unloaded.chunks)

    def start(self) -> None:
        """Begin."""
        self._step()

    def want(self, key: int, count: int, act: Callable[[], None]) -> None:
        """Act when all that the checkpoint says of these blocks is in the map; not at once."""
        assert self.active
        self._waiting.append(_Want(key, count, act))
        self._step()

    def when_over(self, act: Callable[[], None]) -> None:
        """Act when all is loaded; not at once."""
        assert self.active
        self._over.append(act)

    def fail(self) -> None:
        """The device failed: whoever waits looks again, and is told."""
        self._unloaded.chunks.clear()
        self._finish()

    # --- what counts no more ----------------------------------------------------------------------------------

    def knows(self, zone: int) -> bool:
        """Tell whether all that is in a zone is in the map."""
        return self._unloaded.knows(zone)

    def forget(self, key: int, count: int) -> None:
        """These blocks were trimmed, or left the map: what is loaded later must not bring them back."""
        self._unloaded.forget(key, count)

    def forget_zone(self, zone: int) -> None:
        """A zone is going to be filled anew."""
        self._unloaded.forget_zone(zone)

    # --- steps ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Begin what is next: a chunk that somebody waits for, a search, or any chunk."""
        if self._engine.failed or not self.active or self._busy:
            return
        if self._urgent:
            self._load(next(iter(self._urgent)))
        elif self._searched:
            self._read_keys()
        elif self._waiting and self._loads_due <= 0:
            self._begin_search()
        else:
            self._load(next(iter(self._unloaded.chunks)))

    def _load(self, index: int) -> None:
        self._busy = True
        one = self._unloaded.chunks[index]

        def done(answer: Buffer | None) -> None:
            self._busy = False
            if self._engine.failed:
                return
            self._urgent.pop(index, None)
            self._loads_due -= 1
            self._link(one, answer)
            del self._unloaded.chunks[index]
            self._tell_found()
            if self.active:
                self._step()
            else:
                self._finish()

        self._engine.device.read(one.chunk.offset, one.chunk.padded_size, done)

    def _link(self, one: UnloadedChunk, block: Buffer | None) -> None:
        engine, chunk = self._engine, one.chunk
        try:
            if block is None:
                raise CorruptionError(place=one.name, what="checkpoint chunk", expected="to be read", found="an error")
            checkpoint.verify_chunk(block, one.chunk_xxh3, place=one.name)
        except CorruptionError as error:
            self.lost_chunks += 1
            engine.report(f"{error}; the clean blocks that it lists are not cached any more")
            return
        keys, versions, checksums, counts = checkpoint.decode_places(block, chunk.count)
        part = slice(chunk.first, chunk.first + chunk.count)
        counting = self._unloaded.counting(chunk.first, keys) & (engine.map.key_array[part] == 0)
        known = np.zeros(max(engine.volumes, default=0) + 2, np.bool_)
        known[list(engine.volumes)] = True
        counting &= known.take(np.minimum(keys >> np.uint64(LBA_BITS), np.uint64(known.size - 1)).astype(np.int64))
        index = np.flatnonzero(counting)
        places = engine.map.insert_absent(keys[index], versions[index], checksums[index], index + chunk.first)
        restored = np.zeros(chunk.count, np.uint8)
        restored[places - chunk.first] = np.maximum(counts[places - chunk.first], 1)
        engine.policy.restore(chunk.first, restored)

    def _tell_found(self) -> None:
        """Let those go on whose blocks are all in the map now."""
        if self._searched:
            find_run = self._engine.map.find_run
            # A long one waits for the end of the search: looking up all its blocks each time would take too long.
            short = [want for want in self._searched if want.count <= SCALAR_KEYS_MAX]
            found = [want for want in short if int(find_run(want.key, want.count).min()) >= 0]
            if found:
                self._searched = [want for want in self._searched if want not in found]
                for want in found:
                    want.act()

    def _finish(self) -> None:
        """All is loaded: nobody has to wait any more."""
        wants = self._searched + self._waiting
        over, self._over = self._over, []
        self._searched, self._waiting = [], []
        self._urgent.clear()
        for act in (*(want.act for want in wants), *over):
            act()

    # --- searching --------------------------------------------------------------------------------------------

    def _begin_search(self) -> None:
        self._searched, self._waiting = self._waiting[:SEARCH_WANTS_MAX], self._waiting[SEARCH_WANTS_MAX:]
        self._search = iter(list(self._unloaded.chunks))
        self._loads_due = max(SEARCHED_PER_LOADED, len(self._unloaded.chunks)) // SEARCHED_PER_LOADED
        self._tell_found()
        self._step()

    def _read_keys(self) -> None:
        """Keep reading keys; when all were compared, who still waits knows that no chunk has its blocks."""
        while self._reading < SEARCH_READS_MAX and (index := next(self._search, None)) is not None:
            if index in self._unloaded.chunks:
                self._reading += 1
                self._compare(index, self._unloaded.chunks[index])
        if self._reading == 0:
            absent, self._searched = self._searched, []
            for want in absent:
                want.act()
            self._step()

    def _compare(self, index: int, one: UnloadedChunk) -> None:
        chunk = one.chunk
        size = -(-chunk.count * 8 // BLOCK_SIZE) * BLOCK_SIZE

        def done(answer: Buffer | None) -> None:
            self._reading -= 1
            if index in self._unloaded.chunks and (answer is None or self._is_wanted(chunk.count, answer)):
                self._urgent[index] = None
            self._step()

        self._engine.device.read(chunk.offset, size, done)

    def _is_wanted(self, count: int, answer: Buffer) -> bool:
        keys = np.frombuffer(answer, np.uint64, count)
        # What lies below the key wraps around to a huge distance: one comparison tests both ends.
        return any(bool((keys - np.uint64(want.key) < np.uint64(want.count)).any()) for want in self._searched)

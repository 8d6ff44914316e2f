"""Fetched blocks in memory, before anybody decides whether they are worth a write to the device.

Most second uses of a block come soon. So a fetched block that was asked for waits here, and only when it falls out the
policy is asked: half of all writes are saved at the same hit ratio. Beside them lie blocks that nobody asked for yet:
neighbours that came with a fetch, and what was read ahead; those are dropped when they fall out.

Invariants:
    A block is held once, in one pool; a pool lists its blocks in the order in which they came to it.
    SPARE and AHEAD never hold more than their bounds; USED may until `fallen` was gone through, LEAVING is bounded by
    what the log takes.
    Of a held block nothing newer is in the map, in the log, or known as a hole: whoever changes a block forgets it here
    when the change is appended, and what changed while it was fetched never comes here.
Crash: nothing is kept; the store has all of it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice, takewhile
from typing import Final

from forebay_core.units import Buffer, Version

USED: Final = 0
"""Somebody asked for it; the policy decides when it falls out."""
SPARE: Final = 1
"""It came with another block, or passed by in a long sequential read."""
AHEAD: Final = 2
"""Read ahead, and not asked for yet."""
LEAVING: Final = 3
"""In a record on its way to the device; readable here until that is applied."""


class Held:
    """One block and where it is."""

    __slots__ = ("checksum", "plain", "pool", "since_ns", "version")

    def __init__(self, plain: Buffer, version: Version, checksum: int, pool: int) -> None:
        self.plain = plain
        self.version = version
        self.checksum = checksum
        self.pool = pool
        self.since_ns = 0  # when it came to its pool


class Ring:
    """The held blocks by key. `blocks` is for looking; only this class changes it."""

    def __init__(self, *, used_max: int, spare_max: int, ahead_max: int) -> None:
        self.blocks: Final[dict[int, Held]] = {}
        self.now_ns = 0
        # Ordered ones, because the first key of a plain dict is found behind all that were removed before it.
        self._pools: Final[tuple[OrderedDict[int, None], ...]] = tuple(OrderedDict() for _ in range(4))
        self._bounds: Final = (used_max, spare_max, ahead_max)

    def count(self, pool: int) -> int:
        """Return how many blocks a pool holds."""
        return len(self._pools[pool])

    def put(self, key: int, held: Held) -> None:
        """Hold a block that is not held yet, as the newest of its pool."""
        assert key not in self.blocks
        self.blocks[key] = held
        self._enter(key, held.pool)

    def move(self, key: int, pool: int) -> None:
        """Let a held block be the newest of another pool."""
        held = self.blocks[key]
        assert held.pool != pool
        del self._pools[held.pool][key]
        held.pool = pool
        self._enter(key, pool)

    def remove(self, key: int) -> None:
        """Hold a block no more."""
        del self._pools[self.blocks.pop(key).pool][key]

    def forget(self, key: int, count: int) -> None:
        """Hold none of these consecutive blocks any more."""
        blocks = self.blocks
        if count > len(blocks):
            for found in [one for one in blocks if key <= one < key + count]:
                self.remove(found)
            return
        for one in range(key, key + count):
            if one in blocks:
                self.remove(one)

    def clear(self) -> None:
        """Hold nothing any more."""
        self.blocks.clear()
        for pool in self._pools:
            pool.clear()

    def runs(self, key: int, count: int) -> list[tuple[int, list[Held]]]:
        """Return the runs of held blocks among consecutive ones: the first key of each, and its blocks."""
        found: list[tuple[int, list[Held]]] = []
        end = -1
        for one in range(key, key + count):
            held = self.blocks.get(one)
            if held is None:
                continue
            if one != end:
                found.append((one, []))
            found[-1][1].append(held)
            end = one + 1
        return found

    @property
    def is_full(self) -> bool:
        """Whether `fallen` has blocks to yield."""
        return len(self._pools[USED]) > self._bounds[USED]

    def fallen(self) -> Iterator[int]:
        """Yield the oldest used block while there are too many; each must be moved or removed before the next."""
        pool = self._pools[USED]
        while len(pool) > self._bounds[USED]:
            yield next(iter(pool))

    def waited(self, span_ns: int, limit: int) -> list[int]:
        """Return used blocks that came so long ago or longer, the oldest first, so many at most."""
        before = self.now_ns - span_ns
        oldest = islice(self._pools[USED], limit)
        return list(takewhile(lambda key: self.blocks[key].since_ns <= before, oldest))

    def used(self) -> list[int]:
        """Return all used blocks, the oldest first."""
        return list(self._pools[USED])

    def _enter(self, key: int, number: int) -> None:
        pool = self._pools[number]
        pool[key] = None
        self.blocks[key].since_ns = self.now_ns
        if number in (SPARE, AHEAD) and len(pool) > self._bounds[number]:
            self.remove(next(iter(pool)))

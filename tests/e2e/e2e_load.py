"""Load with a memory: writes blocks whose content says what was written, and later says whether what is read may be.

A block's content is its lba and the number of its write, repeated. A block may hold any write issued to it, but none
older than its last acknowledged one; a read block that is neither whole nor known is never allowed.
"""

import random
import struct
from collections.abc import Callable

from e2e_nbd import FLUSH, TRIM, WRITE, NbdClient

from forebay_core.units import BLOCK_SIZE

_CONTENT = struct.Struct("<QQ")
_SYMBOLS = BLOCK_SIZE // _CONTENT.size


class History:
    """What was issued and acknowledged, block by block; a trim counts as write number `-n` that left zeros."""

    def __init__(self, block_count: int, seed: int) -> None:
        self.block_count = block_count
        self.random = random.Random(seed)
        self.numbers = 0
        self.acknowledged = 0
        self.flushed = 0
        self.order: list[tuple[int, list[int]]] = []  # what each change left in which blocks, as issued
        self._issued: dict[int, list[tuple[int, bool]]] = {}  # lba: numbers that it may show, and whether it is a trim
        self._busy: set[int] = set()
        self._under_way: dict[int, tuple[int, list[int]]] = {}

    def run(self, client: NbdClient, *, depth: int, until: Callable[[], bool]) -> None:
        """Keep `depth` requests in flight; ends when `until` says so or the connection breaks."""
        try:
            while not until():
                while len(client.pending) < depth:
                    self._submit(client)
                self._reply(client)
            while client.pending:
                self._reply(client)
        except (ConnectionError, BrokenPipeError):
            self._under_way.clear()
            self._busy.clear()

    def verify(self, content: bytes, start: int = 0) -> None:
        """Compare blocks, the first of which is `start`, with all that they may hold."""
        for at in range(0, len(content), BLOCK_SIZE):
            lba = start + at // BLOCK_SIZE
            block = content[at : at + BLOCK_SIZE]
            number = self._number_of(lba, block)
            allowed = [issued for issued, _ in self._issued.get(lba, [(0, True)])]
            zeros = [0] if any(trim for _, trim in self._issued.get(lba, [(0, True)])) else []
            assert number in allowed + zeros, f"block {lba} shows write {number}, allowed are {allowed} {zeros}"

    def settle(self, content: bytes) -> None:
        """From now on each block may only hold what it was seen to hold."""
        for lba in list(self._issued):
            block = content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE]
            number = self._number_of(lba, block)
            self._issued[lba] = [(number, number == 0)]

    def prefix_of(self, content: bytes) -> int:
        """Return after how many changes, given one at a time, the volume was as `content` shows it; -1: never."""
        shown = [
            self._number_of(lba, content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE]) for lba in range(self.block_count)
        ]
        state = [0] * self.block_count
        wrong = sum(number != 0 for number in shown)
        found = 0 if wrong == 0 else -1
        for count, (number, lbas) in enumerate(self.order, 1):
            for lba in lbas:
                wrong += (number != shown[lba]) - (state[lba] != shown[lba])
                state[lba] = number
            if wrong == 0:
                found = count
        return found

    def _number_of(self, lba: int, block: bytes) -> int:
        if not any(block):
            return 0
        found, number = _CONTENT.unpack_from(block)
        assert block == _CONTENT.pack(found, number) * _SYMBOLS, f"block {lba} is torn or mixed"
        assert found == lba, f"block {lba} shows block {found}"
        return int(number)

    def _submit(self, client: NbdClient) -> None:
        roll = self.random.random()
        if roll < 0.03:
            client.submit(FLUSH, 0, 0)
            return
        count = self.random.choice((1, 1, 1, 2, 8))
        lba = self.random.randrange(self.block_count - count)
        lbas = list(range(lba, lba + count))
        if not self._busy.isdisjoint(lbas):
            client.submit(FLUSH, 0, 0)
            return
        self._busy.update(lbas)
        self.numbers += 1
        trim = roll > 0.93
        for one in lbas:
            self._issued.setdefault(one, [(0, True)]).append((self.numbers, trim))
        if trim:
            cookie = client.submit(TRIM, lba * BLOCK_SIZE, count * BLOCK_SIZE)
        else:
            payload = b"".join(_CONTENT.pack(one, self.numbers) * _SYMBOLS for one in lbas)
            cookie = client.submit(WRITE, lba * BLOCK_SIZE, len(payload), payload)
        self._under_way[cookie] = (self.numbers, lbas)
        self.order.append((0 if trim else self.numbers, lbas))

    def _reply(self, client: NbdClient) -> None:
        cookie, pending, _ = client.next_reply()
        if pending.command == FLUSH:
            self.flushed += 1
            return
        number, lbas = self._under_way.pop(cookie)
        self.acknowledged += 1
        for lba in lbas:
            self._issued[lba] = [item for item in self._issued[lba] if item[0] >= number]
        self._busy.difference_update(lbas)

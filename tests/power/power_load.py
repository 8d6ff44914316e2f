"""A writer with a memory for power cuts, and the judge of what is read afterwards.

Each block is written whole: its lba and the number of its write, repeated. The writer keeps many requests in flight on
one connection (never two to one block), flushes at random, and notes what was acknowledged when. After a cut:

    nothing torn or foreign     a block holds one stamp, of its own lba, that was issued to it; or zeros, if trimmed
    nothing flushed is lost     no block is older than its last write that a flush (or FUA) acknowledged
    a prefix survives           if a write shows, every write acknowledged before that one was even sent shows as well,
                                or something newer. A write may end within a request, never within a block (the
                                cache numbers the parts of a request that fall into different records)

The second is what NBD asks, the third is the promise of the README.
"""

import random
import struct
from collections.abc import Callable
from typing import NamedTuple

from e2e_nbd import FLUSH, FUA, TRIM, WRITE, NbdClient

from forebay_core.units import BLOCK_SIZE

_STAMP = struct.Struct("<QQ")
_STAMPS_PER_BLOCK = BLOCK_SIZE // _STAMP.size


class Change(NamedTuple):
    """A write or trim; `acknowledged` counts the changes that were acknowledged before it was sent."""

    lbas: range
    acknowledged: int


class Stamps:
    """Writes to a volume of `block_count` blocks that nobody else writes to."""

    def __init__(self, block_count: int, seed: int) -> None:
        self.block_count = block_count
        self.flushes = 0
        self.lost_unflushed = 0
        self._dice = random.Random(seed)
        self._flush_share = 0.0
        self._number = 0
        self._floor = [0] * block_count  # the newest change that must not be lost; 0 is zeros
        self._changes: dict[int, Change] = {}  # since the last cut
        self._trims: set[int] = set()
        self._of_block: dict[int, list[int]] = {}  # lba: its changes
        self._acknowledged: list[int] = []  # in the order of the replies, since the last cut
        self._busy: set[int] = set()

    def run(self, client: NbdClient, *, depth: int, flush_share: float, until: Callable[[], bool]) -> None:
        """Keep `depth` requests in flight; ends when `until` says so or the connection breaks."""
        self._flush_share = flush_share
        sent: dict[int, int] = {}  # cookie: the change, or minus the changes that a flush covers
        try:
            while not until():
                while len(client.pending) < depth:
                    self._submit(client, sent)
                self._reply(client, sent)
            while client.pending:
                self._reply(client, sent)
        except ConnectionError:
            pass
        self._busy.clear()

    def check(self, content: bytes) -> None:
        """Judge the volume's content; from then on it is what must not be lost.

        Raises:
            AssertionError: something is lost, torn, foreign, or no prefix.
        """
        shown = [
            self._shown(lba, content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE]) for lba in range(self.block_count)
        ]
        self._check_prefix(shown)
        self.lost_unflushed += sum(
            shown[lba] < number for number, change in self._changes.items() for lba in change.lbas[:1]
        )
        self._floor = [0 if number in self._trims else number for number in shown]
        self._changes.clear()
        self._trims.clear()
        self._of_block.clear()
        self._acknowledged.clear()

    def _shown(self, lba: int, block: bytes) -> int:
        """Return the newest change of a block that left it like this."""
        stamp = 0
        if any(block):
            found, stamp = _STAMP.unpack_from(block)
            assert block == _STAMP.pack(found, stamp) * _STAMPS_PER_BLOCK, f"block {lba} is torn or mixed"
            assert found == lba, f"block {lba} shows block {found}"
        floor = self._floor[lba]
        options = [floor, *(number for number in self._of_block.get(lba, ()) if number > floor)]
        fitting = [number for number in options if (0 if number in self._trims else number) == stamp]
        assert fitting, f"block {lba} shows write {stamp}; flushed is {floor}, newer are {options[1:]}"
        return max(fitting)

    def _check_prefix(self, shown: list[int]) -> None:
        survivors = sorted({number for number in shown if number in self._changes and number not in self._trims})
        for number in survivors:
            lbas = self._changes[number].lbas
            there = [shown[lba] >= number for lba in lbas]
            assert there == sorted(there, reverse=True), f"write {number} to {lbas} shows in parts: {there}"
        if survivors:
            newest = survivors[-1]
            for number in self._acknowledged[: self._changes[newest].acknowledged]:
                for lba in self._changes[number].lbas:
                    assert shown[lba] >= number, (
                        f"write {newest} shows, but write {number}, acknowledged before that was sent, is lost "
                        f"from block {lba} ({shown[lba]})"
                    )

    def _submit(self, client: NbdClient, sent: dict[int, int]) -> None:
        if self._dice.random() < self._flush_share:
            sent[client.submit(FLUSH, 0, 0)] = -len(self._acknowledged)
            return
        lbas = self._idle_blocks()
        kind = self._dice.choices((TRIM, WRITE), (6, 94))[0]
        fua = FUA if self._dice.random() < self._flush_share else 0
        self._busy.update(lbas)
        self._number += 1
        number = self._number
        self._changes[number] = Change(lbas, len(self._acknowledged))
        if kind == TRIM:
            self._trims.add(number)
        for lba in lbas:
            self._of_block.setdefault(lba, []).append(number)
        payload = b"".join(_STAMP.pack(lba, number) * _STAMPS_PER_BLOCK for lba in lbas) if kind == WRITE else b""
        cookie = client.submit(kind, lbas.start * BLOCK_SIZE, len(lbas) * BLOCK_SIZE, payload, fua)
        sent[cookie] = number

    def _idle_blocks(self) -> range:
        """Choose blocks that no request under way touches."""
        while True:
            count = self._dice.choice((1, 1, 1, 2, 8))
            start = self._dice.randrange(self.block_count - count)
            lbas = range(start, start + count)
            if self._busy.isdisjoint(lbas):
                return lbas

    def _reply(self, client: NbdClient, sent: dict[int, int]) -> None:
        cookie, pending, _ = client.next_reply()
        number = sent.pop(cookie)
        if pending.command == FLUSH:
            self.flushes += 1
            self._must_stay(self._acknowledged[:-number])
            return
        self._acknowledged.append(number)
        self._busy.difference_update(self._changes[number].lbas)
        if pending.flags & FUA:
            self._must_stay([number])

    def _must_stay(self, numbers: list[int]) -> None:
        for number in numbers:
            for lba in self._changes[number].lbas:
                self._floor[lba] = max(self._floor[lba], number)

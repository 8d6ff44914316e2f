"""Where the chain of records breaks: the log ends there, or something that was durable is gone.

Each record says which log position was known durable when it was made, so a later record proves what must be there.
Behind a lost write stands whatever was there before it, which looks exactly like the end of a log: so the later
records are looked for where they can be, not only where something looks damaged.

Invariants:
    Each record names the zone where the log goes on behind its own, as far as it was known then: the free zone that
    was first in line stays first until the log enters it. So the record before the break leads to later zones, even
    if all behind it in its own zone is lost. Only where that zone was entered and nothing of it is there, or where no
    zone was free, every zone has to be looked at.
    What an earlier life left behind a log that ended here knows nothing of later positions as durable.
Crash: nothing is kept. Reads: the zone of the break; up to three blocks of each zone that records lead to and all of
the last; and, only if nothing leads on, the first block of every zone.
"""

from collections.abc import Callable, Iterator
from typing import Final

from forebay_cache.engine.log import LogPoint
from forebay_cache.format import record
from forebay_cache.format.record import RecordHeader
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, Buffer

SEAL_BLOCKS: Final = 2
"""The SEAL of a zone stands in one of so many last blocks."""

ReadBlocks = Callable[[int, int, int], Buffer]
"""Read `count` blocks of a zone from a block on."""


class LogEnd:
    """Looks for records behind the point where the chain breaks."""

    def __init__(
        self, read_blocks: ReadBlocks, end: LogPoint, *, zone_count: int, zone_blocks: int, device_tag: int
    ) -> None:
        self._read_blocks = read_blocks
        self._end = end
        self._zone_count = zone_count
        self._zone_blocks = zone_blocks
        self._device_tag = device_tag
        self._durable = 0
        self._before = list(self._headers(memoryview(read_blocks(end.zone, 0, end.block)), end.zone, 0))

    def is_in_its_zone(self, incarnation: int) -> bool:
        """Tell whether a record before the break is of this life of the zone; else it is not the zone it should be."""
        return any(header.incarnation == incarnation for header in self._before)

    def find_durable(self) -> int:
        """Return the highest log position that a record behind the break knew to be durable; 0: there is none.

        What is below it was durable.
        """
        end = self._end
        before = [header for header in self._before if header.header_xxh3 == end.chain]
        behind = self._look(end.zone, end.block) or before
        if behind and behind[-1].next_zone != end.zone:
            self._follow(behind[-1].next_zone)
        else:
            self._search()
        return self._durable

    def _follow(self, zone: int) -> None:
        """Look at the zones that records lead to, and at all of the last one: it may have lost its first record."""
        for _ in range(self._zone_count):
            if zone >= self._zone_count:
                return
            self._look(zone, 0, 1)
            sealed = self._look(zone, self._zone_blocks - SEAL_BLOCKS)
            if not sealed or sealed[-1].next_zone == zone:
                self._look(zone, 0)
                return
            zone = sealed[-1].next_zone

    def _search(self) -> None:
        """Look at the first record of every zone, and at all of the newest zone of each life."""
        newest: dict[int, RecordHeader] = {}
        for zone in range(self._zone_count):
            for header in self._look(zone, 0, 1):
                known = newest.setdefault(header.life, header)
                if header.log_position > known.log_position:
                    newest[header.life] = header
        for header in newest.values():
            self._look(header.zone, 0)

    def _look(self, zone: int, block: int, count: int | None = None) -> list[RecordHeader]:
        """Return the records behind the break whose headers are whole in these blocks; remember what they know."""
        count = self._zone_blocks - block if count is None else count
        if count <= 0:
            return []
        view = memoryview(self._read_blocks(zone, block, count))
        found = list(self._headers(view, zone, self._end.position))
        self._durable = max([self._durable, *(header.durable_position for header in found)])
        return found

    def _headers(self, view: memoryview, zone: int, lowest: int) -> Iterator[RecordHeader]:
        """Yield headers of this zone and device from a log position on; data blocks of whole records are skipped."""
        block = 0
        while block < view.nbytes >> BLOCK_SHIFT:
            at = view[block << BLOCK_SHIFT :][:BLOCK_SIZE]
            block += 1
            fields = record.peek_header(at)
            if (fields.device, fields.zone) != (self._device_tag, zone) or fields.log_position < lowest:
                continue
            try:
                header, _ = record.decode_record(at, place="")
            except CorruptionError:
                continue
            yield header
            block += header.block_count

"""Where the chain of records breaks: the log ends there, or something that was durable is gone.

Each record says which log position was known durable when it was made, so a later record proves what must be there.
Behind a lost write stands whatever was there before it, which looks exactly like the end of a log: so the later
records are looked for where they can be, not only where something looks damaged.

Invariants:
    A log goes on in another zone only behind a SEAL in one of the last two blocks of this one. So if nothing stands
    behind the break in its own zone, and it is not the SEAL that is missing, there is nothing to look for elsewhere.
    What an earlier life left behind a log that ended here knows nothing of later positions as durable.
Crash: nothing is kept. Reads: the rest of the zone; up to three blocks of each zone that a SEAL leads to and all of the
last; and, only if a SEAL may be missing, the first block of every zone.
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

    def find_durable(self) -> int:
        """Return the highest log position that a record behind the break knew to be durable; 0: there is none.

        What is below it was durable.
        """
        found = self._look(self._end.zone, self._end.block)
        seal = _seal_of(found)
        if seal is not None:
            self._follow(seal.next_zone)
        elif found or self._end.block >= self._zone_blocks - SEAL_BLOCKS:
            self._search()
        return self._durable

    def _follow(self, zone: int) -> None:
        """Look at the zones that a SEAL leads to, and at all of the last one: it may have lost its first record."""
        for _ in range(self._zone_count):
            if zone >= self._zone_count:
                return
            self._look(zone, 0, 1)
            seal = _seal_of(self._look(zone, self._zone_blocks - SEAL_BLOCKS))
            if seal is None:
                self._look(zone, 0)
                return
            zone = seal.next_zone

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
        found = list(self._headers(memoryview(self._read_blocks(zone, block, count)), zone))
        self._durable = max([self._durable, *(header.durable_position for header in found)])
        return found

    def _headers(self, view: memoryview, zone: int) -> Iterator[RecordHeader]:
        """Yield headers of this zone and device with later log positions; data blocks of whole records are skipped."""
        block = 0
        while block < view.nbytes >> BLOCK_SHIFT:
            at = view[block << BLOCK_SHIFT :][:BLOCK_SIZE]
            block += 1
            fields = record.peek_header(at)
            if (fields.device, fields.zone) != (self._device_tag, zone) or fields.log_position < self._end.position:
                continue
            try:
                header, _ = record.decode_record(at, place="")
            except CorruptionError:
                continue
            yield header
            block += header.block_count


def _seal_of(headers: list[RecordHeader]) -> RecordHeader | None:
    return next((header for header in headers if header.kind == record.SEAL), None)

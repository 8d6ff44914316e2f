"""The zones of the device: which are free, which is being filled, which may be reclaimed.

Invariants:
    A zone is in exactly one state; `free` lists the FREE ones, `full` the FULL ones in the order they were filled.
    A zone goes FULL -> EMPTYING (its worthy blocks are being moved) -> EMPTY (nothing in it is referenced) -> FREE
    once a sync that began when it was EMPTY has finished: what superseded its blocks is durable then.
    `readers` counts reads and builds under way; a zone with readers is not emptied.
Crash: states are derived again from the replayed map; incarnations come from the checkpoint and the records.
"""

import enum
from array import array
from collections import deque

from forebay_core.units import BLOCK_SIZE


class ZoneState(enum.IntEnum):
    """Life of a zone."""

    FREE = 0
    OPEN = 1
    FULL = 2
    EMPTYING = 3
    EMPTY = 4


class ZoneTable:
    """State of every zone and the arithmetic of places."""

    def __init__(self, *, zone_count: int, zone_blocks: int, zones_offset: int) -> None:
        self.zone_count = zone_count
        self.zone_blocks = zone_blocks
        self.zones_offset = zones_offset
        self.states = bytearray(zone_count)
        self.incarnations = array("I", bytes(4 * zone_count))
        self.first_positions = array("Q", bytes(8 * zone_count))
        self.readers = array("I", bytes(4 * zone_count))
        self.free: deque[int] = deque(range(zone_count))
        self.full: dict[int, None] = {}  # an ordered set

    @property
    def place_count(self) -> int:
        """Blocks of all zones, headers included."""
        return self.zone_count * self.zone_blocks

    def offset_of(self, place: int) -> int:
        """Byte offset of a place on the device."""
        return self.zones_offset + place * BLOCK_SIZE

    def place_at(self, zone: int, block: int) -> int:
        """Place of a block of a zone."""
        return zone * self.zone_blocks + block

    def open_next(self, log_position: int) -> int:
        """Take the free zone that has rested longest; its incarnation is raised."""
        zone = self.free.popleft()
        assert self.states[zone] == ZoneState.FREE
        self.states[zone] = ZoneState.OPEN
        self.incarnations[zone] += 1
        self.first_positions[zone] = log_position
        return zone

    def close(self, zone: int) -> None:
        """The open zone is filled."""
        assert self.states[zone] == ZoneState.OPEN
        self.states[zone] = ZoneState.FULL
        self.full[zone] = None

    def begin_emptying(self, zone: int) -> None:
        """The zone was chosen as victim."""
        assert self.states[zone] == ZoneState.FULL
        assert self.readers[zone] == 0
        del self.full[zone]
        self.states[zone] = ZoneState.EMPTYING

    def emptied(self, zone: int) -> None:
        """Nothing in the zone is referenced any more."""
        assert self.states[zone] == ZoneState.EMPTYING
        self.states[zone] = ZoneState.EMPTY

    def freed(self, zone: int) -> None:
        """What superseded the zone's blocks is durable: it may be filled again."""
        assert self.states[zone] == ZoneState.EMPTY
        self.states[zone] = ZoneState.FREE
        self.free.append(zone)

    def settle(self, *, filled: list[int], open_zone: int) -> None:
        """Set the states after replay: `filled` in the order of their log positions; all others but one are free."""
        assert open_zone not in filled
        self.full = dict.fromkeys(filled)
        self.free = deque(zone for zone in range(self.zone_count) if zone not in self.full and zone != open_zone)
        for zone in range(self.zone_count):
            self.states[zone] = ZoneState.FULL if zone in self.full else ZoneState.FREE
        self.states[open_zone] = ZoneState.OPEN

"""Slowing clients down before garbage fills the disk, because it comes faster than the cleaner takes it away.

A cache sees a slow store. What comes in may take a rate that falls from RATE_MAX to RATE_MIN in equal factors, so that
there is no step, while both grow: the space from SPACE_RATIO_PRESSED to SPACE_RATIO_FREE times what lives, and the
share of the room beside what lives that dead bytes take, from ROOM_SHARE_MIN to ROOM_SHARE_MAX. Each part of a cut
waits for its turn at that rate. Reads, trims and commits never wait.

Invariants: nothing waits longer than DELAY_S_MAX, and nothing at all while no cleaner works, little is dead, or the
disk has room.
"""

from typing import Final

from forebay_core.units import MIB
from forebay_store.limits import SPACE_RATIO_FREE, SPACE_RATIO_PRESSED

RATE_MAX: Final = 512.0 * MIB
RATE_MIN: Final = 4.0 * MIB
"""Bytes per second: more than a store takes, and much less than a cleaner frees that makes no pauses."""

DELAY_S_MAX: Final = 2.0

DEAD_SIZE_MIN: Final = 16 * MIB
"""Dead bytes that are nobody's trouble, whatever their share: a checkpoint that lets them go may be dearer."""


ROOM_SHARE_MIN: Final = 0.25
ROOM_SHARE_MAX: Final = 0.5
"""Dead bytes over dead and free ones: where there is room, garbage is the cleaner's matter and slows nobody."""


class Pushback:
    """The turns of all clients together."""

    def __init__(self) -> None:
        self._due_s = 0.0  # when the bytes that were let in so far are through

    def delay_s(
        self, size: int, now_s: float, *, disk_size: int, live_size: int, free_size: int, is_disk_low: bool
    ) -> float:
        """Return how long a part of `size` bytes is to wait while the cleaner works; segments take `disk_size`."""
        rate = allowed_rate(disk_size, live_size, free_size, is_disk_low=is_disk_low)
        if rate >= RATE_MAX:
            self._due_s = now_s
            return 0.0
        self._due_s = min(max(self._due_s, now_s) + size / rate, now_s + DELAY_S_MAX)
        return self._due_s - now_s


def allowed_rate(disk_size: int, live_size: int, free_size: int, *, is_disk_low: bool) -> float:
    """Return the bytes per second that all clients together may send."""
    dead_size = disk_size - live_size
    if dead_size < DEAD_SIZE_MIN:
        return RATE_MAX
    if is_disk_low:
        return RATE_MIN
    of_room = (dead_size / (dead_size + max(0, free_size)) - ROOM_SHARE_MIN) / (ROOM_SHARE_MAX - ROOM_SHARE_MIN)
    factor: float = (RATE_MIN / RATE_MAX) ** max(0.0, min(space_pressure(disk_size, live_size), of_room))
    return RATE_MAX * factor


def space_pressure(disk_size: int, live_size: int) -> float:
    """Return 0 up to the ratio of disk over live bytes that is meant, and 1 from the one that shall not be passed."""
    ratio = disk_size / max(1, live_size)
    return min(1.0, max(0.0, (ratio - SPACE_RATIO_PRESSED) / (SPACE_RATIO_FREE - SPACE_RATIO_PRESSED)))

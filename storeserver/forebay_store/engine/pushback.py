"""Slowing clients down while dead bytes come faster than the cleaner takes them away: a cache sees a slow store.

What comes in may take a rate that falls from RATE_MAX to RATE_MIN while the space grows from SPACE_RATIO_PRESSED to
SPACE_RATIO_FREE times what lives, in equal factors, so that there is no step. Each part of a cut waits for its turn at
that rate. Reads, trims and commits never wait.

Invariants: nothing waits longer than DELAY_S_MAX, and nothing at all while no cleaner works or little is dead.
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


class Pushback:
    """The turns of all clients together."""

    def __init__(self) -> None:
        self._due_s = 0.0  # when the bytes that were let in so far are through

    def delay_s(self, size: int, now_s: float, *, disk_size: int, live_size: int, is_disk_low: bool) -> float:
        """Return how long a part of `size` bytes is to wait while the cleaner works; segments take `disk_size`."""
        rate = allowed_rate(disk_size, live_size, is_disk_low=is_disk_low)
        if rate >= RATE_MAX:
            self._due_s = now_s
            return 0.0
        self._due_s = min(max(self._due_s, now_s) + size / rate, now_s + DELAY_S_MAX)
        return self._due_s - now_s


def allowed_rate(disk_size: int, live_size: int, *, is_disk_low: bool) -> float:
    """Return the bytes per second that all clients together may send."""
    if disk_size - live_size < DEAD_SIZE_MIN:
        return RATE_MAX
    if is_disk_low:
        return RATE_MIN
    ratio = disk_size / max(1, live_size)
    pressure = (ratio - SPACE_RATIO_PRESSED) / (SPACE_RATIO_FREE - SPACE_RATIO_PRESSED)
    factor: float = (RATE_MIN / RATE_MAX) ** min(1.0, max(0.0, pressure))
    return RATE_MAX * factor

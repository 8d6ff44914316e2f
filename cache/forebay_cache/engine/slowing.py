"""Slowing those who write when the buffer is nearly full: the volumes that hold more than their share of it.

Each appended block of such a volume is paid for with time, more the fuller the buffer is; who has not paid yet waits
in the queue of `writes`. There is no step in it: the delay grows from 0, and is without bound where the buffer may
not be filled further by such a volume. What is left then is for the others.

Invariants:
    A volume that nobody slows has `appended_max` = UNBOUNDED.
    A slowed one may append `appended_max - appended` blocks now; a large write leaves a debt.
Crash: nothing is kept; a restart looks at the buffer anew.
"""

from typing import TYPE_CHECKING, Final

from forebay_cache.engine.rates import NEVER, write_delay_ns

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume

UNBOUNDED: Final = 1 << 63
CREDIT_NS_MAX: Final = 10_000_000
"""Time that a volume may have paid ahead: about what passes between two looks."""

STEP_NS_MIN: Final = 1_000_000
"""Writers that wait are looked at not more often than this."""


class Slowing:
    """Decides who is slowed, at every tick, and gives credit, at every pace."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self._slowed: dict[int, int] = {}  # volume key -> time up to which it got credit
        self.delay_ns = 0  # per block, of those who are slowed; -1: they wait

    def is_slowed(self, volume: "CacheVolume") -> bool:
        """Tell whether this volume's writers pay just now."""
        return volume.key in self._slowed

    def delay_of(self, volume: "CacheVolume") -> int:
        """Return the nanoseconds that each block written to this volume costs just now; waiting counts as a second."""
        if volume.key not in self._slowed:
            return 0
        return self.delay_ns if self.delay_ns >= 0 else 1_000_000_000

    def tick(self, now_ns: int) -> None:
        """Choose whom to slow: nobody while there is much room, else those who hold at least an equal share."""
        engine = self._engine
        self.delay_ns = write_delay_ns(engine.buffer_fill)
        if self.delay_ns == 0 and not self._slowed:
            return
        holders = [volume for volume in engine.volumes.values() if volume.dirty_blocks]
        total = sum(volume.dirty_blocks for volume in holders)
        guilty = {v.key for v in holders if self.delay_ns != 0 and v.dirty_blocks * len(holders) >= total}
        for key in set(self._slowed) - guilty:
            del self._slowed[key]
            if key in engine.volumes:
                engine.volumes[key].appended_max = UNBOUNDED
        for key in sorted(guilty - set(self._slowed)):
            self._slowed[key] = now_ns
            engine.volumes[key].appended_max = engine.volumes[key].appended_blocks

    def pace(self, now_ns: int) -> int:
        """Give credit for the time that has passed; return when to look again, NEVER if nobody waits."""
        if not self._slowed or self.delay_ns <= 0:
            return NEVER
        for key, since_ns in self._slowed.items():
            volume = self._engine.volumes.get(key)
            blocks = max(0, now_ns - since_ns) // self.delay_ns
            if volume is None or blocks == 0:
                continue
            self._slowed[key] = since_ns + blocks * self.delay_ns
            ahead = max(1, CREDIT_NS_MAX // self.delay_ns)
            volume.appended_max = min(volume.appended_max + blocks, volume.appended_blocks + ahead)
        self._engine.resume_writers()
        if any(self._engine.writes.is_waiting(key) for key in self._slowed):
            return now_ns + max(STEP_NS_MIN, self.delay_ns)
        return NEVER

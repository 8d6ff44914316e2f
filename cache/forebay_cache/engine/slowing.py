"""Slowing those who write when the buffer is nearly full: the volumes that hold more than their share of it.

Each appended block of such a volume is paid for with time, more the fuller the buffer is; who has not paid yet waits
in the queue of `writes`. There is no step in it: the delay grows from 0, and is without bound where the buffer may
not be filled further by such a volume. What is left then is for the others.

Room comes back when a cut is committed, all of it at once. While one of a limited volume is on its way, what room there
is must last until then: its writers get it evenly over that time instead of all at once and then nothing.

Invariants:
    A volume that nobody slows has `appended_max` = UNBOUNDED.
    A slowed one may append `appended_max - appended` blocks now; a large write leaves a debt.
Crash: nothing is kept; a restart looks at the buffer anew.
"""

from typing import TYPE_CHECKING, Final

from forebay_cache.engine.rates import NEVER, lasting_delay_ns, write_delay_ns

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
        self._delays: dict[int, int] = {}  # volume key -> what each block costs, in nanoseconds; -1: it waits

    def is_slowed(self, volume: "CacheVolume") -> bool:
        """Tell whether this volume's writers pay just now."""
        return volume.key in self._slowed

    def delay_of(self, volume: "CacheVolume") -> int:
        """Return the nanoseconds that each block written to this volume costs just now; waiting counts as a second."""
        delay_ns = self._delays.get(volume.key, 0)
        return delay_ns if delay_ns >= 0 else 1_000_000_000

    def tick(self, now_ns: int) -> None:
        """Choose whom to slow: nobody while there is much room, else those who hold at least an equal share."""
        engine = self._engine
        least_ns = write_delay_ns(engine.buffer_fill)
        if least_ns == 0 and not self._slowed:
            return
        guilty = self._guilty() if least_ns else {}
        for key in set(self._slowed) - set(guilty):
            del self._slowed[key]
            if key in engine.volumes:
                engine.volumes[key].appended_max = UNBOUNDED
        for key in sorted(set(guilty) - set(self._slowed)):
            self._slowed[key] = now_ns
            engine.volumes[key].appended_max = engine.volumes[key].appended_blocks
        self._delays = {key: self._delay_ns(volume, least_ns, len(guilty)) for key, volume in guilty.items()}

    def _guilty(self) -> dict[int, "CacheVolume"]:
        holders = [volume for volume in self._engine.volumes.values() if volume.dirty_blocks]
        total = sum(volume.dirty_blocks for volume in holders)
        return {v.key: v for v in holders if v.dirty_blocks * len(holders) >= total}

    def _delay_ns(self, volume: "CacheVolume", least_ns: int, sharers: int) -> int:
        """Return what each block costs: what the fill asks for, or more if the room would not last until a commit."""
        engine = self._engine
        wait_ns = engine.destage.until_commit_ns(volume)
        lasting_ns = lasting_delay_ns(engine.buffer_fill, engine.stopping_room // sharers, wait_ns)
        return least_ns if least_ns < 0 else max(least_ns, lasting_ns)

    def pace(self, now_ns: int) -> int:
        """Give credit for the time that has passed; return when to look again, NEVER if nobody waits."""
        paying = {key: delay_ns for key, delay_ns in self._delays.items() if delay_ns > 0}
        for key, delay_ns in paying.items():
            volume = self._engine.volumes.get(key)
            since_ns = self._slowed[key]
            blocks = max(0, now_ns - since_ns) // delay_ns
            if volume is None or blocks == 0:
                continue
            self._slowed[key] = since_ns + blocks * delay_ns
            ahead = max(1, CREDIT_NS_MAX // delay_ns)
            volume.appended_max = min(volume.appended_max + blocks, volume.appended_blocks + ahead)
        if not paying:
            return NEVER
        self._engine.resume_writers()
        waiting = [delay_ns for key, delay_ns in paying.items() if self._engine.writes.is_waiting(key)]
        return now_ns + max(STEP_NS_MIN, min(waiting)) if waiting else NEVER

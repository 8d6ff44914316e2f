"""How fast destaging may go, and how much writers are slowed: token buckets and two curves, all of them pure.

What counts are the bytes that are sent: frames as they are stored, and lists of holes. A *slice*, the parts of a cut
that go in one message, may go whenever no bucket is in debt, and then puts the buckets into debt by its size. So no
slice waits for a bucket to be larger than it, and what was sent is known exactly when it is charged.

Invariants, for any time between t and u of the clock that the caller passes:
    A bucket of rate r and depth d lets at most d + r * (u - t) + one slice through.
    With slices of at most `Shaper.slice_size_max` no second has more than 1.019 times the peak, and 60 seconds no
    more than 1.01 times what was allowed.
Crash: nothing is kept; a bucket starts full, and that is a quarter of a second.
Sources: token bucket as in Partridge, Gigabit Networking, 1994, two of them as in RFC 2698 (here in debt instead of
dropping); the delay of writers as in OpenZFS, dmu_tx_delay: scale * x / (1 - x).
"""

from typing import Final, NamedTuple

from forebay_core.frame import FRAME_SIZE_MAX
from forebay_core.units import BLOCK_SIZE, MIB, RATE_MAX, RATE_MIN, RATE_UNLIMITED

NS: Final = 1_000_000_000

NEVER: Final = 1 << 63
"""A time that does not come: something else than time has to happen."""

PEAK_DEPTH_DIVISOR: Final = 111
PEAK_SLICES_MIN: Final = 100
"""The peak's bucket holds a 111th of a second, a slice at most a 100th: so 1.019. What the event loop is late by is
made up within that; smaller slices would cost the store more than they win."""

AVERAGE_DEPTH_DIVISOR: Final = 4
AVERAGE_SLICES_MIN: Final = 8
"""Of the average: a quarter and an eighth of a second, which is 0.6 % of a minute."""

SLICE_SIZE_MAX: Final = MIB

CALM_FILL: Final = 0.25
URGENT_FILL: Final = 0.75
"""Fill of the buffer, as a share of what may be dirty, at which the allowed rate begins to rise and is at the peak."""

CALM_AGE_NS: Final = 120 * NS
URGENT_AGE_NS: Final = 900 * NS
"""The same for the age of the oldest data that is not upstream."""

SLOWING_FILL: Final = 0.75
STOPPING_FILL: Final = 0.95
"""Where slowing of the writers that hold most begins, and where they wait; the rest is for the other volumes."""

DELAY_SCALE_NS: Final = 200_000
"""Delay per block halfway: 20 MiB per second. At 512 KiB per second of destaging it comes to rest at a fill of 0.945,
at 500 MiB per second at 0.758, if room comes back in pieces that are small beside the buffer."""

LASTING_FILL: Final = 0.8
"""From here on the room that is left has to last until a commit gives some back, below in part."""

assert RATE_MIN // PEAK_SLICES_MIN >= BLOCK_SIZE + 128  # a frame of one block
assert CALM_FILL < URGENT_FILL <= SLOWING_FILL < LASTING_FILL < STOPPING_FILL < 1
assert SLICE_SIZE_MAX >= FRAME_SIZE_MAX


class Limit(NamedTuple):
    """What an admin set, in bytes per second: 0 for both is "not set", RATE_UNLIMITED for both is no limit."""

    average: int
    peak: int


NOT_SET: Final = Limit(0, 0)
NO_LIMIT: Final = Limit(RATE_UNLIMITED, RATE_UNLIMITED)


def is_settable(limit: Limit) -> bool:
    """Tell whether a user may set this: both finite and in bounds, or no limit at all."""
    return limit == NO_LIMIT or RATE_MIN <= limit.average <= limit.peak <= RATE_MAX


def changed_limit(current: Limit, *, average: int, peak: int) -> Limit:
    """Return the limit after one or both values were given; 0 leaves one as it is, or makes both equal."""
    if current in (NOT_SET, NO_LIMIT):
        return Limit(average or peak, peak or average)
    return Limit(average or current.average, peak or current.peak)


class Bucket:
    """Tokens that come at a rate, up to a depth; may be in debt. Counts bytes times nanoseconds, so it is exact."""

    __slots__ = ("_level",)

    def __init__(self) -> None:
        self._level = 0

    def refill(self, elapsed_ns: int, *, rate: int, depth: int) -> None:
        """Let time pass."""
        assert elapsed_ns >= 0
        self._level = min(depth * NS, self._level + rate * elapsed_ns)

    def take(self, size: int) -> None:
        """Charge what is sent."""
        self._level -= size * NS

    def wait_ns(self, rate: int) -> int:
        """Return how long it takes until there is no debt."""
        return -(self._level // rate) if self._level < 0 else 0


class Shaper:
    """The two buckets of a volume, or of all volumes together. `allowed` is the rate of the first just now."""

    __slots__ = ("_at_ns", "_average", "_peak", "allowed", "limit", "slice_size_max")

    def __init__(self) -> None:
        self.limit = NO_LIMIT
        self.allowed = RATE_UNLIMITED
        self.slice_size_max = SLICE_SIZE_MAX
        self._average = Bucket()
        self._peak = Bucket()
        self._at_ns = 0

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.limit is not NO_LIMIT

    def set_limit(self, limit: Limit) -> None:
        """Obey this from now on; debts stay."""
        self.limit = NO_LIMIT if limit in (NO_LIMIT, NOT_SET) else limit
        self.allowed = min(max(self.allowed, self.limit.average), self.limit.peak)
        bound = min(self.limit.peak // PEAK_SLICES_MIN, self.limit.average // AVERAGE_SLICES_MIN)
        self.slice_size_max = min(SLICE_SIZE_MAX, bound)

    def refill(self, now_ns: int) -> None:
        """Let time pass up to `now_ns`; a clock that stands still or goes back adds nothing."""
        elapsed_ns = max(0, now_ns - self._at_ns)
        self._at_ns = max(self._at_ns, now_ns)
        average, peak = self.limit
        self._average.refill(elapsed_ns, rate=self.allowed, depth=average // AVERAGE_DEPTH_DIVISOR)
        self._peak.refill(elapsed_ns, rate=peak, depth=peak // PEAK_DEPTH_DIVISOR)

    def press(self, now_ns: int, urgency: float) -> None:
        """Allow from now on what this urgency, 0 to 1, asks for."""
        self.refill(now_ns)
        average, peak = self.limit
        self.allowed = average + int((peak - average) * urgency)

    def due_ns(self) -> int:
        """Return when the next slice may go, after `refill`."""
        if not self.limited:
            return 0
        return self._at_ns + max(self._average.wait_ns(self.allowed), self._peak.wait_ns(self.limit.peak))

    def take(self, size: int) -> None:
        """Charge a slice."""
        if self.limited:
            self._average.take(size)
            self._peak.take(size)


def urgency(fill: float, age_ns: int) -> float:
    """Return how far the allowed rate is on the way from the average (0) to the peak (1), without a step."""
    return max(_ramp(fill, CALM_FILL, URGENT_FILL), _ramp(age_ns, CALM_AGE_NS, URGENT_AGE_NS))


def write_delay_ns(fill: float) -> int:
    """Return by how much each block of a volume that holds more than its share is slowed; -1: it waits."""
    x = (fill - SLOWING_FILL) / (STOPPING_FILL - SLOWING_FILL)
    if x <= 0:
        return 0
    return -1 if x >= 1 else max(1, int(DELAY_SCALE_NS * x / (1 - x)))


def lasting_delay_ns(fill: float, room_blocks: int, wait_ns: int) -> int:
    """Return the delay per block with which so many blocks last until room comes back in `wait_ns`."""
    return int(wait_ns / max(1, room_blocks) * _ramp(fill, SLOWING_FILL, LASTING_FILL))


def _ramp(value: float, low: float, high: float) -> float:
    """The cubic that leaves 0 and reaches 1 with a slope of 0."""
    t = min(1.0, max(0.0, (value - low) / (high - low)))
    return t * t * (3 - 2 * t)

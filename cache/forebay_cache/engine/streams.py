"""The sequential streams of one volume: reads that go on where an earlier one ended, several at a time.

Only reads of which something is not on the device are told, so a stream that hits asks for nothing. What a stream wants
read ahead begins small and doubles each time it has used up half of it, up to its share of what the volume may have
ahead. A read elsewhere begins a stream of its own; the one that was longest without a read makes room for it.

A stream that missed much *passes by*: the policy lets in of it what is used far more than what it would have to evict
(`policy_core`). The daemon and the replay of traces find that out with the same class. `Streams` has a native twin
(`_streams.h`), which is used where it was built.

Invariants:
    There are at most STREAMS_MAX streams, the one that was read last at the end.
    `asked` is the end of what was ever asked for of a stream, `missed` counts the blocks of it that the store had to
    bring; both only grow.
Crash: nothing is kept.
"""

from typing import Final

from forebay_cache.engine.limits import STREAM_SLACK_BLOCKS, STREAM_STEP_MIN, STREAM_TURNS, STREAMS_MAX, VOLUME_SLOTS
from forebay_core.units import LBA_BITS

try:
    from forebay_cache import _policy
except ImportError:  # no compiler when it was installed
    _policy = None  # type: ignore[assignment]

READ_AHEAD_BLOCKS: Final = 1024
"""What a volume has read ahead, by default."""
BYPASS_BLOCKS: Final = 64
"""Misses from which on a stream passes by, by default."""


class Stream:
    """One run of reads, one behind the other."""

    __slots__ = ("asked", "end", "missed", "turn", "window")

    def __init__(self, end: int, missed: int, turn: int) -> None:
        self.end = end  # of what was read
        self.missed = missed
        self.asked = end  # of what was read ahead
        self.window = 0  # blocks to have ahead; 0: it is no stream yet
        self.turn = turn  # when it was read last

    def goes_on(self, start: int, end: int) -> bool:
        """Whether a read belongs to it. Once it is known as a stream its reads may overtake each other."""
        if not self.window:
            return self.end - 1 <= start <= self.end < end
        return self.end - STREAM_SLACK_BLOCKS <= start <= max(self.end, self.asked) + STREAM_SLACK_BLOCKS


class Streams:
    """The streams of a volume. Time is counted in reads."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._turn = 0

    def missed_before(self, start: int, count: int, /) -> int:
        """Return how many blocks of the stream that a read goes on with the store had to bring so far."""
        stream = self._find(start, start + count)
        return 0 if stream is None else stream.missed

    def read(self, start: int, count: int, missed: int, ahead_max: int, /) -> tuple[int, int] | None:
        """Blocks were read of which the store had to bring some; return start and count of what is to be read ahead.

        All streams together want to have about `ahead_max` blocks ahead.
        """
        self._turn += 1
        stream = self._find(start, start + count)
        if stream is None:
            self._begin(start + count, missed)
            return None
        self._streams.remove(stream)
        self._streams.append(stream)
        stream.turn = self._turn
        stream.missed += missed
        stream.end = max(stream.end, start + count)
        stream.asked = max(stream.asked, stream.end)
        return self._extend(stream, count, ahead_max) if ahead_max else None

    def _find(self, start: int, end: int) -> Stream | None:
        return next((one for one in reversed(self._streams) if one.goes_on(start, end)), None)

    def _begin(self, end: int, missed: int) -> None:
        if len(self._streams) == STREAMS_MAX:
            del self._streams[0]
        self._streams.append(Stream(end, missed, self._turn))

    def _extend(self, stream: Stream, read_count: int, ahead_max: int) -> tuple[int, int] | None:
        if 2 * (stream.asked - stream.end) > stream.window > 0:
            return None
        busy = sum(1 for one in self._streams if one.window and one.turn > self._turn - STREAM_TURNS)
        wanted = 2 * stream.window if stream.window else max(STREAM_STEP_MIN, read_count)
        stream.window = min(wanted, max(ahead_max // max(busy, 1), STREAM_STEP_MIN))
        start, stream.asked = stream.asked, max(stream.asked, stream.end + stream.window)
        return (start, stream.asked - start) if stream.asked > start else None


class StreamTable:
    """The streams of all volumes, by the keys of blocks, and which of them pass by."""

    def __init__(self, bypass_blocks: int, ahead_max: int) -> None:
        self._bypass_blocks = bypass_blocks
        self._ahead_max = ahead_max
        self._by_slot: dict[int, Streams] = {}

    def passes(self, key: int, count: int) -> bool:
        """Tell whether a read is part of a stream that passes by."""
        return 0 < self._bypass_blocks < self._of(key).missed_before(key, count)

    def missed(self, key: int, count: int, missed: int) -> None:
        """Blocks were read of which the store had to bring some."""
        self._of(key).read(key, count, missed, self._ahead_max)

    def _of(self, key: int) -> Streams:
        """Volumes may share streams, as keys are positions of them."""
        return self._by_slot.setdefault((key >> LBA_BITS) % VOLUME_SLOTS, Streams())


StreamsFast: type[Streams] = Streams if _policy is None else _policy.Streams

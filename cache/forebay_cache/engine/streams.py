"""The sequential streams of one volume: reads that go on where an earlier one ended, several at a time.

Only reads of which something is not on the device are told, so a stream that hits asks for nothing. What a stream wants
read ahead begins small and doubles each time it has used up half of it, up to its share of what the volume may have
ahead. A read elsewhere begins a stream of its own; the one that was longest without a read makes room for it.

Invariants:
    There are at most STREAMS_MAX streams, the one that was read last at the end.
    `asked` is the end of what was ever asked for of a stream, `missed` counts the blocks of it that the store had to
    bring; both only grow.
Crash: nothing is kept.
"""

from forebay_cache.engine.limits import STREAM_SLACK_BLOCKS, STREAM_STEP_MIN, STREAM_TURNS, STREAMS_MAX
from forebay_core.extents import Extent


class Stream:
    """One run of reads, one behind the other."""

    __slots__ = ("asked", "end", "missed", "turn", "window")

    def __init__(self, end: int, missed: int, turn: int) -> None:
        self.end = end  # of what was read
        self.missed = missed
        self.asked = end  # of what was read ahead
        self.window = 0  # blocks to have ahead; 0: it is no stream yet
        self.turn = turn  # when it was read last

    def goes_on(self, extent: Extent) -> bool:
        """Whether a read belongs to it. Once it is known as a stream its reads may overtake each other."""
        if not self.window:
            return self.end - 1 <= extent.start <= self.end < extent.end
        return self.end - STREAM_SLACK_BLOCKS <= extent.start <= max(self.end, self.asked) + STREAM_SLACK_BLOCKS


class Streams:
    """The streams of a volume. Time is counted in reads."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._turn = 0

    def missed_before(self, extent: Extent) -> int:
        """Return how many blocks of the stream that a read goes on with the store had to bring so far."""
        stream = self._find(extent)
        return 0 if stream is None else stream.missed

    def read(self, extent: Extent, missed: int, *, ahead_max: int) -> Extent | None:
        """Blocks were read of which the store had to bring some; return what is to be read ahead, if anything.

        All streams together want to have about `ahead_max` blocks ahead.
        """
        self._turn += 1
        stream = self._find(extent)
        if stream is None:
            self._begin(extent, missed)
            return None
        self._streams.remove(stream)
        self._streams.append(stream)
        stream.turn = self._turn
        stream.missed += missed
        stream.end = max(stream.end, extent.end)
        stream.asked = max(stream.asked, stream.end)
        return self._extend(stream, extent.count, ahead_max) if ahead_max else None

    def _find(self, extent: Extent) -> Stream | None:
        return next((one for one in reversed(self._streams) if one.goes_on(extent)), None)

    def _begin(self, extent: Extent, missed: int) -> None:
        if len(self._streams) == STREAMS_MAX:
            del self._streams[0]
        self._streams.append(Stream(extent.end, missed, self._turn))

    def _extend(self, stream: Stream, read_count: int, ahead_max: int) -> Extent | None:
        if 2 * (stream.asked - stream.end) > stream.window > 0:
            return None
        busy = sum(1 for one in self._streams if one.window and one.turn > self._turn - STREAM_TURNS)
        wanted = 2 * stream.window if stream.window else max(STREAM_STEP_MIN, read_count)
        stream.window = min(wanted, max(ahead_max // max(busy, 1), STREAM_STEP_MIN))
        start, stream.asked = stream.asked, max(stream.asked, stream.end + stream.window)
        return Extent(start, stream.asked - start) if stream.asked > start else None

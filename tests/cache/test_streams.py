"""Sequential streams of a volume: found among others, read ahead in growing steps, given up when they break."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_cache.engine.limits import STREAM_STEP_MIN, STREAMS_MAX
from forebay_cache.engine.streams import Streams, StreamsFast
from forebay_core.extents import Extent

AHEAD_MAX = 1024


def read(streams: Streams, start: int, count: int = 8, *, ahead_max: int = AHEAD_MAX) -> Extent | None:
    ahead = streams.read(start, count, count, ahead_max)
    return None if ahead is None else Extent(*ahead)


def test_the_second_read_in_a_row_begins_small_and_the_steps_double() -> None:
    streams = Streams()
    assert read(streams, 1000) is None
    asked = []
    for start in range(1008, 9000, 8):
        ahead = read(streams, start)
        if ahead is not None:
            asked.append(ahead)
            assert ahead.end - (start + 8) <= AHEAD_MAX
    assert asked[0] == Extent(1016, STREAM_STEP_MIN)
    assert all(one.end == other.start for one, other in pairwise(asked)), "without gap or overlap"
    steps = [ahead.count for ahead in asked]
    assert steps[:5] == sorted(steps[:5])
    assert all(later <= 2 * earlier + 8 for earlier, later in pairwise(steps))
    assert AHEAD_MAX // 2 <= steps[-1] <= AHEAD_MAX // 2 + 8, "half of it is always under way or waiting"


def test_a_stream_that_breaks_wants_nothing_more() -> None:
    streams = Streams()
    for start in range(0, 800, 8):
        read(streams, start)
    rng = random.Random(1)
    assert [read(streams, rng.randrange(1 << 20, 1 << 30)) for _ in range(200)] == [None] * 200


def test_random_reads_want_nothing() -> None:
    streams, rng = Streams(), random.Random(2)
    assert not any(read(streams, rng.randrange(1 << 28), rng.choice((1, 2, 32))) for _ in range(5000))


def test_a_block_that_is_read_over_and_over_is_no_stream() -> None:
    streams = Streams()
    assert not any(read(streams, 77, 1) for _ in range(100))


def test_reads_of_less_than_a_block_are_a_stream() -> None:
    streams = Streams()
    asked = [read(streams, offset // 4096, 1) for offset in range(0, 40 * 4096, 512)]
    assert any(asked)


@pytest.mark.parametrize("count", [2, STREAMS_MAX])
def test_interleaved_streams_share_what_may_be_ahead(count: int) -> None:
    streams = Streams()
    ends = dict.fromkeys(range(count), 0)
    for turn in range(400):
        for index in range(count):
            ahead = read(streams, (index << 30) + turn * 8)
            if ahead is not None:
                ends[index] = ahead.end - (index << 30)
    left = [end - 400 * 8 for end in ends.values()]
    assert min(left) > 0, "each of them is read ahead"
    assert sum(left) <= AHEAD_MAX + count * STREAM_STEP_MIN


def test_one_more_stream_takes_the_room_of_the_one_that_rested_longest() -> None:
    streams = Streams()
    for index in range(STREAMS_MAX + 1):
        read(streams, index << 30)
    assert read(streams, 8) is None
    assert read(streams, (2 << 30) + 8) is not None


def test_reads_of_a_stream_may_overtake_each_other() -> None:
    streams = Streams()
    starts = list(range(0, 4096, 8))
    for at in range(16, len(starts), 8):
        starts[at], starts[at + 3] = starts[at + 3], starts[at]
    asked = [ahead for start in starts if (ahead := read(streams, start)) is not None]
    assert asked[-1].end > 4096
    assert sum(ahead.count for ahead in asked) <= 4096 + AHEAD_MAX


def test_a_stream_goes_on_behind_what_was_cached() -> None:
    streams = Streams()
    for start in range(0, 400, 8):
        read(streams, start)
    end = max(stream.asked for stream in streams._streams)
    assert read(streams, end) is not None, "all between was a hit, so nobody told"


def test_what_a_stream_missed_is_counted_for_each_of_several() -> None:
    streams = Streams()
    for turn in range(20):
        read(streams, turn * 8)
        streams.read((1 << 30) + turn * 8, 8, 3, 0)
        read(streams, (1 << 20) + turn * 999)
    assert streams.missed_before(160, 8) == 160
    assert streams.missed_before((1 << 30) + 160, 8) == 60
    assert streams.missed_before(1 << 25, 8) == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), max_size=60), st.sampled_from([16, 100, 1024]))
def test_whatever_is_read_the_bounds_hold(reads: list[tuple[int, int]], ahead_max: int) -> None:
    streams = Streams()
    for start, count in reads:
        ahead = read(streams, start, count, ahead_max=ahead_max)
        assert len(streams._streams) <= STREAMS_MAX
        assert all(stream.window <= max(ahead_max, STREAM_STEP_MIN) for stream in streams._streams)
        if ahead is not None:
            assert 0 < ahead.count <= max(ahead_max, STREAM_STEP_MIN)
            assert ahead.end > start


@pytest.mark.skipif(StreamsFast is Streams, reason="there is no compiler here")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3000), st.integers(1, 40), st.integers(0, 40)), max_size=150),
    st.sampled_from([0, 16, 100, 1024]),
)
def test_both_twins_find_the_same_streams(reads: list[tuple[int, int, int, int]], ahead_max: int) -> None:
    twins = [Streams(), StreamsFast()]
    ends: dict[int, int] = {}
    for which, jump, count, missed in reads:
        start = ends.get(which, which + 1 << 20) + (jump if jump > 2000 else jump % 3 - 1)
        ends[which] = start + count
        assert len({twin.missed_before(start, count) for twin in twins}) == 1
        assert len({twin.read(start, count, missed, ahead_max) for twin in twins}) == 1

"""Destaging by the real daemons: how well it keeps to a limit, how fast it goes without one, and what reads feel.

What was sent is what the daemon counts as `destaged_stored_bytes`, asked for over its control socket every 20 ms; it
counts a part when it is handed to the connection. All data is random, so plain and stored bytes are nearly the same.
"""

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import fio
from fio import KIB, MIB, BenchError, Load
from forebay_tools.connect import cache_client
from forebay_wire.messages import CacheStatus, GetCacheStatus
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, start_both

CACHE_SIZE = "3GiB"
HOT, COLD = "hot", "cold"
HOT_SIZE = 256 * MIB
COLD_SIZE = 768 * MIB
"""Less than half of what may be dirty: no writer is slowed while it is written."""

HOLD = "512KiB/s"
"""The least limit there is: what is written meanwhile is destaged when the limit is lifted."""

AVERAGE = 4 * MIB
PEAK = 12 * MIB
WINDOW_S_MIN, WINDOW_S_MAX = 20.0, 60.0
SPARE_S = 6.0
"""Seconds of destaging at the average that are written beyond the window; with it the buffer stays below a quarter of
what may be dirty, where the allowed rate is the average."""

PEAK_S = 4
"""Seconds that a drain takes at the peak, at least."""

START_S = 1.0
"""From the first part sent to the begin of the window: the full buckets of the beginning are spent."""

SAMPLE_S = 0.02
DEPTHS = (1, 16)
TIMEOUT_S = 120.0


class Seen(NamedTuple):
    """What the daemon had sent at a moment of the monotonic clock, and what was dirty."""

    at_s: float
    sent: int
    dirty: int


def measure(plan: Plan) -> list[Row]:
    """Return the rows of destaging."""
    with ExitStack() as stack:
        store, cache = start_both(stack, plan.folder, CACHE_SIZE)
        for name, size in ((COLD, COLD_SIZE), (HOT, HOT_SIZE)):
            store.command("volume", "create", name, "--size", str(size))
            cache.attach(name)
        _write(cache, HOT, HOT_SIZE)
        cache.settle()  # of the volume written last: at rest means that nothing is destaged
        return [*_unlimited(plan, cache), *_limited(plan, cache)]


def _unlimited(plan: Plan, cache: Cache) -> list[Row]:
    """Measure each of a round's figures in turn: reads while nothing else happens, reads while destaging, destaging."""
    read_note = (
        f"p99 of fio's completion latency while {COLD_SIZE // MIB} MiB of another volume are destaged without a limit, "
        "over that of the same reads at rest (shown as idle), in turn; RAM, buffered"
    )
    reads = {
        depth: Row(
            f"destage-read-{depth}", f"p99 of cached 4 KiB reads while destaging, d{depth}", "us", Goal(), read_note
        )
        for depth in DEPTHS
    }
    speed_note = (
        f"`forebay drain` of {COLD_SIZE // MIB} MiB random data, from the first MiB sent until all is acknowledged"
    )
    speed = Row("destage", "destaging without a limit, nothing else", "MiB/s", Goal(), speed_note)
    with ThreadPoolExecutor(1) as beside:
        for number in range(plan.rounds):
            for depth, row in reads.items():
                row.add("idle", Sample(_read(plan, cache, depth, number).p99_us))
                _hold(cache)
                drained = _release(cache, beside)
                row.add(OURS, Sample(_read(plan, cache, depth, number).p99_us))
                if drained.done():
                    raise BenchError(f"{row.what}: destaging ended before the reads did; take a smaller BENCH_SECONDS")
                drained.result()
            _hold(cache)
            speed.add(OURS, Sample(_rate(*_watch_whole(cache, _release(cache, beside))) / MIB))
    return [*reads.values(), speed]


def _limited(plan: Plan, cache: Cache) -> list[Row]:
    """Measure one window at the average, then the highest second of a drain, which goes at the peak."""
    window_s = min(max(plan.seconds, WINDOW_S_MIN), WINDOW_S_MAX)
    _drain(cache)
    cache.command("limit", COLD, "--average", str(AVERAGE), "--peak", str(PEAK))
    begun = cache.status()["destaged_stored_bytes"]
    _write(cache, COLD, round(AVERAGE * (window_s + SPARE_S) / MIB) * MIB)
    _watch(cache, lambda seen: seen[-1].sent > begun)
    time.sleep(START_S)
    steady = _watch(cache, lambda seen: seen[-1].at_s - seen[0].at_s >= window_s)
    first, last = steady[0], steady[-1]
    if not last.dirty:
        raise BenchError("destaging ended before the window did")
    with ThreadPoolExecutor(1) as beside:
        _write(cache, COLD, PEAK * PEAK_S)
        drained = beside.submit(_drain, cache)
        draining = _watch(cache, lambda _: drained.done())
    how = f"limit {AVERAGE // MIB} MiB/s, peak {PEAK // MIB} MiB/s; once, whatever the rounds; asked every 20 ms"
    average = Row(
        "destage-average",
        f"destage rate over {last.at_s - first.at_s:.0f} s against the average",
        "MiB/s",
        Goal(),
        how,
    )
    average.add(OURS, Sample(_rate(first, last) / MIB))
    average.add("limit", Sample(AVERAGE / MIB))
    peak = Row("destage-peak", "highest 1 s of a drain against the peak", "MiB/s", Goal(), how)
    peak.add(OURS, Sample(highest_rate(draining) / MIB))
    peak.add("limit", Sample(PEAK / MIB))
    return [average, peak]


def highest_rate(seen: Sequence[Seen]) -> float:
    """Return the most bytes per second over any stretch that begins and ends with a sample and just lasts a second.

    Raises:
        BenchError: there is none.
    """
    rates: list[float] = []
    end = 0
    for start in seen:
        while end < len(seen) and seen[end].at_s - start.at_s < 1:
            end += 1
        if end == len(seen):
            break
        rates.append(_rate(start, seen[end]))
    if not rates:
        raise BenchError("what was watched lasted less than a second")
    return max(rates)


def _watch_whole(cache: Cache, drained: Future[None]) -> tuple[Seen, Seen]:
    """Return the sample before the first part was sent, and the first one with nothing dirty."""
    seen = _watch(cache, lambda seen: not seen[-1].dirty)
    drained.result()
    begun = max(index for index, one in enumerate(seen) if one.sent - seen[0].sent < MIB)
    return seen[begun], seen[-1]


def _rate(first: Seen, last: Seen) -> float:
    return (last.sent - first.sent) / (last.at_s - first.at_s)


def _watch(cache: Cache, enough: Callable[[Sequence[Seen]], bool]) -> list[Seen]:
    """Ask the daemon until it is enough.

    Raises:
        TimeoutError: it never was.
    """
    return asyncio.run(asyncio.wait_for(_ask_often(cache, enough), TIMEOUT_S))


async def _ask_often(cache: Cache, enough: Callable[[Sequence[Seen]], bool]) -> list[Seen]:
    seen: list[Seen] = []
    async with cache_client(argparse.Namespace(run_dir=cache.run_dir)) as client:
        while not seen or not enough(seen):
            status, _ = await client.ask(GetCacheStatus(), CacheStatus)
            seen.append(Seen(time.monotonic(), status.destaged_stored_bytes, status.dirty_bytes))
            await asyncio.sleep(SAMPLE_S)
    return seen


def _write(cache: Cache, volume: str, size: int) -> None:
    cache.serve(volume)
    fio.run(cache.uri, Load("write", MIB, 8, TIMEOUT_S, size, io_size=size))


def _read(plan: Plan, cache: Cache, depth: int, number: int) -> fio.Outcome:
    cache.serve(HOT)
    return fio.run(cache.uri, Load("randread", 4 * KIB, depth, plan.seconds, HOT_SIZE, seed=1 + number))


def _drain(cache: Cache) -> None:
    cache.command("drain", COLD)


def _hold(cache: Cache) -> None:
    """Leave `COLD_SIZE` of dirty data behind, nearly none of it sent."""
    cache.command("limit", COLD, "--average", HOLD, "--peak", HOLD)
    _write(cache, COLD, COLD_SIZE)


def _release(cache: Cache, beside: Executor) -> Future[None]:
    """Let all that is held go at full speed."""
    cache.command("limit", COLD, "--unlimited")
    return beside.submit(_drain, cache)

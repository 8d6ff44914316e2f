"""Reads that miss: latency, and CPU of cache daemon and store, with the store on loopback and its data in RAM.

Every measurement has a new cache device. Reads are aligned to what one miss fetches, so only a read that hits an
extent for the second time is no miss; their share is bounded, and CPU is counted per miss.
"""

from contextlib import ExitStack

import fio
from fio import KIB, MIB, BenchError, Load
from results import OURS, Goal, Row, Sample
from rounds import Plan, make_random_file
from servers import Cache, Store, cpu_s

VOLUME_SIZE = 512 * MIB
CACHE_SIZE = "1GiB"
FETCH_UNIT = 16 * KIB
MISS_SHARE_MIN = 0.85
DEPTHS = (1, 16)


def measure(plan: Plan) -> list[Row]:
    """Return the rows: none has a peer or a goal."""
    with ExitStack() as stack:
        store = Store(plan.folder / "store")
        stack.callback(store.stop)
        source = plan.folder / "source.raw"
        make_random_file(source, VOLUME_SIZE)
        store.command("volume", "import", "cold", str(source))
        return [row for depth in DEPTHS for row in _depth(plan, store, depth)]


def _depth(plan: Plan, store: Store, depth: int) -> list[Row]:
    note = "store on loopback, same 2 cores as the load; segments in the page cache; CPU is of the daemon named"
    kinds = (
        ("median", "median latency", "us"),
        ("p99", "p99 latency", "us"),
        ("rate", "rate", "op/s"),
        ("cache-cpu", "CPU of the cache daemon", "us/op"),
        ("store-cpu", "CPU of the store", "us/op"),
    )
    rows = {
        kind: Row(f"miss-{depth}-{kind}", f"4 KiB read miss, d{depth}: {what}", unit, Goal(), note)
        for kind, what, unit in kinds
    }
    for number in range(plan.rounds):
        load = Load("randread", 4 * KIB, depth, plan.seconds, VOLUME_SIZE, align=FETCH_UNIT, seed=number)
        for kind, value in _measure(plan, store, load).items():
            rows[kind].add(OURS, Sample(value))
    return list(rows.values())


def _measure(plan: Plan, store: Store, load: Load) -> dict[str, float]:
    device = plan.folder / "cache"
    cache = Cache(device, plan.folder, store=store.address, size=CACHE_SIZE)
    try:
        cache.attach("cold")
        before = cpu_s(cache.pid), cpu_s(store.pid)
        outcome = fio.run(cache.uri, load)
        after = cpu_s(cache.pid), cpu_s(store.pid)
        missed = cache.status()["miss_blocks"]
        cache.command("detach", "cold")
    finally:
        cache.stop()
        device.unlink()
    if missed < MISS_SHARE_MIN * outcome.operations:
        raise BenchError(f"only {missed} of {outcome.operations} reads were misses")
    return {
        "median": outcome.median_us,
        "p99": outcome.p99_us,
        "rate": outcome.operations_per_s,
        "cache-cpu": (after[0] - before[0]) * 1e6 / missed,
        "store-cpu": (after[1] - before[1]) * 1e6 / missed,
    }

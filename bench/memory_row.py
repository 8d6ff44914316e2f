"""Memory of the cache daemon per GiB of cache: the slope of its anonymous memory between two full caches."""

import time
from pathlib import Path

import fio
from fio import KIB, MIB, BenchError, Load
from full_device import VOLUME, make_full_device
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, anonymous_bytes

SIZES_GIB = (5, 20)
NOWHERE = "127.0.0.1:1"
"""Nobody listens on this port, so the daemon serves alone."""

READ_SIZE = 256 * MIB
SETTLE_S = 1.0
SETTLE_BYTES_MAX = 256 * KIB
SETTLE_TIMEOUT_S = 30.0


def measure(plan: Plan) -> list[Row]:
    """Return the slope and what it is the slope of; also proves that the full cache is served without a store."""
    slope = Row(
        "memory",
        "memory per GiB of cache, 5 to 20 GiB",
        "MiB",
        Goal(12, 8, less_is_better=True),
        "RssAnon of the daemon, a full cache made from the formats, data as holes, after 64Ki cached reads, at rest",
    )
    totals = {
        size: Row(f"memory-{size}", f"memory with a full {size} GiB cache", "MiB", Goal(), slope.note)
        for size in SIZES_GIB
    }
    for _ in range(plan.rounds):
        found = {size: _measure(plan.folder, size) for size in SIZES_GIB}
        for size, used in found.items():
            totals[size].add(OURS, Sample(used / MIB))
        small, large = SIZES_GIB
        slope.add(OURS, Sample((found[large] - found[small]) / MIB / (large - small)))
    return [slope, *totals.values()]


def _measure(folder: Path, size_gib: int) -> int:
    """Return the anonymous bytes of a daemon on a full cache."""
    device = folder / "full"
    made = make_full_device(device, size_gib << 30)
    cache = Cache(device, folder, store=NOWHERE)
    try:
        cache.serve(VOLUME)
        # The last blocks: for the first ones the daemon may have freed some zones to write to.
        offset = made.volume_size - READ_SIZE
        fio.run(cache.uri, Load("randread", 4 * KIB, 16, 60, READ_SIZE, io_size=READ_SIZE, offset=offset))
        used = _at_rest(cache.pid)
        status = cache.status()
        if status["miss_blocks"] or status["cached_bytes"] < 0.9 * status["capacity_bytes"]:
            raise BenchError(f"the cache is not full: {status}")
        return used
    finally:
        cache.stop()
        device.unlink()


def _at_rest(pid: int) -> int:
    """Return the anonymous bytes once they hold still: the checkpoint that follows a start is over."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    before = anonymous_bytes(pid)
    while time.monotonic() < deadline_s:
        time.sleep(SETTLE_S)
        now = anonymous_bytes(pid)
        if abs(now - before) <= SETTLE_BYTES_MAX:
            return now
        before = now
    raise BenchError(f"the memory of the cache daemon grows on: {before} bytes")

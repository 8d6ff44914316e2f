"""Reads that hit: a volume that lies in the cache whole and clean, against peers that serve a file of that size."""

from collections.abc import Callable
from contextlib import ExitStack

import fio
from fio import KIB, MIB, BenchError, Load
from results import Goal, Row, Sample
from rounds import Plan, interleave, make_random_file, measure_mebibytes, measure_operations
from servers import Cache, Peer, Server, Store, drop_file, start_both, warm_file

VOLUME_SIZE = 1024 * MIB
CACHE_SIZE = "1536MiB"
DEPTHS = (1, 16, 64)
READ_GOAL = Goal(0.4, 1.0)
SEQUENTIAL_GOAL = Goal(0.6, 1.0)


def measure(plan: Plan) -> list[Row]:
    """Return the rows of cached reads."""
    with ExitStack() as stack:
        store, cache = start_both(stack, plan.folder, CACHE_SIZE)
        file = plan.folder / "peers.raw"
        make_random_file(file, VOLUME_SIZE)
        nbdkit = Peer("nbdkit", file, plan.folder)
        stack.callback(nbdkit.stop)
        qemu = Peer("qemu-nbd", file, plan.folder)
        stack.callback(qemu.stop)
        _fill(store, cache)
        rows = []
        if "read" in plan.keys:
            rows += [_random(plan, cache, [cache, nbdkit, qemu], depth, cold=False) for depth in DEPTHS]
            rows += [_random(plan, cache, [cache, nbdkit, qemu], depth, cold=True) for depth in DEPTHS]
        if "sequential" in plan.keys:
            rows.append(_sequential(plan, cache, [cache, nbdkit]))
        return rows


def _fill(store: Store, cache: Cache) -> None:
    store.command("volume", "create", "hot", "--size", str(VOLUME_SIZE))
    cache.attach("hot")
    fio.run(cache.uri, Load("write", MIB, 8, 120, VOLUME_SIZE, io_size=VOLUME_SIZE))
    cache.settle()
    status = cache.status()
    if status["dirty_bytes"] or status["cached_bytes"] < VOLUME_SIZE:
        raise BenchError(f"the volume is not in the cache whole and clean: {status}")


def _random(plan: Plan, cache: Cache, servers: list[Server], depth: int, *, cold: bool) -> Row:
    where = "SSD" if cold else "RAM"
    row = Row(
        f"read-{where.lower()}-{depth}",
        f"cached 4 KiB random reads, d{depth}, {where}",
        "op/s",
        READ_GOAL,
        "pages dropped from RAM before each round, each block read once: from the disk; buffered, ours and peers"
        if cold
        else "file warm in the page cache; buffered, ours and peers",
    )

    def measure_one(server: Server, number: int) -> Sample:
        (drop_file if cold else warm_file)(server.file)
        return measure_operations(server, Load("randread", 4 * KIB, depth, plan.seconds, VOLUME_SIZE, seed=1 + number))

    return _without_misses(cache, lambda: interleave(row, servers, plan, measure_one))


def _sequential(plan: Plan, cache: Cache, servers: list[Server]) -> Row:
    row = Row(
        "sequential-read",
        "1 MiB sequential cached reads, d8, RAM",
        "MiB/s",
        SEQUENTIAL_GOAL,
        "file warm in the page cache; buffered, ours and peers",
    )

    def measure_one(server: Server, number: int) -> Sample:
        warm_file(server.file)
        return measure_mebibytes(server, Load("read", MIB, 8, plan.seconds, VOLUME_SIZE, seed=1 + number))

    return _without_misses(cache, lambda: interleave(row, servers, plan, measure_one))


def _without_misses(cache: Cache, fill_row: Callable[[], Row]) -> Row:
    before = cache.status()["miss_blocks"]
    row = fill_row()
    missed = cache.status()["miss_blocks"] - before
    if missed:
        raise BenchError(f"{row.what}: {missed} blocks were not in the cache")
    return row

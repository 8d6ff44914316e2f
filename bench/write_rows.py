"""Writes into a cache that is full of clean data and half as large as its volume, against peers that write to a file.

A measurement ends after WRITE_SIZE at the latest, less than the share of the cache that may be dirty: what is measured
is the buffer, not the store. Afterwards everything is drained and synced, off the clock.
"""

from contextlib import ExitStack

import fio
from fio import KIB, MIB, BenchError, Load
from results import Goal, Row, Sample
from rounds import Plan, interleave, make_random_file, measure_mebibytes, measure_operations
from servers import Cache, Peer, Server, Store, start_both

VOLUME_SIZE = 2048 * MIB
CACHE_SIZE = "1GiB"
WRITE_SIZE = 384 * MIB
FLUSH_EVERY = 256
FREE_ZONES_MAX = 25
"""A tenth of the cache: reclaim keeps some free, nothing else may be."""

WRITE_GOAL = Goal(0.7, 1.5)
SEQUENTIAL_GOAL = Goal(0.6, 1.0)


def measure(plan: Plan) -> list[Row]:
    """Return the rows of writes."""
    with ExitStack() as stack:
        store, cache = start_both(stack, plan.folder, CACHE_SIZE)
        peers = []
        for name in ("nbdkit", "qemu-nbd"):
            file = plan.folder / f"{name}.raw"
            make_random_file(file, VOLUME_SIZE)
            peers.append(Peer(name, file, plan.folder))
            stack.callback(peers[-1].stop)
        note = f"{_fill(store, cache)}, volume twice its size; buffered, ours and peers; drained and synced in between"
        rows = []
        if "write" in plan.keys:
            rows.append(_random(plan, [cache, *peers], None, note))
        if "flush" in plan.keys:
            rows.append(_random(plan, [cache, *peers], FLUSH_EVERY, note))
        if "sequential" in plan.keys:
            rows.append(_sequential(plan, [cache, peers[0]], note))
        return rows


def _fill(store: Store, cache: Cache) -> str:
    """Write the volume once and a part of it at random, destage all; return how full the cache is."""
    store.command("volume", "create", "full", "--size", str(VOLUME_SIZE))
    cache.attach("full")
    fio.run(cache.uri, Load("write", MIB, 8, 300, VOLUME_SIZE, io_size=VOLUME_SIZE))
    fio.run(cache.uri, Load("randwrite", 4 * KIB, 16, 300, VOLUME_SIZE, io_size=WRITE_SIZE))
    cache.settle()
    status = cache.status()
    if status["dirty_bytes"] or status["free_zones"] > FREE_ZONES_MAX:
        raise BenchError(f"the cache is not full of clean data: {status}")
    live = status["cached_bytes"] / status["capacity_bytes"]
    return f"cache full of clean data ({live:.0%} of it live, {status['free_zones']} zones free)"


def _random(plan: Plan, servers: list[Server], flush_every: int | None, note: str) -> Row:
    what = "4 KiB random writes, d16" + (f", flush/{flush_every}" if flush_every else "")
    row = Row("flush" if flush_every else "write", what, "op/s", WRITE_GOAL, note)

    def measure_one(server: Server, number: int) -> Sample:
        load = Load(
            "randwrite",
            4 * KIB,
            16,
            plan.seconds,
            VOLUME_SIZE,
            io_size=WRITE_SIZE,
            flush_every=flush_every,
            seed=100 + number,
        )
        sample = measure_operations(server, load)
        server.settle()
        return sample

    return interleave(row, servers, plan, measure_one)


def _sequential(plan: Plan, servers: list[Server], note: str) -> Row:
    row = Row("sequential-write", "1 MiB sequential writes, d8", "MiB/s", SEQUENTIAL_GOAL, note)

    def measure_one(server: Server, number: int) -> Sample:
        load = Load("write", MIB, 8, plan.seconds, VOLUME_SIZE, io_size=WRITE_SIZE, seed=200 + number)
        sample = measure_mebibytes(server, load)
        server.settle()
        return sample

    return interleave(row, servers, plan, measure_one)

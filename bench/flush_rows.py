"""Flushed writes: group commit, latency against a plain write with fdatasync on the same disk, and bytes on the SSD."""

import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import fio
from fio import KIB, MIB, Load
from nbd_peer import NbdPeer
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, Store

VOLUME_SIZE = 512 * MIB
CACHE_SIZE = "1GiB"
WRITE_SIZE = 192 * MIB
STEADY_CACHE = "256MiB"
STEADY_SIZE = 384 * MIB
WRITERS = 16
PLAIN = "pwrite+fdatasync"
FUA_NOTE = (
    "random offsets, one request at a time by bench/nbd_peer.py, a Python loop as the plain one is: fio has no FUA"
)


def measure(plan: Plan) -> list[Row]:
    """Return the rows of flushed writes."""
    rows: list[Row] = []
    with ExitStack() as stack:
        store = Store(plan.folder / "store")
        stack.callback(store.stop)
        if "commit" in plan.keys:
            rows += _commit(plan, store, stack)
        if "amplification" in plan.keys:
            rows += [_amplification(plan, store, depth, goal) for depth, goal in ((1, 2.3), (32, 1.3))]
            rows.append(_amplification(plan, store, 32, None))
    return rows


def _commit(plan: Plan, store: Store, stack: ExitStack) -> list[Row]:
    note = "4 KiB random writes, each followed by a flush; not full; the plain file is on the same disk, allocated"
    group = Row("commit-group", f"flushed writes/s, {WRITERS} writers over 1", "x", Goal(4, 8), note)
    many = Row("commit-many", f"flushed writes/s, {WRITERS} writers", "op/s", Goal(), note)
    durable = Row("commit-fua", "4 KiB write with FUA, d1", "us", Goal(1.6, 1.2, less_is_better=True), FUA_NOTE)
    latency = Row("commit-latency", "flushed 4 KiB write, d1", "us", Goal(1.6, 1.2, less_is_better=True), note)
    folder = plan.folder / "commit"
    folder.mkdir()
    cache = Cache(folder / "cache", folder, store=store.address, size=CACHE_SIZE)
    stack.callback(cache.stop)
    store.command("volume", "create", "commit", "--size", str(VOLUME_SIZE))
    cache.attach("commit")
    plain = folder / "plain"
    plain.write_bytes(os.urandom(64 * MIB))
    for number in range(plan.rounds):
        load = Load("randwrite", 4 * KIB, 1, plan.seconds, VOLUME_SIZE, flush_every=1, seed=400 + number)
        if number % 2:
            plain_us = _plain_us(plain, plan.seconds, number)
            one = fio.run(cache.uri, load).operations_per_s
        else:
            one = fio.run(cache.uri, load).operations_per_s
            plain_us = _plain_us(plain, plan.seconds, number)
        durable_us = _durable_us(cache, "commit", plan.seconds, number)
        both = fio.run(cache.uri, load._replace(jobs=WRITERS)).operations_per_s
        latency.add(OURS, Sample(1e6 / one))
        latency.add(PLAIN, Sample(plain_us))
        durable.add(OURS, Sample(durable_us))
        durable.add(PLAIN, Sample(plain_us))
        many.add(OURS, Sample(both))
        group.add(OURS, Sample(both / one))
        cache.settle()
    return [group, many, latency, durable]


def _durable_us(cache: Cache, volume: str, seconds: float, seed: int) -> float:
    """Return microseconds of one write of 4 KiB with FUA, as the kernel and qemu send what is written with O_DSYNC."""
    rng = random.Random(seed)
    block = os.urandom(4 * KIB)
    with NbdPeer(cache.socket, volume) as peer:

        def write() -> None:
            peer.write(rng.randrange(VOLUME_SIZE // len(block)) * len(block), block, fua=True)

        return _each_us(write, seconds)


def _plain_us(path: Path, seconds: float, seed: int) -> float:
    """Return microseconds of one pwrite and fdatasync of 4 KiB at random offsets of a file that has its blocks."""
    rng = random.Random(seed)
    block = os.urandom(4 * KIB)
    blocks = path.stat().st_size // len(block)
    fd = os.open(path, os.O_RDWR)
    try:

        def write() -> None:
            os.pwrite(fd, block, rng.randrange(blocks) * len(block))
            os.fdatasync(fd)

        return _each_us(write, seconds)
    finally:
        os.close(fd)


def _each_us(act: Callable[[], None], seconds: float) -> float:
    """Act again and again for so long; return the microseconds of each time."""
    count = 0
    began_s = time.perf_counter()
    while (used_s := time.perf_counter() - began_s) < seconds:
        act()
        count += 1
    return used_s * 1e6 / count


def _amplification(plan: Plan, store: Store, depth: int, goal: float | None) -> Row:
    """`goal` None: in a cache so small that all of it is reclaimed while it is written."""
    steady = goal is None
    name = f"steady-{depth}" if steady else f"d{depth}"
    row = Row(
        f"amplification-{name}",
        f"SSD bytes per byte of guest 4 KiB writes, d{depth}{', reclaim in steady state' if steady else ''}",
        "x",
        Goal(goal, less_is_better=True),
        "write_bytes of the daemon, checkpoints included; random writes without flush",
    )
    size, amount = (STEADY_CACHE, STEADY_SIZE) if steady else (CACHE_SIZE, WRITE_SIZE)
    for number in range(plan.rounds if steady else max(1, plan.rounds // 2)):
        folder = plan.folder / f"amplification-{name}-{number}"
        folder.mkdir()
        volume = f"a-{name}-{number}"
        cache = Cache(folder / "cache", folder, store=store.address, size=size)
        try:
            store.command("volume", "create", volume, "--size", str(VOLUME_SIZE))
            cache.attach(volume)
            load = Load("randwrite", 4 * KIB, depth, 300, VOLUME_SIZE, io_size=amount, seed=500 + number)
            if steady:
                fio.run(cache.uri, load._replace(seed=600 + number))  # fills the cache
            before = _written(cache.pid)
            fio.run(cache.uri, load)
            row.add(OURS, Sample((_written(cache.pid) - before) / amount))
        finally:
            cache.stop()
            cache.file.unlink()
    return row


def _written(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))

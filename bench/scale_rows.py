"""What must not grow: a volume with 1,000 snapshots beside one without, the clone and the TRIM of a volume of 1 TiB.

Both volumes were written alike, a few blocks between any two snapshots, and lie in one store and one cache.
"""

import argparse
import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import fio
from fio import KIB, MIB, BenchError, Load
from forebay_tools.connect import cache_client, store_client
from forebay_wire.messages import AnyMessage, CloneVolume, CreateSnapshot, SnapshotTaken, Volume
from full_device import VOLUME as FULL_VOLUME
from full_device import make_full_device
from nbd_peer import NbdPeer
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, Store

MANY, NONE = "many", "none"
SNAPSHOTS = 1000
WRITES_BETWEEN = 8
VOLUME_SIZE = 256 * MIB
CACHE_SIZE = "1GiB"
COLD_CACHE_SIZE = "72MiB"
HUGE, HUGE_SIZE = "huge", 1 << 40
HUGE_WRITTEN = 256 * MIB
FULL_SIZE = 20 << 30
SWEEP_S = 3.0
BLOCK_SIZE = 4096
PEER = "no snapshots"


def measure(plan: Plan) -> list[Row]:
    """Return the rows."""
    rows: list[Row] = []
    with ExitStack() as stack:
        store = Store(plan.folder / "scale-store")
        stack.callback(store.stop)
        if "snapshots-1000" in plan.keys:
            rows += _many(plan, store, stack)
        if "huge" in plan.keys:
            rows += _huge(plan, store, stack)
        if "trim-full" in plan.keys:
            rows += _trim_full(plan, store, stack)
    return rows


def _cache(plan: Plan, store: Store, stack: ExitStack, name: str, size: str) -> Cache:
    folder = plan.folder / name
    folder.mkdir()
    cache = Cache(folder / "cache", folder, store=store.address, size=size)
    stack.callback(cache.stop)
    return cache


def _many(plan: Plan, store: Store, stack: ExitStack) -> list[Row]:
    cache = _cache(plan, store, stack, "scale", CACHE_SIZE)
    for name in (NONE, MANY):
        store.command("volume", "create", name, "--size", str(VOLUME_SIZE))
        cache.attach(name)
        fio.run(cache.uri, Load("write", MIB, 8, 120, VOLUME_SIZE, io_size=VOLUME_SIZE))
        cache.settle()
        _write_between(cache, name, snapshots=name == MANY)
        cache.settle()
    note = f"{SNAPSHOTS} snapshots, {WRITES_BETWEEN} blocks written between any two; the peer is the same without one"
    goal = Goal(0.9)
    rows = [
        _against(
            plan,
            cache,
            Row("snapshots-1000-read", "4 KiB cached reads d16, 1,000 snapshots over none", "op/s", goal, note),
        ),
        _against(
            plan,
            cache,
            Row("snapshots-1000-write", "4 KiB writes d16, 1,000 snapshots over none", "op/s", goal, note),
            write=True,
        ),
    ]
    for name in (NONE, MANY):
        cache.command("detach", name)
    cold = _cache(plan, store, stack, "scale-cold", COLD_CACHE_SIZE)
    for name in (NONE, MANY):
        cold.command("attach", name)
    text = "4 KiB reads d16 that mostly miss, 1,000 snapshots over none"
    rows.append(_against(plan, cold, Row("snapshots-1000-miss", text, "op/s", goal, note)))
    return rows


def _against(plan: Plan, cache: Cache, row: Row, *, write: bool = False) -> Row:
    for number in range(plan.rounds):
        turn = ((MANY, OURS), (NONE, PEER))
        for name, column in turn if number % 2 else turn[::-1]:
            cache.serve(name)
            rw = "randwrite" if write else "randread"
            load = Load(rw, 4 * KIB, 16, plan.seconds, VOLUME_SIZE, seed=900 + number)
            row.add(column, Sample(fio.run(cache.uri, load).operations_per_s))
            if write:
                cache.settle()
    return row


def _write_between(cache: Cache, name: str, *, snapshots: bool) -> None:
    """Write a few blocks and take a snapshot, over and over; or only write."""
    rng = random.Random(name == MANY)
    with NbdPeer(cache.socket, name) as client:
        for number in range(SNAPSHOTS):
            for _ in range(WRITES_BETWEEN):
                client.write(rng.randrange(VOLUME_SIZE // BLOCK_SIZE) * BLOCK_SIZE, rng.randbytes(BLOCK_SIZE))
            if snapshots:
                _ask_cache(cache, CreateSnapshot((name,), f"s{number}", stored=number % 50 == 49), SnapshotTaken)


def _huge(plan: Plan, store: Store, stack: ExitStack) -> list[Row]:
    note = f"a volume of 1 TiB with {HUGE_WRITTEN // MIB} MiB written, half of it not destaged; asked on the wire"
    clone = Row("huge-clone", "clone of a 1 TiB volume", "ms", Goal(50, less_is_better=True), note)
    trim = Row("huge-trim", "TRIM of 1 TiB in one request", "ms", Goal(100, less_is_better=True), note)
    cache = _cache(plan, store, stack, "huge", CACHE_SIZE)
    store.command("volume", "create", HUGE, "--size", str(HUGE_SIZE))
    cache.attach(HUGE)
    for number in range(plan.rounds):
        offset = (number << 33) & (HUGE_SIZE - 1)
        load = Load("write", MIB, 8, 120, offset + HUGE_WRITTEN, io_size=HUGE_WRITTEN // 2, offset=offset)
        fio.run(cache.uri, load)
        cache.command("drain", HUGE)
        _ask_cache(cache, CreateSnapshot((HUGE,), f"s{number}", stored=True), SnapshotTaken)
        began_s = time.perf_counter()
        _ask_store(store, CloneVolume(HUGE, f"s{number}", f"clone{number}"), Volume)
        clone.add(OURS, Sample((time.perf_counter() - began_s) * 1e3))
        fio.run(cache.uri, load._replace(offset=offset + HUGE_WRITTEN, size=offset + 2 * HUGE_WRITTEN))
        with NbdPeer(cache.socket, HUGE) as client:
            began_s = time.perf_counter()
            client.trim(0, HUGE_SIZE)
            trim.add(OURS, Sample((time.perf_counter() - began_s) * 1e3))
        cache.settle()
    return [clone, trim]


def _trim_full(plan: Plan, store: Store, stack: ExitStack) -> list[Row]:
    note = f"all of a full cache of {FULL_SIZE >> 30} GiB is of the volume, blocks scattered, a tenth of them dirty"
    trim = Row("trim-full", "TRIM of a volume that fills the cache", "ms", Goal(100, less_is_better=True), note)
    beside = Row("trim-full-write", "longest write while its blocks leave the map", "ms", Goal(), note)
    idle = Row("trim-full-none", "the same in as much time before", "ms", Goal(), note)
    folder = plan.folder / "trim-full"
    folder.mkdir()
    for _ in range(plan.rounds):
        made = make_full_device(folder / "cache", FULL_SIZE, dirty_size=FULL_SIZE // 10)
        cache = Cache(folder / "cache", folder, store=store.address)
        try:
            _wait_until_loaded(cache, made.block_count * BLOCK_SIZE)
            with NbdPeer(cache.socket, FULL_VOLUME) as client, NbdPeer(cache.socket, FULL_VOLUME) as other:
                idle.add(OURS, Sample(_longest_write_ms(other)))
                with ThreadPoolExecutor(1) as executor:
                    longest = executor.submit(_longest_write_ms, other)
                    began_s = time.perf_counter()
                    client.trim(0, made.volume_size)
                    trim.add(OURS, Sample((time.perf_counter() - began_s) * 1e3))
                    beside.add(OURS, Sample(longest.result()))
        finally:
            cache.stop()
    return [trim, beside, idle]


def _wait_until_loaded(cache: Cache, cached_size: int) -> None:
    deadline_s = time.monotonic() + 60
    while cache.status()["cached_bytes"] < cached_size * 0.95:  # zones that the start freed are missing
        if time.monotonic() > deadline_s:
            raise BenchError("the cache does not load what it holds")
        time.sleep(0.2)


def _longest_write_ms(client: NbdPeer) -> float:
    longest_s = 0.0
    end_s = time.perf_counter() + SWEEP_S
    while (began_s := time.perf_counter()) < end_s:
        client.write(0, bytes(BLOCK_SIZE))
        longest_s = max(longest_s, time.perf_counter() - began_s)
    return longest_s * 1e3


def _ask_cache(cache: Cache, message: AnyMessage, kind: type[AnyMessage]) -> None:
    async def ask() -> None:
        async with cache_client(argparse.Namespace(run_dir=Path(cache.run_dir))) as client:
            await client.ask(message, kind)

    asyncio.run(ask())


def _ask_store(store: Store, message: AnyMessage, kind: type[AnyMessage]) -> None:
    async def ask() -> None:
        async with store_client(argparse.Namespace(store=store.address, key_file=None)) as client:
            await client.ask(message, kind)

    asyncio.run(ask())

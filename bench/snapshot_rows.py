"""Snapshots of a volume under write load: time of the command, and how long a write is held up.

One client writes 4 KiB and flushes, over and over, and notes each time; beside it fio writes, with a flush after every
32 writes. The command is what a connected client of the control socket waits for. What a write is held up is the
longest flushed write that overlaps a snapshot less the median of all; the same for as many moments without one tells
what the machine does by itself.
"""

import argparse
import asyncio
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import fio
from fio import KIB, MIB, Load
from forebay_tools.connect import cache_client
from forebay_wire.messages import CreateSnapshot, SnapshotTaken
from nbd_peer import NbdPeer
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, start_both

VOLUME = "busy"
VOLUME_SIZE = 1024 * MIB
CACHE_SIZE = "2GiB"
SNAPSHOTS_PER_ROUND = 8
PAUSE_S = 0.4
BLOCK_SIZE = 4 * KIB


class _Write(NamedTuple):
    """When a flushed write began and ended, monotonic clock."""

    began_s: float
    ended_s: float


def measure(plan: Plan) -> list[Row]:
    """Return the rows."""
    with ExitStack() as stack:
        store, cache = start_both(stack, plan.folder, CACHE_SIZE)
        store.command("volume", "create", VOLUME, "--size", str(VOLUME_SIZE))
        cache.attach(VOLUME)
        fio.run(cache.uri, Load("write", MIB, 8, 120, VOLUME_SIZE, io_size=VOLUME_SIZE))
        return measure_on(cache, VOLUME, VOLUME_SIZE, plan.rounds, "snapshot", "")


def measure_on(cache: Cache, volume: str, size: int, rounds: int, key: str, what: str) -> list[Row]:
    """Return the rows of an attached volume; `what` says more of it."""
    note = f"fio d16 with a flush every 32 beside one flushing writer; {SNAPSHOTS_PER_ROUND} snapshots a round{what}"
    command = Row(f"{key}-command", "snapshot under write load", "ms", Goal(20, less_is_better=True), note)
    worst = Row(f"{key}-worst", "the same, slowest of a round", "ms", Goal(), note)
    stall = Row(
        f"{key}-stall", "longest flushed write at one, over the median", "ms", Goal(5, less_is_better=True), note
    )
    without = Row(f"{key}-none", "the same where there is none", "ms", Goal(), note)
    for number in range(rounds):
        cache.settle()
        taken, idle, writes = _round(cache, volume, size, number)
        median_s = statistics.median(one.ended_s - one.began_s for one in writes)
        times = [one.ended_s - one.began_s for one in taken]
        command.add(OURS, Sample(statistics.median(times) * 1e3))
        worst.add(OURS, Sample(max(times) * 1e3))
        stall.add(OURS, Sample((_held_up_s(taken, writes) - median_s) * 1e3))
        without.add(OURS, Sample((_held_up_s(idle, writes) - median_s) * 1e3))
    return [command, worst, stall, without]


def _held_up_s(moments: list[_Write], writes: list[_Write]) -> float:
    """Return the median over the moments of the longest write that overlaps one."""
    longest = [
        max((one.ended_s - one.began_s for one in writes if one.began_s < end and one.ended_s > began), default=0.0)
        for began, end in moments
    ]
    return statistics.median(longest)


def _round(cache: Cache, volume: str, size: int, number: int) -> tuple[list[_Write], list[_Write], list[_Write]]:
    """Return the snapshots, as many moments without one, and the flushed writes."""
    stop = threading.Event()
    seconds = (2 * SNAPSHOTS_PER_ROUND + 4) * PAUSE_S
    load = Load("randwrite", BLOCK_SIZE, 16, seconds, size, flush_every=32, seed=700 + number)
    with ThreadPoolExecutor(2) as beside:
        loading = beside.submit(fio.run, cache.uri, load)
        writing = beside.submit(_write, cache, volume, stop)
        try:
            time.sleep(2 * PAUSE_S)
            taken, idle = asyncio.run(_take(cache, volume, number))
        finally:
            stop.set()
        loading.result()
        return taken, idle, writing.result()


async def _take(cache: Cache, volume: str, number: int) -> tuple[list[_Write], list[_Write]]:
    taken: list[_Write] = []
    idle: list[_Write] = []
    async with cache_client(argparse.Namespace(run_dir=cache.run_dir)) as client:
        for count in range(SNAPSHOTS_PER_ROUND):
            await asyncio.sleep(PAUSE_S)
            began_s = time.monotonic()
            await client.ask(CreateSnapshot((volume,), f"s{number}-{count}"), SnapshotTaken)
            taken.append(_Write(began_s, time.monotonic()))
            await asyncio.sleep(PAUSE_S)
            began_s = time.monotonic()
            idle.append(_Write(began_s, began_s + taken[-1].ended_s - taken[-1].began_s))
    return taken, idle


def _write(cache: Cache, volume: str, stop: threading.Event) -> list[_Write]:
    writes: list[_Write] = []
    payload = os.urandom(BLOCK_SIZE)
    with NbdPeer(cache.socket, volume) as peer:
        while not stop.is_set():
            began_s = time.monotonic()
            peer.write(len(writes) % (VOLUME_SIZE // BLOCK_SIZE) * BLOCK_SIZE, payload)
            peer.flush()
            writes.append(_Write(began_s, time.monotonic()))
    return writes

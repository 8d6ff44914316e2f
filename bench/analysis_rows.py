"""`forebay analyze`: how near it is to the truth, how fast and small it is, and what its sample costs the daemon.

The truth is the whole trace replayed through the policy of the daemon at the same 19 sizes. Speed and memory are those
of the command on a generated trace of our own format, several hundred times as long as what it keeps in memory.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import IO, BinaryIO, NamedTuple

import numpy as np
import zstandard

import fio
from fio import KIB, MIB, BenchError, Load
from forebay_cache.engine.policy import FrequencyPolicy, make_replay
from forebay_cache.engine.sample import AccessSample
from forebay_tools.analysis.evidence import of_traces
from forebay_tools.analysis.trace_record import HEADER, MAGIC, RECORD_DTYPE
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import cpu_s, start_both, warm_file
from trace_keys import have_traces, trace_path, trace_requests

TRACES = ("cp_libcachesim", "arc_P2", "arc_P3", "arc_P6", "vmboot", "vmbuild", "vmpy", "vmscan", "vmdb")
GOALS = {
    8192: (Goal(1.0, 0.5, less_is_better=True), Goal(2.0, 1.0, less_is_better=True)),
    32768: (Goal(0.6, 0.3, less_is_better=True), Goal(1.2, 0.6, less_is_better=True)),
}
"""Mean and worst error in points, hundredths of a hit ratio, by blocks of the sample."""

COMMAND = r"""
import re, sys
from forebay_tools.main import main
code = main(["analyze", "--json", sys.argv[1]])
sys.stderr.write(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""
"""The command, which then tells its peak: what the kernel counts for a child includes its parent's memory."""

LONG_RECORDS = 30_000_000
LONG_BLOCKS = 10_000_000
PACKED_RECORDS = 10_000_000
VOLUME_SIZE = 256 * MIB
HITS = 400_000
HITS_PER_TICK = 5000
"""What a tick of 50 ms brings at 100,000 reads a second."""


class Near(NamedTuple):
    """How far the curve of a trace is from the truth, and how much of the truth is within its band."""

    error: float
    inside: float


def measure(plan: Plan) -> list[Row]:
    """Return the rows of the analysis."""
    rows = [*_long(plan), _cost(plan)]
    return [*_accuracy(), *rows] if have_traces(TRACES, "analysis") else rows


# --- accuracy ---------------------------------------------------------------------------------------------------


def _accuracy() -> list[Row]:
    note = "against full replay of the same policy at 19 sizes, over all traces of the folder"
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for samples, (mean_goal, worst_goal) in GOALS.items():
            near = list(pool.map(lambda name: _near(name, samples), TRACES))  # noqa: B023 - used up within the turn
            words = ", ".join(f"{name} {one.error:.4f}" for name, one in zip(TRACES, near, strict=True))
            print(f"analysis, {samples} samples: {words}", file=sys.stderr)
            for key, what, value, goal in (
                ("", "mean absolute error of the hit ratio", 100 * fmean(one.error for one in near), mean_goal),
                ("-worst", "the same of the worst trace", 100 * max(one.error for one in near), worst_goal),
                ("-inside", "true values within the band", 100 * fmean(one.inside for one in near), Goal(85)),
            ):
                row = Row(f"analysis-{samples}{key}", f"{what}, {samples} samples", "points", goal, note)
                row.add(OURS, Sample(value))
                rows.append(row)
    return rows


def _near(name: str, samples: int) -> Near:
    points = of_traces([trace_path(name)], samples).curve.points()
    requests = trace_requests(name)
    errors = []
    for point in points:
        replay = make_replay(point.size_blocks)
        replay.feed_requests(requests.firsts, requests.counts, requests.writes)
        errors.append(abs(point.hit_ratio - replay.figures()["hits"] / requests.accesses))
    return Near(fmean(errors), fmean(error <= point.band for error, point in zip(errors, points, strict=True)))


# --- speed and memory -------------------------------------------------------------------------------------------


def _long(plan: Plan) -> list[Row]:
    note = f"{LONG_RECORDS} binary records of one block, Zipf-like over {LONG_BLOCKS} blocks, CPU of the whole command"
    speed = Row("analysis-speed", "block accesses analyzed per second of CPU", "M/s", Goal(10, 30), note)
    memory = Row("analysis-memory", "peak resident memory of that", "MiB", Goal(64, less_is_better=True), note)
    packed = [
        Row(f"analysis-memory-{name}", f"the same for {name} input", "MiB", Goal(64, less_is_better=True), text)
        for name, text in (("gzip", f"the first {PACKED_RECORDS} of them"), ("zstd", "those, with a window of 8 MiB"))
    ]
    path = plan.folder / "long"
    _make_long(path)
    try:
        for _ in range(plan.rounds):
            cpu, peak = _run_long(path, LONG_RECORDS)
            speed.add(OURS, Sample(LONG_RECORDS / cpu / 1e6))
            memory.add(OURS, Sample(peak / MIB))
        for row, pack in zip(packed, (_gzip, _zstd), strict=True):
            pack(path, path.with_suffix(".packed"))
            row.add(OURS, Sample(_run_long(path.with_suffix(".packed"), PACKED_RECORDS)[1] / MIB))
    finally:
        path.unlink()
        path.with_suffix(".packed").unlink(missing_ok=True)
    return [speed, memory, *packed]


def _gzip(path: Path, target: Path) -> None:
    with path.open("rb") as source, gzip.open(target, "wb", 1) as file:
        _copy(source, file)


def _zstd(path: Path, target: Path) -> None:
    """Pack with a window as the slow levels have it, which is what unpacking needs memory for."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=23)
    packer = zstandard.ZstdCompressor(compression_params=parameters)
    with path.open("rb") as source, target.open("wb") as raw, packer.stream_writer(raw) as file:
        _copy(source, file)


def _copy(source: BinaryIO, target: IO[bytes]) -> None:
    left = HEADER.size + PACKED_RECORDS * RECORD_DTYPE.itemsize
    while left and (part := source.read(min(left, MIB))):
        target.write(part)
        left -= len(part)


def _make_long(path: Path) -> None:
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 0))
        for at in range(0, LONG_RECORDS, 1_000_000):
            rows = np.zeros(1_000_000, RECORD_DTYPE)
            rank = (LONG_BLOCKS ** rng.random(rows.size)).astype(np.uint64)
            rows["key"] = rank * np.uint64(0x9E3779B97F4A7C15) % np.uint64(1 << 36) + np.uint64(1 << 40)
            rows["count_op"] = 1
            rows["time_ms"] = np.arange(at, at + rows.size) // 10
            file.write(rows.tobytes())


def _run_long(path: Path, records: int) -> tuple[float, int]:
    """Return CPU seconds and peak bytes of the command."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", COMMAND, str(path)], capture_output=True, text=True, check=False)
    used = os.times()
    if done.returncode or json.loads(done.stdout)["accesses"] != records:
        raise BenchError(f"analyze ended with {done.returncode}: {done.stderr}")
    seconds = used.children_user + used.children_system - before.children_user - before.children_system
    return seconds, int(done.stderr.split()[-1]) * KIB


# --- the cost of the sample -------------------------------------------------------------------------------------


def _cost(plan: Plan) -> Row:
    row = Row(
        "analysis-cost",
        "always-on sample, share of the daemon's CPU",
        "%",
        Goal(5, 2, less_is_better=True),
        "what sampling adds to the policy, per hit of a 256 MiB volume, against the CPU of the daemon for a cached "
        "4 KiB random read, d16",
    )
    read_us = _read_us(plan)
    _hits_s(sampling=True)
    for _ in range(plan.rounds):
        added_us = (_hits_s(sampling=True) - _hits_s(sampling=False)) / HITS * 1e6
        row.add(OURS, Sample(max(0.0, added_us / read_us * 100), read_us))
    return row


def _read_us(plan: Plan) -> float:
    with ExitStack() as stack:
        store, cache = start_both(stack, plan.folder, "512MiB")
        store.command("volume", "create", "hot", "--size", str(VOLUME_SIZE))
        cache.attach("hot")
        fio.run(cache.uri, Load("write", MIB, 8, 120, VOLUME_SIZE, io_size=VOLUME_SIZE))
        cache.settle()
        warm_file(cache.file)
        before_s = cpu_s(cache.pid)
        outcome = fio.run(cache.uri, Load("randread", 4 * KIB, 16, plan.seconds, VOLUME_SIZE, seed=1))
        return (cpu_s(cache.pid) - before_s) * 1e6 / outcome.operations


def _hits_s(*, sampling: bool) -> float:
    """Return the CPU seconds of so many hits, with what the daemon does at each tick for its sample, or without."""
    places = VOLUME_SIZE // (4 * KIB)
    keys = np.arange(places, dtype=np.uint64) + np.uint64(1 << 40)
    keys[0] = 0
    policy, sample = FrequencyPolicy(keys), AccessSample()
    policy.written(np.arange(1, places), np.full(places - 1, -1, np.int64), keys[1:], places - 1)
    hits = np.random.default_rng(3).integers(1, places, HITS).tolist()
    began_s = time.process_time()
    for at in range(0, HITS, HITS_PER_TICK):
        if sampling:
            found = policy.take_sample(sample.limit)
            sample.add(found, accesses=policy.figures()["accesses"], span_ns=50_000_000)
        for place in hits[at : at + HITS_PER_TICK]:
            policy.hit(place)
    return time.process_time() - began_s

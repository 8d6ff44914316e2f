"""The cache policy: hit ratio and SSD writes on real traces, CPU per access, memory per block.

Traces run through `Replay`, the policy of the daemon driven by keys, at 1, 5, 10, 20 and 40 % of their different
blocks, each round under another seed; hit ratios are means over the sizes. CPU is that of the policy over places as the
engine calls it, and of the loop that calls it. Memory is that of a process that makes
and fills a policy, at two sizes.

Environment: BENCH_TRACES, a folder with the traces; BENCH_POLICY_ROUNDS (2), rounds of the traces.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np

from fio import MIB
from forebay_cache.engine.policy import WORTHY_FROM, FrequencyPolicy, make_replay, ring_blocks
from forebay_cache.engine.policy_core import Core, CoreFast
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import anonymous_bytes
from trace_keys import DISK_TRACES, VM_TRACES, Requests, have_traces, trace_requests

SIZES = (0.01, 0.05, 0.1, 0.2, 0.4)
PUBLISHED = {
    "cp_libcachesim": 0.2235,
    "arc_P2": 0.5530,
    "arc_P3": 0.4340,
    "arc_P6": 0.5877,
    "vmpy": 0.2120,
    "vmscan": 0.0805,
    "vmdb": 0.2223,
}
"""Mean hit ratio over the same sizes of the best of the published policies on that trace."""

BEST = "best published"
ROUNDS_DEFAULT = 2
CPU_BLOCKS = 40_000
CPU_ACCESSES_NATIVE = 200_000
CPU_ACCESSES_PURE = 12_000
MEMORY_PLACES = (1 << 20, 1 << 22)


def measure(plan: Plan) -> list[Row]:
    """Return the rows of the policy."""
    rows = [_cpu(plan, "policy-cpu", CoreFast, Goal(15, 6, less_is_better=True)), _cpu(plan, "policy-cpu-pure", Core)]
    rows.append(_memory())
    if not have_traces(PUBLISHED, "policy"):
        return rows
    return [*_traces(min(plan.rounds, int(os.environ.get("BENCH_POLICY_ROUNDS", ROUNDS_DEFAULT)))), *rows]


# --- traces -----------------------------------------------------------------------------------------------------


def _traces(rounds: int) -> list[Row]:
    note = "mean over 1, 5, 10, 20, 40 % of the trace's blocks, cold, default settings; each round another seed"
    hits = {name: Row(f"policy-{name}", f"hit ratio, {name}", "", Goal(1.0), note) for name in PUBLISHED}
    won = Row("policy-won", "traces not below the best published policy", "of 7", Goal(5, 7), note)
    worst = Row("policy-worst", "lowest distance from it, disk traces", "", Goal(-0.02, 0.0), note)
    disk = Row("policy-writes", "SSD blocks written per access, disk traces", "", Goal(0.36, 0.25, True), note)
    virtual = Row("policy-writes-vm", "SSD blocks written per access, VM traces", "", Goal(), note)
    for seed in range(rounds):
        found = _replay_all(seed)
        for name, (ratio, _) in found.items():
            hits[name].add(OURS, Sample(ratio))
            hits[name].add(BEST, Sample(PUBLISHED[name]))
        won.add(OURS, Sample(sum(found[name][0] >= best for name, best in PUBLISHED.items())))
        worst.add(OURS, Sample(min(found[name][0] - PUBLISHED[name] for name in DISK_TRACES)))
        disk.add(OURS, Sample(fmean(found[name][1] for name in DISK_TRACES)))
        virtual.add(OURS, Sample(fmean(found[name][1] for name in VM_TRACES)))
    return [*hits.values(), won, worst, disk, virtual]


def _replay_all(seed: int) -> dict[str, tuple[float, float]]:
    """Return mean hit ratio and SSD writes per access of each trace; native replays hold no GIL, so all cores work."""
    requests = {name: trace_requests(name) for name in PUBLISHED}
    cells = [(name, share) for name in PUBLISHED for share in SIZES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda cell: _replay(requests[cell[0]], cell[1], seed), cells))
    by_name = {
        name: [figures for cell, figures in zip(cells, found, strict=True) if cell[0] == name] for name in PUBLISHED
    }
    return {name: (fmean(hit for hit, _ in row), fmean(wrote for _, wrote in row)) for name, row in by_name.items()}


def _replay(requests: Requests, share: float, seed: int) -> tuple[float, float]:
    replay = make_replay(max(1, int(requests.distinct_blocks * share)), seed=seed)
    replay.feed_requests(requests.firsts, requests.counts, requests.writes)
    figures = replay.figures()
    return figures["hits"] / figures["accesses"], figures["writes"] / figures["accesses"]


# --- CPU --------------------------------------------------------------------------------------------------------


def _cpu(plan: Plan, key: str, core: type, goal: Goal = Goal()) -> Row:  # noqa: B008 - immutable
    native = core is CoreFast
    if native and core is Core:
        print("bench: policy: the native twin was not built, so policy-cpu is that of pure Python", file=sys.stderr)
    note = (
        f"Zipf(0.9) reads of {CPU_BLOCKS} blocks, {CPU_BLOCKS // 4} places; what is missed waits in a ring, is offered "
        "and takes the next place that holds nothing worthy; with the loop that drives it"
    )
    row = Row(key, f"CPU of the policy per access, {'native' if native else 'pure Python'}", "us", goal, note)
    weights = 1 / np.arange(1, CPU_BLOCKS + 1) ** 0.9
    accesses = CPU_ACCESSES_NATIVE if native else CPU_ACCESSES_PURE
    for seed in range(plan.rounds):
        drawn = np.random.default_rng(seed).choice(CPU_BLOCKS, accesses, p=weights / weights.sum())
        row.add(OURS, Sample(_drive((drawn + (1 << 40)).tolist(), core) * 1e6 / accesses))
    return row


def _drive(stream: list[int], core: type) -> float:
    """Read the stream through a cache; return the seconds of CPU that took."""
    keys = np.zeros(CPU_BLOCKS // 4, np.uint64)
    policy = FrequencyPolicy(keys, core=core)
    places: dict[int, int] = {}
    ring: dict[int, None] = {}
    ring_max = ring_blocks(policy.capacity)
    target = 0
    began_s = time.process_time()
    for key in stream:
        place = places.get(key)
        if place is not None:
            policy.hit(place)
            continue
        policy.missed(key, 1)
        ring[key] = None
        if len(ring) <= ring_max:
            continue
        key = next(iter(ring))
        del ring[key]
        if not policy.admits(key):
            continue
        target = target % (keys.size - 1) + 1
        while policy.states[target] >= WORTHY_FROM:
            target = target % (keys.size - 1) + 1
        if keys[target]:
            del places[int(keys[target])]
            policy.removed(np.array([target]), volume_key=1)
        keys[target] = key
        places[key] = target
        policy.inserted(target)
    return time.process_time() - began_s


# --- memory -----------------------------------------------------------------------------------------------------


def _memory() -> Row:
    small, large = MEMORY_PLACES
    note = (
        f"RssAnon of a process with a policy over {large >> 20} Mi places, each filled and hit, less one over "
        f"{small >> 20} Mi: lists, states and sketch; each place of the device counts as a block"
    )
    row = Row("policy-memory", "memory of the policy per cached block", "bytes", Goal(17, 12, True), note)
    row.add(OURS, Sample((_filled_bytes(large) - _filled_bytes(small)) / (large - small)))
    return row


def _filled_bytes(places: int) -> int:
    words = [sys.executable, __file__, str(places)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return int(subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def _fill(places: int) -> int:
    """Make and fill a policy in this process; return how much anonymous memory that added."""
    keys = np.arange(places, dtype=np.uint64) + np.uint64(1 << 40)
    step = 1 << 12
    olds = np.full(step, -1, np.int64)
    before = anonymous_bytes(os.getpid())
    policy = FrequencyPolicy(keys)
    for first in range(step, places, step):
        policy.written(np.arange(first, first + step), olds, keys[first : first + step], step)
        policy.hit_run(first, step)
    used = anonymous_bytes(os.getpid()) - before
    assert used > MIB
    return used


if __name__ == "__main__":
    print(_fill(int(sys.argv[1])))

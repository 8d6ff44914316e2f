"""How much to fetch around a miss: hit ratio, SSD writes and store traffic for 4 to 64 KiB, by replay of traces.

    python bench/fill_size.py [--accesses 400000] [--traces cp_libcachesim,vmdb]

prints the table of docs/cache-size.md: for disk traces and for those of virtual machines the mean over the traces and
over caches of 1, 5, 10, 20 and 40 % of the blocks that a trace uses. BENCH_TRACES names the folder with the traces.

Each trace runs through `Replay`, the daemon's policy driven by keys. A block that is read and is not there is fetched
in its aligned unit, as the daemon does; neighbours that were not asked for wait in memory beside the ring and are
dropped if nobody reads them in time, so they are never written. What is written as a whole is not fetched. Read-ahead
of sequential streams is another matter and off here.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from statistics import fmean
from typing import NamedTuple

import numpy as np

from fio import KIB
from forebay_cache.engine.policy import make_replay, ring_blocks
from forebay_core.config import FILL_BLOCKS
from forebay_core.units import BLOCK_SIZE
from forebay_tools.analysis.traces import read_trace
from forebay_wire.limits import READ_BLOCKS_MAX
from trace_keys import DISK_TRACES, VM_TRACES, Keys, trace_path

SIZES = (0.01, 0.05, 0.1, 0.2, 0.4)
ACCESSES_DEFAULT = 400_000


class Request(NamedTuple):
    """Consecutive blocks that were read or written."""

    keys: Keys
    is_write: bool


class Cost(NamedTuple):
    """What one fill size did with one trace in one cache, per block access."""

    hits: float
    ssd_writes: float
    fetched_bytes: float
    store_requests: float


class _Neighbours:
    """Blocks that came with others, in memory, the oldest first; and what fetching has cost."""

    def __init__(self, fill_blocks: int, blocks_max: int) -> None:
        self._fill_blocks = fill_blocks
        self._blocks_max = blocks_max
        self._held: dict[int, None] = {}
        self.hits = self.fetched_blocks = self.requests = 0

    def read(self, missing: list[int], known: set[int]) -> None:
        """Blocks are read that the cache has not; `known` are all that it has of their surroundings."""
        fetched: set[int] = set()
        for key in missing:
            if key in self._held:
                del self._held[key]
                self.hits += 1
            elif (start := key - key % self._fill_blocks) not in fetched:
                fetched.add(start)
                self.fetched_blocks += self._fill_blocks
        self.requests += -(-len(fetched) * self._fill_blocks // READ_BLOCKS_MAX)
        asked = set(missing)
        for start in sorted(fetched):
            for key in range(start, start + self._fill_blocks):
                if key not in asked and key not in known and key not in self._held:
                    self._held[key] = None
        while len(self._held) > self._blocks_max:
            del self._held[next(iter(self._held))]

    def forget(self, keys: list[int]) -> None:
        """Blocks were written: what was fetched of them is old."""
        for key in keys:
            self._held.pop(key, None)


def requests_of(name: str, accesses_max: int) -> list[Request]:
    """Return the first requests of a trace, up to so many block accesses."""
    return list(_requests(name, accesses_max))


def _requests(name: str, left: int) -> Iterator[Request]:
    for part in read_trace(trace_path(name)):
        batch = part.batch
        for first, count, is_write in zip(
            batch.keys.tolist(), batch.counts.tolist(), batch.writes.tolist(), strict=True
        ):
            if left <= 0:
                return
            yield Request(np.arange(first, first + min(count, left), dtype=np.uint64), is_write)
            left -= count


def replay(requests: list[Request], capacity: int) -> list[Cost]:
    """Run requests through one cache; return what each fill size cost. The cache is the same for all: what a neighbour
    becomes once it is read does not depend on how it came."""
    policy = make_replay(capacity)
    fills = [_Neighbours(count, ring_blocks(capacity)) for count in FILL_BLOCKS]
    widest = max(FILL_BLOCKS)
    for request in requests:
        keys = request.keys
        if request.is_write:
            for fill in fills:
                fill.forget(keys.tolist())
        elif missing := [key for key, held in zip(keys.tolist(), policy.holds(keys), strict=True) if not held]:
            around = np.arange(missing[0] - missing[0] % widest, missing[-1] + widest, dtype=np.uint64)
            known = {key for key, held in zip(around.tolist(), policy.holds(around), strict=True) if held}
            for fill in fills:
                fill.read(missing, known)
        policy.feed_requests(keys[:1], np.array([keys.size], np.uint64), np.array([request.is_write]))
    figures = policy.figures()
    accesses = figures["accesses"]
    return [
        Cost(
            (figures["hits"] + fill.hits) / accesses,
            figures["writes"] / accesses,
            fill.fetched_blocks * BLOCK_SIZE / accesses,
            fill.requests / accesses,
        )
        for fill in fills
    ]


def _costs(cell: tuple[str, float, int]) -> list[Cost]:
    name, share, accesses_max = cell
    requests = requests_of(name, accesses_max)
    distinct = np.unique(np.concatenate([request.keys for request in requests])).size
    return replay(requests, max(1, int(distinct * share)))


def table(names: tuple[str, ...], accesses_max: int, pool: ProcessPoolExecutor) -> list[str]:
    """Return the lines of a table for some traces."""
    cells = list(product(names, SIZES, [accesses_max]))
    costs = dict(zip(cells, pool.map(_costs, cells), strict=True))
    lines = [
        "| fetched | hit ratio at 1, 5, 10, 20, 40 % | mean | SSD blocks written | KiB fetched | store reads |",
        "|---|---|---|---|---|---|",
    ]
    for index, fill_blocks in enumerate(FILL_BLOCKS):
        by_size = [fmean(costs[cell][index].hits for cell in cells if cell[1] == size) for size in SIZES]
        mean = Cost(*(fmean(costs[cell][index][field] for cell in cells) for field in range(len(Cost._fields))))
        ratios = ", ".join(f"{ratio:.3f}" for ratio in by_size)
        lines.append(
            f"| {fill_blocks * BLOCK_SIZE // KIB} KiB | {ratios} | {mean.hits:.3f} | {mean.ssd_writes:.3f} "
            f"| {mean.fetched_bytes / KIB:.2f} | {mean.store_requests:.3f} |"
        )
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--accesses", type=int, default=ACCESSES_DEFAULT, help="block accesses of each trace, from its start"
    )
    parser.add_argument("--traces", help="only these, with commas between")
    arguments = parser.parse_args()
    groups = [("disks", DISK_TRACES), ("virtual machines", VM_TRACES)]
    if arguments.traces:
        groups = [("chosen", tuple(arguments.traces.split(",")))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for label, names in groups:
            print(
                "\n".join([f"{label}: {', '.join(names)}", "", *table(names, arguments.accesses, pool), ""]), flush=True
            )


if __name__ == "__main__":
    main()

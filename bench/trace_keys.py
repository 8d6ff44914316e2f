"""The traces that the policy is measured with: where they are, and what they ask for."""

import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fio import BenchError
from forebay_tools.analysis.replaying import DistinctBlocks
from forebay_tools.analysis.traces import read_trace

DISK_TRACES = ("cp_libcachesim", "arc_P2", "arc_P3", "arc_P6")
VM_TRACES = ("vmpy", "vmscan", "vmdb")

Keys = npt.NDArray[np.uint64]


def trace_path(name: str) -> Path:
    """Return where a trace is: in BENCH_TRACES, or beside the project.

    Raises:
        BenchError: it is not there.
    """
    beside = Path(__file__).parent.parent.parent / "shared" / "traces"
    folder = Path(os.environ.get("BENCH_TRACES") or beside)
    path = folder / f"{name}.csv.gz"
    if not path.exists():
        raise BenchError(f"there is no trace {path}; BENCH_TRACES names the folder that has it")
    return path


def have_traces(names: Iterable[str], rows: str) -> bool:
    """Tell whether all these traces are there; if not, say that these rows are left out, and why."""
    try:
        for name in names:
            trace_path(name)
    except BenchError as error:
        print(f"bench: {rows}: the rows of traces are left out: {error}", file=sys.stderr)
        return False
    return True


class Requests(NamedTuple):
    """The requests of a trace in their order: first key, blocks, whether a write; and how many blocks these are."""

    firsts: Keys
    counts: Keys
    writes: npt.NDArray[np.bool_]
    accesses: int
    distinct_blocks: int


@cache
def trace_requests(name: str) -> Requests:
    """Return what a trace asks for."""
    batches = [part.batch for part in read_trace(trace_path(name))]
    distinct = DistinctBlocks()
    for batch in batches:
        distinct.add(batch)
    firsts, counts = (np.concatenate([batch[at] for batch in batches]) for at in (0, 1))
    writes = np.concatenate([batch.writes for batch in batches])
    return Requests(firsts, counts, writes, int(counts.sum()), distinct.count)

"""The traces that the policy is measured with: where they are, and the blocks that they use one after the other."""

import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fio import BenchError
from forebay_tools.analysis.survey import HASHES, Sampler
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


@cache
def trace_keys(name: str) -> Keys:
    """Return the key of each block that a trace accesses, in order."""
    sampler = Sampler()
    parts = [keys for part in read_trace(trace_path(name)) for keys in sampler.take(part.batch, HASHES)[0]]
    return np.concatenate(parts)

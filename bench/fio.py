"""Runs fio over a Unix socket by its nbd engine, or over a block device, and reads its JSON."""

import json
import subprocess
from typing import NamedTuple

KIB = 1 << 10
MIB = 1 << 20
GRACE_S = 120.0
"""How long a run may take beyond its own time before it counts as hung."""


class BenchError(Exception):
    """A bench could not be run; the text says why."""


class Load(NamedTuple):
    """What fio is asked to do; sizes in bytes. It ends after `seconds` or `io_size`, whichever comes first."""

    rw: str
    block_size: int
    depth: int
    seconds: float
    size: int
    io_size: int | None = None
    offset: int = 0
    align: int | None = None
    flush_every: int | None = None
    seed: int = 1
    jobs: int = 1


class Outcome(NamedTuple):
    """What a run did: operations per second, bytes per second, microseconds from submission to completion."""

    operations: int
    operations_per_s: float
    bytes_per_s: float
    median_us: float
    p99_us: float


def run(uri: str, load: Load) -> Outcome:
    """Run the load on an NBD URI or a device.

    Raises:
        BenchError: fio failed, or some request did.
    """
    words = [
        "fio",
        "--name=bench",
        *_target(uri),
        f"--rw={load.rw}",
        f"--bs={load.block_size}",
        f"--iodepth={load.depth}",
        f"--offset={load.offset}",
        f"--size={load.size}",
        f"--runtime={max(1, round(load.seconds * 1000))}ms",
        f"--randseed={load.seed}",
        "--allrandrepeat=0",
        "--output-format=json",
    ]
    words += ["--time_based"] if load.io_size is None else [f"--io_size={load.io_size}"]
    words += [] if load.jobs == 1 else [f"--numjobs={load.jobs}", "--group_reporting"]
    words += [] if load.align is None else [f"--blockalign={load.align}"]
    words += [] if load.flush_every is None else [f"--fsync={load.flush_every}"]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=load.seconds + GRACE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"fio hung: {' '.join(words)}") from None
    if done.returncode:
        raise BenchError(f"fio ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return parse(done.stdout, load)


def _target(uri: str) -> tuple[str, ...]:
    if uri.startswith("/dev/"):
        return "--ioengine=libaio", "--direct=1", f"--filename={uri}"
    return "--ioengine=nbd", f"--uri={uri}"


def parse(text: str, load: Load) -> Outcome:
    """Return what fio's JSON says of the side (read or write) that the load used.

    Raises:
        BenchError: requests failed, or nothing was done.
    """
    job = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio reports error {job['error']}")
    side = job["write" if "write" in load.rw else "read"]
    if not side["total_ios"] or not side["runtime"]:
        raise BenchError("fio did nothing")
    percentiles = side["clat_ns"].get("percentile", {})
    return Outcome(
        operations=side["total_ios"],
        operations_per_s=side["total_ios"] * 1000 / side["runtime"],
        bytes_per_s=side["io_bytes"] * 1000 / side["runtime"],
        median_us=percentiles.get("50.000000", 0) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
    )

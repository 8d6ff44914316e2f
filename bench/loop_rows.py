"""Loop devices with direct I/O over FUSE over NBD: ours, against nbdfuse over nbdkit's file plugin."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import fio
from fio import KIB, MIB, BenchError, Load
from results import OURS, Goal, Row, Sample
from rounds import Plan, make_random_file
from servers import START_TIMEOUT_S, Cache, Peer, Store, start_both, warm_file

VOLUME_SIZE = 512 * MIB
CACHE_SIZE = "1536MiB"
WRITE_SIZE = 384 * MIB  # as in `write_rows`: what is measured is the buffer, not the store
GOAL = Goal(0.6, 1.2)
NOTE = (
    "loop device with direct I/O over a FUSE file over NBD; volume or file in the page cache; the peer is nbdkit file"
)
LOADS = {
    "loop-read": ("4 KiB random reads, d16, loop over FUSE", Load("randread", 4 * KIB, 16, 0, VOLUME_SIZE)),
    "loop-write": ("4 KiB random writes, d16, loop over FUSE", Load("randwrite", 4 * KIB, 16, 0, VOLUME_SIZE)),
    "loop-sequential-read": ("1 MiB sequential reads, d4, loop over FUSE", Load("read", MIB, 4, 0, VOLUME_SIZE)),
    "loop-sequential-write": (
        "1 MiB sequential writes, d4, loop over FUSE",
        Load("write", MIB, 4, 0, VOLUME_SIZE, io_size=WRITE_SIZE),
    ),
}


class Device(NamedTuple):
    """One block device under test, and the file whose pages count."""

    name: str
    path: str
    file: Path


def measure(plan: Plan) -> list[Row]:
    """Return the rows of the loop front."""
    with ExitStack() as stack:
        store, cache = start_both(stack, plan.folder, CACHE_SIZE)
        file = plan.folder / "peer.raw"
        make_random_file(file, VOLUME_SIZE)
        nbdkit = Peer("nbdkit", file, plan.folder)
        stack.callback(nbdkit.stop)
        peer = stack.enter_context(_over_nbdfuse(nbdkit, plan.folder))
        ours = stack.enter_context(_ours(store, cache))
        return [_row(plan, [ours, peer], cache, *load) for load in ((key, *LOADS[key]) for key in LOADS)]


def _row(plan: Plan, devices: list[Device], cache: Cache, key: str, what: str, load: Load) -> Row:
    small = load.block_size < MIB
    row = Row(key, what, "op/s" if small else "MiB/s", GOAL, NOTE)
    for number in range(plan.rounds):
        turn = number % len(devices)
        for device in [*devices[turn:], *devices[:turn]]:
            cache.settle()
            warm_file(device.file)
            outcome = fio.run(device.path, load._replace(seconds=plan.seconds, seed=1 + number))
            row.add(device.name, Sample(outcome.operations_per_s if small else outcome.bytes_per_s / MIB))
    return row


@contextmanager
def _ours(store: Store, cache: Cache) -> Iterator[Device]:
    store.command("volume", "create", "bench-loop", "--size", str(VOLUME_SIZE))
    path = json.loads(cache.command("attach", "bench-loop", "--front", "loop"))["path"]
    cache.serve("bench-loop")
    try:
        fio.run(path, Load("write", MIB, 4, 120, VOLUME_SIZE, io_size=VOLUME_SIZE))
        cache.settle()
        yield Device(OURS, path, cache.file)
    finally:
        cache.command("detach", "bench-loop", "--timeout", "10")


@contextmanager
def _over_nbdfuse(nbdkit: Peer, folder: Path) -> Iterator[Device]:
    file = folder / "nbdfuse"
    file.touch()
    child = subprocess.Popen(["nbdfuse", str(file), nbdkit.uri], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while file.stat().st_size != VOLUME_SIZE:
            if child.poll() is not None or time.monotonic() > deadline:
                raise BenchError("nbdfuse did not start")
            time.sleep(0.02)
        path = _losetup("--find", "--show", "--direct-io=on", str(file)).strip()
        try:
            yield Device("nbdfuse", path, nbdkit.file)
        finally:
            _losetup("--detach", path)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(file)], check=False)
        child.wait(START_TIMEOUT_S)


def _losetup(*words: str) -> str:
    done = subprocess.run(["losetup", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"losetup {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout

"""Import of incompressible data into a store, against `dd` with fdatasync of the same bytes on the same disk."""

import shutil
import subprocess
import time
from pathlib import Path

from fio import MIB, BenchError
from results import OURS, Goal, Row, Sample
from rounds import Plan, make_random_file
from servers import Store, cpu_s, warm_file

SIZE = 1024 * MIB
DD_TIMEOUT_S = 300.0


def measure(plan: Plan) -> list[Row]:
    """Return the row; each round has a new store, and takes turns in who is first."""
    source = plan.folder / "source.raw"
    make_random_file(source, SIZE)
    row = Row(
        "import",
        "import of 1 GiB that does not compress",
        "MiB/s",
        Goal(0.5, 0.9),
        "the command from start to end; source in the page cache; ours direct, dd buffered, both with fdatasync; "
        "CPU is the store's per MiB",
    )
    for number in range(plan.rounds):
        steps = [(OURS, _import), ("dd", _dd)]
        for name, step in steps if number % 2 == 0 else reversed(steps):
            warm_file(source)
            row.add(name, step(plan.folder, source))
    return [row]


def _import(folder: Path, source: Path) -> Sample:
    store = Store(folder / "store")
    try:
        began_s = time.monotonic()
        store.command("volume", "import", "image", str(source))
        took_s = time.monotonic() - began_s
        used_us = cpu_s(store.pid) * 1e6 / (SIZE // MIB)
    finally:
        store.stop()
        shutil.rmtree(folder / "store", ignore_errors=True)
    return Sample(SIZE / MIB / took_s, used_us)


def _dd(folder: Path, source: Path) -> Sample:
    target = folder / "dd.raw"
    words = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fdatasync", "status=none"]
    began_s = time.monotonic()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=DD_TIMEOUT_S, check=False)
    took_s = time.monotonic() - began_s
    target.unlink(missing_ok=True)
    if done.returncode:
        raise BenchError(f"dd ended with {done.returncode}")
    return Sample(SIZE / MIB / took_s)

"""`make bench`: every figure of the table, ours and the peers' interleaved, printed and kept as JSON.

Environment: BENCH_ROUNDS (5), BENCH_SECONDS of one measurement (1.5), BENCH_DIR a folder on the disk to measure
(/var/tmp), BENCH_JSON where the results go (build/bench.json), BENCH_PROFILE a folder for profiles of our daemons,
BENCH_HUGE where the store with ten million extents is kept (made for the run and deleted).
The exit code is 0 unless something could not be run: a figure below its goal is marked, not an error.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import analysis_rows
import clean_rows
import destage_rows
import flush_rows
import guest_rows
import hit_rows
import huge_rows
import import_row
import loop_rows
import memory_row
import miss_rows
import outage_rows
import policy_rows
import readahead_rows
import restart_rows
import scale_rows
import snapshot_rows
import write_rows
from fio import BenchError
from forebay_core.errors import ForebayError
from results import Row, render, save
from rounds import ROUNDS_DEFAULT, SECONDS_DEFAULT, Plan

GROUPS: tuple[tuple[tuple[str, ...], Callable[[Plan], list[Row]]], ...] = (
    (("read", "sequential"), hit_rows.measure),
    (("write", "flush", "sequential"), write_rows.measure),
    (("import",), import_row.measure),
    (("miss",), miss_rows.measure),
    (("readahead",), readahead_rows.measure),
    (("memory",), memory_row.measure),
    (("restart", "warm"), restart_rows.measure),
    (("commit", "amplification"), flush_rows.measure),
    (("destage",), destage_rows.measure),
    (("clean", "yield"), clean_rows.measure),
    (("snapshots-1000", "huge", "trim-full"), scale_rows.measure),
    (("huge-index",), huge_rows.measure),
    (("snapshot",), snapshot_rows.measure),
    (("loop",), loop_rows.measure),
    (("guest", "clones"), guest_rows.measure),
    (("outage",), outage_rows.measure),
    (("policy",), policy_rows.measure),
    (("analysis",), analysis_rows.measure),
)
MICRO = "micro"
KEYS = (*dict.fromkeys(key for keys, _ in GROUPS for key in keys), MICRO)
TOOLS = {
    "fio": "fio",
    "nbdkit": "nbdkit",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
    "dd": "coreutils",
    "nbdfuse": "libnbd-bin",
    "losetup": "mount",
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
}


def main() -> int:
    """Run what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=KEYS, help="measure this; may be given several times")
    keys = frozenset(parser.parse_args().only or KEYS)
    missing = sorted(package for tool, package in TOOLS.items() if shutil.which(tool) is None)
    if missing:
        print(f"bench: needs packages that are missing: {' '.join(missing)}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    began_s = time.monotonic()
    about = _describe()
    rows, errors = _measure(keys)
    about["load_average_after"] = os.getloadavg()
    about["seconds"] = round(time.monotonic() - began_s)
    about["errors"] = errors
    if rows:
        path = Path(os.environ.get("BENCH_JSON", "build/bench.json"))
        save(rows, path, about)
        print("\n" + render(rows))
        print(f"\n{_summary(about)}\nall samples: {path}")
    if MICRO in keys and _micro():
        errors.append(f"{MICRO}: failed")
    for error in errors:
        print(f"bench: {error}", file=sys.stderr)
    return 1 if errors else 0


def _measure(keys: frozenset[str]) -> tuple[list[Row], list[str]]:
    """Return the rows, and what could not be run."""
    rows: list[Row] = []
    errors: list[str] = []
    for group, measure in GROUPS:
        wanted = keys.intersection(group)
        if not wanted:
            continue
        folder = Path(tempfile.mkdtemp(prefix="forebay-bench-", dir=os.environ.get("BENCH_DIR", "/var/tmp")))
        try:
            print(f"measuring {', '.join(sorted(wanted))} ...", file=sys.stderr, flush=True)
            rows += measure(Plan(_rounds(), _seconds(), wanted, folder))
        except (BenchError, ForebayError, OSError, subprocess.SubprocessError) as error:
            errors.append(f"{', '.join(sorted(wanted))}: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return rows, errors


def _micro() -> int:
    words = ["-m", "pytest", str(Path(__file__).with_name("test_micro.py")), "--benchmark-only"]
    words += ["--benchmark-max-time=0.3", "--benchmark-disable-gc", "--benchmark-columns=min,median,ops"]
    return subprocess.run([sys.executable, *words], check=False).returncode


def _rounds() -> int:
    return max(1, int(os.environ.get("BENCH_ROUNDS", ROUNDS_DEFAULT)))


def _seconds() -> float:
    return max(0.2, float(os.environ.get("BENCH_SECONDS", SECONDS_DEFAULT)))


def _describe() -> dict[str, object]:
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rounds": _rounds(),
        "seconds_per_measurement": _seconds(),
        "load_average_before": os.getloadavg(),
    }


def _summary(about: dict[str, object]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items() if key != "errors")


if __name__ == "__main__":
    sys.exit(main())

"""Runs of the simulator in processes of their own, two at a time: a run's state never leaks into another one's."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKERS = 2
RUN = Path(__file__).with_name("sim_run.py")


def run_seeds(first: int, end: int, *, hash_seed: str = "random") -> list[dict[str, object]]:
    """Run seeds; return what was reported of each, in order."""
    step = -(-(end - first) // WORKERS)
    ranges = [(at, min(at + step, end)) for at in range(first, end, step)]
    lines = run_commands([[str(RUN), "--seeds", f"{a}:{b}"] for a, b in ranges], hash_seed=hash_seed)
    rows = [json.loads(line) for line in lines]
    assert [row["seed"] for row in rows] == list(range(first, end)), "a worker died"
    return rows


def run_commands(commands: Sequence[Sequence[str]], *, hash_seed: str = "random") -> list[str]:
    """Run commands of the simulator side by side; return the lines they printed, in the order of the commands."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    running = [
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    return [line for one in running for line in one.communicate()[0].splitlines()]


def complain(rows: Sequence[dict[str, object]]) -> None:
    """Raise with the first failure, if any, which says how to repeat it."""
    failed = [row for row in rows if "error" in row]
    seeds = [row["seed"] for row in failed]
    assert not failed, f"{len(failed)} of {len(rows)} runs failed: seeds {seeds[:10]}; the first:\n{failed[0]['error']}"

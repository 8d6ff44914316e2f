"""Every disk command and every message of a fixed run is where a program dies, and no promise is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("sim_points.py")
POINTS_MIN = 500


def take_points(*arguments: str, timeout_s: int) -> dict[str, object]:
    """Run the command; return its line, or fail with the first complaint, which says how to repeat it."""
    command = [sys.executable, str(COMMAND), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False)
    line: dict[str, object] = json.loads(done.stdout)
    failures = line["failures"]
    assert not failures, f"{len(failures)} of {line['crashes']} crashes broke a promise; the first:\n{failures[0]}"  # type: ignore[arg-type, index]
    assert done.returncode == 0
    print(f"{line['points']} crash points, {line['crashes']} crashes")
    return line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_crash_point_of_a_run_breaks_a_promise() -> None:
    line = take_points(timeout_s=580)
    assert int(str(line["points"])) >= POINTS_MIN
    ways = line["ways"]
    assert isinstance(ways, dict)
    for kind in ("cache write begins", "cache sync ends", "cache>store message", "store segment is linked"):
        for way in ("kill acting", "kill other", "power acting", "power other", "loss acting", "newest acting"):
            assert ways[f"{kind}: {way}"], f"{kind} was never met by {way}"


@pytest.mark.soak
@pytest.mark.parametrize("workload", ["mixed", "small", "away"])
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_no_way_to_die_at_any_point_breaks_a_promise(seed: int, workload: str) -> None:
    take_points("--every", "--seed", str(seed), "--workload", workload, timeout_s=3600)

"""The simulator is no ornament: each planted fault is noticed within a bounded number of seeds or crash points."""

import subprocess
import sys
from pathlib import Path

import pytest
from sim_faults import PLANTED, Planted

COMMAND = Path(__file__).with_name("sim_faults.py")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.plant.__name__)
def test_a_planted_fault_is_noticed(planted: Planted) -> None:
    command = [sys.executable, str(COMMAND), planted.plant.__name__, f"0:{planted.seeds}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_enough_of_them() -> None:
    assert len({planted.plant for planted in PLANTED}) >= 15

"""The power goes while real programs write: nothing that was flushed is lost, and what survives is a prefix.

POWER_SEED and POWER_ROUNDS repeat what a failure names.
"""

import os

import pytest
from power_rig import PowerRig
from power_rounds import Rounds
from undo import Undo

SEED = int(os.environ.get("POWER_SEED", "1"))
ROUNDS = int(os.environ.get("POWER_ROUNDS", "10"))
SOAK_SEEDS = range(100, 110)
SOAK_ROUNDS = 20


@pytest.mark.usefixtures("needs_guest")
@pytest.mark.timeout(0 if "POWER_ROUNDS" in os.environ else 180)
def test_nothing_flushed_is_lost_in_power_cuts(rig: PowerRig, undo: Undo) -> None:
    run(rig, undo, SEED, ROUNDS)


@pytest.mark.soak
@pytest.mark.usefixtures("needs_guest")
@pytest.mark.parametrize("seed", SOAK_SEEDS)
def test_nothing_flushed_is_lost_in_hundreds_of_power_cuts(rig: PowerRig, undo: Undo, seed: int) -> None:
    run(rig, undo, seed, SOAK_ROUNDS)


def run(rig: PowerRig, undo: Undo, seed: int, count: int) -> None:
    rounds = Rounds(rig, undo, seed)
    try:
        rounds.run(count)
    finally:
        rounds.close()
    print(rounds.summary)
    assert rounds.is_harsh, f"nothing was at stake: {rounds.summary}"

"""Hours of the engine against its model; `make soak`. A failure names the seed: call the guard with it to repeat."""

from collections.abc import Callable

import pytest
from test_engine_model import run_kills, run_power_cuts, run_requests

SEEDS = range(1000, 3000)


@pytest.mark.soak
@pytest.mark.parametrize("guard", [run_requests, run_kills, run_power_cuts], ids=lambda guard: guard.__name__)
def test_the_engine_holds_over_thousands_of_seeds(guard: Callable[[int], None]) -> None:
    for seed in SEEDS:
        try:
            guard(seed)
        except Exception as error:
            raise AssertionError(f"{guard.__name__}({seed}) failed") from error

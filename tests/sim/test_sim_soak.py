"""20,000 runs of the simulator; `make soak`. A failure prints the command that repeats it."""

import pytest
from sim_workers import complain, run_seeds

RUNS = 20_000
FIRST = 100_000
STEP = 250  # a soak that is ended loses less than this


@pytest.mark.soak
@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS, STEP))
def test_no_promise_is_broken_in_20000_runs(first: int) -> None:
    complain(run_seeds(first, first + STEP))

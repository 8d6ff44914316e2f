"""20,000 runs of the simulator; `make soak`. A failure prints the command that repeats it."""

import pytest
from sim_workers import complain, run_seeds

RUNS = 20_000
FIRST = 100_000


@pytest.mark.soak
@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS, 1000))
def test_no_promise_is_broken_in_20000_runs(first: int) -> None:
    complain(run_seeds(first, first + 1000))

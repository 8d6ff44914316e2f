"""Whole systems under seeded faults: no promise is broken in 500 runs, and one seed is one run."""

import pytest
from sim_run import run_seed
from sim_workers import complain, run_seeds

RUNS = 500
REPEATED = 24


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_promise_is_broken_in_500_runs() -> None:
    rows = run_seeds(0, RUNS)
    complain(rows)
    assert sum(int(str(row["crashes"])) for row in rows) > RUNS
    assert sum(int(str(row["shown"])) for row in rows) > 5 * RUNS


def test_one_seed_is_one_run_to_the_byte() -> None:
    first = run_seeds(10_000, 10_000 + REPEATED, hash_seed="1")
    again = run_seeds(10_000, 10_000 + REPEATED, hash_seed="2")
    complain(first)
    assert [row["digest"] for row in first] == [row["digest"] for row in again]
    assert len({row["digest"] for row in first}) == REPEATED


@pytest.mark.parametrize(
    ("seed", "profile"),
    [(910031, "fencing"), (910059, "cleaning"), (910048, "family"), (910051, "snapshots"), (102821, "unreadable")],
)
def test_judges_wait_for_rows_and_leave_out_what_checksums_refuse(seed: int, profile: str) -> None:
    """The run ends between a segment and its rows, a zone was half reused, or settling one guest
    killed the host of another: none is a broken promise."""
    run_seed(seed, profile)

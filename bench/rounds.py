"""Interleaved rounds: every server is measured once per round, and the order turns, so all meet the same machine."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import fio
from results import Row, Sample
from servers import Server, cpu_s

ROUNDS_DEFAULT = 5
SECONDS_DEFAULT = 1.5
_PIECE = 1 << 20


class Plan(NamedTuple):
    """How to measure: rounds, seconds of one measurement, which rows, and a folder on the disk for everything."""

    rounds: int
    seconds: float
    keys: frozenset[str]
    folder: Path


def interleave(row: Row, servers: Sequence[Server], plan: Plan, measure: Callable[[Server, int], Sample]) -> Row:
    """Fill a row; `measure` gets the server and the number of the round."""
    for number in range(plan.rounds):
        turn = number % len(servers)
        for server in [*servers[turn:], *servers[:turn]]:
            row.add(server.name, measure(server, number))
    return row


def measure_operations(server: Server, load: fio.Load) -> Sample:
    """Run the load; return operations per second and the server's CPU for each."""
    return _measure(server, load)[0]


def measure_mebibytes(server: Server, load: fio.Load) -> Sample:
    """Run the load; return MiB per second and the server's CPU for each operation."""
    sample, outcome = _measure(server, load)
    return sample._replace(value=outcome.bytes_per_s / fio.MIB)


def make_random_file(path: Path, size: int) -> None:
    """Write a file that no compression makes smaller."""
    with path.open("wb") as file:
        for _ in range(size // _PIECE):
            file.write(os.urandom(_PIECE))
        file.flush()
        os.fdatasync(file.fileno())


def _measure(server: Server, load: fio.Load) -> tuple[Sample, fio.Outcome]:
    before_s = cpu_s(server.pid)
    outcome = fio.run(server.uri, load)
    used_us = (cpu_s(server.pid) - before_s) * 1e6 / outcome.operations
    return Sample(outcome.operations_per_s, used_us), outcome

"""What was measured: samples of interleaved rounds, one row per figure, printed as a table and kept as JSON.

The ratio of a row is the median over the rounds of ours against the better peer of the same round: what else the
machine did in that moment hit both. The better peer is the one with the better median.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

OURS = "forebay"


class Sample(NamedTuple):
    """One measurement: `value` in the row's unit; `cpu_us` is the server's CPU per operation, None if not measured."""

    value: float
    cpu_us: float | None = None


class Goal(NamedTuple):
    """What the issue asks for. `at_least` and `aim` are ratios, or values of the row if it has no peer."""

    at_least: float | None = None
    aim: float | None = None
    less_is_better: bool = False


class Row:
    """One line of the table. `samples` maps a server's name to its rounds; `note` says what was measured."""

    def __init__(self, key: str, what: str, unit: str, goal: Goal, note: str) -> None:
        self.key = key
        self.what = what
        self.unit = unit
        self.goal = goal
        self.note = note
        self.samples: dict[str, list[Sample]] = {}

    def add(self, server: str, sample: Sample) -> None:
        """Keep one round's sample."""
        self.samples.setdefault(server, []).append(sample)

    def median(self, server: str) -> float:
        """Return the median of a server's rounds."""
        return statistics.median(sample.value for sample in self.samples[server])

    def cpu_us(self, server: str) -> float | None:
        """Return the median CPU per operation of a server."""
        found = [sample.cpu_us for sample in self.samples[server] if sample.cpu_us is not None]
        return statistics.median(found) if found else None

    @property
    def peer(self) -> str | None:
        """The better peer, if there is one."""
        peers = [name for name in self.samples if name != OURS]
        return max(peers, key=self.median, default=None)

    @property
    def ratios(self) -> list[float]:
        """Ours against the better peer, round by round."""
        if self.peer is None:
            return []
        pairs = zip(self.samples[OURS], self.samples[self.peer], strict=True)
        return [ours.value / peer.value for ours, peer in pairs]

    @property
    def figure(self) -> float:
        """What is compared with the goal: the ratio, or the value where there is no peer."""
        return statistics.median(self.ratios) if self.peer is not None else self.median(OURS)

    @property
    def verdict(self) -> str:
        """How the figure stands to the goal."""
        goal, figure = self.goal, self.figure
        if goal.at_least is None:
            return "reported"
        sign = -1 if goal.less_is_better else 1
        if sign * figure < sign * goal.at_least:
            return "BELOW"
        return "aim" if goal.aim is not None and sign * figure >= sign * goal.aim else "ok"

    def as_json(self) -> dict[str, object]:
        """Return all that is known of the row."""
        return {
            "key": self.key,
            "what": self.what,
            "unit": self.unit,
            "note": self.note,
            "medians": {name: self.median(name) for name in self.samples},
            "cpu_us_per_operation": {name: self.cpu_us(name) for name in self.samples},
            "samples": {name: [sample.value for sample in rounds] for name, rounds in self.samples.items()},
            "better_peer": self.peer,
            "ratios": self.ratios,
            "figure": self.figure,
            "at_least": self.goal.at_least,
            "aim": self.goal.aim,
            "verdict": self.verdict,
        }


HEAD = ("row", "figure", "unit", OURS, "peers", "ratio (range)", "at least", "aim", "", "CPU us/op")


def render(rows: list[Row]) -> str:
    """Return the table, and below it what each row measured."""
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes: dict[str, list[str]] = {}
    for row in rows:
        notes.setdefault(row.note, []).append(row.key)
    return "\n".join([*lines, "", *(f"{', '.join(keys)}: {note}" for note, keys in notes.items())])


def save(rows: list[Row], path: Path, about: dict[str, object]) -> None:
    """Write everything as JSON; `about` says how it was run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")


def _cells(row: Row) -> tuple[str, ...]:
    peers = ", ".join(f"{name} {_number(row.median(name))}" for name in row.samples if name != OURS)
    ratios = row.ratios
    ratio = f"{row.figure:.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "-"
    cpu = ", ".join(f"{used:.1f}" for name in row.samples if (used := row.cpu_us(name)) is not None)
    goals = ["" if value is None else f"{value:g}" for value in (row.goal.at_least, row.goal.aim)]
    return (row.key, row.what, row.unit, _number(row.median(OURS)), peers or "-", ratio, *goals, row.verdict, cpu)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"

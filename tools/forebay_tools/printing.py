"""What commands write: results to stdout, notes and progress to stderr, one JSON document with --json."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "str | int | float | bool | Mapping[str, Json] | Sequence[Json] | None"


def say(line: str) -> None:
    """Write one line of result."""
    sys.stdout.write(line + "\n")


def note(line: str) -> None:
    """Write one line beside the result."""
    sys.stderr.write(f"forebay: {line}\n")
    sys.stderr.flush()


def say_json(value: Json) -> None:
    """Write one JSON document on one line."""
    say(json.dumps(value))


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows in columns as wide as their longest cell; the last column is not padded."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say_fields(fields: Mapping[str, str]) -> None:
    """Write `name: value` lines with the values below each other."""
    width = max(len(name) for name in fields) + 1
    for name, value in fields.items():
        say(f"{name + ':':<{width}} {value}")

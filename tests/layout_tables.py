"""Reads the layout tables in docstrings, so that tests can compare them with the code (STYLE rule 6)."""

import re
import struct
from types import ModuleType
from typing import NamedTuple

_ROW = re.compile(r"^ +(\d+) +(\d+)  (u8|u16|u32|u64|\d+[sx]) +(\w+)  ")
_CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


class Field(NamedTuple):
    """One row of a table."""

    offset: int
    size: int
    type: str
    name: str


def table(module: ModuleType, title: str) -> list[Field]:
    """Return the rows of the table whose heading begins with `title`, up to the blank line behind it."""
    lines = (module.__doc__ or "").splitlines()
    [start] = [number for number, line in enumerate(lines) if line.startswith(title)]
    rows = []
    for line in lines[start + 2 :]:
        if match := _ROW.match(line):
            rows.append(Field(int(match[1]), int(match[2]), match[3], match[4]))
        elif not line.strip() and rows:
            break
    assert rows, f"no table under {title!r}"
    return rows


def assert_matches(module: ModuleType, title: str, layout: struct.Struct) -> None:
    """Compare a table's heading, types, sizes and offsets with a Struct."""
    rows = table(module, title)
    declared = "<" + "".join(_CODES.get(row.type, row.type) for row in rows)
    assert layout.format == declared, title
    offset = 0
    for row in rows:
        assert row.offset == offset, row
        assert row.size == struct.calcsize("<" + _CODES.get(row.type, row.type)), row
        offset += row.size
    assert offset == layout.size
    assert re.search(rf"^{re.escape(title)}, {layout.size} bytes", module.__doc__ or "", re.MULTILINE), title

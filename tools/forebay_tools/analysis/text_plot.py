"""The curve in a terminal: columns are sizes on a logarithmic axis, `*` is the policy, `.` an LRU."""

import math
from collections.abc import Sequence

from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.analysis.advice import interpolate
from forebay_tools.analysis.curve import Point

WIDTH = 64
HEIGHT = 16


def draw_text(points: Sequence[Point], marks: Sequence[tuple[str, int]]) -> list[str]:
    """Return the lines; `marks` are letters and sizes in blocks to show below the axis."""
    low, high = math.log(points[0].size_blocks), math.log(max(points[-1].size_blocks, points[0].size_blocks + 1))
    rows = [[" "] * WIDTH for _ in range(HEIGHT + 1)]
    for column in range(WIDTH):
        point = interpolate(points, math.exp(low + (high - low) * column / (WIDTH - 1)))
        rows[HEIGHT - round(point.lru_hit_ratio * HEIGHT)][column] = "."
        rows[HEIGHT - round(point.hit_ratio * HEIGHT)][column] = "*"
    lines = [f"{100 - 100 * i // HEIGHT:>4} % |{''.join(row)}".rstrip() for i, row in enumerate(rows)]
    axis = [" "] * WIDTH
    for letter, size in marks:
        column = round((math.log(max(1, size)) - low) / (high - low) * (WIDTH - 1))
        if 0 <= column < WIDTH:
            axis[column] = letter
    left, right = format_size(points[0].size_blocks * BLOCK_SIZE), format_size(points[-1].size_blocks * BLOCK_SIZE)
    return [
        *lines,
        "       +" + "-" * WIDTH,
        "        " + "".join(axis).rstrip(),
        f"        {left}{right:>{WIDTH - len(left)}}",
    ]

"""How far a long transfer is, with rate and time left.

On a terminal one line is rewritten a few times a second; elsewhere a plain line is written now and then, none for a
short transfer. The clock is an argument of the pure part, `progress_line`.
"""

import math
import time
from typing import Final, TextIO

from forebay_core.units import format_size

TERMINAL_INTERVAL_S: Final = 0.2
LINE_INTERVAL_S: Final = 10.0


class Progress:
    """Counts bytes of one transfer and writes about it. For one thread."""

    def __init__(self, label: str, total: int, stream: TextIO, *, lines: bool = True) -> None:
        """Without `lines` nothing is written but on a terminal."""
        self._label = label
        self._total = total
        self._stream = stream
        self._terminal = stream.isatty()
        self._interval_s = TERMINAL_INTERVAL_S if self._terminal else LINE_INTERVAL_S if lines else math.inf
        self._started_s = time.monotonic()
        self._written_s = self._started_s
        self._shown = False
        self.done = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def reach(self, done: int) -> None:
        """Say that `done` bytes of the total are done."""
        self.done = done
        now_s = time.monotonic()
        if now_s - self._written_s >= self._interval_s:
            self._written_s = now_s
            self._show()

    def reach_of(self, done: int, total: int) -> None:
        """Say the same of a transfer whose total is known only now."""
        self._total = total
        self.reach(done)

    def close(self) -> None:
        """Leave the terminal with the cursor at the start of a clean line."""
        if self._shown and self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _show(self) -> None:
        line = progress_line(self._label, self.done, self._total, self.elapsed_s)
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else f"forebay: {line}\n")
        self._stream.flush()
        self._shown = True


def progress_line(label: str, done: int, total: int, elapsed_s: float) -> str:
    """Return `label: 25%, 1 GiB of 4 GiB, 200 MiB/s, 15 s left`."""
    share = done / total if total else 1.0
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    left = f"{show_seconds((total - done) / rate)} left" if rate > 0 else "time left unknown"
    return f"{label}: {share:.0%}, {format_size(done)} of {format_size(total)}, {format_size(int(rate))}/s, {left}"


def show_seconds(seconds: float) -> str:
    """Return a duration for people: `12 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

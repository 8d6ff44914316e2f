"""Which blocks became dirty since the last cut closed, so that closing a cut sorts and copies nothing.

They are gathered in runs, each sorted when it is full; a closed cut takes the runs over and merges them bit by bit
while it is sent. A block is listed twice if it was trimmed and written again; merging leaves it once.

Crash: made anew from the map.
"""

from array import array
from collections.abc import Iterator
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.limits import DIRTY_RUN_BLOCKS, MERGED_PER_RUN_MIN
from forebay_cache.engine.ports import U64Array

_NONE: Final[U64Array] = np.empty(0, np.uint64)
_Values = TypeVar("_Values", U64Array, npt.NDArray[np.int64])


class DirtyBlocks:
    """Lbas of one volume's open cut."""

    def __init__(self) -> None:
        self._newest = array("Q")
        self._runs: list[U64Array] = []
        self._sorted_count = 0

    def __len__(self) -> int:
        return self._sorted_count + len(self._newest)

    def __iter__(self) -> Iterator[int]:
        for run in (*self._runs, np.frombuffer(self._newest, np.uint64) if self._newest else _NONE):
            yield from run.tolist()

    def add(self, lbas: U64Array) -> None:
        """List more blocks; those of one record, or of a slice of the device."""
        self._newest.frombytes(lbas.tobytes())
        if len(self._newest) >= DIRTY_RUN_BLOCKS:
            self._end_run()

    def take(self) -> list[U64Array]:
        """Return the runs, each sorted and without twins, and begin with nothing listed."""
        if self._newest:
            self._end_run()
        runs, self._runs, self._sorted_count = self._runs, [], 0
        return runs

    def all(self) -> U64Array:
        """Return all of them, sorted and without twins: a step as long as the list."""
        parts = [*self._runs, np.frombuffer(self._newest, np.uint64)] if self._newest else self._runs
        return distinct(np.concatenate(parts)) if parts else _NONE

    def replace(self, lbas: U64Array) -> None:
        """List these instead, which are sorted and distinct."""
        self._newest = array("Q")
        self._runs = [lbas] if lbas.size else []
        self._sorted_count = int(lbas.size)

    def _end_run(self) -> None:
        run = distinct(np.frombuffer(self._newest, np.uint64))
        self._newest = array("Q")
        self._runs.append(run)
        self._sorted_count += int(run.size)


class MergedRuns:
    """Takes blocks out of sorted runs, lowest first, each once."""

    def __init__(self, runs: list[U64Array]) -> None:
        self._runs = [run for run in runs if run.size]
        self._at = [0] * len(self._runs)
        self._merged = _NONE

    @property
    def left(self) -> bool:
        """Whether there is more to take."""
        return bool(self._merged.size or self._runs)

    def take(self, count: int) -> U64Array:
        """Return the next `count` blocks, sorted; fewer at the end."""
        while self._merged.size < count and self._runs:
            self._merge(count)
        taken, self._merged = self._merged[:count], self._merged[count:]
        return taken

    def _merge(self, count: int) -> None:
        """Merge what no later element of any run can precede: all up to the lowest end of the pieces looked at."""
        piece = max(MERGED_PER_RUN_MIN, -(-count // len(self._runs)))
        pieces = [run[at : at + piece] for run, at in zip(self._runs, self._at, strict=True)]
        bound = min(int(one[-1]) for one in pieces)
        counts = [int(np.searchsorted(one, np.uint64(bound), side="right")) for one in pieces]
        found = [one[:n] for one, n in zip(pieces, counts, strict=True)]
        self._merged = np.concatenate((self._merged, distinct(np.concatenate(found))))
        ends = [at + n for at, n in zip(self._at, counts, strict=True)]
        left = [(run, end) for run, end in zip(self._runs, ends, strict=True) if end < run.size]
        self._runs, self._at = [run for run, _ in left], [end for _, end in left]


def distinct(values: _Values) -> _Values:
    """Return the distinct values, sorted. For 8192 random blocks `np.unique` takes 0.3 ms, this 0.08 (numpy 2.3)."""
    ordered = np.sort(values)
    return ordered[np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))[: ordered.size]]

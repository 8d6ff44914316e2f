"""What all readers of traces give out: batches of requests as arrays, and how a damaged trace is reported."""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX

BATCH_REQUESTS: Final = 1 << 14
REQUEST_BLOCKS_MAX: Final = 1 << 18
"""Blocks of one request: 1 GiB. More is not what a disk is asked for, but a sign of another format."""

U64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


class Batch(NamedTuple):
    """Requests in their order: first key (volume and block), blocks, whether a write, milliseconds since the start."""

    keys: U64Array
    counts: U64Array
    writes: BoolArray
    times_ms: U64Array


Batches = Iterator[Batch]


class TraceError(ForebayError):
    """A trace is damaged or foreign; the text names file and record."""

    def __init__(self, file: str, number: int, what: str) -> None:
        super().__init__(f"{file}: record {number}: {what}")


class Gathering:
    """Makes batches of single requests, as readers of text find them."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._rows: list[tuple[int, int, bool, int]] = []
        self._volumes: dict[str, int] = {}

    def add(self, number: int, volume: str, offset: int, length: int, write: bool, time_ms: int) -> None:
        """Add record `number`. Raises TraceError: no disk has such a request."""
        if length == 0:
            return
        first = offset >> BLOCK_SHIFT
        count = (offset + length + BLOCK_SIZE - 1 >> BLOCK_SHIFT) - first
        if offset < 0 or not 0 < count <= REQUEST_BLOCKS_MAX or first + count > LBA_MAX:
            raise TraceError(self._file, number, f"no disk is asked for {length} bytes at offset {offset}")
        key = self._volumes.setdefault(volume, len(self._volumes) + 1)
        self._rows.append((key << LBA_BITS | first, count, write, time_ms & (1 << 63) - 1))

    @property
    def is_full(self) -> bool:
        """Whether a batch is due."""
        return len(self._rows) >= BATCH_REQUESTS

    def take(self) -> Batch:
        """Return what was gathered."""
        keys, counts, writes, times = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
        self._rows = []
        return Batch(
            np.array(keys, np.uint64),
            np.array(counts, np.uint64),
            np.array(writes, np.bool_),
            np.array(times, np.uint64),
        )

    def volumes(self) -> dict[int, str]:
        """Return the names of the volumes by key; formats that know one volume only do not name it."""
        return {key: name for name, key in self._volumes.items() if name}

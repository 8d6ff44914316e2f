"""The memory that NBD connections receive into, reused between them.

Invariant: a buffer is in the pool only while no connection and no volume uses it. Fresh memory is touched only as
bytes arrive in it, so a length that a client merely announces costs nothing.
"""

from typing import Final

import numpy as np

from forebay_cache.engine.nbd_limits import LARGE_RECEIVE_SIZE, RECEIVE_SIZE
from forebay_cache.engine.nbd_transmission import ReceiveBuffer

_KEPT_MAX: Final[dict[int, int]] = {RECEIVE_SIZE: 32, LARGE_RECEIVE_SIZE: 16}


class BufferPool:
    """Hands out buffers of two sizes, or of exactly the size asked for when that is larger."""

    def __init__(self) -> None:
        self._kept: dict[int, list[ReceiveBuffer]] = {size: [] for size in _KEPT_MAX}

    def take(self, size: int) -> ReceiveBuffer:
        """Return a buffer of a size that `buffer_size` gave."""
        kept = self._kept.get(size)
        if kept:
            return kept.pop()
        return ReceiveBuffer(np.empty(size, np.uint8).data)

    def give(self, buffer: ReceiveBuffer) -> None:
        """Take a buffer back that nobody uses any more."""
        assert buffer.payloads == 0
        assert buffer.charge == 0
        size = len(buffer.view)
        kept = self._kept.get(size)
        if kept is not None and len(kept) < _KEPT_MAX[size]:
            buffer.retired = False
            kept.append(buffer)


def buffer_size(size: int) -> int:
    """Return how large the buffer for a request of so many bytes is."""
    if size <= RECEIVE_SIZE:
        return RECEIVE_SIZE
    return max(size, LARGE_RECEIVE_SIZE)

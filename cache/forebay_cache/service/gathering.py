"""Gathered output: buffers that one system call takes as one piece, or only a part of."""

from collections.abc import Sequence

from forebay_core.units import Buffer


def rest_of(buffers: Sequence[Buffer], count: int) -> list[Buffer]:
    """Return what is left of the buffers behind the first `count` bytes; nothing is copied."""
    for index, buffer in enumerate(buffers):
        view = memoryview(buffer).cast("B")
        if count < view.nbytes:
            return [view[count:], *buffers[index + 1 :]]
        count -= view.nbytes
    assert count == 0
    return []

"""Reading a device that nobody writes to, around blocks that its disk doesn't give back.

A zone is read whole, because that is fast; one worn-out block of it must not hide all the others.
"""

from collections.abc import Callable

from forebay_core.errors import UnreadableError
from forebay_core.units import BLOCK_SIZE, Buffer

ReadDevice = Callable[[int, int], Buffer]
"""Read `size` bytes at a byte offset of the device, waiting for them; raises UnreadableError."""


def read_around(read: ReadDevice, offset: int, size: int) -> tuple[memoryview, dict[int, UnreadableError]]:
    """Return whole blocks, zeros for those that can't be read, and what happened to these, by their offsets."""
    assert size % BLOCK_SIZE == 0
    try:
        return memoryview(read(offset, size)), {}
    except UnreadableError:
        pass  # it does not say which blocks are whole
    view = memoryview(bytearray(size))
    unreadable: dict[int, UnreadableError] = {}
    for at in range(0, size, BLOCK_SIZE):
        try:
            view[at : at + BLOCK_SIZE] = read(offset + at, BLOCK_SIZE)
        except UnreadableError as error:
            unreadable[offset + at] = error
    return view, unreadable

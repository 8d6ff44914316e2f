"""Room for the payloads of a client's large writes, of which the daemon may see one memory.

Invariants:
    A slot is used for one payload at a time, and again only behind the answer to the last one.
    A daemon that lives may still be at work on a payload whose connection has ended. So the slots of a memory that had
    one unanswered then are never used again: there is a new memory, and the old one goes with its last payload.
"""

from typing import Final, NamedTuple

SLOTS: Final = 32
"""Of a memory: a loop device has less in flight. What comes when all are taken goes through the socket."""


class Memory(NamedTuple):
    """A memory that can be shared: a descriptor of this process, whose number may be that of another one later; `key`
    is its inode, which is that of no other."""

    key: int
    number: int


class Place(NamedTuple):
    """Where a payload is: the key of its memory, and bytes from its beginning on."""

    key: int
    offset: int


class Slot(NamedTuple):
    """Room for one payload; `place` None: in no memory that is shared."""

    view: memoryview
    place: Place | None = None


class PayloadSlots:
    """The slots of one memory, of `size` bytes each; the last one given back is the first to be used again. Without a
    memory none is shared."""

    def __init__(self, memory: Memory | None, view: memoryview, size: int) -> None:
        self.memory = memory
        self._size = size
        self._key = memory.key if memory is not None else 0
        self._free = [Slot(view[at : at + size], Place(self._key, at)) for at in range(0, view.nbytes - size + 1, size)]

    def take(self) -> Slot:
        """Return a free slot, or one that is not shared."""
        return self._free.pop() if self._free else Slot(memoryview(bytearray(self._size)))

    def renewed(self, slot: Slot) -> Slot:
        """Return a shared slot for a free one that is not, or is of another memory, if there is one."""
        return slot if self._is_ours(slot) or not self._free else self._free.pop()

    def give(self, slot: Slot) -> None:
        """Take a slot back, unless it is of no memory or of another one."""
        if self._is_ours(slot):
            self._free.append(slot)

    def _is_ours(self, slot: Slot) -> bool:
        return slot.place is not None and slot.place.key == self._key

"""A block device of the kernel's NBD client, without I/O: which message comes next, and what its answer means.

The kernel keeps a device while its socket is gone and holds its requests back, so a daemon that comes back gives it a
fresh socket; one that is gone is connected anew.

There is one socket for each device, whatever it costs: with several, the kernel takes the socket away from every
request that is not answered within the request timeout, be it 0 or not (nbd_xmit_timeout), and a request that waits
for room in a full buffer is not answered for an hour. With one it only asks again whether its socket was replaced, and
that is how requests that were under way when a daemon died are sent again: after IO_TIMEOUT_MS, not after 30 s.

Invariants:
    At most one command of a device is under way.
    A device that is not ours by its identifier is never given a socket, and never disconnected.
Crash: a start asks the kernel what is there, and compares it with the row of the volume.
"""

import enum
import errno
from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay_core.errors import ForebayError

IO_TIMEOUT_MS: Final = 900
"""How often the kernel looks whether the socket of an unanswered request was replaced: it rounds up to whole seconds,
and tells its log of each such request."""

DEAD_LINK_TIMEOUT_S: Final = 30 * 86400
"""How long the kernel holds requests back while there is no daemon; then they fail."""

_DELAYS_S: Final = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Before each attempt to give a device a socket; the last one again and again."""


class State(enum.Enum):
    """How a device stands."""

    ABSENT = enum.auto()
    CONNECTING = enum.auto()
    LIVE = enum.auto()
    SEVERED = enum.auto()  # the kernel has it and waits for a socket
    MENDING = enum.auto()  # it is being given one
    LEAVING = enum.auto()


class Event(enum.Enum):
    """What moves it."""

    CONNECT = enum.auto()
    MEND = enum.auto()
    DONE = enum.auto()
    REFUSED = enum.auto()
    LOST = enum.auto()  # the kernel closed the socket
    VANISHED = enum.auto()  # somebody else disconnected the device
    LEAVE = enum.auto()


TRANSITIONS: Final = {
    (State.ABSENT, Event.CONNECT): State.CONNECTING,
    (State.ABSENT, Event.MEND): State.MENDING,
    (State.CONNECTING, Event.DONE): State.LIVE,
    (State.CONNECTING, Event.REFUSED): State.ABSENT,
    (State.MENDING, Event.DONE): State.LIVE,
    (State.MENDING, Event.REFUSED): State.SEVERED,
    (State.LIVE, Event.LOST): State.SEVERED,
    (State.SEVERED, Event.MEND): State.MENDING,
    (State.SEVERED, Event.VANISHED): State.ABSENT,
    (State.LIVE, Event.LEAVE): State.LEAVING,
    (State.SEVERED, Event.LEAVE): State.LEAVING,
    (State.LEAVING, Event.DONE): State.ABSENT,
    (State.LEAVING, Event.REFUSED): State.ABSENT,
}


class Found(NamedTuple):
    """A device that the kernel has, connected or not; `identifier` is empty if it tells none."""

    number: int
    connected: bool
    identifier: str
    size: int


class Connect(NamedTuple):
    """Make a device; `number` None lets the kernel choose."""

    number: int | None
    size: int
    block_size: int
    flags: int
    identifier: str


class Mend(NamedTuple):
    """Give a device a fresh socket."""

    number: int
    identifier: str


class Resize(NamedTuple):
    """Tell a device its size."""

    number: int
    size: int
    identifier: str


class KernelDevice:
    """One device, from its first connection until it is let go."""

    def __init__(self, identifier: str, *, size: int, block_size: int, flags: int, number: int | None) -> None:
        """`number`: the one that it had before, if it had one."""
        self._identifier = identifier
        self._block_size = block_size
        self._flags = flags
        self._lost = False
        self._attempts = 0
        self.size = size
        self.number = number
        self.state = State.ABSENT

    @property
    def delay_s(self) -> float:
        """How long to wait before the next attempt to mend it."""
        return _DELAYS_S[min(self._attempts, len(_DELAYS_S) - 1)]

    def begin(self, devices: Sequence[Found]) -> Connect | Mend:
        """Return what brings the device here: what the kernel still has of it is used again."""
        mine = next((found for found in devices if self._is_mine(found)), None)
        if mine is not None:
            self.number = mine.number
            return self._mend()
        busy = {found.number for found in devices if found.connected}
        return self._connect(None if self.number in busy else self.number)

    def mend(self, devices: Sequence[Found]) -> Mend | None:
        """Return what gives a severed device a socket; None if somebody disconnected it."""
        if not any(self._is_mine(found) for found in devices):
            self._move(Event.VANISHED)
            return None
        return self._mend()

    def resize(self, devices: Sequence[Found]) -> Resize | None:
        """Return what tells a live device its size; None if it knows, or there is none."""
        sizes = [found.size for found in devices if found.number == self.number]
        if self.state is not State.LIVE or self.number is None or sizes == [self.size]:
            return None
        return Resize(self.number, self.size, self._identifier)

    def done(self, number: int) -> bool:
        """The command worked; return whether the device is to be mended at once, as its socket is gone already."""
        self.number = number
        self._move(Event.DONE)
        lost, self._lost = self._lost, False
        if lost:
            self._move(Event.LOST)
        else:
            self._attempts = 0
        return lost

    def refused(self, code: int) -> Connect | None:
        """The command failed with an errno; return what to try instead, or None to mend it later.

        Raises:
            ForebayError: there is nothing else to try; the text is one line.
        """
        connecting = self.state is State.CONNECTING
        self._move(Event.REFUSED)
        self._lost = False
        if not connecting:
            return None
        if code in (errno.EBUSY, errno.EEXIST, errno.ENODEV) and self.number is not None:
            return self._connect(None)
        raise ForebayError(_explain(code))

    def lost(self) -> bool:
        """The kernel closed the socket; return whether to mend the device now."""
        if self.state in (State.CONNECTING, State.MENDING):
            self._lost = True
            return False
        if self.state is not State.LIVE:
            return False
        self._move(Event.LOST)
        return True

    def leave(self) -> int | None:
        """Return the number of the device to disconnect; None if the kernel has none any more."""
        if self.state is State.ABSENT:
            return None
        self._move(Event.LEAVE)
        return self.number

    def left(self) -> None:
        """It is disconnected."""
        self._move(Event.DONE)

    def _connect(self, number: int | None) -> Connect:
        self.number = number
        self._move(Event.CONNECT)
        return Connect(number, self.size, self._block_size, self._flags, self._identifier)

    def _mend(self) -> Mend:
        assert self.number is not None
        self._attempts += 1
        self._move(Event.MEND)
        return Mend(self.number, self._identifier)

    def _is_mine(self, found: Found) -> bool:
        """Tell by the identifier, where the kernel keeps one; before Linux 5.14 by number and size."""
        if not found.connected:
            return False
        if found.identifier:
            return found.identifier == self._identifier
        return found.number == self.number and found.size == self.size

    def _move(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]


def _explain(code: int) -> str:
    if code in (errno.EPERM, errno.EACCES):
        return "the kernel lets only root make block devices (CAP_SYS_ADMIN); run the cache daemon as root"
    if code in (errno.EBUSY, errno.ENOSPC, errno.ENODEV, errno.ENOMEM):
        return f"no nbd device is free ({errno.errorcode[code]}); detach one, or load the module with more: nbds_max=64"
    if code == errno.ENOENT:
        return "this kernel has no nbd; load it: modprobe nbd"
    return f"the kernel made no device: {errno.errorcode.get(code, str(code))}"

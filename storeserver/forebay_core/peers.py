"""Which process is at the other end of a Unix socket, as the kernel noted when it connected."""

import socket
import struct
from typing import Final, NamedTuple

_CREDENTIALS: Final = struct.Struct("iII")


class Peer(NamedTuple):
    """A process, and the user and group that it ran as."""

    pid: int
    uid: int
    gid: int


def peer_of(connected: socket.socket) -> Peer:
    """Return who connected to, or listens at, the other end of a Unix socket."""
    return Peer(*_CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))

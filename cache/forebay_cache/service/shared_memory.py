"""Memory that a client of this host shares, so that the bytes of its large reads and writes go through no socket.

A payload of 1 MiB was copied into the socket and out of it by three threads on two cores (0.4 ms of CPU, 2026-11). The
FUSE front lets the kernel write it into a memfd instead, which the daemon has mapped.

Invariants:
    What is mapped can't become shorter: it is sealed. Else whoever owns it could end us by SIGBUS.
    Only processes of our own user are believed: who shares memory may change a payload while it is written.
Crash: the mapping goes with the daemon; the client asks the next one again, and sends what it was not answered.
"""

import fcntl
import logging
import mmap
import os
import socket
from typing import Final

from forebay_core.peers import peer_of
from forebay_core.units import GIB

MEMORY_SIZE_MAX: Final = 1 * GIB
"""Bytes of one client's memory; it is the client who pays for them."""

_LOG = logging.getLogger(__name__)


def make_memory(name: str, size: int) -> tuple[int, memoryview]:
    """Return a descriptor that can be shared, and the memory behind it.

    Raises:
        OSError: there is none to be had.
    """
    number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(number, size)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return number, memoryview(mmap.mmap(number, size))
    except OSError:
        os.close(number)
        raise


def memory_of_peer(client: socket.socket, number: int, inode: int) -> memoryview | None:
    """Return the memory of an inode behind a descriptor of the client's process; None if it is none for us."""
    if client.family != socket.AF_UNIX:
        return None
    pid, uid, _gid = peer_of(client)
    path = f"/proc/{pid}/fd/{number}"
    try:
        if uid != os.geteuid() or not os.readlink(path).startswith("/memfd:"):
            return None
        return _map(path, inode)
    except (OSError, ValueError) as error:
        _LOG.info("an NBD client's memory %s can't be used: %s", path, error)
        return None


def _map(path: str, inode: int) -> memoryview | None:
    number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        sealed = fcntl.fcntl(number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        found = os.fstat(number)  # behind the look at the seal: from then on it gets no shorter
        if not sealed or found.st_ino != inode or found.st_size > MEMORY_SIZE_MAX:
            return None
        return memoryview(mmap.mmap(number, found.st_size))
    finally:
        os.close(number)

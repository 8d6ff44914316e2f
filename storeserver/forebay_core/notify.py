"""Tells systemd, if it started us, that the service is ready and that it still lives (the protocol of sd_notify).

It also keeps sockets for us while we are away, and hands them to the next start as LISTEN_FDS."""

import asyncio
import logging
import os
import socket
from typing import Final

PATIENCE_S: Final = 10.0
_TURNS_PER_PERIOD: Final = 3
_LOG = logging.getLogger(__name__)


def notify(state: str, *descriptors: int, patience_s: float = PATIENCE_S) -> bool:
    """Send a state such as `READY=1` to the socket that NOTIFY_SOCKET names; tell whether there is one that took it.

    A socket with too much in its queue is waited for so long: who reads it may hang, and we are to serve.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(patience_s)
            channel.connect(address)
            socket.send_fds(channel, [state.encode()], descriptors)
    except OSError as error:
        _LOG.warning("systemd could not be told %s: %s", state, error)
        return False
    return True


def keep(name: str, descriptor: int) -> bool:
    """Have a descriptor kept open from the end of this process to its next start; tell whether somebody may do it."""
    return notify(f"FDSTORE=1\nFDNAME={name}", descriptor)


def let_go(name: str) -> None:
    """Have a descriptor kept no longer."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


class Watchdog:
    """Says `WATCHDOG=1` again and again as long as the event loop turns, if WATCHDOG_USEC asks for that."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._period_s = watchdog_period_s(os.environ.get("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID"), os.getpid())

    def start(self) -> None:
        """Begin."""
        if self._period_s:
            self._say()

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()

    def _say(self) -> None:
        notify("WATCHDOG=1", patience_s=0)  # there is one in the queue already, or soon will be
        self._timer = self._loop.call_later(self._period_s, self._say)


def watchdog_period_s(period_us: str | None, watched_pid: str | None, pid: int) -> float:
    """Return how often to tell; 0: nobody watches this process, or what the environment says is no number."""
    if period_us is None or not (period_us.isascii() and period_us.isdigit()):
        return 0.0
    if watched_pid not in (None, str(pid)):
        return 0.0
    return int(period_us[:18]) / 1e6 / _TURNS_PER_PERIOD

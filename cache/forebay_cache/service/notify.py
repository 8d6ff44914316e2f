"""Tells systemd, if it started us, that the service is ready (the protocol of sd_notify)."""

import logging
import os
import socket

_LOG = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a state such as `READY=1` to the socket that NOTIFY_SOCKET names; without it, do nothing."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.connect(address)
            channel.send(state.encode())
    except OSError as error:
        _LOG.warning("systemd could not be told %s: %s", state, error)

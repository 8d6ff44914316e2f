"""The messages of the kernel's NBD client (linux/nbd-netlink.h), by pyroute2's generic netlink.

Unlike most of sysfs and the ioctls of old, these give a device a fresh socket while it is in use.
"""

import os
import sys
from typing import Final

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

RECONFIGURE: Final = 3


class _SocketItem(nla):  # type: ignore[misc]
    nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))


class _Sockets(nla):  # type: ignore[misc]
    nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "socket_item"))
    socket_item = _SocketItem


class _NbdMessage(genlmsg):  # type: ignore[misc]
    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "hex"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )
    sockets = _Sockets


def ask(command: int, attributes: list[object]) -> int | None:
    """Send one message to the kernel's NBD client; return the number of the device that the answer names, if any.

    Raises:
        OSError: the kernel refuses it, with its errno.
    """
    message = _NbdMessage()
    message["cmd"] = command
    message["version"] = 1
    message["attrs"] = attributes
    try:
        with GenericNetlinkSocket() as channel:
            channel.bind("nbd", _NbdMessage)
            answers = channel.nlm_request(message, msg_type=channel.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK)
            numbers = [answer.get_attr("NBD_ATTR_INDEX") for answer in answers]
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error
    return next((int(number) for number in numbers if number is not None), None)


def main() -> int:
    """Tell a device its size: NUMBER SIZE [IDENTIFIER]; the exit code is an errno."""
    attributes: list[object] = [["NBD_ATTR_INDEX", int(sys.argv[1])], ["NBD_ATTR_SIZE_BYTES", int(sys.argv[2])]]
    attributes += [["NBD_ATTR_BACKEND_IDENTIFIER", identifier] for identifier in sys.argv[3:]]
    try:
        ask(RECONFIGURE, attributes)
    except OSError as error:
        return error.errno or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

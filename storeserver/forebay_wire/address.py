"""Addresses: where a server listens and a client connects."""

import ipaddress
import re
from typing import Final, NamedTuple, NewType

from forebay_core.errors import WrongUsageError

UnixPath = NewType("UnixPath", str)

PORT_MAX: Final = 65535
_ADDRESS: Final = re.compile(
    r"(\[(?P<v6>[0-9A-Fa-f:.%\w]{2,100})\]|(?P<name>[\w.-]{0,253})):(?P<port>\d{1,5})\Z", re.ASCII
)


class Address(NamedTuple):
    """A host (name or number; empty: every address of this host) and a TCP port (0: the system chooses one)."""

    host: str
    port: int

    def __str__(self) -> str:
        """`HOST:PORT`, as `parse_address` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that `HOST:PORT`, `[IPV6]:PORT` or `:PORT` names.

    Raises:
        WrongUsageError: it is none of these.
    """
    match = _ADDRESS.match(text)
    if match is not None and int(match["port"]) <= PORT_MAX:
        if match["v6"] is None:
            return Address(match["name"], int(match["port"]))
        if _is_ipv6(match["v6"]):
            return Address(match["v6"], int(match["port"]))
    raise WrongUsageError(
        f"address {text[:300]!r}: write HOST:PORT, [IPV6]:PORT or :PORT, with a port up to {PORT_MAX}"
    )


def is_loopback(host: str) -> bool:
    """Tell whether only processes on this host can reach `host` (a name other than localhost counts as reachable)."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True

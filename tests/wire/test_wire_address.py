"""Addresses as users write them."""

import pytest

from forebay_core.errors import WrongUsageError
from forebay_wire.address import Address, is_loopback, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7300", Address("127.0.0.1", 7300)),
        ("store-1.example.org:0", Address("store-1.example.org", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[fe80::1%eth0]:7300", Address("fe80::1%eth0", 7300)),
        (":7300", Address("", 7300)),
    ],
)
def test_an_address_is_read_and_written_alike(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        "host:65536",
        "host:-1",
        "host:7 ",
        " host:7",
        "::1:7300",
        "[::1]",
        "[host]:7",
        "[]:7",
        "[::g]:7",
        "a b:7",
        "host:٧",
        "host:7\n",
        "h" * 300 + ":7",
        "host:99999999999999999999",
        "user@host:7",
    ],
)
def test_anything_else_is_refused_and_told_what_is_allowed(text: str) -> None:
    with pytest.raises(WrongUsageError, match="HOST:PORT") as caught:
        parse_address(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.x"]
)
def test_everything_else_counts_as_reachable(host: str) -> None:
    assert not is_loopback(host)

"""A network namespace on the other end of a link of a given rate: a pair of veth with a token bucket towards here."""

import os
import subprocess
from types import TracebackType

from fio import BenchError

COMMAND_TIMEOUT_S = 20.0
RATE = "1gbit"
PAYLOAD_MBIT = 952
"""What TCP carries over such a link of Ethernet frames of 1500 bytes."""


class Link:
    """`with Link() as link`: `link.there` is the address in the namespace, `link.prefix` runs a command in it."""

    def __init__(self) -> None:
        number = os.getpid() % 65536
        self._name = f"fb{number}"
        self._net = f"10.{200 + number % 50}.{number >> 8}"
        self.here = f"{self._net}.1"
        self.there = f"{self._net}.2"
        self.prefix = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> "Link":
        """Make it.

        Raises:
            BenchError: this needs root, iproute2, and a kernel with veth and tbf.
        """
        near, far = f"{self._name}a", f"{self._name}b"
        inside = ("ip", "-n", self._name)
        try:
            _run("ip", "netns", "add", self._name)
            _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", self._name)
            _run("ip", "address", "add", f"{self.here}/24", "dev", near)
            _run("ip", "link", "set", near, "up")
            _run(*inside, "address", "add", f"{self.there}/24", "dev", far)
            _run(*inside, "link", "set", far, "up")
            _run(*inside, "link", "set", "lo", "up")
            bucket = ("root", "tbf", "rate", RATE, "burst", "1m", "latency", "100ms")
            _run(*self.prefix, "tc", "qdisc", "add", "dev", far, *bucket)
        except BenchError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self._remove()

    def _remove(self) -> None:
        for words in (("ip", "netns", "delete", self._name), ("ip", "link", "delete", f"{self._name}a")):
            subprocess.run(words, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except OSError as error:
        raise BenchError(f"{words[0]} can't be run: {error.strerror}") from error
    if done.returncode:
        raise BenchError(f"no link between network namespaces here: {' '.join(words)}: {done.stderr.strip()}")

"""Asks a guest of vm_debian to do things, over the port that its agent listens on."""

import base64
import contextlib
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

BOOT_TIMEOUT_S: Final = 240.0
ASK_TIMEOUT_S: Final = 120.0
_PIECE: Final = 1 << 16


class Answer(NamedTuple):
    """What a command in the guest ended with and printed."""

    code: int
    text: str


class Agent:
    """One guest's agent; `trouble` returns what ended the guest, or nothing, and `tail` what it said last."""

    def __init__(self, path: Path, trouble: Callable[[], str], tail: Callable[[], str]) -> None:
        self._path = path
        self._trouble = trouble
        self._tail = tail
        self._line = socket.socket(socket.AF_UNIX)
        self._rest = b""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()

    def __enter__(self) -> "Agent":
        return self

    def booted(self) -> float:
        """Wait until the system has started; return the seconds since this call."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self._line.connect(str(self._path))
                break
            self._alive(began, BOOT_TIMEOUT_S, "boot")
            time.sleep(0.01)
        state = self.ask("systemctl is-system-running --wait", timeout_s=BOOT_TIMEOUT_S)
        assert state.text.strip() in ("running", "degraded"), f"{state}\n{self._tail()}"
        return time.monotonic() - began

    def ask(self, command: str, *, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
        """Have a command run in the guest, and wait for its end."""
        self.send(command)
        began = time.monotonic()
        while b"\n" not in self._rest:
            self._alive(began, timeout_s, command)
            if select.select([self._line], [], [], 0.5)[0]:
                self._rest += self._line.recv(_PIECE)
        line, _, self._rest = self._rest.partition(b"\n")
        code, _, text = line.partition(b" ")
        return Answer(int(code), base64.b64decode(text).decode(errors="replace"))

    def run(self, command: str, *, timeout_s: float = ASK_TIMEOUT_S) -> str:
        """Have a command run that must succeed; return what it printed."""
        answer = self.ask(command, timeout_s=timeout_s)
        assert answer.code == 0, f"{command}: {answer.code}, {answer.text}\n{self._tail()}"
        return answer.text

    def send(self, command: str) -> None:
        """Have a command run, and don't wait."""
        self._line.sendall(base64.b64encode(command.encode()) + b"\n")

    def _alive(self, began: float, timeout_s: float, command: str) -> None:
        trouble = self._trouble()
        assert not trouble, f"{command}: the guest ended: {trouble}\n{self._tail()}"
        assert time.monotonic() - began < timeout_s, f"{command}: no answer in {timeout_s} s:\n{self._tail()}"

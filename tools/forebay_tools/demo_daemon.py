"""A daemon of the demonstration: a child process that says when it is ready."""

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError

STOP_TIMEOUT_S: Final = 60.0


class DemoDaemon:
    """A running daemon; what it logs goes to a file. `ready` is what follows the prefix in its ready line."""

    def __init__(self, words: Sequence[str], log: Path, prefix: str, descriptors: Sequence[int] = ()) -> None:
        """Start it, with these descriptors open, and wait until it is ready.

        Raises:
            ForebayError: it ended instead; the text has the last line it logged.
        """
        self.log = log
        with log.open("a") as stderr:
            self._child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                pass_fds=descriptors,
            )
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.startswith(prefix):
            self.stop()
            logged = log.read_text().strip().splitlines()
            raise ForebayError(logged[-1] if logged else f"{words[-1]} did not start")
        self.ready = line.removeprefix(prefix).strip()

    @property
    def number(self) -> int:
        """Process id."""
        return self._child.pid

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._child.kill()
        self._end()

    def stop(self) -> None:
        """Ask it to end, and make it end if it takes too long."""
        self._child.terminate()
        try:
            self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._end()

    def wait(self) -> int:
        """Wait until it ends; return its exit code."""
        code = self._child.wait()
        self._end()
        return code

    def _end(self) -> None:
        self._child.wait()
        if self._child.stdout is not None:
            with contextlib.suppress(OSError):
                self._child.stdout.close()

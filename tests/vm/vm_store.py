"""A store daemon on this host that guests reach through their emulated network."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

MAIN = (sys.executable, "-m", "forebay_tools.main")
READY = "store listening on "


class HostStore:
    """A store process with an empty data folder."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def __enter__(self) -> "HostStore":
        words = [*MAIN, "store", "serve", "--data", str(self._data), "--listen", "127.0.0.1:0"]
        with self._data.with_suffix(".log").open("wb") as log:
            self._child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line.startswith(READY), self._data.with_suffix(".log").read_text()
        self.address = line.removeprefix(READY).strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.send_signal(signal.SIGTERM)
        assert self._child.stdout is not None
        self._child.stdout.close()
        self._child.wait(timeout=30)

    @property
    def from_guest(self) -> str:
        """Where a guest finds it: its network maps 10.0.2.2 to our loopback."""
        return f"10.0.2.2:{self.address.rpartition(':')[2]}"

    def forebay(self, *words: str) -> str:
        """Run a command about this store; return what it printed."""
        environment = os.environ | {"FOREBAY_STORE": self.address}
        return subprocess.run([*MAIN, *words], env=environment, check=True, capture_output=True, text=True).stdout

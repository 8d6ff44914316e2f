"""A real store daemon for the tests of commands."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from forebay_tools.main import main

MAIN = (sys.executable, "-m", "forebay_tools.main")
READY = "store listening on "


class StoreProcess:
    """A store that runs as a process of its own on a port that the system chose."""

    def __init__(self, data: Path, *flags: str) -> None:
        self.data = data
        self._flags = flags
        self.start()

    def start(self, listen: str = "127.0.0.1:0") -> None:
        words = [*MAIN, "store", "serve", "--data", str(self.data), "--listen", listen, *self._flags]
        with (self.data.parent / "store.log").open("ab") as log:
            self._child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.startswith(READY):
            self.end()
            raise AssertionError((self.data.parent / "store.log").read_text())
        self.address = line.removeprefix(READY).strip()

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._child.send_signal(number)
        assert self._child.stdout is not None
        self._child.stdout.close()
        self._child.wait(timeout=30)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProcess]:
    """A store with an empty data folder, named by FOREBAY_STORE."""
    for name in ("FOREBAY_RUN_DIR", "FOREBAY_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    process = StoreProcess(tmp_path / "store")
    monkeypatch.setenv("FOREBAY_STORE", process.address)
    yield process
    process.end()


class Ended(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Forebay = Callable[..., Ended]


@pytest.fixture
def forebay(capsys: pytest.CaptureFixture[str]) -> Forebay:
    """Run a command in this process."""

    def run(*words: str | os.PathLike[str]) -> Ended:
        capsys.readouterr()
        code = main([os.fspath(word) for word in words])
        output = capsys.readouterr()
        return Ended(code, output.out, output.err)

    return run

"""A guest of the cache without a VM: SQLite on ext4 on a loop device on nbdfuse on the volume's NBD export.

nbdfuse shows the volume as a file, the loop device (direct I/O, so no second page cache below it) makes a real block
device of it, and flushes of ext4's journal arrive as NBD flushes. A power cut kills the writer, drops the page cache
with the mount and throws the loop device away.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sqlite_writer
from undo import Undo

TIMEOUT_S = 30.0
WRITER = Path(sqlite_writer.__file__)


class Guest:
    """One volume with an ext4 file system and a database in it."""

    def __init__(self, uri: str, folder: Path, undo: Undo) -> None:
        self._uri = uri
        self._folder = folder
        self._undo = undo
        self._steps: list[tuple[int, list[str]]] = []
        self._nbdfuse: subprocess.Popen[bytes] | None = None
        self._writer: subprocess.Popen[bytes] | None = None
        self._output = folder / "sqlite.out"
        self.acknowledged = 0
        for name in ("fuse", "disk"):
            (folder / name).mkdir(parents=True)

    @property
    def database(self) -> Path:
        return self._folder / "disk" / "log.sqlite"

    def boot(self, *, make: bool = False) -> None:
        """Attach and mount; `make` a file system first."""
        target = self._folder / "fuse"
        self._nbdfuse = subprocess.Popen(
            ["nbdfuse", str(target / "volume"), self._uri], stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._note("kill", "-9", str(self._nbdfuse.pid))
        self._note("umount", "--lazy", str(target))
        _wait_for(lambda: os.path.ismount(target), f"nbdfuse on {target}")
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(target / "volume")).strip()
        self._note("losetup", "--detach", device)
        if make:
            _run("mkfs.ext4", "-q", "-F", device)
        _run("mount", "-o", "discard", device, str(self._folder / "disk"))
        self._note("umount", str(self._folder / "disk"))

    def write(self) -> None:
        """Start the writer; returns when the first row is acknowledged."""
        self._output.write_bytes(b"")
        before = self.acknowledged
        with self._output.open("ab") as output:
            self._writer = subprocess.Popen(
                [sys.executable, str(WRITER), str(self.database)],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._note("kill", "-9", str(self._writer.pid))
        _wait_for(lambda: self._heard() > before or not self._writing, "first commit")

    def check(self) -> None:
        """Judge the database of a booted guest."""
        self.acknowledged = sqlite_writer.check(self.database, self.acknowledged)

    def cut(self) -> None:
        """Lose the power: the device is gone before anything can be written back."""
        self._end_writer()
        if self._nbdfuse is not None:
            self._nbdfuse.kill()
        self._leave()

    def shut_down(self) -> None:
        """End the writer and unmount in good order."""
        self._end_writer()
        self._leave()

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.kill()
            self._writer.wait(TIMEOUT_S)
            self._writer = None
            self.acknowledged = self._heard()

    def _leave(self) -> None:
        for key, command in reversed(self._steps):
            if command[0] != "kill":
                _wait_for(lambda command=command: _works(command), " ".join(command))
            self._undo.forget(key)
        self._steps.clear()
        if self._nbdfuse is not None:
            self._nbdfuse.wait(TIMEOUT_S)
            self._nbdfuse = None

    @property
    def _writing(self) -> bool:
        return self._writer is not None and self._writer.poll() is None

    def _heard(self) -> int:
        """Return the last row that the writer said it committed."""
        numbers = re.findall(rb"^ACK (\d+)$", self._output.read_bytes(), re.MULTILINE)
        return int(numbers[-1]) if numbers else self.acknowledged

    def _note(self, *command: str) -> None:
        self._steps.append((self._undo.note(*command), list(command)))


def why_no_guest() -> str:
    """Say why there is no guest here; empty when there may be one."""
    missing = [tool for tool in ("nbdfuse", "losetup", "mkfs.ext4", "fio") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    done = subprocess.run(["losetup", "--find"], capture_output=True, text=True, check=False)
    return f"there is no loop device: {done.stderr.strip()}" if done.returncode else ""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False).returncode == 0


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {TIMEOUT_S:g} s"
        time.sleep(0.01)

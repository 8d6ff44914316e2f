"""The test's end of a power-cut file system: mount, cut, mount again; and the unmounting of what a test leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from power_tree import Outcome

TIMEOUT_S = 20.0
PROGRAM = Path(__file__).with_name("power_fuse.py")


class PowerDisk:
    """A mounted file system that can lose its power; close it in any case."""

    def __init__(self, folder: Path) -> None:
        """Mount on an existing, empty folder."""
        self.folder = folder
        # A session of its own: an interrupted test run ends it by closing its standard input, not by a signal.
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.mount()

    def __enter__(self) -> "PowerDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def mount(self) -> None:
        """Mount; what survived is there."""
        assert self._ask(mount=True), f"{self.folder} was not mounted"
        deadline = time.monotonic() + TIMEOUT_S
        while not os.path.ismount(self.folder):
            assert time.monotonic() < deadline, f"{self.folder} was not mounted"
            time.sleep(0.005)

    def power_off(self, seed: int, *, everything: bool = False) -> Outcome:
        """Lose a part of what is not synced, as `seed` says, or `everything`, and unmount.

        The programs on it must have been killed before.
        """
        answer = self._ask(power_off=seed, everything=everything)
        assert isinstance(answer, dict)
        unmount(self.folder)
        return Outcome(**answer)

    def power_cycle(self, seed: int, *, everything: bool = False) -> Outcome:
        outcome = self.power_off(seed, everything=everything)
        self.mount()
        return outcome

    def off_after(self, count: int) -> None:
        """Let so many more changes and syncs pass, then fail every call until the power cycle."""
        self._ask(off_after=count)

    def ignore_sync(self, ignored: bool) -> None:
        """From now on, answer every sync without doing it."""
        self._ask(ignore_sync=ignored)

    @property
    def syncs(self) -> int:
        answer = self._ask(syncs=True)
        assert isinstance(answer, int)
        return answer

    def close(self) -> None:
        """Unmount and end the program."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)
        self._process.stdout.close()

    def _ask(self, **request: object) -> object:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: object = json.loads(self._process.stdout.readline())
        return answer


def unmount(folder: Path) -> None:
    """Unmount; waits for what a killed program still holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while (done := subprocess.run(["umount", str(folder)], capture_output=True, text=True, check=False)).returncode:
        assert time.monotonic() < deadline, f"{folder} stays mounted: {done.stderr}"
        time.sleep(0.02)


def why_not() -> str:
    """Say why power can't be cut here; empty when it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if subprocess.run(["sh", "-c", "ldconfig -p | grep -q libfuse3"], check=False).returncode:
        return "there is no libfuse3: apt-get install fuse3"
    return ""

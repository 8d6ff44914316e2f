"""Undoes mounts, loop devices and processes when the test run ends, however it ends.

Run as a program it reads JSON lines: `[KEY, COMMAND]` to note how to undo a step, `[KEY, null]` once it is undone. At
the end of its input it runs what is left, newest first. It lives in a session of its own, so ^C and kill -9 of the
tests leave it alone, and it undoes only what the tests did.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence

TIMEOUT_S = 30.0
RETRY_S = 10.0


class Undo:
    """The test's end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self._key = 0

    def note(self, *command: str) -> int:
        """Note the command that undoes a step; return its key."""
        self._key += 1
        self._say(self._key, command)
        return self._key

    def forget(self, key: int) -> None:
        self._say(key, None)

    def close(self) -> None:
        """Undo what is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10 * TIMEOUT_S)

    def _say(self, key: int, command: Sequence[str] | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([key, command]) + "\n")
        self._process.stdin.flush()


def main() -> None:
    left: dict[int, list[str]] = {}
    for line in sys.stdin:
        key, command = json.loads(line)
        if command is None:
            left.pop(key)
        else:
            left[key] = command
    for _, command in sorted(left.items(), reverse=True):
        undo(command)


def undo(command: list[str]) -> None:
    """Run a command; again for a while if it fails, because what a killed process held is not free at once."""
    deadline = time.monotonic() + (0 if command[0] == "kill" else RETRY_S)
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if done.returncode and command[0] != "kill":
        print(f"not undone: {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)


if __name__ == "__main__":
    main()

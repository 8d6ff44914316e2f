"""Starts `forebay` processes by fork from one that has imported everything: a start then takes 30 ms, not 600.

Run as a program it is that process: it reads one JSON request a line and answers one JSON line. What it started is
killed when its standard input ends, so a test run that dies leaves nothing behind.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


class Template:
    """The test's end of the template process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: Sequence[str], log: Path) -> int:
        """Start `forebay ARGUMENTS` with its output in `log`; return the process id."""
        return int(self._ask({"arguments": list(arguments), "log": str(log)}))

    def poll(self, pid: int) -> int | None:
        """Return the exit code (negative: the signal), None while it runs."""
        code = self._ask({"poll": pid})
        return None if code is None else int(code)

    def wait(self, pid: int, timeout_s: float) -> int:
        """Wait for the process's end and return its exit code."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll(pid)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {pid} still runs after {timeout_s:g} s")
            time.sleep(0.005)
        return code

    def close(self) -> None:
        """End the template and what it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, request: dict[str, object]) -> int | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: int | None = json.loads(self._process.stdout.readline())
        return answer


def _serve() -> None:
    from forebay_cache.service import daemon as _cache_daemon  # noqa: F401  imported before the forks
    from forebay_store.service import daemon as _store_daemon  # noqa: F401
    from forebay_tools.main import main

    running: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = _poll(running, request["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(_run(main, request["arguments"], request["log"]))
            running[answer] = None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in running:
        if _poll(running, pid) is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _poll(running: dict[int, int | None], pid: int) -> int | None:
    if running[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended == pid:
            running[pid] = os.waitstatus_to_exitcode(status)
    return running[pid]


def _run(main: object, arguments: Sequence[str], log: str) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)
    code = main(list(arguments))  # type: ignore[operator]
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


if __name__ == "__main__":
    _serve()

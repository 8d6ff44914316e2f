"""Real daemons as subprocesses, in folders of their own, killed by their process id."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e_nbd import NbdClient

from forebay_core.units import MIB

READY_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 90.0
FOREBAY = (sys.executable, "-m", "forebay_tools.main")


class Daemon:
    """One daemon process; its output goes to a file that failures show."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*FOREBAY, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
            )

    @property
    def output(self) -> str:
        """What it said since it was started."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (match := re.search(pattern, self.output)) is None:
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"{self.name} never said {pattern!r}:\n{self.output}"
            time.sleep(0.01)
        return match

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(COMMAND_TIMEOUT_S)

    def stop(self) -> int:
        """End it as systemd does; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(COMMAND_TIMEOUT_S)


class Rig:
    """A store and a cache daemon on a folder; both may be killed and started again on what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store_data = folder / "store"
        self.device = folder / "cache.dev"
        self.run_dir = folder / "run"
        self.store: Daemon | None = None
        self.cache: Daemon | None = None
        self.store_address = "127.0.0.1:0"
        self.cache_size = "48MiB"
        self.cache_flags: list[str] = ["--zone-size", "1MiB", "--cut-age-s-max", "0.3"]
        self.store_flags: list[str] = []

    # --- daemons ----------------------------------------------------------------------------------------------

    def start_store(self) -> None:
        flags = ["--data", str(self.store_data), "--listen", self.store_address, *self.store_flags]
        self.store = Daemon("store", ["store", "serve", *flags], self.folder / "store.log")
        self.store_address = self.store.wait_for(r"listening on (127\.0\.0\.1:\d+)")[1]

    def start_cache(self, *flags: str, wait: bool = True) -> None:
        arguments = ["--device", str(self.device), "--size", self.cache_size, "--store", self.store_address]
        arguments += ["--run-dir", str(self.run_dir), *self.cache_flags, *flags]
        self.cache = Daemon("cache", ["cache", "serve", *arguments], self.folder / "cache.log")
        if wait:
            self.cache.wait_for(r"(?m)^READY\b")

    def start(self) -> None:
        self.start_store()
        self.start_cache()

    def kill_store(self) -> None:
        assert self.store is not None
        self.store.kill()

    def kill_cache(self) -> None:
        assert self.cache is not None
        self.cache.kill()

    def stop(self) -> None:
        """End what still runs; by process id."""
        for daemon in (self.cache, self.store):
            if daemon is not None and daemon.process.poll() is None:
                daemon.kill()

    # --- commands ---------------------------------------------------------------------------------------------

    def run(self, *arguments: str, code: int = 0, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command; return its output, or what it said on stderr if it shall fail with `code`."""
        environment = {
            **os.environ,
            "FOREBAY_STORE": self.store_address,
            "FOREBAY_RUN_DIR": str(self.run_dir),
        }
        done = subprocess.run(
            [*FOREBAY, *arguments], capture_output=True, text=True, env=environment, timeout=timeout_s, check=False
        )
        assert done.returncode == code, f"forebay {arguments}: {done.returncode}, {done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def create(self, name: str, size: int = 16 * MIB) -> None:
        self.run("volume", "create", name, "--size", str(size))

    def attach(self, name: str, *flags: str) -> str:
        return str(json.loads(self.run("attach", name, *flags))["uri"])

    def status(self) -> dict[str, Any]:
        cache: dict[str, Any] = json.loads(self.run("status", "--json"))["cache"]
        return cache

    def exported(self, name: str) -> bytes:
        """Return what the store has of a volume."""
        target = self.folder / "exported"
        self.run("volume", "export", name, str(target), "--force")
        content = target.read_bytes()
        target.unlink()
        return content

    def nbd(self, name: str) -> NbdClient:
        return NbdClient(self.run_dir / "nbd.sock", name)

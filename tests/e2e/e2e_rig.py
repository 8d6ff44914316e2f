"""Real daemons as subprocesses, in folders of their own, killed by their process id."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from e2e_nbd import NbdClient
from e2e_template import Template

from forebay_core.units import MIB
from forebay_wire.address import Address, UnixPath, parse_address
from forebay_wire.client import WireClient
from forebay_wire.messages import (
    AnyMessage,
    Attach,
    Attached,
    CacheStatus,
    CreateVolume,
    Detach,
    Done,
    Drain,
    GetCacheStatus,
    Volume,
)

READY_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 90.0
T = TypeVar("T")
FOREBAY = (sys.executable, "-m", "forebay_tools.main")


class Daemon:
    """One daemon process; its output goes to a file that failures show."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, template: Template) -> None:
        self.name = name
        self.log = log
        self._template = template
        self._from = log.stat().st_size if log.exists() else 0
        self.pid = template.start(arguments, log)

    @property
    def output(self) -> str:
        """What it said since it was started."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    @property
    def running(self) -> bool:
        return self._template.poll(self.pid) is None

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (match := re.search(pattern, self.output)) is None:
            assert self.running, f"{self.name} ended with {self._template.poll(self.pid)}:\n{self.output}"
            assert time.monotonic() < deadline, f"{self.name} never said {pattern!r}:\n{self.output}"
            time.sleep(0.01)
        return match

    def wait(self) -> int:
        """Return its exit code once it ended."""
        return self._template.wait(self.pid, READY_TIMEOUT_S)

    def signal(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """End it as systemd does; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()


class Rig:
    """A store and a cache daemon on a folder; both may be killed and started again on what they left."""

    def __init__(self, folder: Path, template: Template) -> None:
        self.folder = folder
        self.template = template
        self.store_data = folder / "store"
        self.device = folder / "cache.dev"
        self.run_dir = folder / "run"
        self.store: Daemon | None = None
        self.cache: Daemon | None = None
        self.store_address = "127.0.0.1:0"
        self.cache_size = "48MiB"
        self.cache_flags: list[str] = ["--zone-size", "1MiB", "--cut-age-s-max", "0.3"]
        self.store_flags: list[str] = []
        self.key: bytes | None = None

    # --- daemons ----------------------------------------------------------------------------------------------

    def start_store(self) -> None:
        flags = ["--data", str(self.store_data), "--listen", self.store_address, *self.store_flags]
        self.store = Daemon("store", ["store", "serve", *flags], self.folder / "store.log", self.template)
        self.store_address = self.store.wait_for(r"listening on (127\.0\.0\.1:\d+)")[1]

    def start_cache(self, *flags: str, wait: bool = True) -> None:
        """Start the cache; `wait` until it serves."""
        arguments = ["--device", str(self.device), "--size", self.cache_size, "--store", self.store_address]
        arguments += ["--run-dir", str(self.run_dir), *self.cache_flags, *flags]
        self.cache = Daemon("cache", ["cache", "serve", *arguments], self.folder / "cache.log", self.template)
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
            if daemon is not None:
                daemon.kill()

    # --- commands ---------------------------------------------------------------------------------------------

    def ask(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run a command, whatever comes of it."""
        environment = {
            **os.environ,
            "FOREBAY_STORE": self.store_address,
            "FOREBAY_RUN_DIR": str(self.run_dir),
        }
        return subprocess.run(
            [*FOREBAY, *arguments], capture_output=True, text=True, env=environment, timeout=timeout_s, check=False
        )

    def run(self, *arguments: str, code: int = 0, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command; return its output, or what it said on stderr if it shall fail with `code`."""
        done = self.ask(*arguments, timeout_s=timeout_s)
        assert done.returncode == code, f"forebay {arguments}: {done.returncode}, {done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    # --- the same without the cost of a command's start -------------------------------------------------------

    def create(self, name: str, size: int = 16 * MIB) -> None:
        self.ask_store(CreateVolume(name, size), Volume)

    def attach(self, name: str, *, read_only: bool = False, take_over: bool = False) -> str:
        return self.ask_cache(Attach(name, read_only, take_over), Attached).uri

    def detach(self, name: str, *, leave_dirty: bool = False) -> None:
        self.ask_cache(Detach(name, leave_dirty), Done)

    def drain(self, name: str) -> None:
        self.ask_cache(Drain(name), Done)

    def status(self) -> CacheStatus:
        return self.ask_cache(GetCacheStatus(), CacheStatus)

    def ask_store(self, message: AnyMessage, expect: type[T]) -> T:
        return asyncio.run(_ask(parse_address(self.store_address), message, expect, self.key))

    def ask_cache(self, message: AnyMessage, expect: type[T]) -> T:
        return asyncio.run(_ask(UnixPath(str(self.run_dir / "control.sock")), message, expect, None))

    def wait_status(self, condition: Callable[[CacheStatus], bool]) -> CacheStatus:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    def wait_idle(self) -> None:
        """Wait until the cache writes nothing any more."""
        seen: list[int] = []
        deadline = time.monotonic() + READY_TIMEOUT_S
        while len(seen) < 6 or len(set(seen[-6:])) > 1:
            assert time.monotonic() < deadline, seen
            seen.append(self.status().log_bytes)
            time.sleep(0.06)

    def store_id(self, folder: Path) -> bytes:
        """Return the UUID of the store in a folder."""
        found = re.search('store = "([0-9a-f-]+)"', (folder / "store.toml").read_text())
        assert found is not None
        return bytes.fromhex(found[1].replace("-", ""))

    # --- bytes ------------------------------------------------------------------------------------------------

    def exported(self, name: str) -> bytes:
        """Return what the store has of a volume."""
        target = self.folder / "exported"
        while (done := self.ask("volume", "export", name, str(target), "--force")).returncode:
            # A cache that is still attached may commit in the middle; what was read then is refused, as it should be.
            assert "was changed while it was exported" in done.stderr, done.stderr
        content = target.read_bytes()
        target.unlink()
        return content

    def nbd(self, name: str) -> NbdClient:
        return NbdClient(self.run_dir / "nbd.sock", name)


async def _ask(where: Address | UnixPath, message: AnyMessage, expect: type[T], key: bytes | None) -> T:
    client = await WireClient.connect(where, key=key, node=b"T" * 16, timeout_s=READY_TIMEOUT_S)
    try:
        return (await client.ask(message, expect, timeout_s=COMMAND_TIMEOUT_S))[0]
    finally:
        await client.close()

"""The servers under test: our daemons and the peers, each a child process on files of the bench folder.

Each has a name, a URI, the file whose pages count, and a process whose CPU is read. End them with `stop`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

from fio import BenchError
from forebay_tools.demo_daemon import DemoDaemon
from results import OURS
from service_manager import ServiceManager

Found = TypeVar("Found")

FOREBAY = (sys.executable, "-m", "forebay_tools.main")
START_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 300.0
READ_SIZE = 1 << 20
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Server(Protocol):
    """What the rounds need of a server."""

    name: str
    uri: str
    file: Path

    @property
    def pid(self) -> int:
        """Process that serves."""

    def settle(self) -> None:
        """Leave nothing behind that would go on in the background."""


class Peer:
    """An NBD server of somebody else on a raw file."""

    def __init__(self, name: str, file: Path, folder: Path) -> None:
        socket = folder / f"{name}.sock"
        self.name = name
        self.file = file
        self.uri = f"nbd+unix:///?socket={socket}"
        with (folder / f"{name}.log").open("w") as log:
            self._child = subprocess.Popen(
                _peer_words(name, file, socket), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not socket.exists():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise BenchError(f"{name} did not start: {(folder / f'{name}.log').read_text()}")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        """Process that serves."""
        return self._child.pid

    def settle(self) -> None:
        """Write back what the page cache holds."""
        sync_file(self.file)

    def stop(self) -> None:
        """End it."""
        self._child.terminate()
        try:
            self._child.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class Store:
    """`forebay store serve` on a folder. `prefix` are words to start it with, to have it in a place of its own."""

    def __init__(self, folder: Path, *more: str, prefix: tuple[str, ...] = (), listen: str = "127.0.0.1:0") -> None:
        words = ["store", "serve", "--data", str(folder), "--listen", listen, "--log-level", "warning", *more]
        self._daemon = DemoDaemon(
            [*prefix, *_daemon_words("store", words)], Path(f"{folder}.log"), "store listening on "
        )
        self.address = self._daemon.ready
        self.log = Path(f"{folder}.log")

    @property
    def pid(self) -> int:
        """Process that serves."""
        return self._daemon.number

    def stop(self) -> None:
        """End it."""
        self._daemon.stop()

    def command(self, *words: str) -> str:
        """Run a `forebay` command that asks the store; return what it printed."""
        return command(*words, store=self.address)


class Cache:
    """`forebay cache serve` on a file, as a service of a manager if there is one; `uri` is the last volume's."""

    def __init__(
        self,
        file: Path,
        folder: Path,
        *,
        store: str,
        size: str | None = None,
        more: tuple[str, ...] = (),
        manager: ServiceManager | None = None,
    ) -> None:
        self.name = OURS
        self.file = file
        self.uri = ""
        self.volume = ""
        self.run_dir = folder / "run"
        words = ["cache", "serve", "--device", str(file), "--store", store, "--run-dir", str(self.run_dir)]
        words += ["--log-level", "warning", *(() if size is None else ("--size", size)), *more]
        self.log = folder / "cache.log"
        self._words = _daemon_words("cache", words)
        self._manager = manager
        self._daemon = self._start()

    @property
    def pid(self) -> int:
        """Process that serves."""
        return self._daemon.number

    def serve(self, volume: str) -> None:
        """Use a volume that is attached already."""
        self.volume = volume
        self.uri = f"nbd+unix:///{volume}?socket={self.run_dir / 'nbd.sock'}"

    @property
    def ready(self) -> str:
        """What it said when it was ready."""
        return self._daemon.ready

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.run_dir / "nbd.sock"

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._daemon.kill()

    def wait(self) -> int:
        """Wait until it ends by itself; return its exit code."""
        return self._daemon.wait()

    def restart(self, meanwhile: Callable[[], Found]) -> Found:
        """Start it again after `kill`; `meanwhile` runs while it starts."""
        with ThreadPoolExecutor(1) as beside:
            found = beside.submit(meanwhile)
            self._daemon = self._start()
            return found.result()

    def _start(self) -> DemoDaemon:
        words, descriptors = self._manager.begin(self._words) if self._manager is not None else (self._words, [])
        return DemoDaemon(words, self.log, "READY", descriptors)

    def attach(self, volume: str) -> None:
        """Attach a volume and use it."""
        self.command("attach", volume)
        self.serve(volume)

    def settle(self) -> None:
        """Destage everything, and write back what the page cache holds."""
        self.command("drain", self.volume)
        sync_file(self.file)

    def status(self) -> dict[str, int]:
        """Return what `forebay status --json` says of the daemon."""
        found: dict[str, int] = json.loads(self.command("status", "--json"))["cache"]
        return found

    def command(self, *words: str) -> str:
        """Run a `forebay` command that asks the daemon; return what it printed."""
        return command(*words, run_dir=str(self.run_dir))

    def stop(self) -> None:
        """End it."""
        self._daemon.stop()


def start_both(stack: ExitStack, folder: Path, size: str) -> tuple[Store, Cache]:
    """Start a store and a cache of this size on it; the stack ends them."""
    store = Store(folder / "store")
    stack.callback(store.stop)
    cache = Cache(folder / "cache", folder, store=store.address, size=size)
    stack.callback(cache.stop)
    return store, cache


def command(*words: str, store: str | None = None, run_dir: str | None = None) -> str:
    """Run a `forebay` command; return what it printed.

    Raises:
        BenchError: it failed.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    environment |= {} if store is None else {"FOREBAY_STORE": store}
    environment |= {} if run_dir is None else {"FOREBAY_RUN_DIR": run_dir}
    done = subprocess.run(
        [*FOREBAY, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"forebay {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that all threads of a process have used, those that ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise BenchError("this kernel tells no RssAnon")


def sync_file(path: Path) -> None:
    """Write a file's pages back and wait for it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def warm_file(path: Path) -> None:
    """Bring a file's pages into memory."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ_SIZE)
        while file.readinto(buffer):
            pass


def drop_file(path: Path) -> None:
    """Drop a file's pages from memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _daemon_words(kind: str, words: list[str]) -> list[str]:
    """Return how a daemon is started; BENCH_PROFILE=FOLDER puts it under cProfile, which makes it slower."""
    folder = os.environ.get("BENCH_PROFILE")
    if folder is None:
        return [*FOREBAY, *words]
    profile = Path(folder).absolute() / f"{kind}-{time.monotonic_ns()}.pstats"
    return [sys.executable, "-m", "cProfile", "-o", str(profile), *FOREBAY[1:], *words]


def _peer_words(name: str, file: Path, socket: Path) -> list[str]:
    if name == "nbdkit":
        return ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(socket), "file", str(file)]
    assert name == "qemu-nbd"
    return ["qemu-nbd", "--format=raw", "--cache=writeback", "--persistent", f"--socket={socket}", str(file)]

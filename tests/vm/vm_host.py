"""The daemons of this host that guests use: a store, and caches on it; killed and started again by their process id."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from service_manager import ServiceManager

MAIN: Final = (sys.executable, "-m", "forebay_tools.main")
STORE_READY: Final = "store listening on "
CACHE_READY: Final = "READY"
COMMAND_TIMEOUT_S: Final = 120


class _Daemon:
    """One process of ours that tells when it is ready."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._child: subprocess.Popen[str] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._child is not None:
            assert self._child.stdout is not None
            self._child.stdout.close()
            self._child.kill()
            self._child.wait()
            self._child = None

    @property
    def said(self) -> str:
        """What it logged."""
        return self._log.read_text(errors="replace")

    def _start(self, words: list[str], ready: str, descriptors: Sequence[int] = ()) -> str:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=descriptors)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line.startswith(ready), self.said
        return line.removeprefix(ready).strip()


class HostStore(_Daemon):
    """A store process with a data folder that is empty at first."""

    def __init__(self, data: Path) -> None:
        super().__init__(data.with_suffix(".log"))
        self.data = data
        self.address = "127.0.0.1:0"

    def __enter__(self) -> "HostStore":
        self.start()
        return self

    def start(self) -> None:
        """Start it, where it listened before."""
        words = [*MAIN, "store", "serve", "--data", str(self.data), "--listen", self.address]
        self.address = self._start(words, STORE_READY)

    @property
    def from_guest(self) -> str:
        """Where a guest finds it: its network maps 10.0.2.2 to our loopback."""
        return f"10.0.2.2:{self.address.rpartition(':')[2]}"

    @property
    def size(self) -> int:
        """Bytes that its segments take."""
        return sum(path.stat().st_size for path in (self.data / "segments").rglob("*") if path.is_file())

    def forebay(self, *words: str) -> str:
        """Run a command about this store; return what it printed."""
        return _command(words, {"FOREBAY_STORE": self.address})

    def data_size(self, volume: str) -> int:
        """Return the bytes that a volume holds in the store."""
        found: int = json.loads(self.forebay("volume", "info", volume, "--json"))["data_size"]
        return found


class HostCache(_Daemon):
    """A cache process in a folder of its own, whose socket is kept while it is away, as systemd does."""

    def __init__(self, folder: Path, store: HostStore, size: str = "512MiB", flags: tuple[str, ...] = ()) -> None:
        folder.mkdir()
        super().__init__(folder / "cache.log")
        self.run_dir = folder / "run"
        self._manager = ServiceManager(folder)
        self._store = store
        self._words = ["cache", "serve", "--device", str(folder / "cache"), "--size", size]
        self._words += ["--run-dir", str(self.run_dir), "--store", store.address, "--cut-age-s-max", "1", *flags]

    def __enter__(self) -> "HostCache":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._manager.close()

    def start(self) -> None:
        """Start it on what it left."""
        words, descriptors = self._manager.begin([*MAIN, *self._words])
        self._start(words, CACHE_READY, descriptors)

    @property
    def socket(self) -> Path:
        """Where NBD clients connect."""
        return self.run_dir / "nbd.sock"

    def uri(self, export: str) -> str:
        """Return what NBD clients call an export."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def forebay(self, *words: str) -> str:
        """Run a command about this cache or its store; return what it printed."""
        return _command(words, {"FOREBAY_STORE": self._store.address, "FOREBAY_RUN_DIR": str(self.run_dir)})

    def attach_device(self, volume: str, front: str) -> Path:
        """Attach a volume as a block device, and return its path."""
        return Path(json.loads(self.forebay("attach", volume, "--front", front))["path"])

    def fetched_blocks(self) -> int:
        """Return how many blocks it read from the store since its start."""
        found: int = json.loads(self.forebay("status", "--json"))["cache"]["policy"]["fetched_blocks"]
        return found


def _command(words: tuple[str, ...], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [*MAIN, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_TIMEOUT_S,
    )
    assert done.returncode == 0, f"forebay {' '.join(words)}: {done.stderr}"
    return done.stdout

"""A qemu between a client and the daemon, with the options of a guest's disk: its NBD client without a guest."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fio import BenchError
from servers import START_TIMEOUT_S

RECONNECT_DELAY_S = 60
_LOOK_S = 0.01


@contextmanager
def through_qemu(folder: Path, socket: Path, volume: str) -> Iterator[Path]:
    """Yield the socket on which qemu serves a volume under its name; `folder` is where that is made.

    Raises:
        BenchError: qemu does not start.
    """
    own = folder / "qemu.sock"
    upstream = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={volume}"
    words = ["qemu-storage-daemon", "--blockdev", f"{upstream},reconnect-delay={RECONNECT_DELAY_S}"]
    words += ["--nbd-server", f"addr.type=unix,addr.path={own},max-connections=0"]
    words += ["--export", f"type=nbd,id=export,node-name=disk,name={volume},writable=on"]
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not own.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise BenchError("qemu-storage-daemon does not start")
            time.sleep(_LOOK_S)
        yield own
    finally:
        child.kill()
        child.wait(START_TIMEOUT_S)

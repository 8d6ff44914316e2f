"""The FUSE front: a process of its own that holds the mount, so that the daemon's death is a wait for whoever uses it.

    python -m forebay_cache.service.fuse_front RUN_DIR

It is the daemon that starts it and tells it what to serve (`fuse_calls`); it ends when nothing is served any more.

Invariants:
    One front per run directory, by a lock. One thread; nothing waits but the poll.
    A connection that ends is made again until its file is closed (`fuse_lines`).
Crash: the mount is dead; the daemon sees its end, takes the mount away and starts another one.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from forebay_cache.engine.fuse_folder import FuseFolder, VolumeFile
from forebay_cache.engine.fuse_requests import FuseRequests
from forebay_cache.engine.nbd_client import NbdClient
from forebay_cache.format import fuse
from forebay_cache.service import fuse_mount
from forebay_cache.service.fuse_calls import LOCK, READY, SOCKET, VOLUMES, CallServer
from forebay_cache.service.fuse_lines import RECONNECT_S, Line, Poll, Slots
from forebay_cache.service.memory_guard import guard_allocations, guard_memory
from forebay_cache.service.run_folder import NBD_SOCKET
from forebay_core.errors import ForebayError
from forebay_core.starting import tell_parent
from forebay_core.units import Buffer

LOCK_WAIT_S: Final = 5.0
REQUESTS_PER_TURN: Final = 32
_GONE: Final = (errno.ENODEV, errno.ECONNABORTED)
"""The kernel's words for a mount that was taken away."""


class FuseFront:
    """The process."""

    def __init__(self, run_dir: Path, descriptor: int) -> None:
        self._nbd = str(run_dir / NBD_SOCKET)
        self._descriptor = descriptor
        self._poll = Poll()
        self._lines: dict[NbdClient, Line] = {}
        self.folder = FuseFolder(uid=os.geteuid(), gid=os.getegid())
        self.requests = FuseRequests(self.folder, self, self._reply)
        self._slots = Slots()
        self._head = bytearray(fuse.PAYLOAD_OFFSET)
        self._slot = self._slots.take()
        self._reading = True
        self.ended = False
        self._poll.watch(descriptor, self._take)
        self._calls = CallServer(str(run_dir / SOCKET), self.folder, self._poll.watch, self._poll.leave)

    def run(self) -> None:
        """Serve until the mount is gone, or nothing is to be served any more."""
        while not (self.ended or self.requests.ended or self._calls.ended or self.folder.deserted):
            self._poll.turn(self._timeout_s())
            self._flush()
            self._connect()
            self._pause()
        self._calls.close()

    # --- Connections ------------------------------------------------------------------------------------------

    def open(self, file: VolumeFile, *, statuses: bool) -> NbdClient:
        """See Connections."""
        client = NbdClient(file.name, self.requests.answered, statuses=statuses)
        self._lines[client] = Line(client, self._nbd, self._poll, self._slots)
        self._lines[client].connect()
        return client

    def close(self, client: NbdClient) -> None:
        """See Connections."""
        self._lines.pop(client).close()

    # --- inside -----------------------------------------------------------------------------------------------

    def _take(self, _events: int) -> None:
        """Read requests of the kernel: each read is one."""
        requests = self.requests
        for _ in range(REQUESTS_PER_TURN):
            try:
                size = os.readv(self._descriptor, (self._head, self._slot.view))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    self.ended = True
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # taken back by who asked
                    continue
                raise
            if requests.take(self._head, self._slot, size):
                self._slot = self._slots.take()
                self._flush()  # the daemon works on it while the next one is read
            if requests.full:
                return

    def _flush(self) -> None:
        for line in self._lines.values():
            if line.client.outgoing:
                line.flush()

    def _reply(self, parts: Sequence[Buffer]) -> None:
        try:
            os.writev(self._descriptor, parts)
        except OSError as error:
            if error.errno in _GONE:
                self.ended = True
            elif error.errno != errno.ENOENT:  # the request was taken back
                raise

    def _connect(self) -> None:
        now_s = time.monotonic()
        for line in self._lines.values():
            line.renew()
            if not line.connected and line.retry_s <= now_s:
                line.connect()

    def _pause(self) -> None:
        """Use the slots that came back; read no more while too much is in flight."""
        for slot in self.requests.given_back:
            self._slots.give(slot)
        self.requests.given_back.clear()
        self._slot = self._slots.renewed(self._slot)
        if self.requests.full == self._reading:
            self._reading = not self._reading
            self._poll.change(self._descriptor, select.EPOLLIN if self._reading else 0)

    def _timeout_s(self) -> float:
        return -1 if all(line.connected for line in self._lines.values()) else RECONNECT_S


def main(run_dir: Path) -> int:
    """Mount, tell the parent that this worked or why it didn't, and serve; the exit code."""
    try:
        lock = _lock(run_dir)  # held as long as we live
        descriptor = fuse_mount.mount(run_dir / VOLUMES)
    except (ForebayError, OSError) as error:
        tell_parent(_reason(run_dir, error))
        return 1
    try:
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        guard_allocations()
        guard_memory()
        front = FuseFront(run_dir, descriptor)
        tell_parent(READY)
        front.run()
    except OSError as error:
        tell_parent(_reason(run_dir, error))
        raise
    finally:
        os.close(descriptor)
        with contextlib.suppress(ForebayError):
            fuse_mount.unmount(run_dir / VOLUMES)
        os.close(lock)
    return 0


def _lock(run_dir: Path) -> int:
    """Be the only front of a run directory, once one that is ending has ended.

    Raises:
        ForebayError: another one goes on.
        OSError: the directory can't be used.
    """
    lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                raise ForebayError(f"{run_dir}: another FUSE front serves it") from None
            time.sleep(RECONNECT_S)
        else:
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
            return lock


def _reason(run_dir: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{run_dir}: can't be used by the FUSE front ({error.strerror})"
    return str(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

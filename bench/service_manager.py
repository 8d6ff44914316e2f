"""Plays systemd for one daemon: keeps the sockets that it is given (FDSTORE) and hands them to the next start."""

import fcntl
import os
import socket
import sys
import threading
from pathlib import Path

_START = (
    "import os,sys;at=[int(word) for word in sys.argv[1].split(',') if word]\n"
    "for number,fd in enumerate(at,3): os.dup2(fd,number)\n"
    "os.environ.update({'LISTEN_PID':str(os.getpid()),'LISTEN_FDS':str(len(at))} if at else {})\n"
    "os.execv(sys.argv[2],sys.argv[2:])"
)
MESSAGE_SIZE_MAX = 4096
_REACHED, _END = b"reached", b"end"
_KEPT_FROM = 100  # descriptors above those that a start gives its own numbers


class ServiceManager:
    """What is kept between two starts."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "notify"
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(self._path))
        self.kept: list[socket.socket] = []
        self._reached = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def begin(self, words: list[str]) -> tuple[list[str], list[int]]:
        """Take what the last life left; return how the next one is started, and the descriptors to pass to it."""
        self._tell(_REACHED)
        self._reached.wait()
        self._reached.clear()
        numbers = [one.fileno() for one in self.kept]
        environment = ["env", f"NOTIFY_SOCKET={self._path}"]
        return [*environment, sys.executable, "-c", _START, ",".join(map(str, numbers)), *words], numbers

    def close(self) -> None:
        """Keep nothing any more."""
        self._tell(_END)
        self._thread.join()
        for one in (*self.kept, self._channel):
            one.close()

    def _tell(self, mark: bytes) -> None:
        """Send ourselves a mark: what a dead daemon said is before it in the queue."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(mark, str(self._path))

    def _take(self) -> None:
        """Take what is said, as it comes: the queue has room for ten."""
        while True:
            said, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_SIZE_MAX, 8)
            if said == _END:
                return
            if said == _REACHED:
                self._reached.set()
            if said.startswith(b"FDSTOREREMOVE=1"):  # of the one name that there is
                while self.kept:
                    self.kept.pop().close()
            for fd in descriptors:
                fresh = socket.socket(fileno=_raised(fd))
                same = [one for one in self.kept if os.fstat(one.fileno()).st_ino == os.fstat(fresh.fileno()).st_ino]
                if same or not said.startswith(b"FDSTORE=1"):
                    fresh.close()
                else:
                    self.kept.append(fresh)


def _raised(fd: int) -> int:
    """Return a copy of a descriptor above those that a start may need, in place of it."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _KEPT_FROM)
    os.close(fd)
    return high

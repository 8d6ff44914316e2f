"""Segments kept open for reading: a bounded cache of file descriptors, shared by threads.

Invariant: a descriptor is closed only when nobody reads through it; at most OPEN_FILES_MAX stay open unused.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay_store.limits import OPEN_FILES_MAX


@dataclass(slots=True)
class OpenFile:
    """One open segment."""

    fd: int
    users: int = 0
    dropped: bool = False


class OpenFiles:
    """Opens files by name; the least recently used is closed first."""

    def __init__(self, folder: Path, *, files_max: int = OPEN_FILES_MAX) -> None:
        self._folder = folder
        self._files_max = files_max
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[int]:
        """Lend a descriptor; raises OSError as `os.open` does."""
        file = self._acquire(name)
        try:
            yield file.fd
        finally:
            self._release(file)

    def forget(self, name: str) -> None:
        """Close a file, at once or when its last reader is done."""
        with self._lock:
            file = self._files.pop(name, None)
            if file is not None:
                self._drop(file)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            while self._files:
                self._drop(self._files.popitem()[1])

    def _acquire(self, name: str) -> OpenFile:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = OpenFile(os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC))
                self._files[name] = file
            self._files.move_to_end(name)
            file.users += 1
            while len(self._files) > self._files_max:
                self._drop(self._files.popitem(last=False)[1])
            return file

    def _release(self, file: OpenFile) -> None:
        with self._lock:
            file.users -= 1
            if file.dropped and file.users == 0:
                os.close(file.fd)

    def _drop(self, file: OpenFile) -> None:
        file.dropped = True
        if file.users == 0:
            os.close(file.fd)

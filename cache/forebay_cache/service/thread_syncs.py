"""fdatasync by a thread, where there is no io_uring.

Invariant: every sync is completed once, on the loop's thread, never inside the call.
"""

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from forebay_cache.service.completions import Completions


class ThreadSyncs:
    """Implements the device's `Syncs`."""

    def __init__(self, fd: int, completions: Completions) -> None:
        self._fd = fd
        self._completions = completions
        self._queue: SimpleQueue[Callable[[OSError | None], None] | None] = SimpleQueue()
        # A daemon thread: a second signal ends the program while a disk hangs.
        self._thread = threading.Thread(target=self._run, name="device-sync", daemon=True)
        self._thread.start()

    def sync(self, done: Callable[[OSError | None], None]) -> None:
        """Begin one; `done` is told of its error."""
        self._queue.put(done)

    def close(self) -> None:
        """Finish what was given; the completion is posted then."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (done := self._queue.get()) is not None:
            self._completions.post(partial(done, fdatasync(self._fd)))


def fdatasync(fd: int) -> OSError | None:
    """Sync here and now; return what went wrong."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        return error
    return None

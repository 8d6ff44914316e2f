"""What keeps the daemon alive when memory runs short on a host whose block devices it serves.

Memory that only our own writes can free must not be waited for: allocations of the daemon start no I/O, what it has in
memory stays there, and the kernel ends other processes first. What is not permitted is left out, and told once.
"""

import ctypes
import logging
import os
import resource
from pathlib import Path
from typing import Final

_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT_FUTURE_ONFAULT: Final = 1 | 2 | 4
_CAP_IPC_LOCK: Final = 14
_OOM_SCORE: Final = "-900"
_LOG = logging.getLogger(__name__)


def guard_allocations() -> None:
    """Let this thread, and those that it starts, never begin I/O to get memory. Needs CAP_SYS_RESOURCE."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        _LOG.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))


def guard_memory() -> None:
    """Keep what is in memory there, and the process from the OOM killer."""
    refused = [*_lock(), *_protect()]
    if refused:
        _LOG.warning("block devices are served without protection from a lack of memory: %s", "; ".join(refused))


def _lock() -> list[str]:
    # With a limit, the first allocation beyond it would end us: then rather not at all.
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    if not (unlimited or _has_capability(_CAP_IPC_LOCK)):
        return ["memory is not locked (CAP_IPC_LOCK or LimitMEMLOCK=infinity)"]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT_FUTURE_ONFAULT):
        return [f"memory is not locked ({os.strerror(ctypes.get_errno())})"]
    return []


def _protect() -> list[str]:
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text()) > int(_OOM_SCORE):
            path.write_text(_OOM_SCORE)
    except OSError as error:
        return [f"the OOM killer may end it ({error.strerror})"]
    return []


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    return any(int(line.split()[1], 16) >> number & 1 for line in status.splitlines() if line.startswith("CapEff:"))

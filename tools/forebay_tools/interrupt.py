"""Runs a coroutine so that SIGINT and SIGTERM cancel it: its clean-up runs, then the command ends as interrupted."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns.

    Raises:
        KeyboardInterrupt: a signal cancelled it, and it has cleaned up.
    """
    try:
        return asyncio.run(_run(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _run(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work

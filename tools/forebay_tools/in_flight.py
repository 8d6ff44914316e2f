"""A bounded number of tasks of one transfer.

Invariant: a failure of any task is raised to the one who starts or waits next; none is lost, none is reported twice.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


class InFlight:
    """At most `count_max` tasks at once. For one coroutine, which closes it at the end."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start a task as soon as there is room. Raises what failed of those before; then `work` is not started."""
        try:
            while len(self._tasks) >= self._count_max:
                await self._wait(asyncio.FIRST_COMPLETED)
        except BaseException:
            work.close()
            raise
        self._tasks.add(asyncio.create_task(work))

    async def finish(self) -> None:
        """Wait for all. Raises what failed first."""
        while self._tasks:
            await self._wait(asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Give up what is still in flight and wait for its end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _wait(self, until: str) -> None:
        done, self._tasks = await asyncio.wait(self._tasks, return_when=until)
        errors = [error for task in done if (error := task.exception()) is not None]
        if errors:
            raise errors[0]

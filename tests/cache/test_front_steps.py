"""Steps of a front that nobody waits for: how they end is told."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from forebay_cache.service.device_fronts import Steps
from forebay_core.errors import ForebayError


def unexpected(step: Callable[[], Coroutine[object, object, None]]) -> list[str]:
    """Take a step that fails; return what only the last resort, which ends the daemon, heard of."""
    heard: list[str] = []

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: heard.append(context["message"]))
        Steps().start(step(), "the device did not grow")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(body())
    return heard


@pytest.mark.parametrize("error", [ForebayError("no front"), OSError("no front"), TimeoutError("no front")])
def test_a_step_that_fails_is_one_line_of_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def step() -> None:
        raise error

    assert unexpected(step) == []
    assert [record.getMessage() for record in caplog.records] == ["the device did not grow: no front"]


def test_a_bug_in_a_step_is_no_line_that_somebody_may_miss(caplog: pytest.LogCaptureFixture) -> None:
    async def step() -> None:
        raise AssertionError

    assert unexpected(step) == ["the device did not grow"]
    assert caplog.records == []

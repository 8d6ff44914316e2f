"""An alarm that is set again and again: the call comes at the time that was set last, and costs few timers."""

from collections.abc import Callable

import pytest

from forebay_cache.service.alarm import Alarm

MS = 1_000_000


class Handle:
    """A call with the loop."""

    def __init__(self, due_ns: int, call: Callable[[], None]) -> None:
        self.due_ns, self.call, self.cancelled = due_ns, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Rig:
    """A loop whose time the test sets, an alarm, and when it acted."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.handles: list[Handle] = []
        self.made = 0
        self.acted: list[int] = []
        self.alarm = Alarm(self, self.acted.append, lambda: self.now_ns)  # type: ignore[arg-type]

    def call_soon(self, call: Callable[[], None]) -> Handle:
        return self.call_later(0, call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Handle:
        self.made += 1
        self.handles.append(Handle(self.now_ns + round(delay_s * 1e9), call))
        return self.handles[-1]

    def pass_to(self, now_ns: int) -> None:
        """Let time pass, with all calls that come due."""
        self.now_ns = now_ns
        while due := [one for one in self.handles if one.due_ns <= now_ns]:
            self.handles.remove(due[0])
            if not due[0].cancelled:
                due[0].call()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_it_acts_once_at_its_time(rig: Rig) -> None:
    rig.alarm.set(5 * MS)
    rig.pass_to(5 * MS - 1)
    assert rig.acted == []
    rig.pass_to(5 * MS)
    rig.pass_to(50 * MS)
    assert rig.acted == [5 * MS]
    assert not rig.handles


def test_what_is_due_comes_soon_and_never_inside_of_the_call(rig: Rig) -> None:
    rig.now_ns = 3 * MS
    for due_ns in (0, 2 * MS, 3 * MS):
        rig.alarm.set(due_ns)
    assert rig.acted == []
    rig.pass_to(3 * MS)
    assert rig.acted == [3 * MS]
    assert rig.made == 1


def test_a_later_time_replaces_an_earlier_one_and_keeps_its_timer(rig: Rig) -> None:
    for due_ns in range(5 * MS, 10 * MS, MS):
        rig.alarm.set(due_ns)
    assert rig.made == 1
    rig.pass_to(9 * MS - 1)
    assert rig.acted == []
    rig.pass_to(9 * MS)
    assert rig.acted == [9 * MS]
    assert rig.made == 2


def test_an_earlier_time_replaces_a_later_one(rig: Rig) -> None:
    rig.alarm.set(9 * MS)
    rig.alarm.set(5 * MS)
    rig.pass_to(5 * MS)
    rig.pass_to(20 * MS)
    assert rig.acted == [5 * MS]
    assert not rig.handles


def test_now_replaces_a_later_time_and_a_later_time_replaces_now(rig: Rig) -> None:
    rig.alarm.set(9 * MS)
    rig.alarm.set(0)
    rig.pass_to(1 * MS)
    assert rig.acted == [1 * MS]
    rig.alarm.set(0)
    rig.alarm.set(7 * MS)
    rig.pass_to(7 * MS - 1)
    assert len(rig.acted) == 1
    rig.pass_to(7 * MS)
    assert rig.acted == [1 * MS, 7 * MS]
    rig.pass_to(20 * MS)
    assert len(rig.acted) == 2


def test_who_acts_may_set_the_next_time(rig: Rig) -> None:
    def act(now_ns: int) -> None:
        rig.acted.append(now_ns)
        rig.alarm.set(now_ns + MS)

    rig.alarm = Alarm(rig, act, lambda: rig.now_ns)  # type: ignore[arg-type]
    rig.alarm.set(0)
    for now_ns in range(0, 4 * MS, MS):
        rig.pass_to(now_ns)
    assert rig.acted == [0, MS, 2 * MS, 3 * MS]


def test_nothing_is_called_once_it_is_cancelled(rig: Rig) -> None:
    rig.alarm.set(5 * MS)
    rig.alarm.set(0)
    rig.alarm.cancel()
    rig.pass_to(50 * MS)
    assert rig.acted == []

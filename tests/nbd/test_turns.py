"""Turns of the event loop's thread: what is done within one, in which order, and what waits for the next."""

from collections import deque
from collections.abc import Callable

import pytest
from ram_volume import RamVolume

from forebay_cache.service import turns as turns_module
from forebay_cache.service.turns import Turns


class Loop:
    """What Turns uses of an event loop; the test makes its turns."""

    def __init__(self) -> None:
        self.soon: deque[Callable[[], None]] = deque()

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)


class Rig:
    """Turns, and what was called so far."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.turns = Turns(self.loop)  # type: ignore[arg-type]
        self.volume = RamVolume("v", 1 << 20)
        self.called: list[str] = []

    def note(self, name: str, *then: Callable[[], None]) -> Callable[[], None]:
        """Return a call that notes its name and does the rest."""

        def call() -> None:
            self.called.append(name)
            for act in then:
                act()

        return call

    def rest(self) -> None:
        """The turn that the loop was asked for; there is one."""
        assert len(self.loop.soon) == 1
        self.loop.soon.popleft()()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_what_a_turn_sets_going_is_finished_in_it(rig: Rig) -> None:
    turns = rig.turns
    answered = rig.note("answered", lambda: turns.soon(rig.note("sent")))
    turns.take(lambda: turns.post(rig.note("written", lambda: turns.post(answered))))
    assert rig.called == ["written", "answered", "sent"]
    assert not rig.loop.soon


def test_nothing_is_called_inside_of_the_call_that_asks(rig: Rig) -> None:
    def begin() -> None:
        before = len(rig.called)
        for ask in (rig.turns.post, rig.turns.soon, rig.turns.later):
            ask(rig.note("called"))
        assert len(rig.called) == before

    begin()
    rig.rest()
    assert len(rig.called) == 3
    rig.turns.take(begin)
    assert len(rig.called) == 5


def test_completions_are_told_in_order_and_before_others(rig: Rig) -> None:
    rig.turns.soon(rig.note("sent"))
    rig.turns.post(rig.note("first"))
    rig.turns.post(rig.note("second"))
    rig.rest()
    assert rig.called == ["first", "second", "sent"]


def test_a_volume_is_kicked_once_behind_each_round_that_brought_requests(rig: Rig) -> None:
    turns, volume = rig.turns, rig.volume

    def give() -> None:
        before = volume.kicks
        for _ in range(3):
            turns.kick(volume)
        assert volume.kicks == before

    turns.take(rig.note("first", give, lambda: turns.soon(rig.note("second", give))))
    assert rig.called == ["first", "second"]
    assert volume.kicks == 2


def test_a_volume_is_kicked_at_once_outside_of_a_turn(rig: Rig) -> None:
    rig.turns.kick(rig.volume)
    assert rig.volume.kicks == 1


def test_what_a_long_turn_left_is_done_in_further_ones_in_order(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "TURN_NS", -1)  # each turn is over at once
    rig.turns.take(lambda: [rig.turns.soon(rig.note(name)) for name in "abc"] and None)
    assert not rig.called
    took = 0
    while rig.loop.soon:
        rig.rest()
        took += 1
    assert rig.called == ["a", "b", "c"]
    assert took == 3


def test_a_turn_for_the_rest_makes_a_call_of_each_kind_however_long_it_takes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "TURN_NS", -1)
    for name in ("written", "written too"):
        rig.turns.post(rig.note(name))
    rig.turns.soon(rig.note("sent"))
    rig.rest()
    assert rig.called == ["written", "sent"]


def test_who_gives_way_waits_for_the_next_turn_and_has_one_in_it(rig: Rig) -> None:
    def more() -> None:
        rig.called.append("more")
        rig.turns.later(more)

    rig.turns.take(more)
    assert rig.called == ["more"]
    for _ in range(5):
        rig.rest()
    assert len(rig.called) == 6
    rig.turns.take(rig.note("others"))
    assert rig.called[6:] == ["others", "more"]


def test_a_call_that_fails_takes_nothing_else_along(rig: Rig) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    rig.turns.soon(fail)
    rig.turns.soon(rig.note("sent"))
    with pytest.raises(ZeroDivisionError):
        rig.turns.take(lambda: rig.turns.kick(rig.volume))
    rig.rest()
    assert rig.called == ["sent"]
    assert rig.volume.kicks == 1

"""Turns of the event loop's thread: what is done within one, in which order, and what waits for the next."""

import os
from collections import deque
from collections.abc import Callable

import pytest
from ram_volume import RamVolume

from forebay_cache.service import turns as turns_module
from forebay_cache.service.turns import Turns, clear_event


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


class Ready:
    """Descriptors that become readable, a round after the other."""

    def __init__(self, *rounds: list[int]) -> None:
        self.rounds = list(rounds)
        self.until_ns: list[int] = []

    def __call__(self, until_ns: int) -> list[tuple[int, int]]:
        self.until_ns.append(until_ns)
        return [(fd, 1) for fd in self.rounds.pop(0)] if self.rounds else []


class Readers(Loop):
    """A loop that is told of descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        self.readers[fd] = call

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]


def rig_with(ready: Ready, *fds: int) -> tuple[Rig, Readers]:
    """Return a rig whose turns have a reader that kicks, named by its number, for each descriptor."""
    rig, loop = Rig(), Readers()
    rig.turns = Turns(loop, ready)  # type: ignore[arg-type]
    for fd in fds:
        rig.turns.add_reader(fd, rig.note(str(fd), lambda: rig.turns.kick(rig.volume)))
    return rig, loop


def test_a_turn_goes_on_with_what_becomes_readable_a_kick_for_each_round() -> None:
    ready = Ready([5], [6, 5])
    rig, loop = rig_with(ready, 5, 6)
    loop.readers[6]()
    assert rig.called == ["6", "5", "6", "5"]
    assert rig.volume.kicks == 3
    assert len(ready.until_ns) == 3 and len(set(ready.until_ns)) == 1, "one bound for all of the turn"
    assert not loop.soon


def test_a_turn_ends_where_a_descriptor_of_others_is_readable() -> None:
    rig, loop = rig_with(Ready([5], [5, 9], [5]), 5)
    loop.readers[5]()
    assert rig.called == ["5", "5"], "5 is left to the loop, which finds it again beside 9"
    assert not loop.soon


def test_who_was_removed_by_the_one_before_is_not_told() -> None:
    rig, loop = rig_with(Ready([5, 6]), 6)
    rig.turns.add_reader(5, rig.note("5", lambda: rig.turns.remove_reader(6)))
    rig.turns.take(rig.note("begun"))
    assert rig.called == ["begun", "5"]
    assert list(loop.readers) == [5]


def test_a_turn_whose_time_is_over_looks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "TURN_NS", -1)
    ready = Ready([5])
    rig, loop = rig_with(ready, 5)
    loop.readers[5]()
    assert rig.called == ["5"]
    assert not ready.until_ns


def test_who_gave_way_comes_before_what_becomes_readable() -> None:
    ready = Ready([5])
    rig, loop = rig_with(ready, 5)
    rig.turns.take(lambda: rig.turns.later(rig.note("later")))
    assert not rig.called and not ready.until_ns
    loop.soon.popleft()()
    assert rig.called == ["later", "5"]


def test_an_eventfd_that_tells_of_nothing_is_cleared_as_one_that_does() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        for count in (0, 3):
            os.eventfd_write(fd, count)
            clear_event(fd)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)
    finally:
        os.close(fd)

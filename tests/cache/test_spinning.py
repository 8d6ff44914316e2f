"""When the selector waits awake, by a clock that moves with each look."""

import asyncio
import os
import selectors

from forebay_cache.service.spinning import SPIN_NS, SYNC_SPIN_NS, Events, SpinningSelector

EVENT: Events = [(selectors.SelectorKey(0, 0, 1, None), 1)]
LOOK_NS = 1000


class Scripted(SpinningSelector):
    """Events come at given times; each look takes LOOK_NS, one that may sleep as long as it must."""

    def __init__(self, *events_at_ns: int) -> None:
        self.now_ns = 0
        self.events_at_ns = list(events_at_ns)
        self.slept = 0
        self.gave_way = 0
        super().__init__(lambda: self.now_ns)

    def look(self, timeout: float | None) -> Events:
        self.now_ns += LOOK_NS
        if timeout != 0:
            self.slept += 1
            end_ns = self.events_at_ns[0] if timeout is None else self.now_ns + int(timeout * 1e9)
            self.now_ns = max(self.now_ns, min(end_ns, *self.events_at_ns[:1] or [end_ns]))
        if self.events_at_ns and self.events_at_ns[0] <= self.now_ns:
            self.events_at_ns.pop(0)
            return EVENT
        return []

    def peek(self) -> list[tuple[int, int]]:
        self.now_ns += LOOK_NS
        return [(0, 1)] if self.events_at_ns and self.events_at_ns[0] <= self.now_ns else []

    def readied(self) -> list[int]:
        """What is ready within a turn, which then takes it."""
        ready = self.ready(1_000_000)
        if ready:
            self.events_at_ns.pop(0)
        return [fd for fd, _ in ready]

    def give_way(self) -> None:
        self.gave_way += 1

    def wait(self, *, syncing: bool) -> None:
        self.syncing = lambda: syncing
        assert self.select() == EVENT


def test_it_sleeps_until_events_follow_one_another_closely_then_waits_awake() -> None:
    selector = Scripted(1_000_000, 1_020_000, 1_040_000, 1_060_000)
    for _ in range(4):
        assert selector.select() == EVENT
    assert selector.slept == 2, "the first wait was long, the second could not know that it would be short"


def test_it_does_not_wait_awake_for_long_nor_twice_in_vain() -> None:
    selector = Scripted(10_000, 30_000, 30_000_000, 60_000_000)
    looks_ns = []
    for _ in range(4):
        assert selector.select() == EVENT
        looks_ns.append(selector.now_ns)
    assert selector.slept == 3  # only the second event was met awake
    assert selector.now_ns - 60_000_000 < SPIN_NS


def test_what_a_sync_takes_does_not_send_it_to_sleep_before_the_next_request() -> None:
    assert SPIN_NS < 150_000 < SYNC_SPIN_NS
    gaps_ns = [40_000, 150_000] * 5
    selector = Scripted(*(1_000_000 + sum(gaps_ns[:count]) for count in range(1, len(gaps_ns) + 1)))
    selector.now_ns = 1_000_000
    for _ in range(5):
        selector.wait(syncing=False)
        selector.wait(syncing=True)
    assert selector.slept == 2, "the first wait of each kind; of the others it knew that they would be short"


def test_it_gives_way_to_others_before_each_look_awake() -> None:
    selector = Scripted(10_000, 20_000, 30_000, 40_000)
    for syncing in (False, True):
        gave_way = selector.gave_way
        selector.wait(syncing=syncing)
        assert selector.gave_way == gave_way, "asleep it is out of the way"
        selector.wait(syncing=syncing)
        assert selector.gave_way > gave_way + 5
    assert selector.slept == 2


def test_the_syncs_of_a_slow_disk_are_never_waited_for_awake() -> None:
    selector = Scripted(*(count * 5_000_000 for count in range(1, 6)))
    for _ in range(5):
        selector.wait(syncing=True)
    assert (selector.slept, selector.gave_way) == (5, 0)


def test_one_slow_sync_costs_one_bound_and_then_it_sleeps() -> None:
    selector = Scripted(100_000, 200_000, 5_000_000, 10_000_000)
    for _ in range(4):
        selector.wait(syncing=True)
    assert selector.slept == 3  # the second was met awake, the third waited for in vain
    assert selector.gave_way < 100_000 / LOOK_NS + SYNC_SPIN_NS / LOOK_NS


def test_what_is_ready_is_told_by_its_descriptor_if_it_comes_within_the_bound() -> None:
    selector = Scripted(10_000, 30_000, 100_000)
    assert selector.readied() == [], "nothing has come closely yet, so it does not even look"
    assert selector.now_ns == 0
    selector.wait(syncing=False)
    assert selector.readied() == [0]
    assert selector.now_ns == 30_000
    assert selector.readied() == [], "the next one comes later than SPIN_NS"
    assert selector.now_ns < 30_000 + SPIN_NS + 2 * LOOK_NS
    before_ns = selector.now_ns
    assert selector.readied() == []
    assert selector.now_ns == before_ns, "it waits in vain only once"


def test_the_end_of_a_turn_ends_the_wait_and_proves_nothing() -> None:
    selector = Scripted(10_000, 60_000)
    selector.wait(syncing=False)
    assert selector.ready(40_000) == []
    assert selector.now_ns < 40_000 + 2 * LOOK_NS
    selector.wait(syncing=False)
    assert selector.slept == 1, "it still waits awake"


def test_it_gives_way_in_a_turn_as_well() -> None:
    selector = Scripted(10_000, 20_000, 150_000)
    selector.wait(syncing=True)
    assert selector.readied() == [0]
    assert selector.gave_way > 5
    assert selector.readied() == [0], "a sync has the larger bound"


def test_a_timeout_is_kept() -> None:
    selector = Scripted()
    assert selector.select(0) == []
    assert selector.slept == 0
    assert selector.select(0.001) == []
    assert selector.slept == 1
    assert selector.now_ns < 1_100_000


def test_an_event_loop_runs_on_it() -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = os.pipe()
        arrived: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(ours, lambda: arrived.set_result(os.read(ours, 10)))
        loop.call_later(0.01, os.write, theirs, b"x")
        try:
            return await arrived
        finally:
            loop.remove_reader(ours)
            os.close(ours)
            os.close(theirs)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(SpinningSelector())) as runner:
        assert runner.run(main()) == b"x"

"""Which fdatasync covers which writes, and when one begins ahead."""

from collections.abc import Callable

import pytest

from forebay_cache.service.sync_order import AHEAD_AFTER, SyncOrder

ERROR = OSError(5, "Input/output error")


class Rig:
    """A disk whose syncs end when told to."""

    def __init__(self) -> None:
        self.syncs: list[Callable[[OSError | None], None]] = []
        self.begun = 0
        self.errors: list[OSError] = []
        self.told: list[tuple[str, bool]] = []
        self.order = SyncOrder(self._start, self.errors.append)

    def _start(self, over: Callable[[OSError | None], None]) -> None:
        self.begun += 1
        self.syncs.append(over)

    def ask(self, name: str) -> bool:
        return self.order.ask(lambda ok: self.told.append((name, ok)))

    def end(self, error: OSError | None = None) -> None:
        self.syncs.pop(0)(error)

    def fall_in_step(self) -> None:
        """Write and sync in turn until syncs begin ahead."""
        for _ in range(AHEAD_AFTER):
            self.order.written()
            assert not self.ask("before")
            self.end()
        self.told.clear()
        self.begun = 0


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_the_first_sync_is_not_taken_for_done_although_nothing_was_written(rig: Rig) -> None:
    assert not rig.ask("first")
    rig.end()
    assert rig.told == [("first", True)]
    assert rig.ask("second") and rig.begun == 1


def test_a_sync_that_began_before_a_write_was_completed_does_not_cover_it(rig: Rig) -> None:
    rig.order.written()
    assert not rig.ask("first")
    rig.order.written()
    assert not rig.ask("second")
    rig.end()
    assert rig.told == [("first", True)] and rig.begun == 2
    rig.end()
    assert rig.told == [("first", True), ("second", True)]


def test_all_who_ask_meanwhile_share_the_next_sync(rig: Rig) -> None:
    rig.order.written()
    rig.ask("first")
    for name in ("b", "c", "d"):
        rig.order.written()
        rig.ask(name)
    assert rig.order.waiting == 4
    rig.end()
    rig.end()
    assert rig.begun == 2 and rig.told == [(name, True) for name in ("first", "b", "c", "d")]


def test_syncs_begin_ahead_once_writes_and_syncs_are_in_step(rig: Rig) -> None:
    rig.fall_in_step()
    rig.order.written()
    assert rig.begun == 1
    assert not rig.ask("joins it")
    rig.end()
    assert rig.told == [("joins it", True)]
    rig.order.written()
    rig.end()
    assert rig.begun == 2
    assert rig.ask("late: it is over") and rig.begun == 2


def test_it_is_foretold_which_write_a_sync_begins_with(rig: Rig) -> None:
    for _ in range(AHEAD_AFTER):
        assert not rig.order.begins_ahead
        rig.order.written()
        rig.ask("in step")
        assert rig.order.is_under_way() and not rig.order.begins_ahead
        rig.end()
        assert not rig.order.is_under_way()
    assert rig.order.begins_ahead
    rig.order.written()
    assert not rig.order.begins_ahead
    rig.end()
    assert not rig.order.begins_ahead, "a write without a sync would follow"


def test_a_write_without_a_sync_ends_syncs_ahead(rig: Rig) -> None:
    rig.fall_in_step()
    rig.order.written()
    rig.end()
    rig.order.written()
    rig.order.written()
    assert rig.begun == 1
    assert not rig.ask("asked") and rig.begun == 2


def test_a_sync_ahead_does_not_cover_a_write_that_came_after_it(rig: Rig) -> None:
    rig.fall_in_step()
    rig.order.written()
    rig.order.written()
    assert not rig.ask("both")
    rig.end()
    assert rig.told == [] and rig.begun == 2
    rig.end()
    assert rig.told == [("both", True)]


@pytest.mark.parametrize("ahead", [False, True])
def test_after_a_failed_sync_no_other_begins_and_nobody_is_told_that_all_is_well(rig: Rig, ahead: bool) -> None:
    rig.fall_in_step()
    if not ahead:
        rig.order.written()
        rig.end()
        rig.order.written()
    rig.order.written()
    rig.ask("first")
    begun = rig.begun
    rig.end(ERROR)
    assert rig.errors == [ERROR]
    assert not rig.ask("second")
    rig.order.written()
    assert not rig.ask("third")
    assert rig.begun == begun and rig.told == []
    rig.order.give_up()
    assert rig.told == [("first", False), ("second", False), ("third", False)]

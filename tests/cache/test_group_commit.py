"""Group commit: writers who all flush share records and syncs, and nobody else waits for a sync."""

import pytest
from engine_rig import Rig

from forebay_cache.engine.front import IoError, Reply
from forebay_cache.engine.group_commit import FORGET_SYNCS, UNFLUSHED_MAX, WRITERS_MAX, GroupCommit
from forebay_core.units import BLOCK_SIZE


class Writers:
    """Guests of one volume on a device whose commands the test completes."""

    def __init__(self) -> None:
        self.rig = Rig(5, size=64 << 20, zone_blocks=512)
        self.device = self.rig.device
        self.rig.run_until(lambda: self.rig.engine.log.idle and self.under_way == (0, 0))
        self.answers: list[str] = []
        self.lba = 0

    def write(self, *names: str, blocks: int = 1) -> None:
        for name in names:
            payload = b"w" * BLOCK_SIZE * blocks
            self.rig.volume.write((self.lba + 1) * BLOCK_SIZE, payload, False, self._noting(f"write {name}"))
            self.lba += blocks
        self.rig.volume.kick()

    def flush(self, *names: str) -> None:
        for name in names:
            self.rig.volume.flush(self._noting(f"flush {name}"))

    def _noting(self, what: str) -> Reply:
        def reply(error: IoError) -> None:
            self.answers.append(what if error == IoError.OK else f"{what} failed")

        return reply

    @property
    def under_way(self) -> tuple[int, int]:
        """Writes and syncs that the device was given."""
        return len(self.device.writes), len(self.device.queue)

    def finish_writes(self) -> list[str]:
        """Complete the writes; return what was answered."""
        while self.device.writes:
            self.device.writes.pop(0)()
        return self._answered()

    def finish_sync(self) -> list[str]:
        """Complete the sync; return what was answered."""
        self.device.queue.pop(0)()
        return self._answered()

    def _answered(self) -> list[str]:
        answers, self.answers = self.answers, []
        return answers

    def form_group(self) -> None:
        """Two writers whose flushes one sync serves."""
        self.write("a", "b")
        self.finish_writes()
        self.flush("a", "b")
        assert self.under_way == (0, 1)
        assert self.finish_sync() == ["flush a", "flush b"]


def test_a_group_has_one_record_and_one_sync_that_begins_before_it_is_asked_for() -> None:
    group = Writers()
    group.form_group()
    group.write("a")
    assert group.finish_writes() == ["write a"]
    assert group.under_way == (0, 1), "the sync of what was written, which nobody has asked for"
    group.write("b")
    group.write("c")
    group.flush("a")
    assert group.under_way == (0, 1), "both writes wait for the sync"
    assert group.finish_sync() == ["flush a"]
    assert group.under_way == (1, 0), "one record of both"
    assert group.finish_writes() == ["write b", "write c"]


def test_a_flush_is_never_answered_by_a_sync_that_began_before_its_write_was_completed() -> None:
    group = Writers()
    group.form_group()
    group.write("a", "b")
    group.finish_writes()
    group.flush("a", "b")
    group.write("c")
    assert group.finish_sync() == ["flush a", "flush b"]
    assert group.finish_writes() == ["write c"]
    group.flush("c")
    assert group.under_way == (0, 1)
    assert group.finish_sync() == ["flush c"]
    group.rig.restart(power=True)
    for lba in range(1, group.lba + 1):
        assert group.rig.read(lba * BLOCK_SIZE, BLOCK_SIZE) == b"w" * BLOCK_SIZE


def test_one_writer_alone_has_no_sync_that_it_did_not_ask_for() -> None:
    one = Writers()
    for _ in range(8):
        one.write("a")
        one.finish_writes()
        assert one.under_way == (0, 0)
        one.flush("a")
        one.finish_sync()


def test_writers_who_flush_each_write_stay_a_group() -> None:
    group = Writers()
    group.form_group()
    for _ in range(8 * WRITERS_MAX):  # a zone is sealed meanwhile
        group.write("a", "b")
        group.finish_writes()
        assert group.under_way == (0, 1)
        group.flush("a", "b")
        assert group.finish_sync() == ["flush a", "flush b"]


def test_a_sync_that_nobody_waited_for_is_the_last_one() -> None:
    group = Writers()
    group.form_group()
    group.write("a")
    group.finish_writes()
    assert group.finish_sync() == []
    group.write("a")
    group.finish_writes()
    assert group.under_way == (0, 0)


@pytest.mark.parametrize("blocks", [1, 2])
def test_who_does_not_flush_ends_it_and_waits_for_no_sync_then(blocks: int) -> None:
    group = Writers()
    group.form_group()
    group.write("a", "b")
    rounds = 0
    while group.rig.engine.log.group.active:
        group.finish_writes()
        group.flush("a", "b")
        assert group.under_way == (0, 1)
        group.write("a", "b")
        group.write("free", blocks=blocks)
        assert group.under_way == (0, 1), "he has one write for each sync"
        group.finish_sync()
        rounds += 1
    assert WRITERS_MAX // 2 < rounds < 2 * WRITERS_MAX
    group.finish_writes()
    group.flush("a", "b")
    assert group.under_way == (0, 1)
    group.write("free", blocks=blocks)
    assert group.under_way == (1, 1)


def test_what_waited_for_a_sync_that_fails_is_answered_with_an_error() -> None:
    group = Writers()
    group.form_group()
    group.write("a")
    group.finish_writes()
    group.write("b")
    group.flush("a")
    group.rig.engine.fail("a sync failed")
    assert sorted(group.answers) == ["flush a failed", "write b failed"]


@pytest.mark.parametrize("unflushed", [0, WRITERS_MAX, WRITERS_MAX + 1, 2 * UNFLUSHED_MAX])
def test_writes_that_no_flush_follows_end_it_and_are_forgotten(unflushed: int) -> None:
    group = GroupCommit()
    for _ in range(unflushed):
        group.written(1)
    syncs = 0
    while not group.active:
        group.synced(2)
        syncs += 1
    assert syncs == max(0, min(unflushed, UNFLUSHED_MAX) - WRITERS_MAX) * FORGET_SYNCS + 1


def test_as_many_writers_as_there_may_be_stay_in_it_as_long_as_they_flush() -> None:
    group = GroupCommit()
    for _ in range(100):
        group.written(WRITERS_MAX)
        for _ in range(WRITERS_MAX):
            group.flushed()
        group.synced(WRITERS_MAX)
        assert group.active
    group.synced(1)
    assert not group.active

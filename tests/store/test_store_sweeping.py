"""A trim or a rollback of more than one transaction holds: it shows at once and whole, and others get their turns."""

from itertools import pairwise

import pytest
from store_daemon import DEVICE
from store_twins import StoreTwin

from forebay_core.extents import Extent, pack
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE
from forebay_store.engine.sweeps import first_sweep
from forebay_store.format.records import CutCommitted
from forebay_store.format.rows import Table
from forebay_store.limits import SWEEP_ENTRIES_MAX, TRIM_ENTRIES_MAX
from forebay_wire import messages

ENTRIES = TRIM_ENTRIES_MAX + 2 * SWEEP_ENTRIES_MAX + 100
BLOCKS = 2 * ENTRIES
Key = tuple[bytes, int, int]


def make(twin: StoreTwin, name: str, blocks: int = BLOCKS) -> Key:
    twin.ask(messages.CreateVolume(name, blocks * BLOCK_SIZE))
    return take(twin, name)


def take(twin: StoreTwin, name: str) -> Key:
    opened = twin.ask(messages.OpenVolume(name, DEVICE))
    assert isinstance(opened, messages.Opened), opened
    return opened.row.id, opened.epoch, opened.session


def cut(key: Key, sequence: int, *, parts: int = 1) -> messages.CommitCut:
    return messages.CommitCut(*key, sequence, parts, sequence, sequence, 1)


def write_every_other_block(twin: StoreTwin, key: Key, sequence: int, fill: bytes) -> None:
    builder = FrameBuilder()
    starts = range(0, ENTRIES, 16)
    for index in range(0, len(starts), 200):
        frames = [
            builder.build([Extent(2 * (at + i), 1) for i in range(16)], fill * (16 << 12))
            for at in starts[index : index + 200]
            if at + 16 <= ENTRIES
        ]
        assert twin.ask(messages.StagePart(*key, sequence, index // 200), b"".join(frames)) == messages.Done()
    parts = -(-len(starts) // 200)
    assert isinstance(twin.ask(cut(key, sequence, parts=parts)), messages.Committed)


def trim_all(twin: StoreTwin, key: Key, sequence: int) -> int:
    """Hand in a cut that trims the volume; return the commit's ticket."""
    assert twin.ask(messages.StagePart(*key, sequence, 0, pack([Extent(0, BLOCKS)]))) == messages.Done()
    return twin.submit(cut(key, sequence))


def see_through(twin: StoreTwin, ticket: int) -> messages.AnyMessage:
    while ticket not in twin.answers:
        twin.step()
    return twin.answers[ticket]


def content(twin: StoreTwin, volume: bytes) -> set[bytes]:
    """Return what the first, a middle and the last written block begin with."""
    blocks = (0, ENTRIES, 2 * (ENTRIES - ENTRIES % 16 - 1))
    found = [twin.plain(volume, Extent(lba, 1))[0] for lba in blocks]
    return {b"\0" if piece.plain is None else bytes(piece.plain[:1]) for piece in found}


def is_sweeping(twin: StoreTwin) -> bool:
    with twin.index.view() as reader:
        return first_sweep(reader) is not None


def restart(twin: StoreTwin) -> StoreTwin:
    restarted = StoreTwin(twin.backend, twin.index.copy())
    restarted.collect()
    return restarted


def test_a_trim_of_many_entries_shows_at_once_and_leaves_the_index_in_steps() -> None:
    twin = StoreTwin()
    key = make(twin, "vm")
    write_every_other_block(twin, key, 1, b"x")
    count = len(twin.index.rows()[Table.HEAD])
    assert isinstance(see_through(twin, trim_all(twin, key, 2)), messages.Committed)
    assert is_sweeping(twin) and content(twin, key[0]) == {b"\0"}
    data = [entries(twin)]
    assert data == [count - TRIM_ENTRIES_MAX]
    while twin.todo:
        twin.step()
        assert content(twin, key[0]) == {b"\0"}
        data.append(entries(twin))
    assert data[-1] == 0
    assert max(before - after for before, after in pairwise(data)) <= SWEEP_ENTRIES_MAX
    assert not is_sweeping(twin) and twin.rebuilt().rows() == twin.index.rows()


def entries(twin: StoreTwin) -> int:
    """Count the entries of heads that hold data."""
    row = twin.query(messages.GetVolume("vm"))
    assert isinstance(row, messages.Volume)
    return row.row.data_blocks


def test_the_commits_of_other_volumes_do_not_wait_for_a_trim() -> None:
    twin = StoreTwin()
    key, other = make(twin, "vm"), make(twin, "other", 64)
    write_every_other_block(twin, key, 1, b"x")
    see_through(twin, trim_all(twin, key, 2))
    assert isinstance(see_through(twin, twin.submit(cut(other, 1, parts=0))), messages.Committed)
    assert is_sweeping(twin)


def test_the_next_change_of_a_trimmed_volume_waits_for_the_last_step_and_opening_it_does_not() -> None:
    twin = StoreTwin()
    key = make(twin, "vm")
    write_every_other_block(twin, key, 1, b"x")
    see_through(twin, trim_all(twin, key, 2))
    key = take_now(twin)
    assert is_sweeping(twin)
    reply = see_through(twin, twin.submit(cut(key, 3, parts=0)))
    assert isinstance(reply, messages.Committed) and not is_sweeping(twin)


def take_now(twin: StoreTwin) -> Key:
    opened = see_through(twin, twin.submit(messages.OpenVolume("vm", DEVICE)))
    assert isinstance(opened, messages.Opened)
    return opened.row.id, opened.epoch, opened.session


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_crash_between_the_steps_of_a_trim_shows_nothing_half_done(steps: int) -> None:
    twin = StoreTwin()
    key = make(twin, "vm")
    write_every_other_block(twin, key, 1, b"x")
    see_through(twin, trim_all(twin, key, 2))
    for _ in range(steps):
        twin.step()
    twin = restart(twin)
    assert content(twin, key[0]) == {b"\0"}
    twin.settle()
    assert not is_sweeping(twin) and content(twin, key[0]) == {b"\0"}
    assert twin.rebuilt().rows() == twin.index.rows()


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_a_rollback_of_many_entries_shows_at_once_and_whole_whenever_a_crash_comes(steps: int) -> None:
    twin = StoreTwin()
    key = make(twin, "vm")
    write_every_other_block(twin, key, 1, b"x")
    assert twin.ask(messages.ReleaseVolume(*key)) == messages.Done()
    assert isinstance(twin.ask(messages.CreateSnapshot(("vm",), "s")), messages.SnapshotTaken)
    key = take(twin, "vm")
    write_every_other_block(twin, key, 3, b"y")
    assert content(twin, key[0]) == {b"y"}
    assert twin.ask(messages.ReleaseVolume(*key)) == messages.Done()
    reply = see_through(twin, twin.submit(messages.RollbackVolume("vm", "s")))
    assert isinstance(reply, messages.Volume)
    assert is_sweeping(twin) and content(twin, key[0]) == {b"x"}
    for _ in range(steps):
        twin.step()
        assert content(twin, key[0]) == {b"x"}
    twin = restart(twin)
    assert content(twin, key[0]) == {b"x"}
    twin.settle()
    assert not is_sweeping(twin) and content(twin, key[0]) == {b"x"}
    assert twin.rebuilt().rows() == twin.index.rows()


def test_a_log_whose_cuts_follow_a_rollback_without_its_steps_gives_the_same_content() -> None:
    """Stores before 2026-12 rolled back in one step: the record is the same, and the steps are missing."""
    twin = StoreTwin()
    key = make(twin, "vm")
    write_every_other_block(twin, key, 1, b"x")
    twin.ask(messages.ReleaseVolume(*key))
    twin.ask(messages.CreateSnapshot(("vm",), "s"))
    key = take(twin, "vm")
    write_every_other_block(twin, key, 3, b"y")
    twin.ask(messages.ReleaseVolume(*key))
    see_through(twin, twin.submit(messages.RollbackVolume("vm", "s")))
    key = take_now(twin)
    see_through(twin, twin.submit(messages.StagePart(*key, 5, 0, pack([Extent(0, 2)]))))
    assert is_sweeping(twin)
    record = CutCommitted(key[0], key[1], attempt=5, part_count=1, first=5, last=5, committed_ns=1, in_sync_version=0)
    twin.engine.submit_records(10_000, [(record, b"")])
    twin.collect()
    see_through(twin, 10_000)
    assert not is_sweeping(twin)
    twin.settle()
    assert content(twin, key[0]) == {b"\0", b"x"}
    assert not is_sweeping(twin)
    assert twin.rebuilt().rows() == twin.index.rows()


def test_a_full_disk_refuses_what_waits_for_a_sweep_and_goes_on_when_there_is_room() -> None:
    twin = StoreTwin()
    key = make(twin, "vm")
    write_every_other_block(twin, key, 1, b"x")
    see_through(twin, trim_all(twin, key, 2))
    ticket = twin.submit(cut(key, 3, parts=0))
    while ticket not in twin.answers:
        twin.backend.fault = "no-space"
        twin.step()
    answer = twin.answers[ticket]
    assert isinstance(answer, messages.Failed) and answer.code == messages.NO_SPACE
    assert is_sweeping(twin) and content(twin, key[0]) == {b"\0"}
    assert isinstance(twin.ask(cut(key, 3, parts=0)), messages.Committed)
    assert not is_sweeping(twin)

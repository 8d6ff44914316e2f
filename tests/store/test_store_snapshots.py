"""Snapshots and clones at the store, over ports in memory: what each request does, refuses and says."""

import numpy as np
import pytest
from sim_index import DictCursor, DictIndex, DictView
from store_books import check_books
from store_daemon import frame, plain
from store_twins import StoreTwin
from test_store_engine import OTHER, Rig, code

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE, Buffer, make_version
from forebay_store.engine.head_change import split_levels
from forebay_store.engine.ports import SegmentMissingError
from forebay_store.engine.reading import plan_read
from forebay_store.engine.replay import next_incarnation
from forebay_store.engine.views import expect_view, walk
from forebay_store.format.entries import HOLE, LEVEL_BITS, ORIGIN, make_hole
from forebay_store.format.rows import Table
from forebay_store.format.segment import SegmentName
from forebay_store.limits import INCARNATION_MAX, WAITING_PER_VOLUME_MAX
from forebay_wire import messages
from forebay_wire.messages import HOLE_FRAME, ORIGIN_FRAME, PIECE_DTYPE

BLOCKS = 1000


class SnapRig(Rig):
    """The rig with requests about snapshots."""

    def release(self) -> None:
        assert self.twin.ask(messages.ReleaseVolume(self.id, self.epoch, self.session)) == messages.Done()

    def close(self, last: int, name: str, snapshot: bytes = b"", parts: int = 0) -> messages.AnyMessage:
        cut = messages.CommitCut(
            self.id,
            self.epoch,
            self.session,
            last,
            parts,
            last,
            last,
            5,
            snapshot=snapshot or name.encode().ljust(16, b"."),
            snapshot_name=name,
            snapshot_ns=7,
        )
        return self.twin.ask(cut)

    def snapshot(self, name: str, volume: str = "vm") -> messages.SnapshotRow:
        taken = self.twin.ask(messages.CreateSnapshot((volume,), name))
        assert isinstance(taken, messages.SnapshotTaken), taken
        return taken.row

    def snapshots(self, volume: str = "vm", **options: int) -> tuple[messages.SnapshotRow, ...]:
        reply = self.twin.query(messages.ListSnapshots(volume, **options))
        assert isinstance(reply, messages.Snapshots), reply
        return reply.rows

    def clone(self, snapshot: str, name: str, volume: str = "vm") -> messages.VolumeRow:
        reply = self.twin.ask(messages.CloneVolume(volume, snapshot, name))
        assert isinstance(reply, messages.Volume), reply
        return reply.row

    def volume(self, name: str) -> messages.VolumeRow:
        reply = self.twin.query(messages.GetVolume(name))
        assert isinstance(reply, messages.Volume), reply
        return reply.row

    def at(self, shown: bytes, lba: int) -> bytes | None:
        [piece] = self.twin.plain(shown, Extent(lba, 1), through=True)
        return None if piece.plain is None else bytes(piece.plain)


def rows(reply: messages.AnyMessage) -> list[tuple[int, int, int, int, int]]:
    assert isinstance(reply, messages.Changes | messages.Mapped | messages.Blocks), reply
    return np.frombuffer(reply.pieces, PIECE_DTYPE).tolist()  # type: ignore[no-any-return]


def test_a_cut_that_closes_with_a_snapshot_takes_it_in_one_step() -> None:
    rig = SnapRig()
    rig.stage(frame(0, "a"), attempt=1)
    assert rig.close(1, "monday", parts=1) == messages.Committed(make_version(1, 1), False)
    rig.write(2, 0, "b")
    [row] = rig.snapshots()
    assert (row.name, row.version, row.size, row.created_ns) == ("monday", make_version(1, 1), BLOCKS * BLOCK_SIZE, 7)
    assert (rig.at(row.id, 0), rig.block(0)) == (plain("a"), plain("b"))
    assert rig.row().snapshots == 1
    rig.assert_rebuilds()


def test_a_repeated_commit_takes_no_second_snapshot() -> None:
    rig = SnapRig()
    assert rig.close(1, "monday") == messages.Committed(make_version(1, 1), False)
    assert rig.close(1, "monday") == messages.Committed(make_version(1, 1), True)
    assert len(rig.snapshots()) == 1


def test_a_name_that_is_taken_by_now_gets_the_number_of_the_change() -> None:
    rig = SnapRig()
    for last in (1, 2, 3):
        rig.close(last, "same", bytes([last]) * 16)
    assert [row.name for row in rig.snapshots()] == ["same", "same.2", "same.3"]
    longest = "n" * 128
    for last in (4, 5):
        rig.close(last, longest, bytes([last]) * 16)
    assert [row.name for row in rig.snapshots()][3:] == [longest, "n" * 126 + ".5"]
    rig.assert_rebuilds()


def test_a_malformed_closing_change_is_refused() -> None:
    rig = SnapRig()
    rig.close(1, "monday")
    cut = messages.CommitCut(rig.id, rig.epoch, rig.session, 2, 0, 2, 2, 5)
    wrong = [
        {"snapshot": b"short", "snapshot_name": "x"},
        {"snapshot": bytes(16), "snapshot_name": "x"},
        {"snapshot": b"i" * 16, "snapshot_name": ""},
        {"snapshot": b"i" * 16, "snapshot_name": "a@b"},
        {"snapshot": b"i" * 16, "snapshot_name": "x", "snapshot_ns": -1},
        {"snapshot": b"i" * 16, "snapshot_name": "x", "size": BLOCK_SIZE},
        {"snapshot": rig.id, "snapshot_name": "x"},
        {"snapshot": rig.snapshots()[0].id, "snapshot_name": "x"},
        {"size": BLOCK_SIZE + 1},
        {"size": -BLOCK_SIZE},
    ]
    for fields in wrong:
        message = messages.CommitCut(*[getattr(cut, name) for name in cut.__struct_fields__[:8]], **fields)  # type: ignore[arg-type]
        assert code(rig.twin.ask(message)) == messages.BAD_REQUEST
    assert rig.row().version == make_version(1, 1)


def test_a_cut_may_close_with_another_size() -> None:
    rig = SnapRig()
    rig.stage(frame(BLOCKS - 1, "end"), attempt=1)
    rig.commit(1, 1, attempt=1)
    part = rig.part(attempt=2)
    grow = messages.CommitCut(rig.id, rig.epoch, rig.session, 9, 0, 2, 2, 5, size=2 * BLOCKS * BLOCK_SIZE)
    rig.twin.ask(part, frame(2 * BLOCKS - 1, "new end"))  # staged before the cut that makes room for it
    assert isinstance(rig.twin.ask(grow), messages.Committed)
    rig.twin.ask(rig.part(attempt=3), frame(2 * BLOCKS - 1, "new end"))
    assert isinstance(rig.commit(3, 3, attempt=3), messages.Committed)
    assert rig.block(2 * BLOCKS - 1) == plain("new end")
    shrink = messages.CommitCut(rig.id, rig.epoch, rig.session, 9, 0, 4, 4, 5, size=BLOCK_SIZE)
    assert isinstance(rig.twin.ask(shrink), messages.Committed)
    assert (rig.row().size, rig.row().data_blocks, rig.row().stored_size) == (BLOCK_SIZE, 0, 0)
    check_books(rig.twin.index)
    rig.assert_rebuilds()


def test_a_held_volume_is_asked_at_its_holder() -> None:
    rig = SnapRig()
    rig.close(1, "s")
    rig.open(control="10.0.0.7:9000")
    assert rig.row().control == "10.0.0.7:9000"
    for message in (
        messages.CreateSnapshot(("vm",), "x"),
        messages.RollbackVolume("vm", "s"),
        messages.ResizeVolume("vm", 2 * BLOCKS * BLOCK_SIZE),
        messages.DeleteVolume("vm"),
        messages.OpenVolume("vm", OTHER),
    ):
        refused = rig.twin.ask(message)
        assert code(refused) == messages.VOLUME_IN_USE
        assert "10.0.0.7:9000" in refused.text and "detach it" in refused.text  # type: ignore[union-attr]
    rig.release()
    assert rig.row().control == ""
    rig.open(control="two\nlines")
    assert rig.row().control == ""


def test_snapshots_of_a_volume_that_nobody_holds_are_changes_of_their_own() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a")
    rig.release()
    first, second = rig.snapshot("one"), rig.snapshot("two")
    assert (first.version, second.version) == (make_version(1, 2), make_version(1, 3))
    assert rig.open().row.version == make_version(1, 3)
    rig.stage(frame(0, "b"), attempt=2)
    assert isinstance(rig.commit(4, 4, attempt=2), messages.Committed)
    assert {rig.at(one.id, 0) for one in (first, second)} == {plain("a")}


def test_bad_requests_about_snapshots_are_refused_by_name() -> None:
    rig = SnapRig()
    rig.close(1, "s")
    rig.release()
    cases = [
        (messages.CreateSnapshot(("vm",), "s"), messages.SNAPSHOT_EXISTS),
        (messages.CreateSnapshot(("vm",), "a@b"), messages.BAD_REQUEST),
        (messages.CreateSnapshot(("vm",), ""), messages.BAD_REQUEST),
        (messages.CreateSnapshot((), "x"), messages.BAD_REQUEST),
        (messages.CreateSnapshot(("vm", "vm"), "x"), messages.BAD_REQUEST),
        (messages.CreateSnapshot(("nope",), "x"), messages.NO_SUCH_VOLUME),
        (messages.DeleteSnapshot("vm", "nope"), messages.NO_SUCH_SNAPSHOT),
        (messages.DeleteSnapshot("vm", "x" * 9999), messages.NO_SUCH_SNAPSHOT),
        (messages.DeleteSnapshot("nope", "s"), messages.NO_SUCH_VOLUME),
        (messages.RollbackVolume("vm", "nope"), messages.NO_SUCH_SNAPSHOT),
        (messages.CloneVolume("vm", "nope", "new"), messages.NO_SUCH_SNAPSHOT),
        (messages.CloneVolume("vm", "s", "vm"), messages.VOLUME_EXISTS),
        (messages.CloneVolume("vm", "s", "a/b"), messages.BAD_REQUEST),
        (messages.FlattenVolume("vm"), messages.BAD_REQUEST),
        (messages.FlattenVolume("nope"), messages.NO_SUCH_VOLUME),
        (messages.DeleteVolume("vm"), messages.HAS_CLONES),
    ]
    for message, expected in cases:
        assert code(rig.twin.ask(message)) == expected, message  # type: ignore[arg-type]
    assert code(rig.twin.query(messages.ListSnapshots("nope"))) == messages.NO_SUCH_VOLUME
    assert code(rig.twin.query(messages.ListSnapshots("vm", 0, 0))) == messages.BAD_REQUEST
    assert code(rig.twin.query(messages.GetSnapshot("vm", "nope"))) == messages.NO_SUCH_SNAPSHOT
    assert code(rig.twin.query(messages.GetSnapshot(id=b"odd"))) == messages.NO_SUCH_SNAPSHOT
    assert code(rig.twin.query(messages.Changed(rig.id, 0, since_snapshot=b"odd"))) == messages.NO_SUCH_SNAPSHOT


def test_snapshots_come_in_pages() -> None:
    rig = SnapRig()
    for last in range(1, 6):
        rig.close(last, f"s{last}")
    first = rig.twin.query(messages.ListSnapshots("vm", 0, 2))
    assert isinstance(first, messages.Snapshots)
    assert ([row.name for row in first.rows], first.more) == (["s1", "s2"], True)
    rest = rig.twin.query(messages.ListSnapshots("vm", first.rows[-1].version))
    assert isinstance(rest, messages.Snapshots)
    assert ([row.name for row in rest.rows], rest.more) == (["s3", "s4", "s5"], False)
    assert rig.snapshots(after=(1 << 64) + 5) == ()


def test_unique_size_is_what_deleting_a_snapshot_frees() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 16)
    rig.close(2, "s2")
    rig.write(3, 0, "b", 8)
    rig.close(4, "s4")
    rig.write(5, 0, "c", 8)
    rig.release()
    live = sum(row.live for row in _segments(rig))
    for name in ("s4", "s2"):
        sizes = {row.name: row.unique_size for row in rig.snapshots()}
        assert sizes[name] > 8 * BLOCK_SIZE
        assert rig.twin.ask(messages.DeleteSnapshot("vm", name)) == messages.Done()
        assert sum(row.live for row in _segments(rig)) == live - sizes[name]
        live -= sizes[name]
    assert live == rig.row().stored_size
    assert not rig.twin.index.rows()[Table.HISTORY]


def _segments(rig: SnapRig) -> list:  # type: ignore[type-arg]
    from forebay_store.format.rows import decode_segment_row

    return [decode_segment_row(value) for value in rig.twin.index.rows()[Table.SEGMENTS].values()]


def test_a_clone_says_what_is_its_own_and_what_its_origin_shows() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 4)
    rig.close(2, "s")
    rig.write(3, 0, "later", 4)
    clone = rig.clone("s", "c")
    assert (clone.version, clone.origin_name, clone.size) == (1, "vm@s", BLOCKS * BLOCK_SIZE)
    rig.twin.ask(messages.ReleaseVolume(rig.id, rig.epoch, rig.session))
    rig.id = clone.id
    opened = rig.twin.ask(messages.OpenVolume("c", OTHER))
    assert isinstance(opened, messages.Opened)
    rig.epoch, rig.session = opened.epoch, opened.session
    rig.stage(frame(1, "own"), holes=(Extent(2, 1), Extent(10, 5)))
    assert isinstance(rig.commit(2, 2), messages.Committed)
    version = make_version(1, 2)
    assert rows(rig.twin.query(messages.MapExtents(clone.id, 0, 20))) == [
        (0, 1, ORIGIN_FRAME, 0, 0),
        (1, 1, 0, 0, version),
        (2, 1, HOLE_FRAME, 0, version),
        (3, 7, ORIGIN_FRAME, 0, 0),
        (10, 5, HOLE_FRAME, 0, version),
        (15, 5, ORIGIN_FRAME, 0, 0),
    ]
    assert rows(rig.twin.query(messages.MapExtents(clone.id, 0, 20, through=True))) == [
        (0, 1, 0, 0, 0),
        (1, 1, 0, 0, version),
        (2, 1, HOLE_FRAME, 0, version),
        (3, 1, 0, 0, 0),
        (4, 6, HOLE_FRAME, 0, 0),
        (10, 5, HOLE_FRAME, 0, version),
        (15, 5, HOLE_FRAME, 0, 0),
    ]
    blocks, _ = rig.twin.read(messages.Read(clone.id, pack([Extent(0, 3)])))
    assert [row[2] for row in rows(blocks)] == [ORIGIN_FRAME, 0, HOLE_FRAME]
    assert [rig.at(clone.id, lba) for lba in range(4)] == [plain("a", 4)[:BLOCK_SIZE], plain("own"), None, part("a", 3)]


def part(seed: str, index: int) -> bytes:
    return plain(seed, 4)[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]


def test_a_snapshot_with_clones_stays_and_names_them() -> None:
    rig = SnapRig()
    rig.close(1, "s")
    for name in ("c2", "c1"):
        rig.clone("s", name)
    refused = rig.twin.ask(messages.DeleteSnapshot("vm", "s"))
    assert code(refused) == messages.HAS_CLONES
    assert "c1, c2" in refused.text  # type: ignore[union-attr]
    assert rig.row().clones == 2 and rig.snapshots()[0].clones == ("c1", "c2")
    assert rig.twin.ask(messages.DeleteVolume("c1")) == messages.Done()
    assert rig.twin.ask(messages.FlattenVolume("c2")) == messages.Done()
    rig.twin.settle()
    assert rig.volume("c2").origin == b""
    assert rig.twin.ask(messages.DeleteSnapshot("vm", "s")) == messages.Done()
    rig.assert_rebuilds()


def test_clones_of_clones_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_store.engine.snapshot_changes.CLONE_DEPTH_MAX", 3)
    rig = SnapRig()
    rig.write(1, 5, "deep")
    rig.release()
    name = "vm"
    for depth in range(3):
        rig.snapshot("s", name)
        clone = rig.clone("s", f"c{depth}", name)
        name = clone.name
    assert rig.at(clone.id, 5) == plain("deep")
    rig.snapshot("s", name)
    refused = rig.twin.ask(messages.CloneVolume(name, "s", "one more"))
    assert code(refused) == messages.BAD_REQUEST
    refused = rig.twin.ask(messages.CloneVolume(name, "s", "more"))
    assert code(refused) == messages.FAILED and "flatten volume c2" in refused.text  # type: ignore[union-attr]


def test_flattening_lists_nothing_as_changed_and_keeps_what_a_rollback_reverted() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 8)
    rig.close(2, "s")
    clone = rig.clone("s", "c")
    before = rig.snapshot("before", "c")
    opened = rig.twin.ask(messages.OpenVolume("c", OTHER))
    assert isinstance(opened, messages.Opened)
    key = (clone.id, opened.epoch, opened.session)
    rig.twin.ask(messages.StagePart(*key, 1, 0), frame(3, "own"))
    rig.twin.ask(messages.CommitCut(*key, 1, 1, 3, 3, 5))
    rig.twin.ask(messages.ReleaseVolume(*key))
    between = rig.snapshot("between", "c")
    rolled = rig.twin.ask(messages.RollbackVolume("c", "before"))
    assert isinstance(rolled, messages.Volume)
    listed = (3, 1, ORIGIN_FRAME, 0, rolled.row.version)
    assert rows(rig.twin.query(messages.Changed(clone.id, 0, since_snapshot=between.id))) == [listed]
    rig.twin.ask(messages.FlattenVolume("c"))
    rig.twin.settle()
    assert rows(rig.twin.query(messages.Changed(clone.id, 0, since_snapshot=between.id))) == [
        (3, 1, 0, 0, rolled.row.version)
    ]
    assert rows(rig.twin.query(messages.Changed(clone.id, rolled.row.version))) == []
    assert [rig.at(one, 3) for one in (clone.id, before.id, between.id)] == [
        plain("a", 8)[3 * BLOCK_SIZE : 4 * BLOCK_SIZE],
        plain("a", 8)[3 * BLOCK_SIZE : 4 * BLOCK_SIZE],
        plain("own"),
    ]
    check_books(rig.twin.index)


def test_a_clone_whose_origin_is_damaged_stays_one_until_it_can_be_read() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 4)
    rig.close(2, "s")
    rig.clone("s", "c")
    [name] = [name for name, whole in rig.twin.backend.segments.items() if len(whole) > 16384]
    whole = rig.twin.backend.segments[name]
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    rig.twin.backend.segments[name] = bytes(damaged)
    assert rig.twin.ask(messages.FlattenVolume("c")) == messages.Done()
    rig.twin.settle()
    assert rig.volume("c").flattening and rig.volume("c").origin
    assert code(rig.twin.ask(messages.RollbackVolume("vm", "s"))) == messages.VOLUME_IN_USE
    assert not rig.twin.engine.error
    rig.twin.engine.retry_copies()
    rig.twin.collect()
    rig.twin.settle()
    assert rig.volume("c").flattening
    rig.twin.backend.segments[name] = whole
    rig.twin.engine.retry_copies()
    rig.twin.collect()
    rig.twin.settle()
    assert not rig.volume("c").flattening and not rig.volume("c").origin


@pytest.mark.parametrize(("misses", "ends"), [(1, True), (1 << 30, False)])
def test_flattening_looks_again_for_what_was_moved_meanwhile_but_not_for_ever(misses: int, ends: bool) -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 4)
    rig.close(2, "s")
    rig.clone("s", "c")
    read_range, left = rig.twin.backend.read_range, [misses]

    def missing(name: str, offset: int, size: int) -> Buffer:
        left[0] -= 1
        if left[0] >= 0:
            raise SegmentMissingError(place=name, what="segment", expected="bytes", found="nothing")
        return read_range(name, offset, size)

    rig.twin.backend.read_range = missing  # type: ignore[method-assign]
    rig.twin.ask(messages.FlattenVolume("c"))
    rig.twin.settle()
    assert rig.volume("c").flattening != ends
    assert not rig.twin.engine.error


def test_a_full_disk_delays_what_goes_on_in_the_background() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 4)
    rig.close(2, "s")
    rig.write(3, 0, "b", 4)
    ticket = rig.twin.submit(messages.DeleteSnapshot("vm", "s"))
    while ticket not in rig.twin.answers:
        rig.twin.step()
    rig.twin.backend.fault = "no-space"
    rig.twin.settle()
    assert rig.twin.index.rows()[Table.HISTORY]
    rig.write(4, 9, "there is space again")
    rig.twin.settle()
    assert not rig.twin.index.rows()[Table.HISTORY]
    rig.assert_rebuilds()


def test_a_shrunk_and_grown_clone_does_not_show_its_origin_again() -> None:
    rig = SnapRig()
    rig.write(1, 50, "a", 4)
    rig.close(2, "s")
    clone = rig.clone("s", "c")
    assert code(rig.twin.ask(messages.ResizeVolume("c", BLOCK_SIZE))) == messages.BAD_REQUEST
    for size in (BLOCK_SIZE, BLOCKS * BLOCK_SIZE):
        assert isinstance(rig.twin.ask(messages.ResizeVolume("c", size, True)), messages.Volume)
    assert rig.at(clone.id, 50) is None
    assert rig.volume("c").version == 2


def test_a_rollback_brings_back_size_and_content_and_newer_snapshots_stay() -> None:
    rig = SnapRig()
    rig.write(1, 0, "a", 4)
    rig.close(2, "old")
    rig.write(3, 2, "b", 4)
    rig.close(4, "new")
    rig.release()
    rig.twin.ask(messages.ResizeVolume("vm", 2 * BLOCKS * BLOCK_SIZE))
    rolled = rig.twin.ask(messages.RollbackVolume("vm", "old"))
    assert isinstance(rolled, messages.Volume)
    version = make_version(1, 5)
    assert (rolled.row.version, rolled.row.size) == (version, BLOCKS * BLOCK_SIZE)
    assert rows(rig.twin.query(messages.Changed(rig.id, make_version(1, 4)))) == [
        (2, 2, 0, 0, version),
        (4, 2, HOLE_FRAME, 0, version),
    ]
    assert [row.name for row in rig.snapshots()] == ["old", "new"]
    assert rig.at(rig.snapshots()[1].id, 4) == plain("b", 4)[2 * BLOCK_SIZE : 3 * BLOCK_SIZE]
    rig.assert_rebuilds()


def test_two_clones_of_one_name_at_once_make_one_volume() -> None:
    for seed in range(10):
        rig = SnapRig(seed)
        rig.close(1, "s")
        tickets = [
            rig.twin.submit(messages.CloneVolume("vm", "s", "c")),
            rig.twin.submit(messages.CreateVolume("c", BLOCK_SIZE)),
            rig.twin.submit(messages.DeleteSnapshot("vm", "s")),
            rig.twin.submit(messages.CloneVolume("vm", "s", "d")),
        ]
        rig.twin.settle()
        replies = [rig.twin.answers[ticket] for ticket in tickets]
        assert isinstance(replies[0], messages.Volume)
        assert code(replies[1]) == messages.VOLUME_EXISTS
        assert code(replies[2]) == messages.HAS_CLONES
        assert isinstance(replies[3], messages.Volume)
        rig.assert_rebuilds()


def test_a_clone_that_is_refused_because_its_parent_is_busy_leaves_its_name_free() -> None:
    rig = SnapRig()
    rig.close(1, "s")
    rig.twin.submit(rig.part(attempt=5), frame(0, "what all others wait for"))
    tickets = [rig.twin.submit(rig.cut(9, 9)) for _ in range(WAITING_PER_VOLUME_MAX + 2)]
    assert code(rig.twin.answers[tickets[-1]]) == messages.FAILED
    clone = rig.twin.submit(messages.CloneVolume("vm", "s", "c"))
    assert code(rig.twin.answers[clone]) == messages.FAILED
    assert isinstance(rig.twin.ask(messages.CreateVolume("c", BLOCK_SIZE)), messages.Volume)
    assert all(ticket in rig.twin.answers for ticket in tickets)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, (1 << 21) - 5, (1 << 30) - 1])
@pytest.mark.parametrize("length", [1, 16, 17, 4096, 70_000, (1 << 22) + 3, (1 << 31) + 5])
def test_long_holes_lie_in_the_history_where_a_look_finds_them(start: int, length: int) -> None:
    pieces = list(split_levels(make_hole(start, length, 1)))
    assert len(pieces) < 2500
    at = start
    for level, piece in pieces:
        assert piece.start == at
        if level:
            assert piece.start % (1 << LEVEL_BITS[level]) == 0 and piece.length <= 1 << LEVEL_BITS[level]
        else:
            assert piece.length <= 16
        at = piece.end
    assert at == start + length


def test_a_snapshot_shows_long_holes_that_left_the_head() -> None:
    rig = SnapRig()
    size = (1 << 23) + 4096 + 100
    rig.release()
    rig.twin.ask(messages.ResizeVolume("vm", size * BLOCK_SIZE))
    rig.snapshot("empty")
    clone = rig.clone("empty", "c")  # In a clone a trim of what was never written is a hole.
    origin = rig.snapshot("origin", "c")
    opened = rig.twin.ask(messages.OpenVolume("c", OTHER))
    assert isinstance(opened, messages.Opened)
    key = (clone.id, opened.epoch, opened.session)
    rig.twin.ask(messages.StagePart(*key, 1, 0, pack([Extent(7, size - 7)])))
    rig.twin.ask(messages.CommitCut(*key, 1, 1, 3, 3, 5))
    rig.twin.ask(messages.ReleaseVolume(*key))
    holes = rig.snapshot("holes", "c")
    for name in ("origin", "holes", "origin"):
        assert isinstance(rig.twin.ask(messages.RollbackVolume("c", name)), messages.Volume)
        rig.snapshot(f"after-{name}-{len(rig.snapshots('c'))}", "c")
    assert len(rig.twin.index.rows()[Table.HISTORY]) > 500
    with rig.twin.index.view() as reader:
        for start, count in ((0, size), (6, 2), (4097, 1), ((1 << 21) + 1, 5), ((1 << 22) - 1, 2), (size - 1, 1)):
            found = list(walk(reader, expect_view(reader, holes.id), start, start + count))
            assert sum(one.length for one in found if one is not None and one.kind == HOLE) == count - (start < 7) * (
                7 - start
            )
            found = list(walk(reader, expect_view(reader, origin.id), start, start + count))
            assert sum(one.length for one in found if one is not None and one.kind == ORIGIN) == count
    for row in rig.snapshots("c"):
        assert rig.twin.ask(messages.DeleteSnapshot("c", row.name)) == messages.Done()
    rig.twin.settle()
    assert not rig.twin.index.rows()[Table.HISTORY]
    rig.assert_rebuilds()


def test_a_store_that_was_started_too_often_says_so() -> None:
    assert next_incarnation([SegmentName(INCARNATION_MAX - 1, 5)]) == INCARNATION_MAX
    with pytest.raises(ForebayError, match="copy it to a new one"):
        next_incarnation([SegmentName(INCARNATION_MAX, 0)])


class CountingView(DictView):
    """Counts what it is asked."""

    def __init__(self, tables: dict) -> None:  # type: ignore[type-arg]
        super().__init__(tables)
        self.reads = 0

    def get(self, table: Table, key: bytes) -> bytes | None:
        self.reads += 1
        return super().get(table, key)

    def scan(self, table: Table, key: bytes):  # type: ignore[no-untyped-def]  # noqa: ANN201
        for row in super().scan(table, key):
            self.reads += 1
            yield row

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        self.reads += 1
        return super().before(table, key)

    def cursor(self, table: Table) -> DictCursor:
        cursor = super().cursor(table)
        step, seek = cursor.step, cursor.seek

        def counted_step() -> tuple[bytes, bytes] | None:
            self.reads += 1
            return step()

        def counted_seek(key: bytes) -> tuple[bytes, bytes] | None:
            self.reads += 1
            return seek(key)

        cursor.step, cursor.seek = counted_step, counted_seek  # type: ignore[method-assign]
        return cursor


class CountingIndex(DictIndex):
    """Counts the reads of each transaction and view."""

    reads = 0

    def update(self, change):  # type: ignore[no-untyped-def]  # noqa: ANN201
        view = CountingView(self.tables)
        result = change(view)
        self.tables = view.tables
        self.reads += view.reads
        return result

    def reads_of(self, message: messages.Read) -> int:
        view = CountingView(self.tables)
        plan_read(view, message)
        return view.reads


def counted(snapshots: int) -> tuple[int, int, int]:
    """Return reads of the index for a read of the head, one of the oldest snapshot, and a commit over old blocks."""
    rig = SnapRig()
    index = CountingIndex()
    index.tables = rig.twin.index.tables
    rig.twin.index = rig.twin.engine._index = rig.twin.engine._background._index = index
    rig.write(1, 0, "a", 16)
    last = 1
    for _ in range(snapshots):
        last += 1
        rig.close(last, f"s{last}")
    rig.write(last + 1, 3, "b")
    head = index.reads_of(messages.Read(rig.id, pack([Extent(0, 16)])))
    old = index.reads_of(messages.Read(rig.snapshots()[0].id, pack([Extent(0, 16)]))) if snapshots else 0
    rig.stage(frame(0, "c", 8), attempt=last + 2)
    rig.twin.engine.stop()  # The part shows in the index: what follows is counted for the commit alone.
    rig.twin.collect()
    rig.twin.settle()
    rig.twin = StoreTwin(rig.twin.backend, index)
    rig.twin.collect()
    rig.twin.settle()
    rig.open()
    before = index.reads
    assert isinstance(rig.commit(last + 2, last + 2, attempt=last + 2), messages.Committed)
    return head, old, index.reads - before


def test_reads_of_the_index_are_the_same_with_a_thousand_snapshots() -> None:
    none, one, many = counted(0), counted(1), counted(1000)
    assert (
        none[0] == many[0] and none[2] >= many[2]
    )  # Without any, what was overwritten dies, in one more segment's row.
    assert one == many and min(one) > 0

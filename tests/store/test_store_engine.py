"""The store's decisions, over ports in memory: order, epochs, sessions, repeated commits, refusals, limits."""

import numpy as np
import pytest
from store_daemon import DEVICE, frame, plain
from store_twins import StoreTwin

from forebay_core.errors import CorruptionError, RefusedError
from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE, make_version
from forebay_store.engine import changes, queries
from forebay_store.engine.volumes import attempts_of, find_name, put_volume
from forebay_store.format.rows import Table
from forebay_store.limits import ATTEMPTS_PER_VOLUME_MAX, WAITING_PER_VOLUME_MAX
from forebay_wire import messages
from forebay_wire.limits import READ_BLOCKS_MAX

OTHER = b"another-device!!"
BLOCKS = 1000


class Rig:
    """A store in memory with an open volume `vm`."""

    def __init__(self, seed: int = 0) -> None:
        self.twin = StoreTwin(seed=seed)
        created = self.twin.ask(messages.CreateVolume("vm", BLOCKS * BLOCK_SIZE))
        assert isinstance(created, messages.Volume)
        self.id = created.row.id
        self.open()

    def open(self, device: bytes = DEVICE, **options: object) -> messages.Opened:
        opened = self.twin.ask(messages.OpenVolume("vm", device, **options))  # type: ignore[arg-type]
        assert isinstance(opened, messages.Opened), opened
        self.epoch, self.session = opened.epoch, opened.session
        return opened

    def part(self, index: int = 0, attempt: int = 1, holes: tuple[Extent, ...] = ()) -> messages.StagePart:
        return messages.StagePart(self.id, self.epoch, self.session, attempt, index, pack(holes))

    def stage(self, payload: bytes, index: int = 0, attempt: int = 1, holes: tuple[Extent, ...] = ()) -> object:
        return self.twin.ask(self.part(index, attempt, holes), payload)

    def cut(self, first: int, last: int, parts: int = 1, attempt: int = 1) -> messages.CommitCut:
        return messages.CommitCut(self.id, self.epoch, self.session, attempt, parts, first, last, 5)

    def commit(self, first: int, last: int, parts: int = 1, attempt: int = 1) -> messages.AnyMessage:
        return self.twin.ask(self.cut(first, last, parts, attempt))

    def write(self, first: int, start: int, seed: object, count: int = 1) -> None:
        assert self.stage(frame(start, seed, count), attempt=first) == messages.Done()
        assert isinstance(self.commit(first, first, attempt=first), messages.Committed)

    def commit_alone(self, payload: bytes, *holes: Extent) -> messages.AnyMessage:
        assert self.stage(payload, holes=holes) == messages.Done()
        return self.commit(1, 1)

    def row(self) -> messages.VolumeRow:
        reply = self.twin.query(messages.GetVolume("vm"))
        assert isinstance(reply, messages.Volume)
        return reply.row

    def block(self, lba: int) -> bytes | None:
        [piece] = self.twin.plain(self.id, Extent(lba, 1))
        return None if piece.plain is None else bytes(piece.plain)

    def assert_rebuilds(self) -> None:
        assert self.twin.rebuilt().rows() == self.twin.index.rows()


def code(reply: object) -> str:
    assert isinstance(reply, messages.Failed), reply
    assert "\n" not in reply.text
    return reply.code


def test_a_cut_shows_whole_and_only_after_its_commit() -> None:
    rig = Rig()
    rig.stage(frame(5, "a"), 0)
    rig.stage(frame(9, "b"), 1, holes=(Extent(20, 5),))
    assert rig.block(5) is None
    assert rig.row().version == 0
    assert rig.commit(1, 7, 2) == messages.Committed(make_version(1, 7), False)
    assert (rig.block(5), rig.block(9)) == (plain("a"), plain("b"))
    assert rig.row().version == make_version(1, 7)
    assert (rig.row().data_blocks, rig.row().committed_ns) == (2, 5)
    rig.assert_rebuilds()


def test_a_commit_that_does_not_follow_is_refused_and_names_both() -> None:
    rig = Rig()
    rig.write(1, 0, "a")
    rig.stage(frame(1, "b"), attempt=2)
    for first in (1, 3, 9):
        refused = rig.commit(first, 9, attempt=2)
        assert code(refused) == messages.OUT_OF_ORDER
        assert f"{first} to 9" in refused.text and "follow 1" in refused.text  # type: ignore[union-attr]
    assert isinstance(rig.commit(2, 9, attempt=2), messages.Committed)


def test_a_repeated_commit_is_answered_already_applied() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"))
    assert rig.commit(1, 3) == messages.Committed(make_version(1, 3), False)
    before = rig.twin.index.rows()
    assert rig.commit(1, 3) == messages.Committed(make_version(1, 3), True)
    assert rig.twin.index.rows() == before


def test_two_commits_of_one_cut_at_once_are_applied_once() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"))
    tickets = [rig.twin.submit(rig.cut(1, 3)) for _ in range(2)]
    rig.twin.settle()
    replies = [rig.twin.answers[ticket] for ticket in tickets]
    assert replies == [messages.Committed(make_version(1, 3), False), messages.Committed(make_version(1, 3), True)]


def test_a_commit_without_all_its_parts_is_refused() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"), 0)
    rig.stage(frame(2, "c"), 2)
    assert code(rig.commit(1, 1, 3)) == messages.PARTS_MISSING
    assert code(rig.commit(1, 1, 1, attempt=9)) == messages.PARTS_MISSING
    rig.stage(frame(1, "b"), 1)
    assert isinstance(rig.commit(1, 1, 3), messages.Committed)


def test_parts_behind_the_last_of_a_cut_are_left_out() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"), 0)
    rig.stage(frame(1, "b"), 1)
    assert isinstance(rig.commit(1, 1, 1), messages.Committed)
    assert (rig.block(0), rig.block(1)) == (plain("a"), None)
    rig.assert_rebuilds()


def test_a_cut_without_parts_moves_the_version_only() -> None:
    rig = Rig()
    assert rig.commit(1, 5, 0) == messages.Committed(make_version(1, 5), False)
    assert rig.row().version == make_version(1, 5)


def test_a_part_that_is_sent_twice_counts_once() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"))
    rig.stage(frame(0, "a"))
    assert code(rig.commit(1, 1, 2)) == messages.PARTS_MISSING  # It waits until the index shows the parts.
    with rig.twin.index.view() as reader:
        [attempt] = attempts_of(reader, rig.id)
    assert attempt.part_count == 1
    assert isinstance(rig.commit(1, 1), messages.Committed)
    assert rig.row().data_blocks == 1


def test_of_blocks_that_come_twice_in_a_cut_the_later_wins_and_data_over_holes() -> None:
    rig = Rig()
    rig.stage(frame(0, "old", 4), 0, holes=(Extent(10, 4),))
    rig.stage(frame(1, "new", 1) + frame(11, "data", 1), 1, holes=(Extent(3, 1),))
    rig.commit(1, 1, 2)
    assert rig.block(1) == plain("new")
    assert rig.block(3) == plain("old", 4)[3 * BLOCK_SIZE :]
    assert rig.block(11) == plain("data")
    assert rig.row().data_blocks == 5
    rig.assert_rebuilds()


def test_the_next_cut_may_be_staged_while_one_is_committed() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"), attempt=1)
    commit = rig.twin.submit(rig.cut(1, 1))
    part = rig.twin.submit(rig.part(attempt=2), frame(1, "b"))
    rig.twin.settle()
    assert isinstance(rig.twin.answers[commit], messages.Committed)
    assert rig.twin.answers[part] == messages.Done()
    assert isinstance(rig.commit(2, 2, attempt=2), messages.Committed)
    assert rig.block(1) == plain("b")


def test_a_commit_forgets_older_attempts() -> None:
    rig = Rig()
    for attempt in (1, 2, 3):
        rig.stage(frame(0, attempt), attempt=attempt)
    rig.commit(1, 1, attempt=2)
    with rig.twin.index.view() as reader:
        assert [one.attempt for one in attempts_of(reader, rig.id)] == [3]
    rig.assert_rebuilds()


def test_unfinished_cuts_are_bounded_and_the_oldest_goes() -> None:
    rig = Rig()
    for attempt in range(1, ATTEMPTS_PER_VOLUME_MAX + 4):
        assert rig.stage(frame(0, attempt), attempt=attempt) == messages.Done()
    with rig.twin.index.view() as reader:
        left = [one.attempt for one in attempts_of(reader, rig.id)]
    assert left == list(range(4, ATTEMPTS_PER_VOLUME_MAX + 4))
    assert code(rig.commit(1, 1, attempt=3)) == messages.PARTS_MISSING
    assert isinstance(rig.commit(1, 1, attempt=4), messages.Committed)
    rig.assert_rebuilds()


def test_staged_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    monkeypatch.setattr(changes, "STAGED_BYTES_MAX", 3 * BLOCK_SIZE)
    for attempt in (1, 2, 3):
        rig.stage(frame(0, attempt), attempt=attempt)
        assert code(rig.commit(1, 1, 2, attempt)) == messages.PARTS_MISSING  # The index shows the part now.
    with rig.twin.index.view() as reader:
        assert [one.attempt for one in attempts_of(reader, rig.id)] == [2, 3]
    assert code(rig.stage(frame(0, "x", 4), attempt=4)) == messages.BAD_REQUEST


def test_extents_of_a_cut_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    monkeypatch.setattr(changes, "CUT_ENTRIES_MAX", 3)
    rig.stage(frame(0, "a") + frame(2, "b"), 0)
    rig.stage(frame(4, "c"), 1, holes=(Extent(8, 2),))
    assert code(rig.commit(1, 1, parts=2)) == messages.BAD_REQUEST
    assert rig.row().version == 0
    assert isinstance(rig.commit(1, 1, parts=1), messages.Committed)


def test_an_older_epoch_is_fenced() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"))
    old_part, old_cut = rig.part(1), rig.cut(1, 1)
    old_release = messages.ReleaseVolume(rig.id, rig.epoch, rig.session)
    opened = rig.open(OTHER, take_over=True)
    assert opened.epoch == 2
    assert code(rig.twin.ask(old_part, frame(1, "b"))) == messages.FENCED
    assert code(rig.twin.ask(old_cut)) == messages.FENCED
    assert code(rig.twin.ask(old_release)) == messages.FENCED
    assert code(rig.commit(1, 1)) == messages.PARTS_MISSING
    rig.assert_rebuilds()


def test_reads_under_an_older_epoch_are_fenced_and_those_without_one_are_not() -> None:
    rig = Rig()
    rig.write(1, 0, "a")
    where = pack([Extent(0, 1)])
    old = rig.epoch
    rig.twin.read(messages.Read(rig.id, where, 0, old, rig.session))
    rig.open(OTHER, take_over=True)
    for epoch in (old, old + 2):
        with pytest.raises(RefusedError, match="is over") as caught:
            rig.twin.read(messages.Read(rig.id, where, 0, epoch))
        assert caught.value.code == messages.FENCED
        assert code(rig.twin.query(messages.MapExtents(rig.id, 0, 1, epoch))) == messages.FENCED
    for epoch in (0, rig.epoch):
        rig.twin.read(messages.Read(rig.id, where, 0, epoch))
        assert isinstance(rig.twin.query(messages.MapExtents(rig.id, 0, 1, epoch)), messages.Mapped)
    rig.twin.ask(messages.ReleaseVolume(rig.id, rig.epoch, rig.session))
    with pytest.raises(RefusedError, match="released"):
        rig.twin.read(messages.Read(rig.id, where, 0, rig.epoch))


def test_an_older_session_of_the_same_device_is_fenced_and_staged_parts_stay() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"))
    old_cut = rig.cut(1, 1)
    first = (rig.epoch, rig.session)
    rig.open()
    assert rig.epoch == first[0] and rig.session > first[1]
    assert code(rig.twin.ask(old_cut)) == messages.FENCED
    assert isinstance(rig.commit(1, 1), messages.Committed)


def test_a_commit_under_way_is_over_before_the_next_open_is_answered() -> None:
    for seed in range(20):
        rig = Rig(seed)
        rig.stage(frame(0, "a"))
        commit = rig.twin.submit(rig.cut(1, 1))
        opened = rig.twin.submit(messages.OpenVolume("vm", DEVICE))
        rig.twin.settle()
        reply = rig.twin.answers[opened]
        assert isinstance(rig.twin.answers[commit], messages.Committed)
        assert isinstance(reply, messages.Opened) and reply.row.version == make_version(1, 1)


def test_a_held_volume_is_refused_to_others() -> None:
    rig = Rig()
    assert code(rig.twin.ask(messages.OpenVolume("vm", OTHER))) == messages.VOLUME_IN_USE
    assert code(rig.twin.ask(messages.DeleteVolume("vm"))) == messages.VOLUME_IN_USE
    assert code(rig.twin.ask(messages.ResizeVolume("vm", 2 * BLOCKS * BLOCK_SIZE))) == messages.VOLUME_IN_USE
    assert rig.twin.ask(messages.ReleaseVolume(rig.id, rig.epoch, rig.session)) == messages.Done()
    assert rig.row().writer == b""
    assert rig.open(OTHER).epoch == 2


def test_a_store_behind_what_it_acknowledged_says_so() -> None:
    rig = Rig()
    rig.write(1, 0, "a")
    refused = rig.twin.ask(messages.OpenVolume("vm", DEVICE, False, make_version(1, 2)))
    assert code(refused) == messages.STORE_BEHIND
    assert isinstance(rig.open(acknowledged=make_version(1, 1)), messages.Opened)
    with pytest.raises(RefusedError, match="stands at") as caught:
        rig.twin.read(messages.Read(rig.id, pack([Extent(0, 1)]), make_version(1, 2)))
    assert caught.value.code == messages.STORE_BEHIND


def test_volumes_are_created_resized_listed_and_deleted() -> None:
    twin = StoreTwin()
    for name in ("b", "a", "c"):
        assert isinstance(twin.ask(messages.CreateVolume(name, BLOCK_SIZE)), messages.Volume)
    assert code(twin.ask(messages.CreateVolume("a", BLOCK_SIZE))) == messages.VOLUME_EXISTS
    grown = twin.ask(messages.ResizeVolume("a", 4 * BLOCK_SIZE))
    assert isinstance(grown, messages.Volume) and grown.row.size == 4 * BLOCK_SIZE
    assert code(twin.ask(messages.ResizeVolume("a", BLOCK_SIZE))) == messages.BAD_REQUEST
    page = twin.query(messages.ListVolumes("", 2))
    assert isinstance(page, messages.Volumes)
    assert ([row.name for row in page.rows], page.more) == (["a", "b"], True)
    page = twin.query(messages.ListVolumes("b", 2))
    assert isinstance(page, messages.Volumes)
    assert ([row.name for row in page.rows], page.more) == (["c"], False)
    assert twin.ask(messages.DeleteVolume("a")) == messages.Done()
    assert code(twin.query(messages.GetVolume("a"))) == messages.NO_SUCH_VOLUME
    assert isinstance(twin.ask(messages.CreateVolume("a", BLOCK_SIZE)), messages.Volume)
    for table in (Table.VOLUMES, Table.NAMES):
        assert twin.rebuilt().rows()[table] == twin.index.rows()[table]


def test_two_creations_of_one_name_at_once_make_one_volume() -> None:
    twin = StoreTwin()
    tickets = [twin.submit(messages.CreateVolume("a", BLOCK_SIZE)) for _ in range(3)]
    twin.settle()
    replies = [twin.answers[ticket] for ticket in tickets]
    assert isinstance(replies[0], messages.Volume)
    assert [code(reply) for reply in replies[1:]] == [messages.VOLUME_EXISTS] * 2


def test_a_deleted_volume_takes_its_extents_and_parts_along() -> None:
    rig = Rig()
    rig.write(1, 0, "a", 16)
    rig.stage(frame(3, "b"), attempt=9)
    rig.twin.ask(messages.ReleaseVolume(rig.id, rig.epoch, rig.session))
    rig.twin.ask(messages.DeleteVolume("vm"))
    rows = {table.value: found for table, found in rig.twin.index.rows().items()}
    assert not any(rows[name] for name in ("volumes", "names", "head", "attempts", "staged", "deleted"))


@pytest.mark.parametrize(
    "message",
    [
        messages.CreateVolume("ok", 0),
        messages.CreateVolume("ok", -BLOCK_SIZE),
        messages.CreateVolume("ok", BLOCK_SIZE + 1),
        messages.CreateVolume("ok", 1 << 60),
        messages.CreateVolume("", BLOCK_SIZE),
        messages.CreateVolume("../etc", BLOCK_SIZE),
        messages.CreateVolume("a" * 129, BLOCK_SIZE),
        messages.CreateVolume("a\nb", BLOCK_SIZE),
        messages.ResizeVolume("vm", 3),
        messages.OpenVolume("vm", b"short"),
        messages.OpenVolume("vm", bytes(16)),
        messages.ListVolumes("", 0),
        messages.MapExtents(b"", 0, 0),
        messages.MapExtents(b"", 0, BLOCKS + 1),
        messages.MapExtents(b"", -1, 1),
        messages.MapExtents(b"", BLOCKS, 1),
        messages.Changed(b"", 0, BLOCKS + 1),
        messages.Changed(b"", 0, -1),
    ],
    ids=str,
)
def test_malformed_requests_are_refused(message: messages.AnyMessage) -> None:
    rig = Rig()
    match message:
        case messages.MapExtents():
            reply = rig.twin.query(messages.MapExtents(rig.id, message.start, message.count))
        case messages.Changed():
            reply = rig.twin.query(messages.Changed(rig.id, message.since, message.start))
        case messages.ListVolumes():
            reply = rig.twin.query(message)
        case messages.OpenVolume():
            reply = rig.twin.ask(message)
        case _:
            rig.twin.ask(messages.ReleaseVolume(rig.id, rig.epoch, rig.session))
            reply = rig.twin.ask(message)  # type: ignore[arg-type]
    assert code(reply) == messages.BAD_REQUEST
    assert not rig.twin.engine.error


def test_malformed_parts_and_cuts_are_refused() -> None:
    rig = Rig()
    cases = [
        rig.commit_alone(frame(BLOCKS, "a")),
        rig.commit_alone(frame(BLOCKS - 1, "a", 2)),
        rig.commit_alone(b"", Extent(BLOCKS - 1, 2)),
        rig.stage(b"", index=-1),
        rig.stage(b"", index=65536),
        rig.stage(b"", attempt=-1),
        rig.stage(b"", attempt=1 << 64),
        rig.twin.ask(messages.StagePart(rig.id, rig.epoch, rig.session, 1, 0, b"odd")),
        rig.commit(0, 0),
        rig.commit(1, 0),
        rig.commit(1, 1 << 44),
        rig.commit(1, 1, -1),
        rig.commit(1, 1, 65537),
        rig.commit(1, 1, attempt=-1),
    ]
    assert {code(reply) for reply in cases} == {messages.BAD_REQUEST}


def test_unknown_volumes_are_said_to_be_unknown() -> None:
    twin = StoreTwin()
    for name in ("nope", "", "x" * 5000, "\0"):
        for message in (messages.DeleteVolume(name), messages.OpenVolume(name, DEVICE)):
            assert code(twin.ask(message)) == messages.NO_SUCH_VOLUME
        assert code(twin.query(messages.GetVolume(name))) == messages.NO_SUCH_VOLUME
    for volume in (b"", b"x" * 16, b"y" * 9999):
        for change in (messages.ReleaseVolume(volume, 1, 1), messages.CommitCut(volume, 1, 1, 1, 1, 1, 1, 1)):
            assert code(twin.ask(change)) == messages.NO_SUCH_VOLUME
        assert code(twin.query(messages.MapExtents(volume, 0, 1))) == messages.NO_SUCH_VOLUME


def test_reads_that_are_too_large_or_outside_are_refused() -> None:
    rig = Rig()
    for extents in (
        [],
        [Extent(0, READ_BLOCKS_MAX + 1)],
        [Extent(BLOCKS, 1)],
        [Extent(BLOCKS - 1, 2)],
        [Extent(at * 2, 1) for at in range(READ_BLOCKS_MAX + 1)],
    ):
        with pytest.raises(RefusedError) as caught:
            rig.twin.read(messages.Read(rig.id, pack(extents)))
        assert caught.value.code == messages.BAD_REQUEST


def test_a_frame_that_several_pieces_use_is_sent_once() -> None:
    rig = Rig()
    whole = frame(0, "a", 16)
    rig.stage(whole)
    rig.commit(1, 1)
    rig.write(2, 5, "b")
    _, payload = rig.twin.read(messages.Read(rig.id, pack([Extent(0, 16)])))
    assert len(payload) == len(whole) + len(frame(5, "b"))
    pieces = rig.twin.plain(rig.id, Extent(0, 16))
    assert [(piece.extent, piece.version) for piece in pieces] == [
        (Extent(0, 5), make_version(1, 1)),
        (Extent(5, 1), make_version(1, 2)),
        (Extent(6, 10), make_version(1, 1)),
    ]


def test_a_damaged_frame_is_an_error_that_names_its_place() -> None:
    rig = Rig()
    rig.write(1, 0, "a", 4)
    [name] = [name for name, whole in rig.twin.backend.segments.items() if len(whole) > 16384]
    damaged = bytearray(rig.twin.backend.segments[name])
    damaged[len(damaged) // 2] ^= 1
    rig.twin.backend.segments[name] = bytes(damaged)
    with pytest.raises(CorruptionError, match=f"segment {name} offset"):
        rig.twin.read(messages.Read(rig.id, pack([Extent(0, 1)])))


def test_changes_since_a_version_are_listed() -> None:
    rig = Rig()
    rig.write(1, 0, "a", 10)
    rig.stage(frame(4, "b", 2), holes=(Extent(8, 2),), attempt=2)
    rig.commit(2, 2, attempt=2)
    reply = rig.twin.query(messages.Changed(rig.id, make_version(1, 1)))
    assert isinstance(reply, messages.Changes)
    assert (reply.next_start, reply.version) == (-1, make_version(1, 2))
    assert len(reply.pieces) == 2 * 28
    everything = rig.twin.query(messages.Changed(rig.id, 0))
    assert isinstance(everything, messages.Changes) and len(everything.pieces) == 4 * 28


def by_block(pieces: bytes) -> dict[int, tuple[int, int]]:
    """Return frame and version of each block: pages part what would be one piece."""
    rows = np.frombuffer(pieces, messages.PIECE_DTYPE).tolist()
    return {lba: (frame, version) for start, count, frame, _, version in rows for lba in range(start, start + count)}


def test_long_lists_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    holes = tuple(Extent(at * 3, 1 + at % 2) for at in range(200))
    rig.stage(b"".join(frame(at, at, 16) for at in range(0, 608, 16)))
    rig.commit(1, 1)
    rig.stage(b"", holes=holes, attempt=2)
    rig.commit(2, 2, attempt=2)
    whole = rig.twin.query(messages.Changed(rig.id, 0))
    mapped = rig.twin.query(messages.MapExtents(rig.id, 0, BLOCKS))
    assert isinstance(whole, messages.Changes) and isinstance(mapped, messages.Mapped)
    monkeypatch.setattr(queries, "PIECES_MAX", 7)
    monkeypatch.setattr(queries, "SCAN_ENTRIES_MAX", 5)
    pieces, start = b"", 0
    while start >= 0:
        page = rig.twin.query(messages.Changed(rig.id, 0, start))
        assert isinstance(page, messages.Changes) and len(page.pieces) <= 7 * 28
        pieces, start = pieces + page.pieces, page.next_start
    assert by_block(pieces) == by_block(whole.pieces)
    pieces, start = b"", 0
    while start < BLOCKS:
        part = rig.twin.query(messages.MapExtents(rig.id, start, BLOCKS - start))
        assert isinstance(part, messages.Mapped) and 0 < len(part.pieces) <= 7 * 28
        start = sum(int(count) for count in np.frombuffer(part.pieces, messages.PIECE_DTYPE)["count"]) + start
        pieces += part.pieces
    assert by_block(pieces) == by_block(mapped.pieces)


def test_changes_below_the_floor_are_gone() -> None:
    rig = Rig()
    with rig.twin.index.view() as reader:
        row = find_name(reader, "vm")
    assert row is not None
    rig.twin.index.update(lambda writer: put_volume(writer, row._replace(floor=7)))
    assert code(rig.twin.query(messages.Changed(rig.id, 6))) == messages.HISTORY_GONE
    assert isinstance(rig.twin.query(messages.Changed(rig.id, 7)), messages.Changes)


def test_one_volume_can_not_queue_without_bound() -> None:
    rig = Rig()
    tickets = [rig.twin.submit(rig.cut(1, 1)) for _ in range(WAITING_PER_VOLUME_MAX + 5)]
    refused = [ticket for ticket in tickets if ticket in rig.twin.answers]
    rig.stage(frame(0, "a"))
    rig.twin.settle()
    assert all(ticket in rig.twin.answers for ticket in tickets)
    assert all(code(rig.twin.answers[ticket]) in (messages.FAILED, messages.PARTS_MISSING) for ticket in refused)


def test_a_stopping_store_takes_no_changes_and_brings_the_index_up() -> None:
    rig = Rig()
    rig.stage(frame(0, "a"))
    rig.twin.engine.stop()
    rig.twin.collect()
    assert code(rig.twin.ask(messages.CreateVolume("x", BLOCK_SIZE))) == messages.STOPPING
    rig.twin.settle()
    assert rig.twin.engine.idle
    rig.assert_rebuilds()

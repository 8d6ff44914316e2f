"""Crashes and failing disks: what was answered stays, no cut is half there, segments alone give everything back."""

import random

import numpy as np
import pytest
from store_daemon import DEVICE, frame, plain
from store_twins import STORE, Crash, DictIndex, MemoryBackend, StoreTwin

from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent, pack
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE, make_version, sequence_of
from forebay_store.engine.ports import SegmentMissingError
from forebay_store.engine.replay import replay
from forebay_store.format.rows import Table
from forebay_wire import messages

BLOCKS = 64
VOLUMES = ("red", "green")
Blocks = dict[int, object]


class Model:
    """What one volume must hold: the cuts that were acknowledged, and the one that may or may not have been."""

    def __init__(self) -> None:
        self.states: list[Blocks] = [{}]  # by sequence

    def next_state(self, changes: Blocks) -> Blocks:
        state = {**self.states[-1], **changes}
        return {lba: seed for lba, seed in state.items() if seed is not None}


class Load:
    """Writes cuts to two volumes of a store in memory, and compares after each crash."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.backend = MemoryBackend()
        self.older = DictIndex()
        self.twin = StoreTwin(self.backend, DictIndex(), seed=seed)
        self.ids: dict[str, bytes] = {}
        self.models = {name: Model() for name in VOLUMES}
        self.maybe: dict[str, Blocks] = {}
        for name in VOLUMES:
            created = self.twin.ask(messages.CreateVolume(name, BLOCKS * BLOCK_SIZE))
            assert isinstance(created, messages.Volume)
            self.ids[name] = created.row.id
        self.older = self.twin.index.copy()

    def round(self) -> bool:
        """Write a cut to each volume; tell whether both were acknowledged."""
        cuts = {name: self.submit(name) for name in VOLUMES}
        commits = {name: self.twin.submit(cut) for name, cut in cuts.items() if cut is not None}
        try:
            self.twin.settle()
        finally:
            for name, ticket in commits.items():
                if isinstance(self.twin.answers.get(ticket), messages.Committed):
                    self.models[name].states.append(self.maybe.pop(name))
        return not self.maybe

    def submit(self, name: str) -> messages.CommitCut | None:
        """Stage a cut of one or two parts; return its commit."""
        opened = self.twin.ask(messages.OpenVolume(name, DEVICE))
        if not isinstance(opened, messages.Opened):
            return None
        model = self.models[name]
        assert sequence_of(opened.row.version) == len(model.states) - 1
        changes: Blocks = {}
        attempt = self.random.getrandbits(60)
        parts = self.random.randint(1, 2)
        for index in range(parts):
            start, seed = self.random.randrange(BLOCKS - 8), self.random.getrandbits(30)
            holes = Extent(self.random.randrange(BLOCKS - 4), 3)
            changes = {**dict.fromkeys(range(holes.start, holes.end)), **changes}  # Data counts.
            changes |= {start + at: (seed, at) for at in range(2)}
            part = messages.StagePart(self.ids[name], opened.epoch, opened.session, attempt, index, pack([holes]))
            self.twin.submit(part, frame(start, (seed, 0)) + frame(start + 1, (seed, 1)))
        self.maybe[name] = model.next_state(changes)
        sequence = len(model.states)
        return messages.CommitCut(
            self.ids[name], opened.epoch, opened.session, attempt, parts, sequence, sequence, committed_ns=sequence
        )

    def restart(self) -> None:
        """Start again from the segments and an index that may have lost its newest transactions."""
        index = self.random.choice([self.twin.index, self.older])
        self.twin = StoreTwin(self.backend, index.copy(), seed=self.random.getrandbits(30))
        self.older = self.twin.index.copy()
        self.adopt()
        self.compare()

    def adopt(self) -> None:
        """Look which of the cuts without an acknowledgement are there."""
        for name, unknown in self.maybe.items():
            reply = self.twin.query(messages.GetVolume(name))
            assert isinstance(reply, messages.Volume)
            if sequence_of(reply.row.version) == len(self.models[name].states):
                self.models[name].states.append(unknown)
        self.maybe.clear()

    def compare(self) -> None:
        for name in VOLUMES:
            self.compare_lists(name)
        for name, model in self.models.items():
            reply = self.twin.query(messages.GetVolume(name))
            assert isinstance(reply, messages.Volume)
            assert sequence_of(reply.row.version) == len(model.states) - 1
            state = model.states[-1]
            for piece in self.twin.plain(self.ids[name], Extent(0, BLOCKS)):
                for at in range(piece.extent.count):
                    lba = piece.extent.start + at
                    found = None if piece.plain is None else bytes(piece.plain[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
                    expected = plain(state[lba]) if lba in state else None
                    assert found == expected, f"{name} block {lba}"
            assert reply.row.data_blocks == len(state)
        assert self.twin.rebuilt().rows() == self.twin.index.rows()

    def compare_lists(self, name: str) -> None:
        """MapExtents and Changed must say of each block what reading it says."""
        pieces = self.twin.plain(self.ids[name], Extent(0, BLOCKS))
        blocks = {
            lba: (piece.plain is None, piece.version)
            for piece in pieces
            for lba in range(piece.extent.start, piece.extent.end)
        }
        mapped = self.twin.query(messages.MapExtents(self.ids[name], 0, BLOCKS))
        assert isinstance(mapped, messages.Mapped)
        assert listed(mapped.pieces) == blocks
        since = make_version(1, self.random.randrange(len(self.models[name].states)))
        changed = self.twin.query(messages.Changed(self.ids[name], since))
        assert isinstance(changed, messages.Changes) and changed.next_start == -1
        assert listed(changed.pieces) == {lba: found for lba, found in blocks.items() if found[1] > since}


def listed(pieces: bytes) -> dict[int, tuple[bool, int]]:
    """Return of each block in a piece table whether it is a hole, and its version."""
    return {
        lba: (frame_index == messages.HOLE_FRAME, version)
        for start, count, frame_index, _, version in np.frombuffer(pieces, messages.PIECE_DTYPE).tolist()
        for lba in range(start, start + count)
    }


@pytest.mark.parametrize("seed", range(12))
def test_acknowledged_cuts_survive_crashes_and_no_cut_is_half_there(seed: int) -> None:
    load = Load(seed)
    for _ in range(12):
        load.backend.fault = load.random.choice(["", "crash-before", "crash-after"])
        try:
            assert load.round()
            load.compare()
        except Crash:
            load.restart()
            load.backend.fault = ""


@pytest.mark.parametrize("seed", range(4))
def test_a_full_disk_refuses_and_goes_on_when_there_is_space(seed: int) -> None:
    load = Load(seed)
    for turn in range(12):
        load.backend.fault = "no-space" if turn % 2 else ""
        load.twin.index.full = load.random.random() < 0.3
        if not load.round():
            load.backend.fault, load.twin.index.full = "", False
            load.twin.ask(messages.DeleteVolume("none"))  # Whatever is asked brings the index up.
            load.adopt()
        assert not load.twin.engine.error
    load.compare()
    assert len(load.models["red"].states) > 3


def test_no_space_is_answered_as_such_and_the_request_may_be_repeated() -> None:
    twin = StoreTwin()
    twin.backend.fault = "no-space"
    refused = twin.ask(messages.CreateVolume("vm", BLOCK_SIZE))
    assert isinstance(refused, messages.Failed) and refused.code == messages.NO_SPACE
    assert isinstance(twin.query(messages.GetVolume("vm")), messages.Failed)
    assert isinstance(twin.ask(messages.CreateVolume("vm", BLOCK_SIZE)), messages.Volume)
    assert twin.rebuilt().rows() == twin.index.rows()


def test_an_index_without_space_keeps_what_is_durable_and_shows_it_later() -> None:
    twin = StoreTwin()
    twin.index.full = True
    refused = twin.ask(messages.CreateVolume("vm", BLOCK_SIZE))
    assert isinstance(refused, messages.Failed) and refused.code == messages.NO_SPACE
    again = twin.ask(messages.CreateVolume("other", BLOCK_SIZE))
    assert isinstance(again, messages.Failed) and again.code == messages.NO_SPACE
    twin.index.full = False
    still = twin.ask(messages.CreateVolume("other", BLOCK_SIZE))
    assert isinstance(still, messages.Failed) and still.code == messages.NO_SPACE  # This one brings the index up.
    assert isinstance(twin.ask(messages.CreateVolume("other", BLOCK_SIZE)), messages.Volume)
    assert isinstance(twin.query(messages.GetVolume("vm")), messages.Volume)


def test_a_segment_that_was_not_begun_is_refused_and_may_be_repeated() -> None:
    twin = StoreTwin()
    twin.backend.fault = "nothing-kept"
    refused = twin.ask(messages.CreateVolume("vm", BLOCK_SIZE))
    assert isinstance(refused, messages.Failed) and refused.code == messages.FAILED and "repeat" in refused.text
    assert not twin.engine.error
    assert isinstance(twin.ask(messages.CreateVolume("vm", BLOCK_SIZE)), messages.Volume)


@pytest.mark.parametrize("fault", ["broken", "broken-after"])
def test_a_broken_disk_refuses_all_changes_until_the_next_start(fault: str) -> None:
    twin = StoreTwin()
    twin.ask(messages.CreateVolume("kept", BLOCK_SIZE))
    twin.backend.fault = fault
    tickets = [twin.submit(messages.CreateVolume(name, BLOCK_SIZE)) for name in ("a", "b", "a")]
    twin.settle()
    for ticket in tickets:
        reply = twin.answers[ticket]
        assert isinstance(reply, messages.Failed) and reply.code == messages.FAILED
    assert "the disk broke" in twin.engine.error and twin.engine.idle
    later = twin.ask(messages.CreateVolume("c", BLOCK_SIZE))
    assert isinstance(later, messages.Failed) and "restart the store" in later.text
    assert isinstance(twin.query(messages.GetVolume("kept")), messages.Volume)
    restarted = StoreTwin(twin.backend, twin.index, seed=1)
    found = restarted.query(messages.GetVolume("a"))
    assert isinstance(found, messages.Volume) == (fault == "broken-after")
    assert isinstance(restarted.ask(messages.CreateVolume("c", BLOCK_SIZE)), messages.Volume)


def test_a_lost_acknowledgement_is_repaired_by_repeating_the_commit() -> None:
    load = Load(1)
    cut = load.submit("red")
    assert cut is not None
    load.twin.settle()
    load.backend.fault = "crash-after"
    load.twin.submit(cut)
    with pytest.raises(Crash):
        load.twin.settle()
    load.restart()
    opened = load.twin.ask(messages.OpenVolume("red", DEVICE))
    assert isinstance(opened, messages.Opened)
    again = load.twin.ask(
        messages.CommitCut(cut.volume, opened.epoch, opened.session, cut.attempt, cut.part_count, 1, 1, 1)
    )
    assert isinstance(again, messages.Committed) and again.already_applied


def test_parts_that_were_staged_before_a_crash_can_be_committed_after_it() -> None:
    load = Load(2)
    cut = load.submit("red")
    assert cut is not None
    load.twin.settle()
    expected = load.maybe.pop("red")
    load.restart()
    opened = load.twin.ask(messages.OpenVolume("red", DEVICE))
    assert isinstance(opened, messages.Opened)
    reply = load.twin.ask(
        messages.CommitCut(cut.volume, opened.epoch, opened.session, cut.attempt, cut.part_count, 1, 1, 1)
    )
    assert isinstance(reply, messages.Committed) and not reply.already_applied
    load.models["red"].states.append(expected)
    load.compare()


def test_a_missing_segment_is_named_at_start() -> None:
    load = Load(3)
    for _ in range(3):
        load.round()
    names = load.backend.list()
    for missing in names[1:]:
        backend = MemoryBackend()
        backend.segments = {name: whole for name, whole in load.backend.segments.items() if name != missing}
        if missing == names[-1]:
            with pytest.raises(SegmentMissingError, match=missing):
                replay(backend, load.twin.index.copy(), store=STORE)
        else:
            with pytest.raises(SegmentMissingError, match=missing):
                replay(backend, DictIndex(), store=STORE)


def test_a_foreign_or_damaged_segment_stops_the_start_and_is_named() -> None:
    load = Load(4)
    load.round()
    name = load.backend.list()[-1]
    with pytest.raises(CorruptionError, match=f"store of a segment in segment {load.backend.list()[0]}"):
        replay(load.backend, DictIndex(), store=b"some other store")
    whole = load.backend.segments[name]
    load.backend.segments[name] = whole[:-1]
    with pytest.raises(CorruptionError, match=name):
        replay(load.backend, DictIndex(), store=STORE)
    load.backend.segments[name] = load.backend.segments[load.backend.list()[-2]]
    with pytest.raises(CorruptionError, match="name in a segment"):
        replay(load.backend, DictIndex(), store=STORE)


def test_a_large_deleted_volume_goes_in_steps_and_on_after_a_crash() -> None:
    from forebay_store.limits import PURGE_ENTRIES_MAX

    twin = StoreTwin()
    created = twin.ask(messages.CreateVolume("vm", 1 << 30))
    opened = twin.ask(messages.OpenVolume("vm", DEVICE))
    assert isinstance(created, messages.Volume) and isinstance(opened, messages.Opened)
    key = (created.row.id, opened.epoch, opened.session)
    builder = FrameBuilder()
    for part in range(2):
        starts = range(part * PURGE_ENTRIES_MAX, (part + 1) * PURGE_ENTRIES_MAX, 16)
        frames = [builder.build([Extent(2 * (at + i), 1) for i in range(16)], b"x" * (16 << 12)) for at in starts]
        twin.ask(messages.StagePart(*key, 1, part), b"".join(frames))
    assert isinstance(twin.ask(messages.CommitCut(*key, 1, 2, 1, 1, 1)), messages.Committed)
    twin.ask(messages.ReleaseVolume(*key))
    ticket = twin.submit(messages.DeleteVolume("vm"))
    while ticket not in twin.answers:
        twin.step()
    assert len(twin.index.rows()[Table.HEAD]) > PURGE_ENTRIES_MAX
    while len(twin.index.rows()[Table.HEAD]) > PURGE_ENTRIES_MAX:
        twin.step()
    assert len(twin.index.rows()[Table.HEAD]) == PURGE_ENTRIES_MAX
    restarted = StoreTwin(twin.backend, twin.index.copy())
    restarted.collect()
    restarted.settle()
    assert not restarted.index.rows()[Table.HEAD] and not restarted.index.rows()[Table.DELETED]
    assert restarted.rebuilt().rows() == restarted.index.rows()

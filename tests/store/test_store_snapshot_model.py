"""Snapshots, clones, rollbacks and deletes at random against plain dictionaries: one copy of the content per snapshot.

Whatever happens later, a snapshot reads as its copy; a rebuild gives the same rows; counters are exact. Run one seed
again: `Load(SEED).run(STEPS)`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from clean_load import EAGER
from store_books import check_books
from store_daemon import DEVICE, frame, plain
from store_twins import STORE, StoreTwin

from forebay_core.extents import Extent, merge, pack
from forebay_core.units import BLOCK_SIZE, sequence_of
from forebay_store.engine.replay import replay
from forebay_store.engine.space import RESTING
from forebay_store.format.rows import Table
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_wire import messages
from forebay_wire.messages import PIECE_DTYPE

SEEDS = 24
STEPS = 70
BLOCKS_MAX = 80
Content = dict[int, object]  # by block, the seed of its plain bytes; absent: zeros


@dataclass
class Snap:
    id: bytes
    version: int
    blocks: int
    content: Content
    touched: dict[int, int]


@dataclass
class Volume:
    id: bytes
    blocks: int
    content: Content
    version: int
    touched: dict[int, int] = field(default_factory=dict)  # by block, the version that last wrote or trimmed it
    snapshots: dict[str, Snap] = field(default_factory=dict)
    origin: bytes = b""
    opened: messages.Opened | None = None


class Load:
    """A store under random requests, and what it must show."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"load {seed}")
        self.twin = StoreTwin(seed=seed)
        self.volumes: dict[str, Volume] = {}
        self.made = 0
        self.copied = 0  # bytes, by the cleaner
        self.create()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        self.settle()
        self.check()

    def step(self) -> None:
        name = self.random.choice(sorted(self.volumes))
        volume = self.volumes[name]
        verbs = [self.write] * 8 + [self.snapshot] * 4 + [self.delete_snapshot] * 2
        verbs += [
            self.roll_back,
            self.clone,
            self.flatten,
            self.resize,
            self.delete,
            self.restart,
            self.clean,
            self.check_some,
        ]
        self.random.choice(verbs)(name, volume)

    def fresh(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def ask(self, message: object, payload: bytes = b"") -> messages.AnyMessage:
        """See a request through; what goes on in the background may stay behind."""
        ticket = self.twin.submit(message, payload)  # type: ignore[arg-type]
        while ticket not in self.twin.answers:
            self.twin.step()
        return self.twin.answers[ticket]

    def settle(self) -> None:
        self.twin.settle()

    # Requests.

    def create(self) -> None:
        name, blocks = self.fresh("vm"), self.random.randrange(20, BLOCKS_MAX)
        created = self.ask(messages.CreateVolume(name, blocks * BLOCK_SIZE))
        assert isinstance(created, messages.Volume)
        self.volumes[name] = Volume(created.row.id, blocks, {}, 0)

    def open(self, name: str, volume: Volume) -> messages.Opened:
        if volume.opened is None:
            opened = self.ask(messages.OpenVolume(name, DEVICE))
            assert isinstance(opened, messages.Opened), opened
            assert opened.row.version == volume.version
            volume.opened = opened
        return volume.opened

    def release(self, volume: Volume) -> None:
        if volume.opened is not None:
            opened, volume.opened = volume.opened, None
            assert self.ask(messages.ReleaseVolume(volume.id, opened.epoch, opened.session)) == messages.Done()

    def write(self, name: str, volume: Volume) -> None:
        """One cut of random data and holes, perhaps with a snapshot or a resize at its end."""
        opened = self.open(name, volume)
        key = (volume.id, opened.epoch, opened.session)
        first = sequence_of(volume.version) + 1
        last = first + self.random.randrange(3)
        version = opened.epoch << 44 | last
        parts = self.random.randrange(3)
        closing_kind, blocks = self.random.randrange(6), self.random.randrange(10, BLOCKS_MAX)
        written: set[int] = set()
        for index in range(parts):
            holes = merge(self.extent(volume, 24) for _ in range(self.random.randrange(3)))
            payload = b""
            for lba in sorted({lba for hole in holes for lba in range(hole.start, hole.end)} - written):
                self.change(volume, Extent(lba, 1), version, None)
            for _ in range(self.random.randrange(4)):
                extent, seed = self.extent(volume, 5), self.fresh("data")
                payload += frame(extent.start, seed, extent.count)
                self.change(volume, extent, version, seed)
                written.update(range(extent.start, extent.end))
            part = messages.StagePart(*key, first, index, pack(holes))
            assert self.ask(part, payload) == messages.Done()
        closing: dict[str, object] = {}
        snap = ""
        match closing_kind:
            case 0 | 1:
                snap = self.fresh("s")
                closing = {"snapshot": self.random.randbytes(16), "snapshot_name": snap, "snapshot_ns": 5}
            case 2:
                self.resize_to(volume, blocks, version)
                closing = {"size": blocks * BLOCK_SIZE}
        commit = messages.CommitCut(*key, first, parts, first, last, 1, **closing)  # type: ignore[arg-type]
        assert isinstance(reply := self.ask(commit), messages.Committed), reply
        volume.version = version
        if snap:
            self.note_snapshot(volume, snap, commit.snapshot)

    def snapshot(self, name: str, volume: Volume) -> None:
        self.release(volume)
        snap = self.fresh("s")
        taken = self.ask(messages.CreateSnapshot((name,), snap))
        assert isinstance(taken, messages.SnapshotTaken), taken
        volume.version += 1
        assert taken.row.version == volume.version
        self.note_snapshot(volume, snap, taken.row.id)

    def delete_snapshot(self, name: str, volume: Volume) -> None:
        if not volume.snapshots:
            return
        snap = self.random.choice(sorted(volume.snapshots))
        tied = self.ties(volume.snapshots[snap].id)
        reply = self.ask(messages.DeleteSnapshot(name, snap))
        if reply == messages.Done():
            del volume.snapshots[snap]
        else:
            assert isinstance(reply, messages.Failed) and reply.code == messages.HAS_CLONES and tied

    def roll_back(self, name: str, volume: Volume) -> None:
        if not volume.snapshots:
            return
        self.release(volume)
        self.settle()  # A volume that is being flattened can't be rolled back.
        snap = volume.snapshots[self.random.choice(sorted(volume.snapshots))]
        names = [one for one, found in volume.snapshots.items() if found is snap]
        reply = self.ask(messages.RollbackVolume(name, names[0]))
        assert isinstance(reply, messages.Volume), reply
        volume.version += 1
        for lba, touched in volume.touched.items():
            if touched > snap.version:
                volume.touched[lba] = volume.version
        volume.content, volume.blocks = dict(snap.content), snap.blocks
        volume.origin = reply.row.origin

    def clone(self, name: str, volume: Volume) -> None:
        if not volume.snapshots or len(self.volumes) > 5:
            return
        snap, made = self.random.choice(sorted(volume.snapshots)), self.fresh("vm")
        reply = self.ask(messages.CloneVolume(name, snap, made))
        assert isinstance(reply, messages.Volume), reply
        found = volume.snapshots[snap]
        self.volumes[made] = Volume(reply.row.id, found.blocks, dict(found.content), 1, origin=found.id)

    def flatten(self, name: str, volume: Volume) -> None:
        reply = self.ask(messages.FlattenVolume(name))
        if reply == messages.Done():
            assert volume.origin
        else:  # It is none, or an earlier request was seen through meanwhile.
            assert isinstance(reply, messages.Failed) and reply.code == messages.BAD_REQUEST
        if self.random.random() < 0.5:
            self.settle()
        self.look_at_origins()

    def resize(self, name: str, volume: Volume) -> None:
        self.release(volume)
        before = volume.blocks
        after = self.random.randrange(10, BLOCKS_MAX)
        self.resize_to(volume, after, volume.version + 1)
        reply = self.ask(messages.ResizeVolume(name, after * BLOCK_SIZE, True))
        assert isinstance(reply, messages.Volume), reply
        volume.version += after < before
        assert reply.row.version == volume.version

    def delete(self, name: str, volume: Volume) -> None:
        self.release(volume)
        reply = self.ask(messages.DeleteVolume(name))
        if volume.snapshots:
            assert isinstance(reply, messages.Failed) and reply.code == messages.HAS_CLONES
            return
        assert reply == messages.Done()
        del self.volumes[name]
        self.create()

    def restart(self, *_: object) -> None:
        """Kill the store, perhaps with an index that lags behind; its cache opens again."""
        index = self.twin.index.copy()
        for volume in self.volumes.values():
            if self.random.random() < 0.5:
                self.release(volume)
        if self.random.random() < 0.5:
            index = self.twin.index.copy()
        self.twin = StoreTwin(self.twin.backend, index, seed=self.random.randrange(1 << 32))
        self.twin.collect()
        for name, volume in self.volumes.items():
            if volume.opened is not None:  # The device holds it still, the session is over.
                volume.opened = None
                self.open(name, volume)
        self.look_at_origins()

    def clean(self, *_: object) -> None:
        """Let the cleaner make a pass, with requests between its jobs."""
        names = sorted(self.volumes)

        def between() -> None:
            if self.random.random() < 0.3:
                name = self.random.choice(names)
                self.random.choice([self.write, self.delete_snapshot, self.flatten])(name, self.volumes[name])

        self.copied += self.twin.clean(self.random.choice([EAGER, RESTING]), between).counts.bytes_copied

    def check_some(self, *_: object) -> None:
        self.check(sample=2)

    # What must be.

    def extent(self, volume: Volume, count_max: int) -> Extent:
        start = self.random.randrange(volume.blocks)
        return Extent(start, min(self.random.randint(1, count_max), volume.blocks - start))

    def change(self, volume: Volume, extent: Extent, version: int, seed: object) -> None:
        for index in range(extent.count):
            volume.touched[extent.start + index] = version
            volume.content.pop(extent.start + index, None)
            if seed is not None:
                volume.content[extent.start + index] = (seed, extent.count, index)

    def resize_to(self, volume: Volume, blocks: int, version: int) -> None:
        if blocks < volume.blocks:
            self.change(volume, Extent(blocks, volume.blocks - blocks), version, None)
        volume.blocks = blocks

    def note_snapshot(self, volume: Volume, name: str, snapshot: bytes) -> None:
        volume.snapshots[name] = Snap(
            snapshot, volume.version, volume.blocks, dict(volume.content), dict(volume.touched)
        )

    def ties(self, snapshot: bytes) -> bool:
        """Ask the store whether something reads through: when flattening ends is its own affair."""
        reply = self.twin.query(messages.GetSnapshot(id=snapshot))
        assert isinstance(reply, messages.Snapshot)
        return bool(reply.row.clones)

    def look_at_origins(self) -> None:
        for name, volume in self.volumes.items():
            reply = self.twin.query(messages.GetVolume(name))
            assert isinstance(reply, messages.Volume)
            assert reply.row.origin in (volume.origin, b"")
            if not reply.row.origin:
                volume.origin = b""

    def check(self, sample: int | None = None) -> None:
        self.look_at_origins()
        check_books(self.twin.index)
        for name, volume in self.volumes.items():
            reply = self.twin.query(messages.GetVolume(name))
            assert isinstance(reply, messages.Volume)
            assert (reply.row.version, reply.row.size) == (volume.version, volume.blocks * BLOCK_SIZE)
            self.check_content(volume.id, volume.blocks, volume.content)
            self.check_list(name, volume)
            snaps = list(volume.snapshots.values())
            for snap in snaps if sample is None else self.random.sample(snaps, min(sample, len(snaps))):
                self.check_content(snap.id, snap.blocks, snap.content)
                self.check_changed(volume.id, volume.blocks, volume.content, volume.touched, snap)
                later = self.random.choice(snaps)
                if later.version >= snap.version:
                    self.check_changed(later.id, later.blocks, later.content, later.touched, snap)
        if sample is None:
            self.twin.settle()
            assert self.twin.rebuilt().rows() == self.twin.index.rows()
            self.check_lmdb()

    def check_lmdb(self) -> None:
        """The index that daemons use comes to the same rows."""
        with TemporaryDirectory() as folder:
            index = LmdbIndex(Path(folder), lasting=False)
            replay(self.twin.backend, index, store=STORE)
            with index.view() as reader:
                found = {table: dict(reader.scan(table, b"")) for table in Table}
            index.close()
        assert found == self.twin.index.rows()

    def check_content(self, shown: bytes, blocks: int, content: Content) -> None:
        pieces = self.twin.plain(shown, Extent(0, blocks), through=True)
        found: Content = {}
        for piece in pieces:
            for index in range(piece.extent.count if piece.plain is not None else 0):
                assert piece.plain is not None
                found[piece.extent.start + index] = bytes(piece.plain[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        assert found == {lba: content_of(seed) for lba, seed in content.items()}
        mapped = self.twin.query(messages.MapExtents(shown, 0, blocks, through=True))
        assert isinstance(mapped, messages.Mapped)
        assert {lba for lba, frame in by_block(mapped.pieces).items() if frame == 0} == set(content)

    def check_changed(self, shown: bytes, blocks: int, content: Content, touched: dict[int, int], since: Snap) -> None:
        reply = self.twin.query(messages.Changed(shown, 0, since_snapshot=since.id))
        assert isinstance(reply, messages.Changes), reply
        listed = by_block(reply.pieces)
        both = range(min(blocks, since.blocks))
        differs = {lba for lba in both if content.get(lba) != since.content.get(lba)}
        assert differs <= set(listed) <= {lba for lba, version in touched.items() if version > since.version}
        assert all(kind == messages.ORIGIN_FRAME or (kind == 0) == (lba in content) for lba, kind in listed.items())

    def check_list(self, name: str, volume: Volume) -> None:
        reply = self.twin.query(messages.ListSnapshots(name))
        assert isinstance(reply, messages.Snapshots)
        assert {(row.name, row.id, row.version, row.size) for row in reply.rows} == {
            (snap, one.id, one.version, one.blocks * BLOCK_SIZE) for snap, one in volume.snapshots.items()
        }


def content_of(seed: object) -> bytes:
    name, count, index = seed  # type: ignore[misc]
    return plain(name, count)[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]


def by_block(pieces: bytes) -> dict[int, int]:
    rows = np.frombuffer(pieces, PIECE_DTYPE).tolist()
    return {lba: frame for start, count, frame, _, _ in rows for lba in range(start, start + count)}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_snapshot_reads_as_it_was_taken_whatever_comes_later(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_store.engine.background.PURGE_ENTRIES_MAX", 5)
    monkeypatch.setattr("forebay_store.engine.background.SWEEP_ENTRIES_MAX", 2)
    monkeypatch.setattr("forebay_store.engine.sweeping.TRIM_ENTRIES_MAX", 3)
    monkeypatch.setattr("forebay_store.engine.flatten.FLATTEN_BLOCKS_MAX", 16)
    Load(seed).run(STEPS)

"""A store in memory under cuts, trims, snapshots, deletions and rollbacks, beside a model that keeps copies of blocks.

Whatever the cleaner, the checkpoints and crashes do, each volume and each snapshot must read as its copy, the
segments alone must give the same index, and each segment with live bytes must be there.
"""

import random

from store_daemon import DEVICE, frame, plain
from store_twins import Crash, DictIndex, MemoryBackend, StoreTwin

from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE, sequence_of
from forebay_store.engine.moving import leaving_segments, segment_name
from forebay_store.engine.space import Pressure
from forebay_store.format.rows import Table, decode_segment_row
from forebay_wire import messages

BLOCKS = 96
Blocks = dict[int, object]
EAGER = Pressure(ratio_max=1.02, live_share_max=0.98, checkpoint_share=1.0, small_count_max=1 << 30)
"""Copies at the slightest gain, and takes checkpoints often."""


class CleanLoad:
    """Changes volumes at random and compares."""

    def __init__(self, seed: int, *, volumes: int = 2) -> None:
        self.random = random.Random(seed)
        self.twin = StoreTwin(MemoryBackend(), DictIndex(), seed=seed)
        self.ids: dict[str, bytes] = {}
        self.heads: dict[str, Blocks] = {}
        self.snapshots: dict[tuple[str, str], tuple[bytes, Blocks]] = {}
        self.count = 0
        for number in range(volumes):
            self.create(f"vm-{number}")

    def create(self, name: str) -> None:
        """Make a volume."""
        created = self.twin.ask(messages.CreateVolume(name, BLOCKS * BLOCK_SIZE))
        assert isinstance(created, messages.Volume)
        self.ids[name] = created.row.id
        self.heads[name] = {}

    def change(self) -> None:
        """Make one change, mostly a cut."""
        name = self.random.choice(sorted(self.heads))
        mine = sorted(key for key in self.snapshots if key[0] == name)
        match self.random.randrange(12):
            case 0 | 1:
                self.take(name)
            case 2 if mine:
                self.delete_snapshot(*self.random.choice(mine))
            case 3 if mine:
                self.roll_back(*self.random.choice(mine))
            case 4:
                self.replace_volume(name)
            case _:
                self.cut(name)

    def cut(self, name: str, *, commit: bool = True) -> None:
        """Write and trim some blocks as a cut of one or two parts."""
        opened = self.twin.ask(messages.OpenVolume(name, DEVICE))
        assert isinstance(opened, messages.Opened)
        key = (self.ids[name], opened.epoch, opened.session)
        attempt = self.random.getrandbits(60)
        state = dict(self.heads[name])
        parts = self.random.randint(1, 2)
        written: set[int] = set()  # whose data counts, whatever the holes of the same cut say
        for index in range(parts):
            holes = Extent(self.random.randrange(BLOCKS - 4), self.random.randint(1, 4))
            for lba in set(range(holes.start, holes.end)) - written:
                state.pop(lba, None)
            payload = b""
            for _ in range(self.random.randint(1, 3)):
                count = self.random.randint(1, 8)
                start, seed = self.random.randrange(BLOCKS - count), self.random.getrandbits(30)
                payload += frame(start, seed, count)
                blocks = plain(seed, count)
                for at in range(count):
                    state[start + at] = blocks[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
                    written.add(start + at)
            self.twin.ask(messages.StagePart(*key, attempt, index, pack([holes])), payload)
        if not commit:
            return
        sequence = sequence_of(opened.row.version) + 1
        reply = self.twin.ask(messages.CommitCut(*key, attempt, parts, sequence, sequence, committed_ns=1))
        assert isinstance(reply, messages.Committed), reply
        self.heads[name] = state

    def release(self, name: str) -> None:
        """Give a volume back."""
        opened = self.twin.ask(messages.OpenVolume(name, DEVICE))
        assert isinstance(opened, messages.Opened)
        self.twin.ask(messages.ReleaseVolume(opened.row.id, opened.epoch, opened.session))

    def take(self, name: str) -> None:
        """Take a snapshot."""
        self.release(name)
        self.count += 1
        reply = self.twin.ask(messages.CreateSnapshot((name,), f"s{self.count}"))
        assert isinstance(reply, messages.SnapshotTaken), reply
        self.snapshots[name, f"s{self.count}"] = (reply.row.id, dict(self.heads[name]))

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """Delete one."""
        reply = self.twin.ask(messages.DeleteSnapshot(name, snapshot))
        assert isinstance(reply, messages.Done), reply
        del self.snapshots[name, snapshot]

    def roll_back(self, name: str, snapshot: str) -> None:
        """Make the head what a snapshot shows."""
        self.release(name)
        reply = self.twin.ask(messages.RollbackVolume(name, snapshot))
        assert isinstance(reply, messages.Volume), reply
        self.heads[name] = dict(self.snapshots[name, snapshot][1])

    def replace_volume(self, name: str) -> None:
        """Delete a volume, and make another of the same name."""
        for key in [key for key in self.snapshots if key[0] == name]:
            self.delete_snapshot(*key)
        self.delete_volume(name)
        self.create(name)

    def delete_volume(self, name: str) -> None:
        """Delete a volume without snapshots."""
        self.release(name)
        reply = self.twin.ask(messages.DeleteVolume(name))
        assert isinstance(reply, messages.Done), reply
        del self.heads[name]

    def compare(self) -> None:
        """Compare everything."""
        for name, state in self.heads.items():
            self._compare(name, self.ids[name], state)
        for (name, snapshot), (number, state) in self.snapshots.items():
            self._compare(f"{name}@{snapshot}", number, state)
        assert self.twin.rebuilt().rows() == self.twin.index.rows()
        for name, (_, live) in self.rows().items():
            assert not live or name in self.twin.backend.segments, name

    def _compare(self, what: str, number: bytes, state: Blocks) -> None:
        for piece in self.twin.plain(number, Extent(0, BLOCKS)):
            for at in range(piece.extent.count):
                lba = piece.extent.start + at
                found = None if piece.plain is None else bytes(piece.plain[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
                assert found == state.get(lba), f"{what} block {lba}"

    def rows(self) -> dict[str, tuple[int, int]]:
        """Return size and live bytes of each segment that the index knows."""
        with self.twin.index.view() as reader:
            return {
                segment_name(key).text: decode_segment_row(value)[:2] for key, value in reader.scan(Table.SEGMENTS, b"")
            }

    def no_leaks(self) -> None:
        """Check that the files are those of the rows, but for some that are on their way out."""
        with self.twin.index.view() as reader:
            leaving = {name.text for name in leaving_segments(reader)}
        files = set(self.twin.backend.segments)
        assert set(self.rows()) <= files <= set(self.rows()) | leaving

    def restart(self, *, power_cut: bool) -> None:
        """Start anew, perhaps with an index that lost what was not synced."""
        index = self.twin.index
        tables = self.random.choice(index.since) if power_cut else index.tables
        fresh = DictIndex()
        fresh.tables = dict(tables)
        fresh.since = [fresh.tables]
        backend = MemoryBackend()
        backend.segments = dict(self.twin.backend.segments)
        self.twin = StoreTwin(backend, fresh, seed=self.random.getrandbits(30))
        self.twin.collect()
        self.twin.settle()

    def crash_after(self, points: int) -> None:
        """Let the store die at a moment at which the disk or the index changes."""
        left = [points]

        def point(_: str) -> None:
            if left[0] == 0:
                raise Crash
            left[0] -= 1

        self.twin.backend.point = self.twin.index.point = point

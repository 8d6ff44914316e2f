"""Snapshots and resizes of a running volume against a recorded history: each is what the volume was at its sequence."""

import random
from typing import NamedTuple

import pytest
from engine_rig import VOLUME_ID, Rig, check_books, store_content

from forebay_cache.engine import cut_ends
from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.changes import Tracked
from forebay_cache.engine.front import IoError
from forebay_cache.format.cut_end import RESIZE, SNAPSHOT, CutEnd
from forebay_core.errors import RefusedError
from forebay_core.units import BLOCK_SIZE, Version, make_version, sequence_of


class Changed(NamedTuple):
    """One change that got its version: `content` None is zeros."""

    version: int
    lba: int
    blocks: int
    content: bytes | None


class Recorder:
    """Notes every change of the volume when it gets its version, and every snapshot that was answered."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.rng = random.Random(seed)
        self.changes: list[Changed] = []
        self.answered: dict[str, int] = {}  # names of snapshots, with their versions
        self.sizes: list[int] = []  # resizes that were answered
        self.asked = 0
        self.in_flight = 0
        self.watch(rig.engine)

    def watch(self, engine: CacheEngine) -> None:
        """Note what the engine appends from now on; after a crash, forget what did not survive."""
        last = self.rig.volume.version
        self.changes = [one for one in self.changes if one.version <= last]
        writes = engine.writes
        appended, event = writes._appended, writes._append_event

        def blocks_appended(batch, volume, lba, view, count) -> None:
            appended(batch, volume, lba, view, count)
            self.changes.append(Changed(volume.version, lba, count, bytes(view)))

        def append_event(volume, kind, extent, settled) -> None:
            event(volume, kind, extent, settled)
            self.changes.append(Changed(volume.version, extent.start, extent.count, None))

        writes._appended, writes._append_event = blocks_appended, append_event  # type: ignore[method-assign]

    def content(self, version: int, size: int) -> bytes:
        """Return what the volume was at a version."""
        image = bytearray(size)
        for one in self.changes:
            if one.version <= version:
                part = slice(one.lba * BLOCK_SIZE, (one.lba + one.blocks) * BLOCK_SIZE)
                image[part] = (one.content or bytes(one.blocks * BLOCK_SIZE))[: size - one.lba * BLOCK_SIZE]
        return bytes(image)

    def request(self) -> None:
        """Write, trim or zero something, hot blocks mostly, aligned or not."""
        rng, volume = self.rng, self.rig.volume
        hot = rng.random() < 0.6
        blocks = volume.size // BLOCK_SIZE
        lba = rng.randrange(40) if hot else rng.randrange(blocks)
        count = min(rng.choice((1, 1, 1, 2, 8, 40)), blocks - lba)
        offset, length = lba * BLOCK_SIZE, count * BLOCK_SIZE
        self.in_flight += 1
        kind = rng.random()
        if kind < 0.65:
            volume.write(offset, rng.randbytes(length), rng.random() < 0.05, self._over)
        elif kind < 0.75:
            volume.write(offset + 512, rng.randbytes(700), False, self._over)
        elif kind < 0.9:
            volume.trim(offset, length, False, self._over)
        else:
            volume.write_zeroes(offset, length, False, self._over)

    def _over(self, error: IoError) -> None:
        assert error == IoError.OK, self.rig.reports
        self.in_flight -= 1

    def snapshot(self) -> None:
        """Take one, without waiting."""
        self.asked += 1
        name = f"s{self.asked}"

        def taken(end: CutEnd | None) -> None:
            assert end is not None
            self.answered[name] = end.version

        snapshot = self.rng.randbytes(16)
        self.rig.engine.cut_ends.snapshot(self.rig.volume, snapshot, name, self.rig.now_ns + 1, taken)

    def grow(self) -> None:
        """Ask for some more blocks."""
        size = self.rig.volume.logged_size + 16 * BLOCK_SIZE

        def taken(end: CutEnd | None) -> None:
            assert end is not None
            self.sizes.append(end.size)

        self.rig.engine.cut_ends.resize(self.rig.volume, size, taken)

    def judge(self) -> None:
        """Compare all that the store has with the history."""
        store, size = self.rig.store, self.rig.volume.size
        wanted = [(version, plain, f"snapshot {name}") for name, (version, _, plain) in store.snapshots.items()]
        wanted += [(version, plain, "the cut") for version, plain in store.history]
        for name, (version, _, _) in store.snapshots.items():
            assert self.answered.get(name, version) == version, name
        image, left = bytearray(size), iter([*self.changes, None])
        one = next(left)
        for version, plain, what in sorted(wanted, key=lambda entry: entry[0]):
            while one is not None and one.version <= version:
                part = slice(one.lba * BLOCK_SIZE, (one.lba + one.blocks) * BLOCK_SIZE)
                image[part] = one.content or bytes(one.blocks * BLOCK_SIZE)
                one = next(left)
            same = store_content(plain, size) == image
            assert same, f"{what} is not what the volume was at {sequence_of(version)}"

    def judge_answered(self) -> None:
        """Every snapshot that was answered is in the store or waits for it; no resize is lost."""
        known = {*self.rig.store.snapshots, *self.rig.volume.pending_snapshots}
        assert self.answered.keys() <= known, sorted(self.answered.keys() - known)
        assert self.rig.volume.size >= max(self.sizes, default=0)


def work(rig: Rig, recorder: Recorder, turns: int) -> None:
    """Let a guest write and an admin take snapshots while the store comes and goes."""
    rng = recorder.rng
    for _ in range(turns):
        while recorder.in_flight < 8 and rng.random() < 0.8:
            recorder.request()
        if rng.random() < 0.5:
            rig.volume.kick()
        if rng.random() < 0.04:
            rig.store.away = not rig.store.away
        if rng.random() < 0.06 and len(rig.volume.ends) < 40:
            recorder.snapshot()
        if rng.random() < 0.01 and len(rig.volume.ends) < 40:
            recorder.grow()
        for _ in range(rng.randrange(14)):
            rig.step()


def settle(rig: Rig, recorder: Recorder) -> None:
    rig.store.away = False
    rig.volume.kick()
    rig.run_until(lambda: recorder.in_flight == 0)


def finish(rig: Rig, recorder: Recorder) -> None:
    """Drain, and compare everything."""
    settle(rig, recorder)
    assert rig.drain()
    check_books(rig.engine)
    recorder.judge_answered()
    recorder.judge()
    assert not (rig.volume.ends or rig.volume.cuts)
    assert recorder.answered.keys() <= rig.store.snapshots.keys()
    if recorder.sizes:
        assert rig.store.size == rig.volume.size == max(recorder.sizes)
    size = rig.volume.size
    found = b"".join(rig.read(at, min(1 << 20, size - at)) for at in range(0, size, 1 << 20))
    assert found == recorder.content(rig.volume.version, size), "what is read is not the history"


def run_snapshots(seed: int) -> None:
    """Snapshots under load, on a device that is always full."""
    rig = Rig(seed, size=12 << 20, blocks=2300, cut_age_ns_max=200_000_000)
    rig.store.lose_acknowledgements = 0.2
    recorder = Recorder(rig, seed)
    work(rig, recorder, 500)
    finish(rig, recorder)
    assert len(rig.store.snapshots) > 10
    assert rig.engine.reclaim.dropped_blocks > 0, "the device was never full: the test is too small"


def run_crashes(seed: int, *, power: bool) -> None:
    """The daemon dies or the power goes, with snapshots taken that the store does not have."""
    rig = Rig(seed, size=12 << 20, blocks=1500)
    recorder = Recorder(rig, seed)
    for _ in range(5):
        work(rig, recorder, 90)
        if not power:
            settle(rig, recorder)
            for _ in range(recorder.rng.randrange(30)):
                rig.step()
        recorder.in_flight = 0
        rig.store.away = recorder.rng.random() < 0.5
        rig.restart(power=power)
        recorder.watch(rig.engine)
        check_books(rig.engine)
        recorder.judge_answered()
        assert rig.store.version <= rig.volume.version, "the store ran ahead of the device"
    finish(rig, recorder)


def run_power_cuts_with_snapshots(seed: int) -> None:
    """See run_crashes."""
    run_crashes(seed, power=True)


def run_kills_with_snapshots(seed: int) -> None:
    """See run_crashes."""
    run_crashes(seed, power=False)


@pytest.mark.parametrize("seed", range(6))
def test_each_snapshot_is_what_the_volume_was_at_its_sequence(seed: int) -> None:
    run_snapshots(seed)


@pytest.mark.parametrize("seed", range(6))
def test_snapshots_survive_the_death_of_the_daemon(seed: int) -> None:
    run_kills_with_snapshots(seed)


@pytest.mark.parametrize("seed", [*range(10), 217])
def test_answered_snapshots_survive_a_power_cut(seed: int) -> None:
    run_power_cuts_with_snapshots(seed)


def take(rig: Rig, name: str) -> list[CutEnd | None]:
    got: list[CutEnd | None] = []
    rig.engine.cut_ends.snapshot(rig.volume, name.encode().ljust(16, b"-"), name, 1, got.append)
    return got


def test_a_snapshot_is_answered_when_it_is_durable_while_the_store_is_away() -> None:
    rig = Rig(1)
    rig.store.away = True
    assert rig.write(0, b"a" * BLOCK_SIZE) == IoError.OK
    sync, held = rig.device.sync, []
    rig.device.sync = held.append  # type: ignore[method-assign]
    got = take(rig, "monday")
    rig.run_until(lambda: bool(held))
    for _ in range(50):
        rig.step()
    assert not got, "it was answered before a sync covered it"
    rig.device.sync = sync  # type: ignore[method-assign]
    for done in held:
        sync(done)
    rig.run_until(lambda: bool(got))
    assert got[0] is not None
    assert (got[0].kind, got[0].name, got[0].size) == (SNAPSHOT, "monday", rig.size)
    assert got[0].version == make_version(1, 2) == rig.volume.version
    assert rig.volume.pending_snapshots == ["monday"]
    assert not rig.store.snapshots


def test_several_closed_cuts_go_upstream_in_order_with_what_was_overwritten_since() -> None:
    rig = Rig(1)
    rig.store.away = True
    for turn in range(5):
        assert rig.write(0, bytes([turn + 1]) * BLOCK_SIZE) == IoError.OK
        got = take(rig, f"s{turn}")
        rig.run_until(lambda got=got: bool(got))
    assert len(rig.volume.cuts) == 5
    assert rig.engine.map.held_count == 4
    rig.store.away = False
    assert rig.drain()
    assert [plain[0][:1] for _, _, plain in rig.store.snapshots.values()] == [b"\1", b"\2", b"\3", b"\4", b"\5"]
    assert set(rig.volume.known_snapshots) == {f"s{turn}" for turn in range(5)}
    assert not (rig.volume.ends or rig.volume.cuts)


def test_a_snapshot_of_an_unchanged_volume_is_a_cut_without_parts() -> None:
    rig = Rig(1)
    got, other = take(rig, "empty"), take(rig, "again")
    rig.run_until(lambda: bool(got and other))
    assert rig.drain()
    assert not rig.store.staged
    assert [version for version, _, _ in rig.store.snapshots.values()] == [make_version(1, 1), make_version(1, 2)]


def test_a_name_that_is_taken_is_refused_here_and_upstream() -> None:
    rig = Rig(1)
    rig.store.away = True
    rig.volume.known_snapshots["stored"] = Tracked(VOLUME_ID, Version(1))
    take(rig, "pending")
    for name in ("stored", "pending"):
        with pytest.raises(RefusedError, match=f"volume v has a snapshot {name} already") as caught:
            take(rig, name)
        assert caught.value.code == "snapshot-exists"


def test_too_many_pending_snapshots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_ends, "SNAPSHOTS_PENDING_MAX", 3)
    rig = Rig(1)
    rig.store.away = True
    for turn in range(3):
        take(rig, f"s{turn}")
    with pytest.raises(RefusedError, match="3 snapshots are not in the store yet"):
        take(rig, "s3")
    monkeypatch.setattr(cut_ends, "ENDS_PENDING_MAX", 3)
    with pytest.raises(RefusedError, match="3 snapshots and resizes of this cache"):
        rig.engine.cut_ends.resize(rig.volume, rig.size, lambda _: None)
    rig.store.away = False
    assert rig.drain()
    take(rig, "s3")


def test_a_volume_grows_while_it_is_attached_and_stays_so() -> None:
    rig = Rig(1)
    rig.store.away = True
    got: list[CutEnd | None] = []
    rig.engine.cut_ends.resize(rig.volume, rig.size + BLOCK_SIZE, got.append)
    rig.run_until(lambda: bool(got))
    assert got[0] is not None and got[0].kind == RESIZE
    assert rig.volume.size == rig.size + BLOCK_SIZE
    assert rig.read(rig.size, BLOCK_SIZE) == bytes(BLOCK_SIZE), "the store can't tell yet: it does not know the size"
    assert rig.allocation(rig.size, BLOCK_SIZE) == [(BLOCK_SIZE, True)]
    assert rig.write(rig.size, b"new".ljust(BLOCK_SIZE)) == IoError.OK
    assert rig.flush() == IoError.OK
    rig.restart(power=True)
    assert rig.volume.size == rig.size + BLOCK_SIZE
    assert rig.read(rig.size, BLOCK_SIZE) == b"new".ljust(BLOCK_SIZE)
    rig.store.away = False
    assert rig.drain()
    assert rig.store.size == rig.size + BLOCK_SIZE


@pytest.mark.parametrize(("change", "text"), [(-BLOCK_SIZE, "detach it before"), (1, "multiple of 4096")])
def test_an_attached_volume_is_not_made_smaller_or_crooked(change: int, text: str) -> None:
    rig = Rig(1)
    with pytest.raises(RefusedError, match=text):
        rig.engine.cut_ends.resize(rig.volume, rig.size + change, lambda _: None)


def test_a_failed_device_answers_who_waits_for_a_snapshot() -> None:
    rig = Rig(3)
    got = take(rig, "lost")
    rig.device.failing = True
    rig.run_until(lambda: bool(got))
    assert got == [None]
    with pytest.raises(RefusedError, match="takes no changes"):
        take(rig, "another")


def test_a_trim_keeps_what_a_closed_cut_needs() -> None:
    rig = Rig(1)
    rig.store.away = True
    assert rig.write(0, b"a" * 8 * BLOCK_SIZE) == IoError.OK
    got = take(rig, "before")
    rig.run_until(lambda: bool(got))
    answers: list[IoError] = []
    rig.volume.trim(0, rig.size, False, answers.append)
    rig.volume.kick()
    rig.run_until(lambda: bool(answers))
    assert rig.read(0, 8 * BLOCK_SIZE) == bytes(8 * BLOCK_SIZE)
    rig.store.away = False
    assert rig.drain()
    assert sorted(rig.store.snapshots["before"][2]) == list(range(8))
    assert not rig.store.plain()

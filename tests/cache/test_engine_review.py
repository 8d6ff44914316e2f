"""What a review broke, each as the scenario that broke it."""

from collections.abc import Callable

import pytest
from engine_rig import STORE_ID, VOLUME_ID, Rig, check_books, joined

from forebay_cache.engine import attaching
from forebay_cache.engine import cache as cache_module
from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.front import IoError
from forebay_cache.engine.ports import CutIdentity, UpstreamRefusal
from forebay_cache.engine.volume import CacheVolume
from forebay_core.units import BLOCK_SIZE, LBA_BITS, SEQUENCE_BITS, Epoch, Version, VolumeId
from forebay_wire import messages


def settle(rig: Rig, steps: int = 400) -> None:
    for _ in range(steps):
        if not rig.step():
            rig.tick()


def attach_second(rig: Rig) -> CacheVolume:
    got: list[CacheVolume | None] = []
    view = StoreView(VolumeId(b"w" * 16), "w", 1 << 20, Epoch(1), Version(0), STORE_ID)
    rig.engine.attaching.attach(view, [], read_only=False, attached=got.append)
    rig.run_until(lambda: bool(got))
    assert got[0] is not None
    return got[0]


def test_a_volume_without_room_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "HOLES_KEPT_MAX", 100)
    rig = Rig(1, size=64 << 20, blocks=4000)
    other = attach_second(rig)
    rig.volume.destaging = False
    waiting: list[IoError] = []
    for lba in range(0, 300, 2):
        rig.volume.trim(lba * BLOCK_SIZE, BLOCK_SIZE, False, waiting.append)
        rig.volume.kick()
        settle(rig, 20)
    assert len(waiting) < 150
    got: list[IoError] = []
    other.write(0, b"a" * BLOCK_SIZE, False, got.append)
    other.kick()
    rig.run_until(lambda: bool(got))
    assert got == [IoError.OK]
    rig.engine.destage.stop_volume(rig.volume, "fenced")
    rig.run_until(lambda: len(waiting) == 150)
    assert waiting[-1] == IoError.IO


def test_trimmed_dirty_blocks_make_room_while_the_store_is_away() -> None:
    rig = Rig(2, size=24 << 20, blocks=4000)
    rig.store.away = True
    for turn in range(3):
        for lba in range(0, 1600, 8):
            assert rig.write(lba * BLOCK_SIZE, bytes([turn + 1]) * (8 * BLOCK_SIZE)) == IoError.OK
        got: list[IoError] = []
        rig.volume.trim(0, 1600 * BLOCK_SIZE, False, got.append)
        rig.volume.kick()
        rig.run_until(lambda got=got: bool(got))
    check_books(rig.engine)


def test_a_drain_waits_for_what_is_in_the_log() -> None:
    rig = Rig(3)
    written: list[IoError] = []
    drained: list[bool] = []
    rig.volume.write(0, b"a" * BLOCK_SIZE, False, written.append)
    rig.engine.destage.drain(rig.volume, drained.append)
    rig.run_until(lambda: bool(drained))
    assert written == [IoError.OK]
    assert rig.store.plain() == {0: b"a" * BLOCK_SIZE}


def reading(rig: Rig, lba: int) -> list[tuple[IoError, bytes]]:
    """Begin to read a block; what is returned grows by the answer."""
    got: list[tuple[IoError, bytes]] = []
    rig.volume.read(lba * BLOCK_SIZE, BLOCK_SIZE, lambda error, chunks: got.append((error, joined(chunks))))
    rig.volume.kick()
    return got


def committing(rig: Rig) -> tuple[list[object], Callable[[], None]]:
    """Begin a drain and stop when the store has applied the cut; return the drain's answer, and what acknowledges."""
    held: list[Callable[[], None]] = []
    commit = rig.store.commit
    rig.store.commit = lambda cut, count, ns, end, done: commit(  # type: ignore[method-assign]
        cut, count, ns, end, lambda answer: held.append(lambda: done(answer))
    )
    drained: list[object] = []
    rig.engine.destage.drain(rig.volume, drained.append)
    rig.run_until(lambda: bool(held))
    return drained, held[0]


@pytest.mark.parametrize("content", [b"s" * BLOCK_SIZE, None], ids=["block", "hole"])
@pytest.mark.parametrize("ahead", [5, 1 << SEQUENCE_BITS])
def test_a_fetched_version_that_was_never_acknowledged_is_neither_kept_nor_served(
    content: bytes | None, ahead: int
) -> None:
    rig = Rig(20)
    rig.write(0, b"a" * BLOCK_SIZE)
    assert rig.drain()
    rig.store.blocks[5] = (content, Version(rig.volume.acknowledged + ahead))
    got = reading(rig, 5)
    rig.run_until(lambda: bool(got))
    assert got == [(IoError.IO, b"")] and "version" in rig.reports[-1]
    rig.write(5 * BLOCK_SIZE, b"n" * BLOCK_SIZE)  # were it kept, it would be newer than this
    assert rig.read(5 * BLOCK_SIZE, BLOCK_SIZE) == b"n" * BLOCK_SIZE
    assert rig.drain() and rig.store.plain()[5] == b"n" * BLOCK_SIZE
    assert rig.read(6 * BLOCK_SIZE, BLOCK_SIZE) == bytes(BLOCK_SIZE) and not rig.volume.has_changes
    check_books(rig.engine)


def test_a_read_that_brings_our_own_cut_before_its_acknowledgement_waits_for_that() -> None:
    rig = Rig(21)
    rig.store.away = True
    got = reading(rig, 5)  # begins before the write, is answered behind its commit
    rig.write(5 * BLOCK_SIZE, b"n" * BLOCK_SIZE)
    fetches = rig.store.queue
    rig.store.queue = []
    rig.store.away = False
    drained, acknowledge = committing(rig)
    rig.store.queue += fetches
    settle(rig)
    assert not got and not drained
    acknowledge()
    rig.run_until(lambda: bool(got and drained))
    assert got == [(IoError.OK, b"n" * BLOCK_SIZE)] and drained == [True]
    assert rig.engine.fetches.under_way == 0
    check_books(rig.engine)


def test_a_neighbour_of_what_is_being_committed_need_not_wait() -> None:
    rig = Rig(22)
    rig.write(4 * BLOCK_SIZE, b"n" * BLOCK_SIZE)
    drained, acknowledge = committing(rig)
    assert rig.read(5 * BLOCK_SIZE, BLOCK_SIZE) == bytes(BLOCK_SIZE)  # of the same unit
    assert not drained
    acknowledge()
    rig.run_until(lambda: bool(drained))


def test_a_read_that_waits_for_an_acknowledgement_ends_with_its_volume() -> None:
    rig = Rig(23)
    rig.store.away = True
    got = reading(rig, 5)
    rig.write(5 * BLOCK_SIZE, b"n" * BLOCK_SIZE)
    fetches = rig.store.queue
    rig.store.queue = []
    rig.store.away = False
    committing(rig)
    rig.store.queue += fetches
    settle(rig)
    assert not got
    rig.engine.destage.stop_volume(rig.volume, "fenced")
    rig.run_until(lambda: bool(got))
    assert got == [(IoError.IO, b"")] and rig.engine.fetches.under_way == 0


@pytest.mark.parametrize("kind", ["fetch", "allocation"])
def test_a_fenced_read_stops_the_volume_with_all_that_is_cached(kind: str) -> None:
    rig = Rig(24)
    rig.write(0, b"a" * BLOCK_SIZE)
    assert rig.drain()
    rig.write(BLOCK_SIZE, b"b" * BLOCK_SIZE)
    refusal = UpstreamRefusal(messages.FENCED, "epoch 1 is over")
    setattr(rig.store, kind, lambda *words, **_: rig.store.queue.append(lambda: words[-1](refusal)))
    got: list[IoError] = []
    if kind == "fetch":
        rig.volume.read(9 * BLOCK_SIZE, BLOCK_SIZE, lambda error, _: got.append(error))
    else:
        rig.volume.allocation(0, 9 * BLOCK_SIZE, lambda error, _: got.append(error))
    rig.run_until(lambda: bool(got))
    assert got == [IoError.IO] and "epoch 1 is over" in rig.volume.error
    assert reading(rig, 0) == reading(rig, 1) == [(IoError.IO, b"")]
    assert rig.volume.has_changes, "they are kept for salvage"


def test_a_volume_being_detached_refuses_late_writes() -> None:
    rig = Rig(4)
    rig.volume.closing = True
    assert rig.write(0, b"a" * BLOCK_SIZE) == IoError.SHUTDOWN
    assert rig.write(5, b"a") == IoError.SHUTDOWN
    assert not rig.volume.has_changes


def test_an_error_outlives_a_reconnect() -> None:
    rig = Rig(5)
    rig.engine.destage.stop_volume(rig.volume, "corrupt")
    rig.attach()
    assert rig.volume.error == "corrupt"


def test_a_cut_whose_answer_was_lost_is_over_when_the_store_grants_the_volume() -> None:
    rig = Rig(6, cut_age_ns_max=10**15)
    engine, volume = rig.engine, rig.volume
    assert rig.write(0, b"a" * (4 * BLOCK_SIZE)) == IoError.OK
    commit = rig.store.commit
    rig.store.commit = lambda cut, parts, ns, end, done: commit(  # type: ignore[method-assign]
        cut, parts, ns, end, lambda _: done(UpstreamRefusal(messages.NOT_ATTACHED, "detached"))
    )
    engine.destage.drain(volume, lambda _: None)
    rig.run_until(lambda: rig.store.version > 0)
    settled: list[bool] = []
    engine.attaching.detach(volume, leave_dirty=True, settled=settled.append)
    rig.run_until(lambda: bool(settled))
    settle(rig)
    rig.store.commit = commit  # type: ignore[method-assign]
    rig.attach()
    assert not volume.cuts
    assert rig.write(0, b"b" * BLOCK_SIZE) == IoError.OK
    assert rig.drain()
    assert rig.store.plain()[0] == b"b" * BLOCK_SIZE
    check_books(engine)


def test_a_cut_that_rested_over_a_detach_is_begun_anew() -> None:
    rig = Rig(7, cut_age_ns_max=10**15)
    rig.store.away = True
    assert rig.write(0, b"a" * (4 * BLOCK_SIZE)) == IoError.OK
    drained: list[bool] = []
    rig.engine.destage.drain(rig.volume, drained.append)
    settle(rig, 60)
    rig.engine.destage.stop_volume(rig.volume, "the store is behind")
    assert drained == [False]
    settled: list[bool] = []
    rig.engine.attaching.detach(rig.volume, leave_dirty=True, settled=settled.append)
    rig.run_until(lambda: bool(settled))
    rig.store.away = False
    rig.store.queue.clear()
    rig.attach()
    assert rig.engine.by_id(VOLUME_ID) is rig.volume
    assert rig.drain()
    assert rig.store.plain()[3] == b"a" * BLOCK_SIZE


def test_room_that_is_found_while_looking_for_room_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(8)
    other = attach_second(rig)
    has_room = rig.engine.has_room
    monkeypatch.setattr(rig.engine, "has_room", lambda volume: False)
    got: list[IoError] = []
    for volume in (rig.volume, other):
        volume.write(0, b"a" * BLOCK_SIZE, False, got.append)

    def frees_a_zone(volume: CacheVolume) -> bool:
        monkeypatch.setattr(rig.engine, "has_room", has_room)
        rig.engine.resume_writers()
        return has_room(volume)

    monkeypatch.setattr(rig.engine, "has_room", frees_a_zone)
    rig.engine.resume_writers()
    rig.run_until(lambda: len(got) == 2)
    assert got == [IoError.OK, IoError.OK]


@pytest.mark.parametrize("limited", [False, True])
def test_a_cut_whose_volume_is_taken_and_granted_again_during_its_sync_waits_for_it(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(1)
    if limited:
        rig.engine.set_limit(rig.volume, lambda ok: None, average=4 << 20, peak=8 << 20)
    assert rig.write(0, rig.rng.randbytes(60 * BLOCK_SIZE)) == IoError.OK
    settle(rig)
    assert rig.drain()
    assert rig.write(0, rig.rng.randbytes(60 * BLOCK_SIZE)) == IoError.OK
    syncs: list[Callable[[bool], None]] = []
    staged: list[CutIdentity] = []
    sync, stage = rig.device.sync, rig.store.stage
    monkeypatch.setattr(rig.device, "sync", syncs.append)
    monkeypatch.setattr(rig.store, "stage", lambda cut, *rest: (staged.append(cut), stage(cut, *rest)))
    drained: list[bool] = []
    rig.engine.destage.drain(rig.volume, drained.append)
    rig.run_until(lambda: bool(rig.volume.cuts and syncs))
    rig.engine.destage.suspend(rig.volume)
    view = StoreView(VOLUME_ID, "v", rig.size, Epoch(1), rig.store.version, STORE_ID)
    rig.engine.attaching.reopened(rig.volume, view)
    settle(rig)
    assert not staged, "sent before a sync covered it"
    monkeypatch.setattr(rig.device, "sync", sync)
    for done in syncs:
        sync(done)
    rig.run_until(lambda: bool(drained))
    assert drained == [True]
    settle(rig)
    check_books(rig.engine)


def test_a_volume_that_takes_the_place_of_a_forgotten_one_never_shows_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attaching, "VOLUMES_MAX", 2)
    rig = Rig(1)
    old = attach_second(rig)
    old.destaging = False
    got: list[IoError] = []
    old.write(0, b"W" * BLOCK_SIZE, False, got.append)
    old.kick()
    rig.run_until(lambda: bool(got))
    old.adopt(old.applied)
    settled: list[bool] = []
    rig.engine.attaching.detach(old, leave_dirty=False, settled=settled.append)
    rig.engine.checkpoints.want(settled.append)
    rig.run_until(lambda: len(settled) == 2)
    attached: list[CacheVolume | None] = []
    view = StoreView(VolumeId(b"x" * 16), "x", 1 << 20, Epoch(1), Version(0), STORE_ID)
    rig.engine.attaching.attach(view, [], read_only=False, attached=attached.append)
    rig.run_until(lambda: bool(attached))
    assert rig.engine.by_id(old.id) is None
    rig.device.kill()
    rig.start()
    settle(rig)
    found = rig.engine.by_id(view.id)
    assert found is not None
    assert rig.engine.map.find(found.key << LBA_BITS) < 0

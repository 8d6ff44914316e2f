"""Cleaning, checkpoints and deletion of segments: nothing that anybody reads changes, whatever crashes in between."""

from collections.abc import Callable, Iterator

import pytest
from clean_load import EAGER, CleanLoad
from store_twins import STORE, Crash, DictIndex, MemoryBackend

from forebay_core.errors import CorruptionError, RefusedError, UnreadableError
from forebay_store.engine import cleaner as cleaner_engine
from forebay_store.engine import cleaning, moving
from forebay_store.engine.cleaner import Cleaner
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.replay import replay
from forebay_store.engine.space import RESTING, Space
from forebay_store.format.segment import SegmentName, parse_name

POINTS_MAX = 400


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pressure", [EAGER, RESTING], ids=["eager", "resting"])
def test_volumes_and_snapshots_read_the_same_after_cleaning(seed: int, pressure: object) -> None:
    load = CleanLoad(seed)
    for _ in range(4):
        for _ in range(8):
            load.change()
        load.twin.clean(pressure)  # type: ignore[arg-type]
        load.compare()
        load.no_leaks()


@pytest.mark.parametrize("seed", range(8))
def test_what_changes_while_blocks_are_copied_stays(seed: int) -> None:
    check_changes_meanwhile(seed)


def check_changes_meanwhile(seed: int) -> None:
    load = CleanLoad(seed)
    for _ in range(12):
        load.change()
    for _ in range(3):
        left = iter(range(25))

        def between(left: Iterator[int] = left) -> None:
            if next(left, None) is not None:
                load.change()

        cleaner = load.twin.clean(EAGER, between=between)
        load.compare()
    assert cleaner.counts.segments_freed


def test_cleaning_brings_a_store_back_to_what_lives() -> None:
    load = CleanLoad(1, volumes=1)
    for _ in range(60):
        load.cut("vm-0")
    load.twin.clean()
    size = sum(len(whole) for whole in load.twin.backend.segments.values())
    live = sum(live for _, live in load.rows().values())
    assert size < 1.25 * live
    assert len(load.twin.backend.segments) < 12


def test_an_emptied_store_takes_no_more_than_an_empty_one() -> None:
    load = CleanLoad(2)
    for _ in range(40):
        load.change()
    for name in ("vm-0", "vm-1"):
        for key in [key for key in load.snapshots if key[0] == name]:
            load.delete_snapshot(*key)
        load.delete_volume(name)
    load.twin.clean()
    assert len(load.twin.backend.segments) <= 4
    assert sum(len(whole) for whole in load.twin.backend.segments.values()) < 4096
    load.compare()


def test_a_pass_that_finds_nothing_writes_nothing() -> None:
    load = CleanLoad(3)
    for _ in range(30):
        load.change()
    load.twin.clean()
    before = set(load.twin.backend.segments)
    load.twin.clean()
    assert set(load.twin.backend.segments) == before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power-cut"])
def test_a_crash_anywhere_in_a_pass_loses_nothing(seed: int, power_cut: bool) -> None:
    check_crashes(seed, power_cut=power_cut)


def check_crashes(seed: int, *, power_cut: bool) -> None:
    crashed = 0
    for points in range(POINTS_MAX):
        load = CleanLoad(seed)
        for _ in range(14):
            load.change()
        load.cut("vm-0", commit=False)
        load.crash_after(points)
        try:
            load.twin.clean(EAGER)
        except Crash:
            crashed += 1
        else:
            break
        load.restart(power_cut=power_cut)
        load.compare()
        load.twin.clean()
        load.compare()
        load.no_leaks()
    assert crashed == points > 10


@pytest.mark.parametrize("seed", range(6))
def test_crashes_while_clients_write_and_the_cleaner_works_lose_nothing(seed: int) -> None:
    load = CleanLoad(seed)
    for _ in range(10):
        for _ in range(4):
            load.change()
        load.crash_after(load.random.randrange(60))
        try:
            load.twin.clean(EAGER)
        except Crash:
            load.restart(power_cut=load.random.random() < 0.5)
        else:
            load.twin.backend.point = load.twin.index.point = lambda _: None
        load.compare()


def damage(load: CleanLoad) -> str:
    """Flip a bit of each frame of the first segment that is worth cleaning; return its name."""
    victim = next(name for name, (size, live) in sorted(load.rows().items()) if 0 < live < 0.9 * size)
    whole = bytearray(load.twin.backend.segments[victim])
    at = whole.find(b"FBFR")
    while at >= 0:
        whole[at + 3000] ^= 4
        at = whole.find(b"FBFR", at + 1)
    load.twin.backend.segments[victim] = bytes(whole)
    return victim


def damaged_load() -> tuple[CleanLoad, str]:
    load = CleanLoad(5, volumes=1)
    for _ in range(10):
        load.cut("vm-0")
    return load, damage(load)


def check_damage_stays() -> None:
    load, victim = damaged_load()
    cleaner = load.twin.clean(EAGER)
    assert cleaner.barred == {parse_name(victim)}
    assert {place.segment for place in cleaner.damaged} == {parse_name(victim)}
    assert victim in load.twin.backend.segments
    assert load.twin.rebuilt().rows() == load.twin.index.rows()
    with pytest.raises(CorruptionError):
        load.compare()


def test_damage_is_not_copied_and_keeps_its_segment() -> None:
    check_damage_stays()


def test_a_segment_that_can_not_be_read_keeps_no_other_from_being_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    load = CleanLoad(5, volumes=1)
    for _ in range(30):
        load.cut("vm-0")
    poor = sorted((live / size, name) for name, (size, live) in load.rows().items() if live)
    victim = poor[0][1]
    read = MemoryBackend.read

    def unreadable(self: MemoryBackend, name: str) -> bytes:
        if name == victim:
            raise UnreadableError(place=f"segment {name} offset 0", reason="Input/output error")
        return read(self, name)

    monkeypatch.setattr(MemoryBackend, "read", unreadable)
    cleaner = load.twin.clean(EAGER)
    assert cleaner.barred == {parse_name(victim)}
    assert cleaner.counts.segments_freed > len(poor) // 2
    monkeypatch.undo()
    load.compare()


def test_the_tests_notice_when_copying_does_not_compare_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "check_stored", lambda header, frame, place: frame[header.stored_offset :])
    monkeypatch.setattr(cleaning, "open_frame", lambda header, stored, place: bytes(stored))
    with pytest.raises(AssertionError):
        check_damage_stays()


def test_the_tests_notice_when_entries_move_without_being_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        moving, "is_at", lambda entry, old, move: entry.is_data and move.start <= entry.start and entry.end <= move.end
    )
    with pytest.raises((AssertionError, CorruptionError)):
        for seed in range(8):
            check_changes_meanwhile(seed)


def test_the_tests_notice_when_files_go_before_the_index_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DictIndex, "sync", lambda self: None)
    with pytest.raises(CorruptionError):
        for seed in range(4):
            check_crashes(seed, power_cut=True)


def test_a_segment_that_no_checkpoint_covers_is_never_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(reader: IndexReader, barred: set[SegmentName]) -> Space:
        found = cleaner_engine.look(reader, barred)
        return found._replace(covered=found.applied)

    load = CleanLoad(4)
    for _ in range(20):
        load.change()
    monkeypatch.setattr(Cleaner, "_look", lambda self, _: setattr(self, "space", look_now(self, look)))
    with pytest.raises(RefusedError, match="deleted segment"):
        load.twin.clean(EAGER)


def look_now(cleaner: Cleaner, look: Callable[[IndexReader, set[SegmentName]], Space]) -> Space:
    with cleaner._index.view() as reader:
        return look(reader, set())


def test_a_damaged_checkpoint_is_told_and_never_guessed() -> None:
    load = CleanLoad(6)
    for _ in range(30):
        load.change()
    load.twin.clean(EAGER)
    for name, whole in sorted(load.twin.backend.segments.items()):
        at = whole.find(b"\x28\xb5\x2f\xfd") if b"FBFR" not in whole else -1
        if at < 0:
            continue
        backend = MemoryBackend()
        backend.segments = dict(load.twin.backend.segments)
        for flipped in (at, at + 9, at + 40, at - 40, at - 70):
            backend.segments[name] = whole[:flipped] + bytes([whole[flipped] ^ 1]) + whole[flipped + 1 :]
            with pytest.raises(CorruptionError, match=name):
                replay(backend, DictIndex(), store=STORE)
        del backend.segments[name]
        with pytest.raises(CorruptionError):
            replay(backend, DictIndex(), store=STORE)
        return
    raise AssertionError("there was no checkpoint")

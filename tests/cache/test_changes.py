"""What changed since a snapshot: what the store lists, and what is only here."""

from clone_rig import BASE, CLONES, CloneRig

from forebay_cache.engine.changes import Tracked
from forebay_cache.engine.front import IoError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, Version, VolumeId

SNAPSHOT = VolumeId(b"taken of a clone")


def dirty(rig: CloneRig, offset: int = 0, length: int = 0) -> list[tuple[int, int]]:
    """Return the changed runs as first block and count."""
    end = offset + (length or rig.volume.size - offset)
    found: list[tuple[int, int]] = []
    while offset < end:
        got: list[tuple[IoError, list]] = []
        rig.volume.changes("s", offset, end - offset, lambda *answer: got.append(answer))  # noqa: B023
        rig.run_until(lambda: bool(got))  # noqa: B023
        assert got[0][0] == IoError.OK
        for run in got[0][1]:
            if run.changed and found and sum(found[-1]) == offset // BLOCK_SIZE:
                found[-1] = (found[-1][0], found[-1][1] + run.length // BLOCK_SIZE)
            elif run.changed:
                found.append((offset // BLOCK_SIZE, run.length // BLOCK_SIZE))
            offset += run.length
    return found


def rig_with_snapshot(seed: int) -> CloneRig:
    rig = CloneRig(seed, clones=CLONES[:1], cut_age_ns_max=10**15)
    rig.write(0, b"x" * 4 * BLOCK_SIZE)
    assert rig.drain()
    rig.volume.known_snapshots["s"] = Tracked(SNAPSHOT, rig.volume.acknowledged)
    rig.family.since[CLONES[0], SNAPSHOT] = []
    return rig


def test_what_is_not_destaged_counts_as_changed() -> None:
    rig = rig_with_snapshot(1)
    assert dirty(rig) == []
    rig.write(7 * BLOCK_SIZE, b"y" * 2 * BLOCK_SIZE)
    rig.write(100, b"part")
    got: list[IoError] = []
    rig.volume.trim(20 * BLOCK_SIZE, 500 * BLOCK_SIZE, False, got.append)
    rig.volume.kick()
    rig.run_until(lambda: bool(got))
    assert dirty(rig) == [(0, 1), (7, 2), (20, 500)]


def test_what_the_store_lists_and_what_is_here_are_joined() -> None:
    rig = rig_with_snapshot(2)
    rig.family.since[CLONES[0], SNAPSHOT] = [Extent(2, 3), Extent(1000, 400)]
    rig.write(4 * BLOCK_SIZE, b"y" * 2 * BLOCK_SIZE)
    assert dirty(rig) == [(2, 4), (1000, 400)]
    assert dirty(rig, 3 * BLOCK_SIZE + 512, BLOCK_SIZE)[0][0] == 3


def test_a_cut_that_goes_over_while_the_store_is_asked_is_not_missed() -> None:
    rig = rig_with_snapshot(3)
    rig.write(40 * BLOCK_SIZE, b"y" * BLOCK_SIZE)
    got: list[tuple[IoError, list]] = []
    answers: list = []
    changed = rig.family.changed
    rig.family.changed = lambda *words: answers.append(words)
    rig.volume.changes("s", 0, rig.size, lambda *answer: got.append(answer))
    rig.family.changed = changed
    assert rig.drain()  # the answer was made before
    key = rig.volume.key << 40 | 40
    rig.engine.drop_block(key, rig.engine.map.find(key))
    changed(*answers[0])
    rig.run_until(lambda: bool(got))
    assert [run for run in got[0][1] if run.changed] == [(BLOCK_SIZE, True)]


def test_a_snapshot_that_is_not_in_the_store_is_not_asked_for() -> None:
    rig = rig_with_snapshot(4)
    rig.write(9 * BLOCK_SIZE, b"y" * BLOCK_SIZE)
    rig.volume.known_snapshots["s"] = Tracked(VolumeId(b"taken here alone"), Version(rig.volume.applied))
    rig.family.away = True
    rig.write(11 * BLOCK_SIZE, b"z" * BLOCK_SIZE)
    assert dirty(rig) == [(11, 1)]


def test_an_unknown_or_deleted_snapshot_is_an_error_and_known_no_more() -> None:
    rig = rig_with_snapshot(5)
    del rig.family.since[CLONES[0], SNAPSHOT]
    for _ in range(2):
        got: list[tuple[IoError, list]] = []
        rig.volume.changes("s", 0, rig.size, lambda *answer: got.append(answer))  # noqa: B023
        rig.run_until(lambda: bool(got))  # noqa: B023
        assert got[0][0] == IoError.IO
    assert rig.volume.tracked() == []


def test_an_attached_snapshot_tells_changes_between_two() -> None:
    rig = CloneRig(6, clones=())  # type: ignore[arg-type]
    rig.volume = rig.attach_snapshot(BASE)
    rig.volume.known_snapshots["s"] = Tracked(SNAPSHOT, Version(3))
    rig.family.since[BASE, SNAPSHOT] = [Extent(5, 7)]
    assert dirty(rig) == [(5, 7)]

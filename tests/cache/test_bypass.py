"""Sequential bypass: a long scan of a full cache is counted and leaves nothing in it but what is used often."""

import random

import pytest
from engine_rig import Rig, check_books
from test_ring import content, full_rig, place_of, settle

from forebay_cache.engine.ring import SPARE
from forebay_core.units import BLOCK_SIZE

BYPASS = 200
COUNT = 2000
BLOCKS = 12_000
BUSY = range(6000, BLOCKS)


def scan(rig: Rig, *, start: int = 0, count: int = COUNT, step: int = 8) -> None:
    for lba in range(start, start + count, step):
        expected = b"".join(content(lba + i) for i in range(step))
        assert rig.read(lba * BLOCK_SIZE, step * BLOCK_SIZE) == expected
        settle(rig)


def scanned(rig: Rig, count: int = COUNT) -> list[int]:
    """The blocks of a scan that were kept."""
    settle(rig)
    return [lba for lba in range(count) if place_of(rig, lba) >= 0]


def asked(rig: Rig) -> int:
    """For how many fetched blocks the policy was asked; all that wait in memory are decided about."""
    settle(rig)
    rig.engine.admission.decide_all()
    return rig.engine.policy.admitted_blocks + rig.engine.policy.refused_blocks


def busy_rig(**options: int) -> Rig:
    """A cache that is full of blocks that were used at random, some of them twice."""
    rig = full_rig(blocks=BLOCKS, **{"size": 12 << 20, "bypass_blocks": BYPASS, "fill_blocks": 1, **options})
    rng = random.Random(1)
    while rig.engine.policy.figures()["count"] < rig.engine.policy.capacity:
        for _ in range(50):
            lba = rng.choice(BUSY)
            for _ in range(rng.choice((1, 2))):
                rig.read(lba * BLOCK_SIZE, BLOCK_SIZE)
        settle(rig)
    return rig


@pytest.mark.parametrize("ahead", [0, 256])
def test_a_long_scan_leaves_its_beginning_alone(ahead: int) -> None:
    rig = busy_rig(read_ahead_blocks=ahead)
    before = rig.engine.policy.figures()["accesses"]
    admission = asked(rig)
    scan(rig)
    assert asked(rig) - admission < BYPASS + 16
    assert all(lba < BYPASS + 16 for lba in scanned(rig))
    assert rig.engine.policy.figures()["accesses"] == before + COUNT, "but all of it is counted"
    assert rig.engine.policy.frequency(rig.volume.key << 40 | 1500) == 1
    assert rig.engine.admission.ring.count(SPARE) <= rig.engine.admission.ring._bounds[SPARE]
    check_books(rig.engine)


def test_what_passes_comes_in_while_there_is_room() -> None:
    rig = full_rig(blocks=BLOCKS, size=64 << 20, bypass_blocks=BYPASS)
    scan(rig)
    assert len(scanned(rig)) > COUNT - 200


def test_a_scan_that_comes_again_and_again_keeps_the_same_part() -> None:
    rig = full_rig(blocks=BLOCKS, size=12 << 20, bypass_blocks=BYPASS, fill_blocks=1)
    capacity = rig.engine.policy.capacity
    for _ in range(4):
        scan(rig, count=BLOCKS)
    hits = rig.volume.hit_blocks
    scan(rig, count=BLOCKS)
    assert rig.volume.hit_blocks - hits > 0.8 * capacity, "an LRU would hit nothing"


def test_blocks_that_are_used_far_more_than_others_are_kept_when_a_scan_passes() -> None:
    rig = busy_rig()
    often = list(range(1000, 1900, 9))
    for _ in range(8):
        rig.engine.admission.ring.clear()
        for lba in often:
            rig.read(lba * BLOCK_SIZE, BLOCK_SIZE)
    for lba in often:
        rig.engine.admission.ring.clear()
        if (place := place_of(rig, lba)) >= 0:
            rig.engine.drop_block(rig.volume.key << 40 | lba, place)
    scan(rig)
    rig.engine.admission.decide_all()
    kept = [lba for lba in scanned(rig) if 1000 <= lba < 1900]
    assert set(kept) <= set(often)
    assert len(kept) > 0.9 * len(often)


def test_short_scans_and_random_reads_are_not_bypassed() -> None:
    rig = busy_rig()
    before = asked(rig)
    for start in range(0, 4000, 400):
        scan(rig, start=start, count=160)
    assert asked(rig) - before > 1400


def test_it_can_be_turned_off() -> None:
    rig = busy_rig(bypass_blocks=0)
    before = asked(rig)
    scan(rig)
    assert asked(rig) - before > COUNT - 200

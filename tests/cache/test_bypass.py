"""Sequential bypass: a long scan is counted and leaves nothing in the cache but what was used before."""

import pytest
from engine_rig import Rig, check_books
from test_ring import content, full_rig, place_of, settle

from forebay_cache.engine.ring import SPARE
from forebay_core.units import BLOCK_SIZE

BYPASS = 200
COUNT = 2000
SIZE = 64 << 20


def scan(rig: Rig, *, start: int = 0, count: int = COUNT, step: int = 8) -> None:
    for lba in range(start, start + count, step):
        expected = b"".join(content(lba + i) for i in range(step))
        assert rig.read(lba * BLOCK_SIZE, step * BLOCK_SIZE) == expected
        settle(rig)


def cached(rig: Rig) -> list[int]:
    settle(rig)
    return [lba for lba in range(4000) if place_of(rig, lba) >= 0]


@pytest.mark.parametrize("ahead", [0, 256])
def test_a_long_scan_leaves_its_beginning_alone(ahead: int) -> None:
    rig = full_rig(size=SIZE, bypass_blocks=BYPASS, read_ahead_blocks=ahead)
    scan(rig)
    found = cached(rig)
    assert found
    assert max(found) < BYPASS + 16
    assert rig.engine.policy.figures()["accesses"] == COUNT, "but all of it is counted"
    assert rig.engine.policy.frequency(rig.volume.key << 40 | 1500) == 1
    assert rig.engine.admission.ring.count(SPARE) <= rig.engine.admission.ring._bounds[SPARE]
    check_books(rig.engine)


def test_a_second_scan_keeps_what_the_first_one_counted() -> None:
    rig = full_rig(size=SIZE, bypass_blocks=BYPASS)
    scan(rig)
    few = len(cached(rig))
    scan(rig)
    assert len(cached(rig)) > few + COUNT // 2


def test_blocks_that_were_used_before_are_kept_when_a_scan_passes() -> None:
    rig = full_rig(size=SIZE, bypass_blocks=BYPASS, fill_blocks=1)
    for lba in range(1000, 1900, 9):
        rig.read(lba * BLOCK_SIZE, BLOCK_SIZE)
    rig.engine.admission.ring.clear()
    for lba in cached(rig):
        rig.engine.drop_block(rig.volume.key << 40 | lba, place_of(rig, lba))
    scan(rig)
    for lba in range(2500, 3900, 9):  # lets what waits in memory fall out
        rig.read(lba * BLOCK_SIZE, BLOCK_SIZE)
    assert [lba for lba in cached(rig) if 1000 <= lba < 1900] == list(range(1000, 1900, 9))


def test_short_scans_and_random_reads_are_not_bypassed() -> None:
    rig = full_rig(size=SIZE, bypass_blocks=BYPASS)
    for start in range(0, 4000, 400):
        scan(rig, start=start, count=160)
    assert len(cached(rig)) > 1400


def test_it_can_be_turned_off() -> None:
    rig = full_rig(size=SIZE, bypass_blocks=0)
    scan(rig)
    assert len(cached(rig)) > COUNT - 200

"""Use counts over a restart: the policy learns those of dirty blocks behind the first answers, and stays as good."""

import random

import numpy as np
import pytest
from engine_rig import Rig, check_books
from test_engine_model import Guest, assert_same
from test_ring import EveryBlock

from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.front import IoError
from forebay_cache.engine.policy_lists import MAIN, REGION_SHIFT
from forebay_core.units import BLOCK_SIZE


def checkpointed(rig: Rig) -> None:
    settled: list[bool] = []
    rig.engine.checkpoints.want(settled.append)
    rig.run_until(lambda: bool(settled))


def dirty_rig(seed: int = 1) -> Rig:
    """A store that is away, 900 dirty blocks, the first 300 of them used often, and a checkpoint of that."""
    rig = Rig(seed, size=12 << 20)
    rig.store.away = True
    assert rig.write(0, rig.rng.randbytes(900 * BLOCK_SIZE)) == IoError.OK
    for _ in range(6):
        rig.read(0, 300 * BLOCK_SIZE)
    checkpointed(rig)
    return rig


def states_of(engine: CacheEngine, count: int) -> list[int]:
    """The policy's states of the first blocks of the volume."""
    (volume,) = engine.volumes.values()
    return [engine.policy.states[place] for place in engine.map.find_run(volume.key << 40, count).tolist()]


def check_policy(engine: CacheEngine) -> None:
    """The policy knows each linked place, and no other."""
    known = engine.policy.states != 0
    assert np.array_equal(known, engine.map.linked_mask(0, engine.map.place_count))
    listed = [place for places in engine.policy._core.blocks() for place in places]
    assert len(listed) == len(set(listed)) == engine.policy.figures()["count"]
    assert known[listed].all()


def test_a_start_answers_before_the_policy_knows_all_and_then_it_knows_what_it_knew() -> None:
    rig = dirty_rig()
    rig.run_until(lambda: not rig.engine.use_counts.active)
    before = states_of(rig.engine, 900)
    assert {state >> REGION_SHIFT for state in before[:300]} == {MAIN}
    rig.restart(power=False)
    assert rig.engine.use_counts.active
    got: list[IoError] = []
    rig.volume.read(500 * BLOCK_SIZE, BLOCK_SIZE, lambda error, _: got.append(error))
    while not got:
        assert rig.device.step()  # without a turn of the policy
    assert got == [IoError.OK]
    assert rig.engine.use_counts.active
    rig.run_until(lambda: not rig.engine.use_counts.active)
    after = states_of(rig.engine, 900)
    assert after[:500] + after[501:] == before[:500] + before[501:]
    check_policy(rig.engine)


def test_a_block_that_is_read_before_its_turn_is_known_to_be_frequent() -> None:
    rig = dirty_rig()
    key = rig.volume.key << 40
    often = rig.engine.policy.frequency(key)
    assert often >= 6
    rig.restart(power=False)
    rig.read(0, BLOCK_SIZE)
    rig.run_until(lambda: not rig.engine.use_counts.active)
    assert rig.engine.policy.frequency(key) >= often - 1


def test_no_checkpoint_is_begun_before_the_policy_knows_all() -> None:
    rig = dirty_rig()
    rig.restart(power=False)
    settled: list[bool] = []
    rig.engine.checkpoints.want(settled.append)
    while rig.device.step():
        assert rig.engine.use_counts.active
    assert not settled
    rig.run_until(lambda: bool(settled))
    assert not rig.engine.use_counts.active


def test_a_zone_whose_blocks_the_policy_does_not_know_is_no_victim() -> None:
    rig = dirty_rig()
    checkpointed(rig)  # a second one, so that no replay needs the zones of the blocks
    rig.restart(power=False)
    engine = rig.engine
    zones = [zone for zone in engine.zones.full if not engine.use_counts.knows(zone)]
    assert zones
    assert not list(engine.reclaim._victims(zones))
    rig.run_until(lambda: not engine.use_counts.active)
    assert list(engine.reclaim._victims(zones))


@pytest.mark.parametrize("seed", range(6))
def test_whatever_guests_do_meanwhile_the_books_of_the_policy_stay_true(seed: int) -> None:
    rig = Rig(seed, size=12 << 20, blocks=1500)
    guest = Guest(rig, seed)
    active = 0
    for _ in range(6):
        for _ in range(80):
            while guest.in_flight < 8 and guest.rng.random() < 0.8:
                guest.issue()
            for _ in range(guest.rng.randrange(10)):
                rig.device.step() or rig.store.step()
            if guest.rng.random() < 0.1:
                rig.tick()
        guest.settle()
        check_books(rig.engine)
        rig.restart(power=False)
        active += rig.engine.use_counts.active
    assert active
    rig.run_until(lambda: not (rig.engine.use_counts.active or rig.engine.loading.active))
    assert_same(rig.content(), guest.model)
    check_policy(rig.engine)


# --- how warm the cache stays -------------------------------------------------------------------------------------


def hit_ratio(rig: Rig, lbas: list[int]) -> float:
    """Use blocks one after the other, every tenth by writing it; return the hits per block read."""
    volume = rig.volume
    before = volume.hit_blocks, volume.miss_blocks
    for count, lba in enumerate(lbas):
        if lba % 10 == 3:
            assert rig.write(lba * BLOCK_SIZE, lba.to_bytes(8, "little") * 512) == IoError.OK
        else:
            rig.read(lba * BLOCK_SIZE, BLOCK_SIZE)
        if count % 50 == 0:
            rig.tick()
    hits, misses = volume.hit_blocks - before[0], volume.miss_blocks - before[1]
    return hits / (hits + misses)


@pytest.mark.parametrize("seed", range(2))
def test_a_load_hits_as_often_after_a_kill_as_before(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(seed, size=16 << 20, blocks=12_016, fill_blocks=1)
    rig.store.blocks = EveryBlock()
    rig.device.now_share = 1.0
    weights = 1 / np.arange(1, 12_001) ** 0.9
    scattered = rng.permutation(12_000)

    def load(count: int) -> list[int]:
        return scattered[rng.choice(12_000, count, p=weights / weights.sum())].tolist()

    hit_ratio(rig, load(18_000))
    before = hit_ratio(rig, load(6_000))
    rig.restart(power=False)
    after = hit_ratio(rig, load(6_000))
    assert 0.5 < before < 0.8
    assert after >= 0.98 * before, (before, after)


def hits_of_the_frequent(seed: int, *, killed: bool) -> float:
    """Use 600 blocks often and as many as the cache holds once; perhaps kill the daemon; read a burst of new blocks
    that is five times the cache, each twice; return how many of the 600 are hits then."""
    rig = Rig(seed, size=16 << 20, blocks=30_000, fill_blocks=1)
    rig.store.blocks = EveryBlock()
    rig.device.now_share = 1.0
    frequent = random.Random(seed).sample(range(30_000), 600)
    capacity = rig.engine.policy.capacity
    for turn in range(7):
        hit_ratio(rig, frequent + list(range(turn, capacity, 7)))
    checkpointed(rig)
    if killed:
        rig.restart(power=False)
        rig.run_until(lambda: not (rig.engine.use_counts.active or rig.engine.loading.active))
    burst = random.Random(seed + 1).sample(range(30_000), 5 * capacity)
    hit_ratio(rig, [lba for at in range(0, len(burst), 20) for lba in burst[at : at + 20] * 2])
    return hit_ratio(rig, frequent)


@pytest.mark.parametrize("seed", range(2))
def test_what_was_used_often_withstands_a_burst_after_a_kill_as_well_as_before(seed: int) -> None:
    before = hits_of_the_frequent(seed, killed=False)
    after = hits_of_the_frequent(seed, killed=True)
    assert before > 0.6
    assert after >= 0.95 * before, (before, after)

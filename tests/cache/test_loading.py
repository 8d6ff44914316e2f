"""Loading clean entries behind the first answers: guests read, write and trim meanwhile, and nothing old comes back.

The faults at the end are planted by replacing methods of the engine: the guards must notice each.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from engine_rig import Rig, check_books, store_content
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_blockmap import insert_many
from test_engine_model import Guest, assert_same

from forebay_cache.engine.blockmap import BlockMap, PlaceArray, U64Array
from forebay_cache.engine.checkpoints import Checkpoints
from forebay_cache.engine.front import IoError
from forebay_cache.engine.loading import Loading
from forebay_cache.engine.reclaim import Reclaim
from forebay_cache.engine.unloaded import Unloaded
from forebay_cache.format import checkpoint
from forebay_cache.format.checkpoint import Chunk
from forebay_core.units import BLOCK_SIZE

SEEDS = 8


def slow_rig(seed: int, **settings: int) -> Rig:
    rig = Rig(seed, size=12 << 20, blocks=2500, **settings)
    rig.device.slow_before = rig.engine.zones_offset
    return rig


def checkpointed(rig: Rig) -> None:
    """Bring a checkpoint about that begins now."""
    settled: list[bool] = []
    rig.engine.checkpoints.want(settled.append)
    rig.run_until(lambda: bool(settled))


def warm(rig: Rig, count: int) -> bytes:
    """Fill the first blocks and make them clean, with a checkpoint behind."""
    content = rig.rng.randbytes(count * BLOCK_SIZE)
    assert rig.write(0, content) == IoError.OK
    assert rig.drain()
    checkpointed(rig)
    return content


def run_loading(seed: int) -> int:
    """kill -9 eight times under load, mostly before the last start has loaded all; return how often it had not."""
    rig = slow_rig(seed)
    guest = Guest(rig, seed)
    unloaded = 0
    for turn in range(8):
        for _ in range(90):
            while guest.in_flight < 8 and guest.rng.random() < 0.8:
                guest.issue()
            for _ in range(guest.rng.randrange(14)):
                rig.step()
        guest.settle()
        check_books(rig.engine)
        if turn % 2:
            assert rig.drain()
            checkpointed(rig)
        rig.restart(power=False)
        unloaded += rig.engine.loading.active
    check_books(rig.engine)
    assert_same(rig.content(), guest.model)
    assert rig.drain()
    assert_same(store_content(rig.store.plain(), rig.size), guest.model)
    rig.run_until(lambda: not rig.engine.loading.active)
    check_books(rig.engine)
    return unloaded


def run_pressure(seed: int) -> None:
    """Clean blocks are rewritten, destaged and dropped again while their old entries are still to be loaded."""
    rig = slow_rig(seed)
    rig.write(0, rig.rng.randbytes(2400 * BLOCK_SIZE))
    assert rig.drain()
    checkpointed(rig)
    rig.restart(power=False)
    assert rig.engine.loading.active
    model = bytearray(store_content(rig.store.plain(), rig.size))
    for _ in range(120):
        lba = rig.rng.randrange(2380)
        payload = rig.rng.randbytes(20 * BLOCK_SIZE)
        assert rig.write(lba * BLOCK_SIZE, payload) == IoError.OK
        model[lba * BLOCK_SIZE : (lba + 20) * BLOCK_SIZE] = payload
        if rig.rng.random() < 0.3:
            assert rig.drain()
    rig.run_until(lambda: not rig.engine.loading.active)
    check_books(rig.engine)
    assert_same(rig.content(), model)


def run_warm(seed: int) -> None:
    """Stop in the midst of loading, start again, and read all that was cached with the store away."""
    rig = slow_rig(seed)
    content = warm(rig, 1500)
    for _ in range(3):
        rig.restart(power=False)
        assert rig.engine.loading.active
        rig.store.away = True
        at = rig.rng.randrange(1500)
        assert rig.read(at * BLOCK_SIZE, BLOCK_SIZE) == content[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
        settled: list[bool] = []
        rig.engine.stop(settled.append)
        rig.run_until(lambda settled=settled: bool(settled))
        rig.store.away = False
    rig.restart(power=False)
    rig.store.away = True
    hits = rig.volume.miss_blocks
    assert_same(rig.read(0, len(content)), content)
    assert rig.volume.miss_blocks == hits, "what was cached is not any more"


def run_dirty_first(seed: int) -> None:
    """Dirty blocks of the checkpoint and of the log are listed and served first, then clean ones one by one."""
    rig = slow_rig(seed)
    content = warm(rig, 1500)
    rig.store.away = True
    assert rig.write(0, b"d" * 8 * BLOCK_SIZE) == IoError.OK
    checkpointed(rig)
    assert rig.write(16 * BLOCK_SIZE, b"e" * 8 * BLOCK_SIZE) == IoError.OK
    rig.device.kill()
    rig.start()
    volume = rig.engine.attached()[0]
    assert sorted(volume.dirty) == [*range(8), *range(16, 24)]
    assert rig.engine.map.linked_count < 200 < 1500, "clean blocks were loaded first"
    rig.attach()
    assert rig.read(16 * BLOCK_SIZE, BLOCK_SIZE) == b"e" * BLOCK_SIZE
    assert rig.read(0, BLOCK_SIZE) == b"d" * BLOCK_SIZE
    assert rig.engine.loading.active
    assert rig.read(700 * BLOCK_SIZE, BLOCK_SIZE) == content[700 * BLOCK_SIZE : 701 * BLOCK_SIZE]
    assert rig.engine.loading.active, "one block was searched, not all loaded"


@pytest.mark.parametrize("seed", range(6))
def test_requests_while_loading_equal_a_byte_array(seed: int) -> None:
    assert run_loading(seed) >= 3, "almost nothing was loaded late: the test is too small"


@pytest.mark.parametrize("seed", range(3))
def test_old_entries_do_not_come_back_when_newer_ones_are_dropped(seed: int) -> None:
    run_pressure(seed)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_cached_stays_cached_over_stops_in_the_midst_of_loading(seed: int) -> None:
    run_warm(seed)


def test_dirty_blocks_are_known_before_anything_is_loaded() -> None:
    run_dirty_first(1)


def test_a_damaged_chunk_of_clean_entries_costs_only_them() -> None:
    rig = slow_rig(2)
    content = warm(rig, 1500)
    rig.device.kill()
    rig.start()
    chunk = next(iter(rig.engine.loading._unloaded.chunks.values())).chunk
    rig.device.bytes[chunk.offset + 5] ^= 1
    rig.attach()
    assert_same(rig.read(0, len(content)), content)
    rig.run_until(lambda: not rig.engine.loading.active)
    assert rig.engine.loading.lost_chunks == 1
    assert any("not cached any more" in text for text in rig.reports)


def test_a_device_that_fails_while_loading_answers_everybody() -> None:
    rig = slow_rig(3)
    warm(rig, 1500)
    rig.restart(power=False)
    got: list[IoError] = []
    for lba in range(0, 1500, 100):
        rig.volume.read(lba * BLOCK_SIZE, BLOCK_SIZE, lambda error, chunks: got.append(error))
    rig.device.failing = True
    rig.volume.write(0, b"x" * BLOCK_SIZE, False, got.append)
    rig.volume.kick()
    rig.run_until(lambda: len(got) == 16)
    assert IoError.IO in got
    assert not rig.engine.loading.active


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12))
def test_forgotten_keys_and_zones_do_not_count(extents: list[tuple[int, int]]) -> None:
    unloaded = Unloaded(4, 64, 64)
    unloaded.add(Chunk(64, 64, 0, 0), 0, "here")
    gone: set[int] = set()
    keys = np.arange(64, dtype=np.uint64) + np.uint64(1)
    for index, (key, count) in enumerate(extents):
        unloaded.forget(key, count)
        gone |= set(range(key, key + count))
        if index % 3 == 2:
            assert unloaded.counting(64, keys).tolist() == [key not in gone for key in keys.tolist()]
    assert unloaded.counting(64, keys).tolist() == [key not in gone for key in keys.tolist()]
    assert [zone for zone in range(4) if unloaded.knows(zone)] == [0, 2, 3]
    unloaded.forget_zone(1)
    assert not unloaded.counting(64, keys).any()
    assert unloaded.knows(1)


# --- planted faults -------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def clean_replaces_newer(patch: pytest.MonkeyPatch) -> None:
    def insert(self: BlockMap, keys: U64Array, versions: U64Array, sums: U64Array, places: PlaceArray) -> PlaceArray:
        insert_many(self, keys, versions, sums, places)
        return places

    patch.setattr(BlockMap, "insert_absent", insert)


def forgotten_keys_loaded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Unloaded, "forget", lambda self, key, count: None)


def reused_zone_loaded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Unloaded, "forget_zone", lambda self, zone: None)


def unloaded_zone_reclaimed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reclaim, "_victims", Reclaim._unused)
    patch.setattr(Loading, "forget_zone", lambda self, zone: None)


def checkpoint_forgets_entries(patch: pytest.MonkeyPatch) -> None:
    step = Checkpoints.step

    def early(self) -> None:
        chunks, self._engine.loading._unloaded.chunks = self._engine.loading._unloaded.chunks, {}
        try:
            step(self)
        finally:
            self._engine.loading._unloaded.chunks = chunks

    patch.setattr(Checkpoints, "step", early)


def reads_do_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Loading, "want", lambda self, key, count, act: act())


def dirty_chunks_not_marked(patch: pytest.MonkeyPatch) -> None:
    table = checkpoint.encode_table
    patch.setattr(checkpoint, "encode_table", lambda sums, dirty: table(sums, bytes(len(dirty))))


@pytest.mark.parametrize(
    ("fault", "guard"),
    [
        (clean_replaces_newer, run_loading),
        (forgotten_keys_loaded, run_loading),
        (reused_zone_loaded, run_loading),
        (unloaded_zone_reclaimed, run_pressure),
        (checkpoint_forgets_entries, run_warm),
        (reads_do_not_wait, run_warm),
        (dirty_chunks_not_marked, run_dirty_first),
    ],
    ids=lambda value: value.__name__,
)
def test_a_planted_fault_is_caught(
    fault: Patch, guard: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    for seed in itertools.count():
        assert seed < SEEDS, f"{fault.__name__} went unnoticed by {guard.__name__} in {SEEDS} seeds"
        try:
            guard(seed)
        except Exception:  # whatever way the guard fails is a catch
            return

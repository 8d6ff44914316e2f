"""The map against a dict: scalar and array calls mixed, in chains as long as they get."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_cache.engine.blockmap import NIL, UNLINKED, BlockMap, PlaceArray, U64Array, choose_bucket_count, make_key
from forebay_cache.engine.limits import RANGE_LOOKUPS_MAX, SCALAR_KEYS_MAX

ZONE_BLOCKS = 64
ZONES = 8
PLACES = ZONE_BLOCKS * ZONES
LBAS = 400
VERSION_MAX = (1 << 64) - 1


def u64(values: Iterable[int]) -> U64Array:
    return np.array(list(values), np.uint64)


def places_of(values: Iterable[int]) -> PlaceArray:
    return np.array(list(values), np.int64)


def insert_many(table: BlockMap, keys: U64Array, versions: U64Array, checksums: U64Array, places: PlaceArray) -> None:
    for row in zip(keys.tolist(), versions.tolist(), checksums.tolist(), places.tolist(), strict=True):
        table.insert(*row)


def check_chains(blockmap: BlockMap) -> None:
    """Compare every invariant of the module's docstring with the arrays."""
    heads, nexts = blockmap._head_array.tolist(), blockmap._next_array.tolist()
    keys = blockmap.key_array.tolist()
    linked = []
    for bucket, place in enumerate(heads):
        while place != NIL:
            assert keys[place] != 0
            assert keys[place] % blockmap.bucket_count == bucket
            linked.append(place)
            assert len(linked) <= blockmap.place_count, "a chain runs in a circle"
            place = nexts[place]
    assert len(linked) == len(set(linked))
    assert len({keys[place] for place in linked}) == len(linked)
    assert set(linked) == {place for place, after in enumerate(nexts) if keys[place] and after != UNLINKED}
    zones = np.bincount(places_of(linked) // blockmap.zone_blocks, minlength=blockmap.live_array.size)
    assert blockmap.live_array.tolist() == zones.tolist()
    assert blockmap.linked_count == len(linked)


@dataclasses.dataclass
class Block:
    place: int
    version: int
    checksum: int


class AgainstDict(RuleBasedStateMachine):
    """Every call of the map, next to a dict of what is mapped and a dict of what is held."""

    @initialize(bucket_count=st.sampled_from([1, 3, 17, 509, None]))
    def begin(self, bucket_count: int | None) -> None:
        self.map = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=bucket_count)
        self.mapped: dict[int, Block] = {}
        self.held: dict[int, tuple[int, int, int]] = {}
        self.empty = list(range(1, PLACES))  # place 0 holds no block
        self.version = 1

    def _take(self, count: int) -> list[int]:
        taken, self.empty = self.empty[:count], self.empty[count:]
        return taken

    def _free(self, places: Iterable[int]) -> None:
        self.empty.extend(places)

    def _note_insert(self, key: int, version: int, checksum: int, place: int) -> int:
        old = self.mapped.pop(key, None)
        self.mapped[key] = Block(place, version, checksum)
        if old is None:
            return -1
        self._free([old.place])
        return old.place

    def _run(self, start: int, count: int, volume: int) -> list[int]:
        return [make_key(volume, lba) for lba in range(start, start + count)]

    @precondition(lambda self: self.empty)
    @rule(lba=st.integers(0, LBAS), volume=st.integers(1, 2))
    def insert(self, lba: int, volume: int) -> None:
        key, place = make_key(volume, lba), self._take(1)[0]
        self.version += 1
        found = self.map.insert(key, self.version, self.version * 3, place)
        assert found == self._note_insert(key, self.version, self.version * 3, place)

    @rule(lba=st.integers(0, LBAS), count=st.integers(0, 200), volume=st.integers(1, 2))
    def insert_absent(self, lba: int, count: int, volume: int) -> None:
        keys = self._run(lba, min(count, len(self.empty)), volume)
        places = self._take(len(keys))
        self.version += 1
        versions = [self.version] * len(keys)
        used = self.map.insert_absent(u64(keys), u64(versions), u64(places), places_of(places)).tolist()
        assert used == [place for key, place in zip(keys, places, strict=True) if key not in self.mapped]
        for key, place in zip(keys, places, strict=True):
            if place in used:
                self.mapped[key] = Block(place, self.version, place)
        self._free([place for place in places if place not in used])

    @rule(lba=st.integers(0, LBAS), volume=st.integers(1, 2))
    def remove(self, lba: int, volume: int) -> None:
        block = self.mapped.pop(make_key(volume, lba), None)
        assert self.map.remove(make_key(volume, lba)) == (block.place if block else -1)
        self._free([block.place] if block else [])

    @rule(lba=st.integers(0, LBAS), volume=st.integers(1, 2))
    def unlink(self, lba: int, volume: int) -> None:
        key = make_key(volume, lba)
        block = self.mapped.pop(key, None)
        assert self.map.unlink(key) == (block.place if block else -1)
        if block:
            self.held[block.place] = (key, block.version, block.checksum)

    @precondition(lambda self: self.held)
    @rule()
    def wipe(self) -> None:
        place = min(self.held)
        del self.held[place]
        self.map.wipe(place)
        assert self.map.keys[place] == self.map.versions[place] == self.map.checksums[place] == 0
        self._free([place])

    @precondition(lambda self: self.held and self.empty)
    @rule()
    def move_held(self) -> None:
        place, target = min(self.held), self._take(1)[0]
        self.held[target] = self.held.pop(place)
        self.map.wipe(place)
        self.map.hold(*self.held[target], target)
        self._free([place])

    def _forget(self, places: Sequence[int]) -> int:
        gone = [key for key, block in self.mapped.items() if block.place in places]
        freed = [self.mapped.pop(key).place for key in gone]
        held = [place for place in self.held if place in places]
        for place in held:
            del self.held[place]
        self._free(freed + held)
        return len(gone)

    @rule(zone=st.integers(0, ZONES - 1))
    def clear_zone(self, zone: int) -> None:
        first = zone * ZONE_BLOCKS
        found = self.map.clear_zone(first, ZONE_BLOCKS)
        assert found == self._forget(range(first, first + ZONE_BLOCKS))

    @rule(first=st.integers(0, 40), step=st.integers(1, 40))
    def clear_places(self, first: int, step: int) -> None:
        places = range(max(1, first), PLACES, step)
        assert self.map.clear_places(places_of(places)) == self._forget(places)

    @rule(lba=st.integers(0, LBAS), count=st.integers(1, 300), volume=st.integers(1, 2), age=st.integers(0, 300))
    def remove_range(self, lba: int, count: int, volume: int, age: int) -> None:
        self._remove_range(make_key(volume, lba), count, max(0, self.version - age))

    @rule(lba=st.integers(0, LBAS), count=st.integers(1, 300), volume=st.integers(1, 2), age=st.integers(0, 300))
    def remove_range_but_hold_some(self, lba: int, count: int, volume: int, age: int) -> None:
        first, to = make_key(volume, lba), max(0, self.version - age)
        above = to // 2
        for _ in self.map.remove_range(first, count, below=self.version + 1, kept=(above, to)):
            pass
        for key in [key for key in self.mapped if first <= key < first + count]:
            block = self.mapped.pop(key)
            if above < block.version <= to:
                self.held[block.place] = (key, block.version, block.checksum)
            else:
                self._free([block.place])

    @rule(volume=st.integers(1, 2), age=st.integers(0, 300))
    def remove_volume(self, volume: int, age: int) -> None:
        self._remove_range(make_key(volume, 0), 1 << 40, max(0, self.version - age))

    def _remove_range(self, first: int, count: int, below: int) -> None:
        steps = list(self.map.remove_range(first, count, below=below))
        found = sorted(place for step in steps for place in step.tolist())
        gone = [
            block.place for key, block in self.mapped.items() if first <= key < first + count and block.version < below
        ]
        assert found == sorted(gone)
        assert self._forget(gone) == len(gone)

    @rule(lba=st.integers(0, LBAS), count=st.integers(1, 200), volume=st.integers(1, 2))
    def find_run(self, lba: int, count: int, volume: int) -> None:
        expected = [self.mapped[key].place if key in self.mapped else -1 for key in self._run(lba, count, volume)]
        assert self.map.find_run(make_key(volume, lba), count).tolist() == expected
        assert self.map.find_many(u64(self._run(lba, count, volume))).tolist() == expected

    @rule()
    def load_again(self) -> None:
        """What is held is loaded too, and loses against a newer version of its block."""
        twin = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS, bucket_count=self.map.bucket_count)
        keys = np.where(self.map.linked_mask(0, PLACES), self.map.key_array, np.uint64(0))
        assert twin.load(keys, self.map.version_array, self.map.checksum_array) == 0
        self.map = twin
        self._free(self.held)
        self.held = {}

    @invariant()
    def same_as_dict(self) -> None:
        if not hasattr(self, "map"):
            return
        check_chains(self.map)
        for key, block in self.mapped.items():
            place = self.map.find(key)
            assert place == block.place
            assert self.map.is_linked(place)
            assert (self.map.versions[place], self.map.checksums[place]) == (block.version, block.checksum)
        assert self.map.linked_count == len(self.mapped)
        for place, (key, version, checksum) in self.held.items():
            assert not self.map.is_linked(place)
            assert (self.map.keys[place], self.map.versions[place]) == (key, version)
            assert self.map.checksums[place] == checksum
            found = int(self.map.find_held(u64([key]), above=version - 1, to=version)[0])
            assert self.held[found][:2] == (key, version)
        assert sorted(self.map.held_places().tolist()) == sorted(self.held)
        assert self.map.held_count == len(self.held)


TestAgainstDict = AgainstDict.TestCase
TestAgainstDict.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("bucket_count", [1, 7, 1021])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=ZONE_BLOCKS * 4 - 1))
def test_of_two_places_with_one_key_the_newest_version_is_loaded(
    bucket_count: int | None, rows: list[tuple[int, int]]
) -> None:
    blockmap = BlockMap(ZONE_BLOCKS * 4, zone_blocks=ZONE_BLOCKS, bucket_count=bucket_count)
    keys, versions = np.zeros(blockmap.place_count, np.uint64), np.zeros(blockmap.place_count, np.uint64)
    newest: dict[int, int] = {}
    for place, (lba, version) in enumerate(rows, 1):
        keys[place], versions[place] = make_key(1, lba), version
        newest[make_key(1, lba)] = max(version, newest.get(make_key(1, lba), 0))
    dropped = blockmap.load(keys, versions, versions)
    assert dropped == len(rows) - len(newest)
    check_chains(blockmap)
    assert {key: blockmap.versions[blockmap.find(key)] for key in newest} == newest
    assert np.count_nonzero(blockmap.key_array) == len(newest)


def test_linking_older_places_behind_newer_state_changes_nothing() -> None:
    blockmap = BlockMap(ZONE_BLOCKS * 4, zone_blocks=ZONE_BLOCKS)
    for lba in range(100):
        blockmap.insert(make_key(1, lba), 50, 1, 128 + lba)
    keys = u64([*(make_key(1, lba) for lba in range(100)), *[0] * 20])
    assert blockmap.link_run(5, keys, np.full(120, 49, np.uint64), keys) == 100
    check_chains(blockmap)
    assert blockmap.find_run(make_key(1, 0), 100).tolist() == list(range(128, 228))


def test_a_long_trim_is_done_in_bounded_steps_and_spares_what_is_written_between() -> None:
    zone_blocks = 4096
    blockmap = BlockMap(zone_blocks * 32, zone_blocks=zone_blocks)
    count = blockmap.place_count - 10
    sequence = u64(range(1, count + 1))
    insert_many(blockmap, sequence + np.uint64(make_key(1, 0)), sequence, sequence, np.arange(1, count + 1))
    removed = 0
    for step, places in enumerate(blockmap.remove_range(make_key(1, 0), 1 << 40, below=count + 1)):
        assert places.size <= RANGE_LOOKUPS_MAX
        removed += places.size
        if step == 0:
            blockmap.insert(make_key(1, 100_000), count + 1, 7, count + 1)
    assert removed == count - 1
    assert blockmap.linked_count == 1
    assert blockmap.find(make_key(1, 100_000)) == count + 1
    check_chains(blockmap)


def test_a_trim_touches_only_its_volume_and_extent() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    keys = [make_key(volume, lba) for volume in (1, 2, 3) for lba in (0, 1, 99, 100, (1 << 40) - 1)]
    insert_many(blockmap, u64(keys), u64([5] * 15), u64([5] * 15), np.arange(1, 16))
    list(blockmap.remove_range(make_key(2, 0), 1 << 40, below=6))
    assert [key for key in keys if blockmap.find(key) < 0] == keys[5:10]
    list(blockmap.remove_range(make_key(3, 1), 99, below=6))
    assert [key for key in keys if blockmap.find(key) < 0] == [*keys[5:10], *keys[11:13]]


def test_the_last_key_of_all_is_found_and_removed() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    first = VERSION_MAX - 99
    keys = np.arange(100, dtype=np.uint64) + np.uint64(first)
    insert_many(blockmap, keys, keys, keys, np.arange(1, 101))
    assert blockmap.find_run(first, 100).tolist() == list(range(1, 101))
    assert blockmap.find(VERSION_MAX) == 100
    assert sum(step.size for step in blockmap.remove_range(first, 100, below=VERSION_MAX)) == 99
    assert blockmap.remove(VERSION_MAX) == 100


def test_an_occupied_place_is_refused() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    blockmap.insert(make_key(1, 1), 1, 1, 5)
    with pytest.raises(AssertionError):
        blockmap.insert(make_key(1, 2), 1, 1, 5)
    with pytest.raises(AssertionError):
        blockmap.wipe(5)
    many = np.arange(1, SCALAR_KEYS_MAX + 2)
    with pytest.raises(AssertionError):
        insert_many(blockmap, u64(many) + np.uint64(make_key(1, 9)), u64(many), u64(many), many)


def test_what_is_in_the_map_already_is_not_replaced() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    for lba in range(0, 100, 2):
        blockmap.insert(make_key(1, lba), 9, 9, 300 + lba)
    keys = np.arange(100, dtype=np.uint64) + np.uint64(make_key(1, 0))
    places = np.arange(1, 101)
    assert blockmap.insert_absent(keys, keys, keys, places).tolist() == places[1::2].tolist()
    check_chains(blockmap)
    expected = [300 + lba if lba % 2 == 0 else 1 + lba for lba in range(100)]
    assert blockmap.find_run(make_key(1, 0), 100).tolist() == expected
    assert not blockmap.keys[1], "a place that was not used stays empty"


def test_place_0_takes_no_block() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    with pytest.raises(AssertionError):
        blockmap.insert(make_key(1, 1), 1, 1, 0)
    with pytest.raises(AssertionError):
        blockmap.hold(make_key(1, 1), 1, 1, 0)
    with pytest.raises(AssertionError):
        insert_many(blockmap, *[u64([make_key(1, lba) for lba in range(60)])] * 3, np.arange(60))


def test_consecutive_blocks_lie_in_consecutive_buckets() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    buckets = blockmap._buckets_of(np.arange(100, dtype=np.uint64) + np.uint64(make_key(7, 1000)))
    assert set(np.diff(buckets).tolist()) <= {1, 1 - blockmap.bucket_count}


@pytest.mark.parametrize("place_count", [1, 2, 64, 1024, 1_310_720])
@pytest.mark.parametrize("seed", [0, 12345, (1 << 64) - 1])
def test_the_bucket_count_is_a_prime_near_the_places(place_count: int, seed: int) -> None:
    count = choose_bucket_count(place_count, seed)
    assert place_count <= count <= place_count * 9 // 8 + 200
    assert count > 1
    assert all(count % divisor for divisor in range(2, int(count**0.5) + 1))


def test_a_cached_block_costs_at_most_33_bytes() -> None:
    blockmap = BlockMap(1 << 20, zone_blocks=1024)
    assert blockmap.memory_bytes / blockmap.place_count <= 33


def test_the_newest_held_version_in_a_range_is_found() -> None:
    blockmap = BlockMap(PLACES, zone_blocks=ZONE_BLOCKS)
    for place, version in ((3, 5), (4, 9), (5, 7), (6, 12)):
        blockmap.hold(make_key(1, 7), version, 0, place)
    keys = u64([make_key(1, 7), make_key(1, 8)])
    for above, to, expected in ((0, 4, -1), (0, 5, 3), (4, 9, 4), (5, 8, 5), (9, 11, -1), (0, 99, 6)):
        assert blockmap.find_held(keys, above=above, to=to).tolist() == [expected, -1]

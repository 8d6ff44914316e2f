"""The map: (volume, block) to place, in flat arrays, without an object per block.

A key is `volume_key << 40 | lba`; a place is `zone * zone_blocks + block`. Per place the map keeps key, version,
checksum and the next place of its hash chain; the buckets hold each chain's first place: 8 + 8 + 8 + 4 + about 4 bytes.
Held places, which keep pinned versions, are in a second table of the same kind: its memory is touched only by them.
The bucket of a key is its remainder by a prime, so consecutive blocks of a volume lie in consecutive buckets and a run
of them costs few cache misses. The prime may be drawn at random, so that a guest cannot aim at one bucket.

Invariants:
    A place is linked (in exactly one chain) or not: it is if it has a key and `nexts[place]` is not UNLINKED.
    A linked place has a key, is in the chain of that key's bucket, and no two linked places have the same key.
    A place that is not linked is empty (key 0) or held (a key, for a pinned version): then it is in exactly one chain
    of the second table, that of its key's bucket; a key may have several there.
    live[zone] == linked places of the zone; held_array[zone] == its held ones.
    bucket, place and key arrays never move, so that other code may keep views of them.
    What `hidden` covers is linked, but no look-up finds it: see `sweeping`.
    All arrays begin as zeros that were never touched: a large map costs no time and memory before it is filled. So the
    end of a chain is 0, which is no place of a block: place 0 is the header of the first record of zone 0.
Crash: the map is only in memory; it is loaded from a checkpoint and brought up by replay.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.emptying import HeldViews, clear_places_fast, find_kept_fast
from forebay_cache.engine.entering import (
    NIL,
    UNLINKED,
    Entered,
    MapViews,
    Moved,
    enter_moves_fast,
    enter_writes_fast,
)
from forebay_cache.engine.limits import (
    LINK_ROUNDS_MAX,
    LOAD_SLICE_PLACES,
    PLACES_MAX,
    RANGE_LOOKUPS_MAX,
    RANGE_SCAN_RATIO,
    SCALAR_KEYS_MAX,
)
from forebay_cache.engine.runs import Run, find_runs_fast, join_runs
from forebay_cache.engine.sweeping import Hidden
from forebay_core.units import LBA_BITS, LBA_MAX, Buffer

U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
PlaceArray = npt.NDArray[np.int64]
IntView = memoryview  # of ints: indexing one costs a third of indexing the numpy array

_NIL: Final = np.uint32(NIL)
_UNLINKED: Final = np.uint32(UNLINKED)
_ONE: Final = np.uint16(1)


class LostPlace(NamedTuple):
    """What a place held that lost to a newer version of its block."""

    key: int
    version: int
    checksum: int
    place: int


def make_key(volume_key: int, lba: int) -> int:
    """Return the key of a block."""
    assert volume_key > 0
    assert 0 <= lba <= LBA_MAX
    return volume_key << LBA_BITS | lba


class BlockMap:
    """Where each cached block lies. Scalar calls take and return ints, array calls u64 keys and int64 places.

    `find(key)` returns the place or -1. `keys`, `versions`, `checksums` and `live` are views for reading one element
    quickly; `key_array` and the like are the same memory for array operations. Only this class writes to them.
    """

    def __init__(self, place_count: int, *, zone_blocks: int, bucket_count: int | None = None) -> None:
        """Make an empty map; `bucket_count` is best a prime, see `choose_bucket_count`."""
        assert 0 < place_count <= PLACES_MAX
        assert 0 < zone_blocks <= 0xFFFF
        assert place_count % zone_blocks == 0
        self.place_count: Final = place_count
        self.zone_blocks: Final = zone_blocks
        self.bucket_count: Final = bucket_count or choose_bucket_count(place_count)
        self.key_array: Final[U64Array] = np.zeros(place_count, np.uint64)
        self.version_array: Final[U64Array] = np.zeros(place_count, np.uint64)
        self.checksum_array: Final[U64Array] = np.zeros(place_count, np.uint64)
        self.live_array: Final[npt.NDArray[np.uint16]] = np.zeros(place_count // zone_blocks, np.uint16)
        self.held_array: Final[npt.NDArray[np.uint16]] = np.zeros(place_count // zone_blocks, np.uint16)
        self._next_array: Final[U32Array] = np.zeros(place_count, np.uint32)
        self._head_array: Final[U32Array] = np.zeros(self.bucket_count, np.uint32)
        self._held_nexts: Final[U32Array] = np.zeros(place_count, np.uint32)
        self._held_heads: Final[U32Array] = np.zeros(self.bucket_count, np.uint32)
        self._second: Final = HeldViews(self._held_heads.data, self._held_nexts.data, self.held_array.data)
        self.keys: Final[IntView] = self.key_array.data
        self.versions: Final[IntView] = self.version_array.data
        self.checksums: Final[IntView] = self.checksum_array.data
        self.live: Final[IntView] = self.live_array.data
        self._nexts: Final[IntView] = self._next_array.data
        self._heads: Final[IntView] = self._head_array.data
        self._views = MapViews(self._heads, self._nexts, self.keys, self.versions, self.checksums, self.live)
        self.hidden: Final[list[Hidden]] = []
        self.find: Final[Callable[[int], int]] = _make_find(self._views, self.hidden)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays but those of the second table: a place that holds no pinned version touches none."""
        arrays = (self.key_array, self.version_array, self.checksum_array, self.live_array, self.held_array)
        chains = (self._next_array, self._head_array)
        return sum(array.nbytes for array in (*arrays, *chains))

    @property
    def linked_count(self) -> int:
        """Blocks in the map."""
        return int(self.live_array.sum(dtype=np.int64))

    @property
    def held_count(self) -> int:
        """Places that hold a pinned version."""
        return int(self.held_array.sum(dtype=np.int64))

    @property
    def used_zones(self) -> PlaceArray:
        """Zones with a place that is not empty."""
        return np.flatnonzero(self.live_array | self.held_array)

    # One block at a time.

    def insert(self, key: int, version: int, checksum: int, place: int) -> int:
        """Map the key to an empty place; return the place it had before, which is empty now, or -1."""
        keys, nexts, heads, live = self.keys, self._nexts, self._heads, self.live
        assert keys[place] == 0 and place > 0, place
        bucket = key % self.bucket_count
        first = old = heads[bucket]
        before = NIL
        while old != NIL and keys[old] != key:
            before = old
            old = nexts[old]
        if old == NIL:
            nexts[place] = first
            heads[bucket] = place
            old = -1
        else:
            nexts[place] = nexts[old]
            nexts[old] = UNLINKED
            keys[old] = 0
            live[old // self.zone_blocks] -= 1
            if before == NIL:
                heads[bucket] = place
            else:
                nexts[before] = place
        keys[place] = key
        self.versions[place] = version
        self.checksums[place] = checksum
        live[place // self.zone_blocks] += 1
        return old

    def unlink(self, key: int) -> int:
        """Take the key out but leave its place held: key, version and checksum stay. Return the place or -1."""
        keys, nexts, heads = self.keys, self._nexts, self._heads
        bucket = key % self.bucket_count
        place: int = heads[bucket]
        before = NIL
        while place != NIL and keys[place] != key:
            before = place
            place = nexts[place]
        if place == NIL:
            return -1
        if before == NIL:
            heads[bucket] = nexts[place]
        else:
            nexts[before] = nexts[place]
        nexts[place] = UNLINKED
        self.live[place // self.zone_blocks] -= 1
        self._hold_place(place)
        return place

    def remove(self, key: int) -> int:
        """Take the key out and empty its place; return the place or -1."""
        place = self.find(key)
        if place >= 0:
            self.clear_places(np.array([place]))
        return place

    def hold(self, key: int, version: int, checksum: int, place: int) -> None:
        """Let an empty place hold a block without linking it: a pinned version that was moved."""
        assert self.keys[place] == 0 and place > 0, place
        assert key > 0
        self._nexts[place] = UNLINKED
        self.keys[place] = key
        self.versions[place] = version
        self.checksums[place] = checksum
        self._hold_place(place)

    def wipe(self, place: int) -> None:
        """Empty a place that is held or empty already."""
        assert not self.is_linked(place), place
        self.clear_places(np.array([place]))
        self.versions[place] = 0
        self.checksums[place] = 0

    def is_linked(self, place: int) -> bool:
        """Tell whether the place is what its key is mapped to."""
        return bool(self.keys[place] != 0 and self._nexts[place] != UNLINKED)

    # Many blocks at once.

    def linked_mask(self, first_place: int, count: int) -> npt.NDArray[np.bool_]:
        """Return for each place of a run whether it is linked."""
        part = slice(first_place, first_place + count)
        mask: npt.NDArray[np.bool_] = (self._next_array[part] != _UNLINKED) & (self.key_array[part] != 0)
        return mask

    def linked_at(self, places: PlaceArray) -> npt.NDArray[np.bool_]:
        """Return for each place whether it is linked."""
        mask: npt.NDArray[np.bool_] = self._next_array.take(places) != _UNLINKED
        mask &= self.key_array.take(places) != 0
        return mask

    def enter_writes(
        self,
        headers: list[bytearray],
        record_blocks: int,
        number: int,
        index: int,
        count: int,
        first_place: int,
        *,
        acknowledged: int,
        closed: int,
        found: Entered,
    ) -> tuple[int, int]:
        """Map packed entries to consecutive empty places; see `entering.enter_writes`."""
        run = headers, record_blocks, number, index, count, first_place
        dirty_count, pinned_count = enter_writes_fast(self._views, self.zone_blocks, *run, acknowledged, closed, found)
        if pinned_count:
            for place in found.pinned_places[:pinned_count].tolist():
                self._hold_place(place)
        return dirty_count, pinned_count

    def enter_moves(
        self, packed: Buffer, index: int, sources: PlaceArray, first_place: int, *, found: Moved
    ) -> tuple[int, int]:
        """Map packed entries to consecutive empty places instead of their sources; see `entering.enter_moves`."""
        return enter_moves_fast(self._views, self.zone_blocks, packed, index, sources, first_place, found)

    def find_runs(self, key: int, count: int) -> list[Run]:
        """Return the runs that consecutive blocks make; see `runs.find_runs`, but what is hidden has no place."""
        if self.hidden:
            return join_runs(self.find_run(key, count).tolist())
        return find_runs_fast(self._views, key, count)

    def find_run(self, key: int, count: int) -> PlaceArray:
        """Return the places of `count` consecutive blocks, -1 where one is missing."""
        if count <= SCALAR_KEYS_MAX:
            find = self.find
            return np.array([find(one) for one in range(key, key + count)], np.int64)
        return self.find_many(np.arange(count, dtype=np.uint64) + np.uint64(key))

    def find_many(self, keys: U64Array) -> PlaceArray:
        """Return the place of each key, -1 where one is missing."""
        places = self.find_linked(keys)
        if self.hidden:
            places[self.hidden_mask(keys, np.maximum(places, 0))] = -1
        return places

    def hidden_mask(self, keys: U64Array, places: PlaceArray) -> npt.NDArray[np.bool_]:
        """Tell of each key, which lies at the place, whether it is hidden."""
        versions = self.version_array.take(places)
        mask = np.zeros(keys.size, np.bool_)
        for one in self.hidden:
            mask |= one.mask(keys, versions)
        return mask

    def find_linked(self, keys: U64Array) -> PlaceArray:
        """Return the places as `find_many` does, also of what is hidden."""
        found = np.full(keys.size, -1, np.int64)
        places = self._head_array.take(self._buckets_of(keys))
        waiting = np.flatnonzero(places != _NIL)
        places = places[waiting]
        while waiting.size:
            hit = self.key_array.take(places) == keys[waiting]
            found[waiting[hit]] = places[hit]
            missed = ~hit
            places = self._next_array.take(places[missed])
            more = places != _NIL
            places, waiting = places[more], waiting[missed][more]
        return found

    def find_held(self, keys: U64Array, *, above: int, to: int) -> PlaceArray:
        """Return for each key the held place with the newest version in (above, to], -1 where there is none."""
        found = np.full(keys.size, -1, np.int64)
        newest = np.full(keys.size, above, np.uint64)
        places = self._held_heads.take(self._buckets_of(keys))
        asking = np.flatnonzero(places != _NIL)
        places = places[asking]
        while asking.size:
            versions = self.version_array.take(places)
            hit = (self.key_array.take(places) == keys[asking]) & (versions <= np.uint64(to))
            hit &= versions > newest[asking]
            found[asking[hit]] = places[hit]
            newest[asking[hit]] = versions[hit]
            places = self._held_nexts.take(places)
            more = places != _NIL
            places, asking = places[more], asking[more]
        return found

    def held_places(self) -> PlaceArray:
        """Return all held places; looks at each zone that has one."""
        zones = np.flatnonzero(self.held_array).tolist()
        parts = []
        for first in (zone * self.zone_blocks for zone in zones):
            part = slice(first, first + self.zone_blocks)
            held = (self._next_array[part] == _UNLINKED) & (self.key_array[part] != 0)
            parts.append(np.flatnonzero(held) + first)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def insert_absent(self, keys: U64Array, versions: U64Array, checksums: U64Array, places: PlaceArray) -> PlaceArray:
        """Map those of distinct keys that are not in the map to their empty places; return the places used."""
        absent = self.find_linked(keys) < 0
        self._fill(keys[absent], versions[absent], checksums[absent], places[absent])
        return places[absent]

    def clear_places(self, places: PlaceArray) -> int:
        """Empty places, whether linked, held or empty; return how many were linked."""
        return clear_places_fast(self._views, self._second, self.zone_blocks, places)

    def unlink_places(self, places: PlaceArray) -> None:
        """Take distinct linked places out of the map but leave them held, as `unlink` does."""
        keys = self.key_array.take(places)
        self.clear_places(places)
        self.key_array[places] = keys
        self._enter_held(places, keys)

    def clear_zone(self, first_place: int, count: int) -> int:
        """Empty a run of places, whether linked, held or empty; return how many were linked."""
        return self.clear_places(np.arange(first_place, first_place + count, dtype=np.int64))

    def find_kept(
        self,
        first_place: int,
        count: int,
        states: npt.NDArray[np.uint8],
        noted: U64Array,
        worthy_from: int,
        found: PlaceArray,
    ) -> int:
        """Find those of a run of places that are to be kept; see `emptying.find_kept`."""
        return find_kept_fast(self._views, states, noted, first_place, count, worthy_from, found)

    def remove_range(
        self, key: int, count: int, *, below: int, kept: tuple[int, int] = (0, 0), step: int = RANGE_LOOKUPS_MAX
    ) -> Iterator[PlaceArray]:
        """Take out the places of `count` consecutive blocks whose version is less than `below`, and empty them, but for
        those with a version in (kept[0], kept[1]]: they stay held.

        A generator of bounded steps: each yields the places it took out, at most `step`. Its cost is that of the blocks
        or of the places of the device, whichever is less. The map may change between steps; what comes newer is left
        alone.
        """
        if count <= self.place_count // RANGE_SCAN_RATIO or count <= step:
            for at in range(0, count, step):
                some = min(step, count - at)
                if self.hidden:  # it may be what is hidden that is to be removed
                    found = self.find_linked(np.arange(some, dtype=np.uint64) + np.uint64(key + at))
                else:
                    found = self.find_run(key + at, some)
                yield self.clear_older(found[found >= 0], below, kept)
            return
        scanned = step * RANGE_SCAN_RATIO
        for first in range(0, self.place_count, scanned):
            # What lies below the key wraps around to a huge distance: one comparison tests both ends.
            distances = self.key_array[first : first + scanned] - np.uint64(key)
            found = np.flatnonzero(distances < np.uint64(count)) + first
            if not found.size:
                yield found
            for at in range(0, found.size, step):
                places = found[at : at + step]
                # The map may have changed since they were found.
                distances = self.key_array.take(places) - np.uint64(key)
                linked = self._next_array.take(places) != _UNLINKED  # those of them that have a key still
                yield self.clear_older(places[(distances < np.uint64(count)) & linked], below, kept)

    def clear_older(self, places: PlaceArray, below: int, kept: tuple[int, int]) -> PlaceArray:
        """Take out those of distinct linked places whose version is less than `below`, as `remove_range` does."""
        versions = self.version_array.take(places)
        older = versions < np.uint64(below)
        pinned = older & (versions > np.uint64(kept[0])) & (versions <= np.uint64(kept[1]))
        if pinned.any():
            self.unlink_places(places[pinned])
        self.clear_places(places[older & ~pinned])
        return places[older]

    def load(self, keys: U64Array, versions: U64Array, checksums: U64Array) -> int:
        """Fill an empty map from whole arrays; return how many places lost to a newer version of their block."""
        assert keys.size == versions.size == checksums.size == self.place_count
        assert not self.live_array.any()
        lost = 0
        for first in range(0, self.place_count, LOAD_SLICE_PLACES):
            part = slice(first, first + LOAD_SLICE_PLACES)
            lost += self.link_run(first, keys[part], versions[part], checksums[part])
        return lost

    def link_run(
        self,
        first_place: int,
        keys: U64Array,
        versions: U64Array,
        checksums: U64Array,
        *,
        lost: list[LostPlace] | None = None,
    ) -> int:
        """Map the keys that are not 0 to the empty places of a run.

        Of several places with one key the newest version stays (of equals one of them); the others are emptied, and
        added to `lost`. Returns how many were.
        """
        part = slice(first_place, first_place + keys.size)
        assert not self.key_array[part].any()
        assert first_place > 0 or keys[0] == 0
        self.key_array[part] = keys
        self.version_array[part] = versions
        self.checksum_array[part] = checksums
        self._next_array[part] = _UNLINKED
        places = (np.flatnonzero(keys) + first_place).astype(np.uint32)
        np.add.at(self.live_array, places // self.zone_blocks, _ONE)
        before = self.linked_count
        lost = [] if lost is None else lost
        rest, losers = self._link_newest(places)
        lost += [self._at(place) for place in losers.tolist()]
        self.clear_places(losers)
        for place in rest.tolist():
            self._link_one_newest(place, lost)
        return before - self.linked_count

    def hold_run(self, places: PlaceArray, keys: U64Array, versions: U64Array, checksums: U64Array) -> None:
        """Let distinct empty places hold blocks, as `hold` does one."""
        assert not self.key_array.take(places).any()
        self.key_array[places] = keys
        self.version_array[places] = versions
        self.checksum_array[places] = checksums
        self._next_array[places] = _UNLINKED
        self._enter_held(places, keys)

    # Chains.

    def _fill(self, keys: U64Array, versions: U64Array, checksums: U64Array, places: PlaceArray) -> None:
        assert places.size == 0 or int(places.min()) > 0
        self.key_array[places] = keys
        self.version_array[places] = versions
        self.checksum_array[places] = checksums
        self._link(self._head_array, self._next_array, places.astype(np.uint32), self._buckets_of(keys))
        np.add.at(self.live_array, places // self.zone_blocks, _ONE)

    def _buckets_of(self, keys: U64Array) -> PlaceArray:
        return (keys % np.uint64(self.bucket_count)).view(np.int64)

    def _link(self, heads: U32Array, nexts: U32Array, places: U32Array, buckets: PlaceArray) -> None:
        """Put places at the front of their chains, in rounds: of several for one bucket, one wins each round."""
        for _ in range(LINK_ROUNDS_MAX):
            if places.size <= SCALAR_KEYS_MAX:
                break
            nexts[places] = heads.take(buckets)
            heads[buckets] = places
            lost = heads.take(buckets) != places
            places, buckets = places[lost], buckets[lost]
        for place, bucket in zip(places.tolist(), buckets.tolist(), strict=True):
            nexts[place] = heads[bucket]
            heads[bucket] = place

    def _link_newest(self, places: U32Array) -> tuple[U32Array, PlaceArray]:
        """Link places as `_link` does; return those left over and those that have an older version of a key."""
        heads, nexts = self._head_array, self._next_array
        buckets = self._buckets_of(self.key_array.take(places))
        losers = [np.empty(0, np.int64)]
        for _ in range(LINK_ROUNDS_MAX):
            if places.size <= SCALAR_KEYS_MAX:
                break
            chains = heads.take(buckets)
            heads[buckets] = places
            won = heads.take(buckets) == places
            winners, chains = places[won], chains[won]
            nexts[winners] = chains
            losers.extend(self._older_twins(winners, chains))
            lost = ~won
            places, buckets = places[lost], buckets[lost]
        return places, np.unique(np.concatenate(losers))

    def _older_twins(self, places: U32Array, chains: U32Array) -> Iterator[PlaceArray]:
        """Compare each place with the chain behind it; yield the older one of each pair with the same key."""
        while True:
            more = chains != _NIL
            places, chains = places[more], chains[more]
            if not places.size:
                return
            twin = self.key_array.take(chains) == self.key_array.take(places)
            if twin.any():
                mine, other = places[twin], chains[twin]
                newer = self.version_array.take(mine) >= self.version_array.take(other)
                yield np.where(newer, other, mine).astype(np.int64)
            chains = self._next_array.take(chains)

    def _link_one_newest(self, place: int, lost: list[LostPlace]) -> None:
        one = self._at(place)
        twin = self.find(one.key)
        self.keys[place] = 0
        self.live[place // self.zone_blocks] -= 1
        if twin >= 0 and self.versions[twin] > one.version:
            lost.append(one)
            return
        if twin >= 0:
            lost.append(self._at(twin))
        self.insert(one.key, one.version, one.checksum, place)

    def _at(self, place: int) -> LostPlace:
        return LostPlace(self.keys[place], self.versions[place], self.checksums[place], place)

    def _hold_place(self, place: int) -> None:
        """Enter a place that was just unlinked, or filled, into the second table."""
        heads, nexts, held = self._second
        bucket = self.keys[place] % self.bucket_count
        nexts[place] = heads[bucket]
        heads[bucket] = place
        held[place // self.zone_blocks] += 1

    def _enter_held(self, places: PlaceArray, keys: U64Array) -> None:
        self._link(self._held_heads, self._held_nexts, places.astype(np.uint32), self._buckets_of(keys))
        np.add.at(self.held_array, places // self.zone_blocks, _ONE)


def choose_bucket_count(place_count: int, seed: int = 0) -> int:
    """Return a prime that is at least `place_count` and at most about an eighth above it, by a random seed."""
    candidate = (place_count + seed % (place_count // 8 + 1)) | 1
    while any(candidate % divisor == 0 for divisor in range(3, int(candidate**0.5) + 1, 2)):
        candidate += 2
    return max(candidate, 3)


def _make_find(views: MapViews, hidden: list[Hidden]) -> Callable[[int], int]:
    """Return the hottest function of the engine; as a closure it looks nothing up on an object."""
    heads, nexts, keys, versions, _, _ = views
    bucket_count = len(heads)

    def find(key: int) -> int:
        place: int = heads[key % bucket_count]
        while place != NIL:
            if keys[place] == key:
                return -1 if hidden and any(one.covers(key, versions[place]) for one in hidden) else place
            place = nexts[place]
        return -1

    return find

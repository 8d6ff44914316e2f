"""The map: (volume, block) to place, in flat arrays, without an object per block.

A key is `volume_key << 40 | lba`; a place is `zone * zone_blocks + block`. Per place the map keeps key, version,
checksum and the next place of its hash chain; the buckets hold each chain's first place: 8 + 8 + 8 + 4 + about 4 bytes.
The bucket of a key is its remainder by a prime, so consecutive blocks of a volume lie in consecutive buckets and a run
of them costs few cache misses. The prime may be drawn at random, so that a guest cannot aim at one bucket.

Invariants:
    A place is linked (in exactly one chain) or not: it is if it has a key and `nexts[place]` is not UNLINKED.
    A linked place has a key, is in the chain of that key's bucket, and no two linked places have the same key.
    A place that is not linked is empty (key 0) or held (a key, for a pinned version).
    live[zone] == linked places of the zone.
    bucket, place and key arrays never move, so that other code may keep views of them.
    All arrays begin as zeros that were never touched: a large map costs no time and memory before it is filled. So the
    end of a chain is 0, which is no place of a block: place 0 is the header of the first record of zone 0.
Crash: the map is only in memory; it is loaded from a checkpoint and brought up by replay.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.entering import NIL, UNLINKED, Entered, MapViews, enter_writes_fast
from forebay_cache.engine.limits import (
    LINK_ROUNDS_MAX,
    LOAD_SLICE_PLACES,
    PLACES_MAX,
    RANGE_LOOKUPS_MAX,
    RANGE_SCAN_PLACES_MAX,
    RANGE_SCAN_RATIO,
    SCALAR_KEYS_MAX,
)
from forebay_core.units import LBA_BITS, LBA_MAX, Buffer

U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
PlaceArray = npt.NDArray[np.int64]
IntView = memoryview  # of ints: indexing one costs a third of indexing the numpy array

_NIL: Final = np.uint32(NIL)
_UNLINKED: Final = np.uint32(UNLINKED)
_ONE: Final = np.uint16(1)


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
        self._next_array: Final[U32Array] = np.zeros(place_count, np.uint32)
        self._head_array: Final[U32Array] = np.zeros(self.bucket_count, np.uint32)
        self.keys: Final[IntView] = self.key_array.data
        self.versions: Final[IntView] = self.version_array.data
        self.checksums: Final[IntView] = self.checksum_array.data
        self.live: Final[IntView] = self.live_array.data
        self._nexts: Final[IntView] = self._next_array.data
        self._heads: Final[IntView] = self._head_array.data
        self._views = MapViews(self._heads, self._nexts, self.keys, self.versions, self.checksums, self.live)
        self.find: Final[Callable[[int], int]] = _make_find(self._heads, self.keys, self._nexts, self.bucket_count)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.key_array, self.version_array, self.checksum_array, self.live_array)
        return sum(array.nbytes for array in arrays) + self._next_array.nbytes + self._head_array.nbytes

    @property
    def linked_count(self) -> int:
        """Blocks in the map."""
        return int(self.live_array.sum(dtype=np.int64))

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
        return place

    def remove(self, key: int) -> int:
        """Take the key out and empty its place; return the place or -1."""
        place = self.unlink(key)
        if place >= 0:
            self.keys[place] = 0
        return place

    def hold(self, key: int, version: int, checksum: int, place: int) -> None:
        """Let an empty place hold a block without linking it: a pinned version that was moved."""
        assert self.keys[place] == 0 and place > 0, place
        assert key > 0
        self._nexts[place] = UNLINKED
        self.keys[place] = key
        self.versions[place] = version
        self.checksums[place] = checksum

    def wipe(self, place: int) -> None:
        """Empty a place that is held or empty already."""
        assert not self.is_linked(place), place
        self.keys[place] = 0
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

    def enter_writes(
        self,
        packed: Buffer,
        index: int,
        count: int,
        first_place: int,
        *,
        acknowledged: int,
        closed: int,
        found: Entered,
    ) -> tuple[int, int]:
        """Map packed entries to consecutive empty places; see `entering.enter_writes`."""
        views, zone_blocks = self._views, self.zone_blocks
        return enter_writes_fast(views, zone_blocks, packed, index, count, first_place, acknowledged, closed, found)

    def find_run(self, key: int, count: int) -> PlaceArray:
        """Return the places of `count` consecutive blocks, -1 where one is missing."""
        if count <= SCALAR_KEYS_MAX:
            find = self.find
            return np.array([find(one) for one in range(key, key + count)], np.int64)
        return self.find_many(np.arange(count, dtype=np.uint64) + np.uint64(key))

    def find_many(self, keys: U64Array) -> PlaceArray:
        """Return the place of each key, -1 where one is missing."""
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

    def insert_absent(self, keys: U64Array, versions: U64Array, checksums: U64Array, places: PlaceArray) -> PlaceArray:
        """Map those of distinct keys that are not in the map to their empty places; return the places used."""
        absent = self.find_many(keys) < 0
        self._fill(keys[absent], versions[absent], checksums[absent], places[absent])
        return places[absent]

    def clear_places(self, places: PlaceArray) -> int:
        """Empty distinct places, whether linked, held or empty; return how many were linked."""
        linked = places[(self._next_array.take(places) != _UNLINKED) & (self.key_array.take(places) != 0)]
        if linked.size <= SCALAR_KEYS_MAX:
            for place in linked.tolist():
                self._unlink_place(place)
            self.key_array[places] = 0
            return int(linked.size)
        buckets = self._buckets_of(self.key_array.take(linked))
        self.key_array[places] = 0
        self._sweep(buckets)
        self._next_array[linked] = _UNLINKED
        np.subtract.at(self.live_array, linked // self.zone_blocks, _ONE)
        return int(linked.size)

    def unlink_places(self, places: PlaceArray) -> None:
        """Take distinct linked places out of the map but leave them held, as `unlink` does."""
        keys = self.key_array.take(places)
        self.clear_places(places)
        self.key_array[places] = keys

    def clear_zone(self, first_place: int, count: int) -> int:
        """Empty a run of places, whether linked, held or empty; return how many were linked."""
        return self.clear_places(np.arange(first_place, first_place + count, dtype=np.int64))

    def remove_range(self, key: int, count: int, *, below: int) -> Iterator[PlaceArray]:
        """Empty the places of `count` consecutive blocks whose version is less than `below`.

        A generator of bounded steps: each yields the places it emptied. Its cost is that of the blocks or of the
        places of the device, whichever is less. The map may change between steps; what comes newer is left alone.
        """
        if count <= self.place_count // RANGE_SCAN_RATIO or count <= RANGE_LOOKUPS_MAX:
            for at in range(0, count, RANGE_LOOKUPS_MAX):
                found = self.find_run(key + at, min(RANGE_LOOKUPS_MAX, count - at))
                yield self._clear_older(found[found >= 0], below)
            return
        for first in range(0, self.place_count, RANGE_SCAN_PLACES_MAX):
            # What lies below the key wraps around to a huge distance: one comparison tests both ends.
            distances = self.key_array[first : first + RANGE_SCAN_PLACES_MAX] - np.uint64(key)
            found = np.flatnonzero(distances < np.uint64(count)) + first
            if not found.size:
                yield found
            for at in range(0, found.size, RANGE_LOOKUPS_MAX):
                some = found[at : at + RANGE_LOOKUPS_MAX]
                # The map may have changed since they were found.
                distances = self.key_array.take(some) - np.uint64(key)
                linked = self._next_array.take(some) != _UNLINKED  # those of them that have a key still
                some = some[(distances < np.uint64(count)) & linked]
                yield self._clear_older(some, below)

    def load(self, keys: U64Array, versions: U64Array, checksums: U64Array) -> int:
        """Fill an empty map from whole arrays; return how many places lost to a newer version of their block."""
        assert keys.size == versions.size == checksums.size == self.place_count
        assert not self.live_array.any()
        lost = 0
        for first in range(0, self.place_count, LOAD_SLICE_PLACES):
            part = slice(first, first + LOAD_SLICE_PLACES)
            lost += self.link_run(first, keys[part], versions[part], checksums[part])
        return lost

    def link_run(self, first_place: int, keys: U64Array, versions: U64Array, checksums: U64Array) -> int:
        """Map the keys that are not 0 to the empty places of a run.

        Of several places with one key the newest version stays (of equals one of them); the others are emptied.
        Returns how many were.
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
        rest, losers = self._link_newest(places)
        self.clear_places(losers)
        for place in rest.tolist():
            self._link_one_newest(place)
        return before - self.linked_count

    # Chains.

    def _fill(self, keys: U64Array, versions: U64Array, checksums: U64Array, places: PlaceArray) -> None:
        assert places.size == 0 or int(places.min()) > 0
        self.key_array[places] = keys
        self.version_array[places] = versions
        self.checksum_array[places] = checksums
        self._link(places.astype(np.uint32), self._buckets_of(keys))
        np.add.at(self.live_array, places // self.zone_blocks, _ONE)

    def _buckets_of(self, keys: U64Array) -> PlaceArray:
        return (keys % np.uint64(self.bucket_count)).view(np.int64)

    def _link(self, places: U32Array, buckets: PlaceArray) -> None:
        """Put places at the front of their chains, in rounds: of several for one bucket, one wins each round."""
        heads, nexts = self._head_array, self._next_array
        for _ in range(LINK_ROUNDS_MAX):
            if places.size <= SCALAR_KEYS_MAX:
                break
            nexts[places] = heads.take(buckets)
            heads[buckets] = places
            lost = heads.take(buckets) != places
            places, buckets = places[lost], buckets[lost]
        for place, bucket in zip(places.tolist(), buckets.tolist(), strict=True):
            self._nexts[place] = self._heads[bucket]
            self._heads[bucket] = place

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

    def _link_one_newest(self, place: int) -> None:
        key, version = self.keys[place], self.versions[place]
        twin = self.find(key)
        self.keys[place] = 0
        self.live[place // self.zone_blocks] -= 1
        if twin < 0 or self.versions[twin] <= version:
            self.insert(key, version, self.checksums[place], place)

    def _unlink_place(self, target: int) -> None:
        """Take one linked place out of its chain, whatever else has its key: while linking, twins do."""
        bucket = self.keys[target] % self.bucket_count
        before, place = NIL, self._heads[bucket]
        while place != target:
            before, place = place, self._nexts[place]
        if before == NIL:
            self._heads[bucket] = self._nexts[target]
        else:
            self._nexts[before] = self._nexts[target]
        self._nexts[target] = UNLINKED
        self.live[target // self.zone_blocks] -= 1

    def _clear_older(self, places: PlaceArray, below: int) -> PlaceArray:
        older = places[self.version_array.take(places) < np.uint64(below)]
        self.clear_places(older)
        return older

    def _sweep(self, buckets: PlaceArray) -> None:
        """Cut the places without a key out of the chains of buckets; naming one twice does no harm."""
        heads, nexts = self._head_array, self._next_array
        places = self._first_with_key(heads.take(buckets))
        heads[buckets] = places
        places = places[places != _NIL]
        while places.size:
            after = self._first_with_key(nexts.take(places))
            nexts[places] = after
            places = after[after != _NIL]

    def _first_with_key(self, places: U32Array) -> U32Array:
        """Return for each place the first one from it along its chain that has a key, or NIL."""
        keys, nexts = self.key_array, self._next_array
        dead = np.flatnonzero(places != _NIL)
        while True:
            dead = dead[keys.take(places[dead]) == 0]
            if not dead.size:
                return places
            places[dead] = nexts.take(places[dead])
            dead = dead[places[dead] != _NIL]


def choose_bucket_count(place_count: int, seed: int = 0) -> int:
    """Return a prime that is at least `place_count` and at most about an eighth above it, by a random seed."""
    candidate = (place_count + seed % (place_count // 8 + 1)) | 1
    while any(candidate % divisor == 0 for divisor in range(3, int(candidate**0.5) + 1, 2)):
        candidate += 2
    return max(candidate, 3)


def _make_find(heads: IntView, keys: IntView, nexts: IntView, bucket_count: int) -> Callable[[int], int]:
    """Return the hottest function of the engine; as a closure it looks nothing up on an object."""

    def find(key: int) -> int:
        place: int = heads[key % bucket_count]
        while place != NIL:
            if keys[place] == key:
                return place
            place = nexts[place]
        return -1

    return find

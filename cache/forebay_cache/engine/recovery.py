"""Recovery: the newest checkpoint that is whole, then every record that was written since.

Before it the caller syncs the device, so that what is read now is what a power cut would leave. Records behind the
highest known durable position count only as long as they chain and their data match their checksums: what survives
of unflushed writes is a prefix. Below that position a mismatch is bit rot or a lost write: the device is refused, never
shortened. What can't be read counts as damaged, but for data blocks: the record stands, and whoever reads such a block
later fetches it again, or is told of an error if it is not in the store.

A volume may have snapshots and resizes that are not upstream: each ends a closed cut, which needs the newest version
of a block up to it, whatever came since. Which they are is known before any block is placed.

Invariants:
    Of several places for one block the highest version wins; of equal versions the later record. Those that lose are
    held if an end of a cut lies between them and the winner; of several in one cut the highest counts.
    A PIN is never taken for the newest.
    Replaying a record over a state that shows it already changes nothing.
    No two volumes have one id: the newer key counts, and nothing of the older one is left.
    What is not upstream is known when recovery is over: of the checkpoint only chunks of places that hold nothing but
    clean blocks are left for `loading`, and whatever replay changed, trimmed or filled anew counts before them.
Source: write-ahead logging with fuzzy checkpoints, as in Mohan et al., ARIES, 1992 (redo only).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.blockmap import BlockMap, LostPlace, choose_bucket_count
from forebay_cache.engine.checkpoints import Kept
from forebay_cache.engine.device_reads import ReadDevice, read_around
from forebay_cache.engine.holes import HoleMap
from forebay_cache.engine.limits import RANGE_LOOKUPS_MAX
from forebay_cache.engine.log import LogPoint
from forebay_cache.engine.log_end import LogEnd
from forebay_cache.engine.origin_map import OriginMap
from forebay_cache.engine.ports import U64Array
from forebay_cache.engine.pruning import prune_held
from forebay_cache.engine.unloaded import Unloaded
from forebay_cache.engine.zones import ZoneState, ZoneTable
from forebay_cache.format import checkpoint, record
from forebay_cache.format import superblock as superblock_format
from forebay_cache.format.cut_end import RESIZE, CutEnd
from forebay_cache.format.record import EntryArray, RecordHeader
from forebay_cache.format.superblock import Superblock
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.checksums import ZERO_BLOCK, checksum
from forebay_core.errors import CorruptionError, UnreadableError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX, Buffer

FIRST_POSITION: Final = 1


class RecoveredVolume(NamedTuple):
    """One volume as the device knows it."""

    note: VolumeNote
    version: int
    acknowledged: int
    holes: HoleMap
    origins: OriginMap | None = None
    ends: tuple[CutEnd, ...] = ()  # of closed cuts that are not upstream
    closed_holes: tuple[HoleMap, ...] = ()  # of each of them

    def cut_of(self, version: int) -> int:
        """Return which closed cut a version falls into, or how many there are if it is newer than all."""
        return bisect_left(self.ends, version, key=lambda end: end.version)

    def cuts_of(self, versions: U64Array) -> npt.NDArray[np.int64]:
        """Return what `cut_of` says of each version."""
        return np.searchsorted(np.array([end.version for end in self.ends], np.uint64), versions)


class Recovered(NamedTuple):
    """All that was on the device."""

    superblock: Superblock
    map: BlockMap
    zones: ZoneTable
    counts: npt.NDArray[np.uint8]
    volumes: dict[int, RecoveredVolume]
    kept: list[Kept]
    point: LogPoint
    findings: list[str]
    records_replayed: int
    unloaded: Unloaded
    limit_average: int = 0  # of all volumes together, as in VolumeNote
    limit_peak: int = 0


class _Pending(NamedTuple):
    """What is known of a volume when the whole log was looked at."""

    ends: tuple[CutEnd, ...]  # of cuts that are not upstream
    acknowledged: int


class _Record(NamedTuple):
    zone: int
    block: int
    header: RecordHeader
    entries: EntryArray
    note: VolumeNote | CutEnd | None


def blank_device(superblock: Superblock) -> list[tuple[int, bytes]]:
    """Return what makes an empty device, as (offset, bytes); the superblocks are last and want a sync before them."""
    geometry = superblock.geometry
    header = checkpoint.CheckpointHeader(
        device=superblock.device,
        sequence=1,
        log_position=FIRST_POSITION,
        previous_xxh3=0,
        replay_zone=0,
        replay_block=0,
        replay_incarnation=0,
        place_count=0,
        zone_count=geometry.zone_count,
        volume_count=0,
        hole_count=0,
        chunk_places=checkpoint.CHUNK_PLACES,
        table_xxh3=0,
    )
    rows = checkpoint.encode_zones(np.zeros(geometry.zone_count, checkpoint.ZONE_DTYPE))
    chunks = [rows[c.offset - BLOCK_SIZE :][: c.padded_size] for c in header.layout.zone_chunks]
    table = checkpoint.encode_table([checksum(chunk) for chunk in chunks], b"")
    header = header._replace(table_xxh3=checksum(table))
    area = geometry.checkpoint_offsets[0]
    writes = [(area + c.offset, chunk) for c, chunk in zip(header.layout.zone_chunks, chunks, strict=True)]
    writes.append((area + header.layout.table.offset, table))
    writes.append((area, checkpoint.encode_checkpoint_header(header)))
    writes.append((geometry.checkpoint_offsets[1], bytes(BLOCK_SIZE)))
    block = superblock_format.encode_superblock(superblock)
    return [*writes, (BLOCK_SIZE, block), (0, block)]


def recover(read: ReadDevice, superblock: Superblock, *, bucket_seed: int = 0, whole: bool = False) -> Recovered:
    """Return the state of a device that was synced and that nobody writes to; `whole`: with all clean blocks.

    Raises:
        CorruptionError: no checkpoint is whole, or a record that was durable is damaged.
    """
    offsets = superblock.checkpoint_offsets
    names = tuple(f"checkpoint area {area} at offset {offset}" for area, offset in enumerate(offsets))
    findings: list[str] = []
    candidates = _candidates(read, superblock, names, findings)
    for index, (area, header) in enumerate(candidates):
        try:
            replay = _load(read, superblock, area, header, place=names[area], bucket_seed=bucket_seed, whole=whole)
        except CorruptionError as error:
            if index + 1 == len(candidates):
                raise
            findings.append(f"{error}; the older checkpoint is used")
            continue
        replay.durable = max(h.log_position for _, h in candidates)
        kept = [Kept(h.sequence, a, h.log_position, h.replay_zone) for a, h in candidates[index:]]
        return replay.run(kept, findings)
    raise AssertionError("unreachable")


def _candidates(
    read: ReadDevice, superblock: Superblock, names: tuple[str, ...], findings: list[str]
) -> list[tuple[int, checkpoint.CheckpointHeader]]:
    """Return the checkpoints whose headers are whole, newest first."""
    blocks: list[Buffer] = []
    unreadable: list[UnreadableError] = []
    for offset, name in zip(superblock.checkpoint_offsets, names, strict=True):
        try:
            blocks.append(read(offset, BLOCK_SIZE))
        except UnreadableError as error:
            blocks.append(ZERO_BLOCK)
            unreadable.append(error)
            findings.append(f"{name}: {error}; the other checkpoint is used")
    try:
        return checkpoint.choose_checkpoints(
            blocks, device=superblock.device, size_max=superblock.checkpoint_size, places=names
        )
    except CorruptionError:
        if unreadable:
            raise unreadable[0] from None
        raise


class _Replay:
    """The state that records are applied to."""

    def __init__(self, read: ReadDevice, superblock: Superblock, *, bucket_seed: int, chunk_places: int) -> None:
        geometry = superblock.geometry
        self.read = read
        self.superblock = superblock
        self.zones = ZoneTable(
            zone_count=geometry.zone_count, zone_blocks=geometry.zone_blocks, zones_offset=geometry.zones_offset
        )
        self.map = BlockMap(
            geometry.place_count,
            zone_blocks=geometry.zone_blocks,
            bucket_count=choose_bucket_count(geometry.place_count, bucket_seed),
        )
        self.counts = np.zeros(geometry.place_count, np.uint8)
        self.volumes: dict[int, RecoveredVolume] = {}
        self.start = LogPoint(FIRST_POSITION, 0, 0, 0)
        self.incarnation = 0  # of the zone where replay starts
        self.durable = 0  # what checkpoints prove to be so
        self.limit = (0, 0)
        self.unloaded = Unloaded(geometry.zone_count, geometry.zone_blocks, chunk_places)
        self.unreadable: dict[int, UnreadableError] = {}  # by the offset of the block
        self.load_places: Callable[[], None] = lambda: None  # enters what the checkpoint says of places
        self.pending: dict[int, _Pending] = {}  # by volume key

    def run(self, kept: list[Kept], findings: list[str]) -> Recovered:
        """Apply the log and settle the zones."""
        records, end = self._collect()
        findings += self._unreadable_findings(end)
        self._note_ends(records)
        self.load_places()
        for one in records:
            self._apply(one)
        prune_held(self.map, self.volumes)
        self._settle(end, kept)
        return Recovered(
            self.superblock,
            self.map,
            self.zones,
            self.counts,
            self.volumes,
            kept,
            end,
            findings,
            len(records),
            self.unloaded,
            *self.limit,
        )

    # --- walking the log --------------------------------------------------------------------------------------

    def _collect(self) -> tuple[list[_Record], LogPoint]:
        """Return the valid records from the start of replay on, and the point behind the last one.

        Raises:
            CorruptionError: a record that was durable is missing.
        """
        records = list(self._walk())
        end = self._end_of(records)
        behind = self._log_end(end)
        place = f"zone {end.zone} block {end.block}"
        if not records and end.block and not behind.is_in_its_zone(self.incarnation):
            expected = f"records of its incarnation {self.incarnation}, which were durable"
            raise CorruptionError(place=place, what="zone", expected=expected, found="others or none")
        durable = max([self.durable, behind.find_durable(), *(one.header.durable_position for one in records)])
        if durable > end.position:
            expected = f"log position {end.position}, because everything before {durable} was durable"
            error = self.unreadable.get(self._offset(end.zone, end.block))
            found = "a damaged or lost record" if error is None else str(error)
            raise CorruptionError(place=place, what="log record", expected=expected, found=found)
        for index, one in enumerate(records):
            if one.header.log_position >= durable and not self._matches(one):
                return records[:index], self._end_of(records[:index])
        return records, end

    def _log_end(self, end: LogPoint) -> LogEnd:
        zones = self.zones
        tag = device_tag(self.superblock)
        return LogEnd(
            self._read_blocks, end, zone_count=zones.zone_count, zone_blocks=zones.zone_blocks, device_tag=tag
        )

    def _end_of(self, records: list[_Record]) -> LogPoint:
        if not records:
            return self.start
        last = records[-1]
        header = last.header
        zone, block = last.zone, last.block + header.size
        if header.kind == record.SEAL:
            zone, block = header.next_zone, 0
        return LogPoint(header.log_position + 1, zone, block, header.header_xxh3)

    def _walk(self) -> Iterator[_Record]:
        """Yield the records that chain."""
        point = self.start
        blocks = memoryview(b"")
        loaded = -1
        while point.block < self.zones.zone_blocks and point.zone < self.zones.zone_count:
            if point.zone != loaded:
                loaded = point.zone
                blocks = self._read_blocks(loaded, 0, self.zones.zone_blocks)
            one = self._decode(blocks, point)
            if one is None:
                return
            yield one
            point = self._end_of([one])

    def _decode(self, blocks: memoryview, point: LogPoint) -> _Record | None:
        header_block = blocks[point.block << BLOCK_SHIFT : (point.block + 1) << BLOCK_SHIFT]
        place = f"zone {point.zone} block {point.block}"
        try:
            header, entries = record.decode_record(header_block, place=place)
            note = record.decode_note(header_block, place=place) if header.kind == record.NOTE else None
        except CorruptionError:
            return None
        if (
            header.device != device_tag(self.superblock)
            or header.zone != point.zone
            or header.log_position != point.position
            or header.previous_xxh3 != point.chain
            or point.block + header.size > self.zones.zone_blocks
        ):
            return None
        return _Record(point.zone, point.block, header, entries, note)

    def _matches(self, one: _Record) -> bool:
        """Compare the data blocks of a record, which may have been torn, with their checksums.

        What can't be read tells nothing: ending the log there would lose all that was acknowledged behind it.
        """
        count = one.header.block_count
        first = self._offset(one.zone, one.block + 1)
        view = self._read_blocks(one.zone, one.block + 1, count)
        sums = one.entries["checksum"][:count].tolist()
        return all(
            checksum(view[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT]) == expected
            for i, expected in enumerate(sums)
            if first + i * BLOCK_SIZE not in self.unreadable
        )

    def _read_blocks(self, zone: int, block: int, count: int) -> memoryview:
        """Read blocks of a zone; those that can't be read are zeros, and noted."""
        if count == 0:
            return memoryview(b"")
        view, unreadable = read_around(self.read, self._offset(zone, block), count << BLOCK_SHIFT)
        self.unreadable |= unreadable
        return view

    def _offset(self, zone: int, block: int) -> int:
        return self.zones.zones_offset + (zone * self.zones.zone_blocks + block) * BLOCK_SIZE

    def _unreadable_findings(self, end: LogPoint) -> list[str]:
        """Return a line for each zone with blocks that can't be read, and one if the log ends at such a block."""
        by_zone: dict[int, list[int]] = {}
        for offset in sorted(self.unreadable):
            zone = (offset - self.zones.zones_offset) // (self.zones.zone_blocks * BLOCK_SIZE)
            by_zone.setdefault(zone, []).append(offset)
        findings = [
            f"zone {zone}: {len(offsets)} blocks can't be read, the first at offset {offsets[0]}; if they are in use, "
            "clean ones are fetched again, and reading changes that are not in the store is an error"
            for zone, offsets in by_zone.items()
        ]
        error = self.unreadable.get(self._offset(end.zone, end.block))
        if error is not None:
            findings.append(f"zone {end.zone} block {end.block}: {error}; the log ends there, nothing shows it went on")
        return findings

    # --- what is not upstream ---------------------------------------------------------------------------------

    def _note_ends(self, records: list[_Record]) -> None:
        """Learn of each volume, before anything is placed, what is upstream in the end and which cuts are not."""
        acknowledged = {key: volume.acknowledged for key, volume in self.volumes.items()}
        ends = {key: {end.version: end for end in volume.ends} for key, volume in self.volumes.items()}
        for one in records:
            if isinstance(one.note, CutEnd):
                ends.setdefault(one.note.volume_key, {})[one.note.version] = one.note
            for _, version, _, volume_key, kind, *_ in one.entries[one.header.block_count :].tolist():
                if kind == record.ACKNOWLEDGED:
                    acknowledged[volume_key] = max(acknowledged.get(volume_key, 0), version)
        for key, found in ends.items():
            stored = acknowledged.get(key, 0)
            left = tuple(end for version, end in sorted(found.items()) if version > stored)
            if key in self.volumes:
                self._set(_with_ends(self.volumes[key], left, stored))
            self.pending[key] = _Pending(left, stored)

    def older(self, volume_key: int, lba: int, version: int, block_checksum: int, place: int, newest: int) -> None:
        """Hold a version that is not the newest of its block if a closed cut needs it."""
        volume, pending = self.volumes.get(volume_key), self.pending.get(volume_key)
        if volume is None or pending is None or version <= pending.acknowledged:
            return
        cut = volume.cut_of(version)
        if cut == volume.cut_of(newest):
            return
        if not _uncover(volume.closed_holes[cut], lba, version):
            return
        key = volume_key << LBA_BITS | lba
        keys, before = np.array([key], np.uint64), volume.ends[cut - 1].version if cut else 0
        above, to = max(before, pending.acknowledged), volume.ends[cut].version
        while (known := self.map.find_held(keys, above=above, to=to))[0] >= 0:
            if self.map.versions[int(known[0])] > version:
                return
            self.map.clear_places(known)
        if self.map.keys[place]:
            self.map.clear_places(np.array([place]))
        self.map.hold(key, version, block_checksum, place)

    def hold_pinned(
        self, places: npt.NDArray[np.int64], keys: U64Array, versions: U64Array, checksums: U64Array
    ) -> None:
        """Hold those of a checkpoint's pinned places that are needed still."""
        volume_keys = keys >> np.uint64(LBA_BITS)
        needed = np.zeros(keys.size, np.bool_)
        for key in np.unique(volume_keys).tolist():
            pending = self.pending.get(key)
            if pending is not None and pending.ends and key in self.volumes:
                inside = (versions > np.uint64(pending.acknowledged)) & (
                    versions <= np.uint64(pending.ends[-1].version)
                )
                needed |= (volume_keys == np.uint64(key)) & inside
        self.map.hold_run(places[needed], keys[needed], versions[needed], checksums[needed])

    # --- applying ---------------------------------------------------------------------------------------------

    def _apply(self, one: _Record) -> None:
        header = one.header
        if one.block == 0:
            self._enter(one)
        if one.note is not None:
            if isinstance(one.note, VolumeNote):
                self._note(one.note)
            else:
                self._end(one.note)
            return
        first_place = self.zones.place_at(one.zone, one.block) + 1
        for index, (start, version, value, volume_key, kind, *_) in enumerate(one.entries.tolist()):
            if kind == record.LIMIT:
                self.limit = (version, value)
                continue
            volume = self.volumes.get(volume_key)
            if volume is None:
                continue  # forgotten since
            if volume.origins is not None:
                _change_origins(volume.origins, kind, start, version, value)
            if index < header.block_count:
                self._place(volume, kind, start, version, value, first_place + index)
            elif kind == record.ORIGIN:
                continue
            elif kind == record.ACKNOWLEDGED:
                self._set(volume._replace(acknowledged=max(volume.acknowledged, version)))
            else:
                self._zero(volume, kind, Extent(start, value), version)

    def _enter(self, one: _Record) -> None:
        """The zone was opened anew: nothing of what it held before counts."""
        self._clear_zone(one.zone)
        self.zones.incarnations[one.zone] = one.header.incarnation
        self.zones.first_positions[one.zone] = one.header.log_position

    def _clear_zone(self, zone: int) -> None:
        self.map.clear_zone(self.zones.place_at(zone, 0), self.zones.zone_blocks)
        self.unloaded.forget_zone(zone)

    def _note(self, note: VolumeNote) -> None:
        known = self.volumes.get(note.volume_key)
        if known is None:
            self._forget_older(note.volume_id)
            pending = self.pending.get(note.volume_key, _Pending((), 0))
            volume = RecoveredVolume(note, 0, 0, HoleMap(), self.origin_map(note))
            self._set(_with_ends(volume, pending.ends, 0))
        else:
            same = known.note.origin == note.origin
            self._set(known._replace(note=note, origins=known.origins if same else self.origin_map(note)))

    def origin_map(self, note: VolumeNote) -> OriginMap | None:
        """Return an empty map for a clone whose origin is known."""
        for other in self.volumes.values():
            if other.note.volume_id == note.origin:
                return OriginMap(other.note.size // BLOCK_SIZE)
        return None

    def _end(self, end: CutEnd) -> None:
        volume = self.volumes.get(end.volume_key)
        if volume is None:
            return
        if end.kind == RESIZE and end.size > volume.note.size:
            old = volume.note.size >> BLOCK_SHIFT
            volume.holes.add(Extent(old, (end.size >> BLOCK_SHIFT) - old), end.version)
            volume = volume._replace(note=volume.note._replace(size=end.size))
        self._set(volume._replace(version=max(volume.version, end.version)))

    def _forget_older(self, volume_id: bytes) -> None:
        """A volume that comes under a new key had been forgotten under its older one, which nothing logs."""
        for key in [key for key, one in self.volumes.items() if one.note.volume_id == volume_id]:
            del self.volumes[key]
            for _ in self.map.remove_range(key << LBA_BITS, 1 << LBA_BITS, below=(1 << 64) - 1):
                pass
            self.unloaded.forget(key << LBA_BITS, 1 << LBA_BITS)

    def _set(self, volume: RecoveredVolume) -> None:
        self.volumes[volume.note.volume_key] = volume

    def _place(
        self, volume: RecoveredVolume, kind: int, lba: int, version: int, block_checksum: int, place: int
    ) -> None:
        volume_key = volume.note.volume_key
        key = volume_key << LBA_BITS | lba
        if kind == record.WRITE and version > volume.version:
            self._set(volume._replace(version=version))
        mapped = self.map.find(key)
        newest = self.map.versions[mapped] if mapped >= 0 else 0
        hole = volume.holes.find(lba) if len(volume.holes) else None
        if hole is not None:
            newest = max(newest, hole.version)
        if newest > version or kind == record.PIN:
            self.older(volume_key, lba, version, block_checksum, place, max(newest, volume.version))
            return
        if hole is not None:
            volume.holes.remove(Extent(lba, 1))
        if volume.ends and (cut := volume.cut_of(version)) < len(volume.ends):
            _uncover(volume.closed_holes[cut], lba, version)
        if mapped == place:
            return
        if self.map.keys[place]:
            self.map.clear_places(np.array([place]))
        before = self.map.checksums[mapped] if mapped >= 0 else 0
        self.map.insert(key, version, block_checksum, place)
        if mapped >= 0:
            self.counts[place] = self.counts[mapped]
            self.older(volume_key, lba, newest, before, mapped, version)

    def _zero(self, volume: RecoveredVolume, kind: int, extent: Extent, version: int) -> None:
        volume_key = volume.note.volume_key
        key = volume_key << LBA_BITS | extent.start
        pending = self.pending.get(volume_key, _Pending((), 0))
        cut = volume.cut_of(version)
        before = volume.ends[cut - 1].version if cut else 0
        for _ in self.map.remove_range(key, extent.count, below=version, kept=(pending.acknowledged, before)):
            pass
        self.unloaded.forget(key, extent.count)
        if kind == record.DROP:
            volume.holes.remove(extent)
            return
        if cut < len(volume.ends):
            self._unhold(key, extent.count, above=max(before, pending.acknowledged), below=version)
            volume.closed_holes[cut].add(extent, version)
        volume.holes.add(extent, version)
        if version > volume.version:
            self._set(volume._replace(version=version))

    def _unhold(self, key: int, count: int, *, above: int, below: int) -> None:
        """A trim took these versions out of its own cut: a fuzzy checkpoint may have shown them beside newer ones."""
        if count > RANGE_LOOKUPS_MAX:
            places = self.map.held_places()
            # A key below the first one wraps around to a huge distance.
            inside = self.map.key_array.take(places) - np.uint64(key) < np.uint64(count)
            versions = self.map.version_array.take(places)
            self.map.clear_places(places[inside & (versions > np.uint64(above)) & (versions < np.uint64(below))])
            return
        keys = np.arange(count, dtype=np.uint64) + np.uint64(key)
        while self.map.held_count:
            found = self.map.find_held(keys, above=above, to=below - 1)
            if int(found.max()) < 0:
                return
            self.map.clear_places(found[found >= 0])

    def _settle(self, end: LogPoint, kept: list[Kept]) -> None:
        """A zone is free unless it holds something or a replay from a kept checkpoint would read it.

        The zone that the log is about to enter had been emptied: what a checkpoint says of it is of its life before.
        """
        if end.block == 0:
            self._clear_zone(end.zone)
        oldest = min(one.position for one in kept)
        live = self.map.used_zones.tolist()
        replayed = [zone for zone in range(self.zones.zone_count) if self.zones.first_positions[zone] >= oldest]
        filled = {*live, *replayed, *(one.zone for one in kept), *self.unloaded.zones()} - {end.zone}
        order = self.zones.first_positions
        self.zones.settle(filled=sorted(filled, key=lambda zone: order[zone]), open_zone=end.zone)
        self.unloaded.sort(order)
        for zone in self.zones.free:
            self.unloaded.forget_zone(zone)
        if end.block == 0:
            self.zones.incarnations[end.zone] += 1
            self.zones.first_positions[end.zone] = end.position


def _change_origins(origins: OriginMap, kind: int, start: int, version: int, value: int) -> None:
    """Let an entry of a clone change what is known of its origin."""
    if kind == record.WRITE:
        origins.remove(Extent(start, 1))
    elif kind in (record.TRIM, record.ZERO):
        origins.remove(Extent(start, value))
    elif kind == record.DROP:
        origins.forget(Extent(start, value))
    elif kind == record.ORIGIN:
        origins.add(Extent(start, value))
        origins.asked_to = max(origins.asked_to, min(version, origins.block_count))


def _uncover(holes: HoleMap, lba: int, version: int) -> bool:
    """Take a block out of the holes, which was written under this version; False: it was trimmed since."""
    hole = holes.find(lba)
    if hole is not None and hole.version > version:
        return False
    if hole is not None:
        holes.remove(Extent(lba, 1))
    return True


def _with_ends(volume: RecoveredVolume, ends: tuple[CutEnd, ...], acknowledged: int) -> RecoveredVolume:
    """Return the volume with closed cuts; what holes it has belong to the cuts that their versions fall into."""
    found = volume._replace(ends=ends, closed_holes=tuple(HoleMap() for _ in ends))
    for hole in (*(hole for holes in volume.closed_holes for hole in holes), *volume.holes):
        cut = found.cut_of(hole.version)
        if hole.version > acknowledged and cut < len(ends):
            found.closed_holes[cut].add(Extent(hole.start, hole.end - hole.start), hole.version)
    return found


def device_tag(superblock: Superblock) -> int:
    """Return the part of the device's id that every record carries."""
    return int.from_bytes(superblock.device[:8], "little")


def _load(
    read: ReadDevice,
    superblock: Superblock,
    area: int,
    header: checkpoint.CheckpointHeader,
    *,
    place: str,
    bucket_seed: int,
    whole: bool,
) -> _Replay:
    """Return the state that one checkpoint holds, without the chunks of places that are all clean unless `whole`."""
    replay = _Replay(read, superblock, bucket_seed=bucket_seed, chunk_places=header.chunk_places)
    base = superblock.checkpoint_offsets[area]
    layout = header.layout
    table_block = read(base + layout.table.offset, layout.table.padded_size)
    sums, dirty = checkpoint.decode_table(table_block, header, place=place)
    left = iter(sums)

    def chunk_of(chunk: checkpoint.Chunk) -> Buffer:
        block = read(base + chunk.offset, chunk.padded_size)
        checkpoint.verify_chunk(block, next(left), place=f"{place} + {chunk.offset}")
        return block

    table = b"".join(bytes(memoryview(chunk_of(chunk))[: chunk.size]) for chunk in layout.volume_chunks)
    _load_volumes(replay, checkpoint.decode_volumes(table, layout, place=place))
    for chunk in layout.zone_chunks:
        rows = checkpoint.decode_zones(chunk_of(chunk), chunk.count)
        for zone, row in enumerate(rows.tolist(), chunk.first):
            replay.zones.first_positions[zone], replay.zones.incarnations[zone], replay.zones.states[zone] = row[:3]
    # A zone that was free when its row was copied held nothing then; if it was opened since, replay will enter it.
    for zone in range(header.zone_count):
        if replay.zones.states[zone] == ZoneState.FREE:
            replay.unloaded.forget_zone(zone)
    blocks: list[tuple[checkpoint.Chunk, Buffer]] = []
    for chunk, chunk_xxh3, is_dirty in zip(layout.place_chunks, left, dirty, strict=True):
        offset, name = base + chunk.offset, f"{place} + {chunk.offset}"
        if not (is_dirty or whole):
            replay.unloaded.add(chunk._replace(offset=offset), chunk_xxh3, name)
            continue
        block = read(offset, chunk.padded_size)
        checkpoint.verify_chunk(block, chunk_xxh3, place=name)
        blocks.append((chunk, block))
    replay.load_places = partial(_load_places, replay, blocks)
    replay.limit = (header.limit_average, header.limit_peak)
    replay.incarnation = header.replay_incarnation
    replay.start = LogPoint(header.log_position, header.replay_zone, header.replay_block, header.previous_xxh3)
    return replay


def _load_volumes(replay: _Replay, states: list[checkpoint.VolumeState]) -> None:
    """Enter the rows of a checkpoint's volumes, with their holes and what is known of their origins."""
    maps: list[tuple[VolumeNote, checkpoint.OriginPages]] = []
    for state in states:
        volume = RecoveredVolume(state.note, state.version, state.acknowledged, HoleMap(), None, state.ends)
        closed = tuple(HoleMap() for _ in state.ends)
        for holes, rows in ((None, state.holes), (closed, state.closed_holes)):
            for start, count, version in rows.tolist():
                into = volume.holes if holes is None else holes[volume.cut_of(version)]
                into.add(Extent(start, count), version)
        replay.volumes[state.note.volume_key] = volume._replace(closed_holes=closed)
        if state.origins is not None:
            maps.append((state.note, state.origins))
    for note, pages in maps:  # now that the rows of all origins are known
        origins = replay.origin_map(note)
        if origins is not None:
            origins.load(pages)
        replay.volumes[note.volume_key] = replay.volumes[note.volume_key]._replace(origins=origins)


def _load_places(replay: _Replay, blocks: list[tuple[checkpoint.Chunk, Buffer]]) -> None:
    """Enter the places of a checkpoint's chunks; each was copied at another moment."""
    lost: list[LostPlace] = []
    for chunk, block in blocks:
        keys, versions, checksums, counts = checkpoint.decode_places(block, chunk.count)
        replay.counts[chunk.first : chunk.first + chunk.count] = counts
        replay.map.link_run(chunk.first, np.where(counts > 0, keys, 0), versions, checksums, lost=lost)
        pinned = np.flatnonzero((counts == 0) & (keys != 0))
        if pinned.size:
            replay.hold_pinned(pinned + chunk.first, keys[pinned], versions[pinned], checksums[pinned])
    for one in lost:
        newest = replay.map.versions[replay.map.find(one.key)]
        replay.older(one.key >> LBA_BITS, one.key & LBA_MAX, one.version, one.checksum, one.place, newest)

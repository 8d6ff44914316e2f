"""What can be saved from a cache device: each volume's changes that are not in the store, and what is cached of it.

A device that recovery accepts gives exactly what a start would serve. One that it refuses is searched: every zone for
whole records, both areas for whole checkpoints. Then only changes that are not in the store are offered, because
nobody can tell whether an old clean block is still current.

What a search accepts: a record of one life of the daemon is dead if a later life began at or before its log position
and it was never durable before that; records that nobody knows as durable must follow the others without a break and
with whole data. So what is offered is no mix of histories, but it may lack what was damaged, and `doubts` says so.

Invariants:
    Of each block the newest version found is offered, at every place that holds it. Older ones that only a pending
    snapshot needs are not.
    Blocks that a newer trim emptied are not offered.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.check_areas import ChosenCheckpoint, check_checkpoints, check_superblocks
from forebay_cache.engine.device_reads import ReadDevice, read_around
from forebay_cache.engine.findings import Findings
from forebay_cache.engine.holes import HoleMap
from forebay_cache.engine.recovery import Recovered, RecoveredVolume, device_tag, recover
from forebay_cache.engine.zone_scan import ScannedRecord, later_records
from forebay_cache.format import checkpoint, record
from forebay_cache.format.superblock import Superblock
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX

COPY_DTYPE = np.dtype([("lba", "<u8"), ("version", "<u8"), ("checksum", "<u8"), ("offset", "<u8")])
CopyArray = npt.NDArray[np.void]


class SalvageVolume(NamedTuple):
    """One volume: where copies of its blocks lie on the device, by lba (COPY_DTYPE), and what reads as zeros.

    `version` is the newest change known; the store has everything up to `acknowledged`.
    """

    note: VolumeNote
    version: int
    acknowledged: int
    dirty: CopyArray
    clean: CopyArray
    holes: list[Extent]  # made by changes that are not in the store
    clean_holes: list[Extent]


class Salvage(NamedTuple):
    """All that was found; `doubts` says what is missing or not provable, one line each."""

    volumes: list[SalvageVolume]
    doubts: list[str]


def search_device(read: ReadDevice, device_size: int) -> Salvage:
    """Return what can be saved.

    Raises:
        CorruptionError: no superblock is whole, so nobody knows where anything is.
    """
    findings = Findings()
    superblock = check_superblocks(read, device_size, findings)
    if superblock is None:
        raise CorruptionError(
            place="device", what="superblocks", expected="a whole one", found=[one.text for one in findings.rows]
        )
    try:
        return _exact(recover(read, superblock, whole=True))
    except CorruptionError as error:
        doubt = str(error)
    return _search(read, superblock, doubt)


# --- a device that a start would accept -----------------------------------------------------------------------------


def _exact(recovered: Recovered) -> Salvage:
    table = recovered.map
    places = np.flatnonzero(table.linked_mask(0, table.place_count))
    keys = table.key_array[places]
    rows = np.zeros(places.size, COPY_DTYPE)
    rows["lba"] = keys & np.uint64(LBA_MAX)
    rows["version"] = table.version_array[places]
    rows["checksum"] = table.checksum_array[places]
    rows["offset"] = places.astype(np.uint64) * np.uint64(BLOCK_SIZE) + np.uint64(recovered.zones.zones_offset)
    volumes = []
    for key, volume in sorted(recovered.volumes.items()):
        mine = rows[keys >> np.uint64(LBA_BITS) == np.uint64(key)]
        volumes.append(_volume(volume, mine[np.argsort(mine["lba"])]))
    return Salvage(volumes, list(recovered.findings))


def _volume(volume: RecoveredVolume, rows: CopyArray) -> SalvageVolume:
    dirty = rows["version"] > np.uint64(volume.acknowledged)
    newer = {(hole.start, hole.end) for hole in volume.holes.newer_than(volume.acknowledged)}
    holes = [Extent(hole.start, hole.end - hole.start) for hole in volume.holes]
    return SalvageVolume(
        volume.note,
        max(volume.version, volume.acknowledged),
        volume.acknowledged,
        rows[dirty],
        rows[~dirty],
        [hole for hole in holes if (hole.start, hole.end) in newer],
        [hole for hole in holes if (hole.start, hole.end) not in newer],
    )


# --- a damaged one ----------------------------------------------------------------------------------------------------


def _search(read: ReadDevice, superblock: Superblock, doubt: str) -> Salvage:
    chosen = next(iter(check_checkpoints(read, superblock, Findings())), None)
    doubts = [
        doubt,
        "only changes that are not in the store are saved; some of them may be missing, or older than lost",
    ]
    if chosen is None:
        doubts.append("no checkpoint is whole: what was trimmed, and what is in the store already, may come back")
    found = sorted(_records(read, superblock, doubts), key=lambda one: one.header.log_position)
    durable = chosen.header.log_position if chosen is not None else 0
    records = _of_one_log(read, superblock, found, durable)
    missing = _missing(records, durable if chosen is not None else None)
    if missing:
        doubts.append(f"{missing} records of the log are damaged or gone")
    volumes, copies = _checkpointed(read, superblock, chosen) if chosen is not None else ({}, [])
    search = _Search(superblock, volumes)
    for key, rows in copies:
        search.add(key, rows)
    for one in records:
        search.collect(one)
    return Salvage(search.found(), doubts)


class _Trim(NamedTuple):
    """Blocks of an older version are gone; `dropped` ones are stale, the others read as zeros."""

    extent: Extent
    version: int
    dropped: bool


class _Search:
    """What records and checkpoint say, by volume key."""

    def __init__(self, superblock: Superblock, volumes: dict[int, RecoveredVolume]) -> None:
        self._superblock = superblock
        self.volumes = volumes
        self._copies: dict[int, list[CopyArray]] = {}
        self._trims: dict[int, list[_Trim]] = {}
        for key, volume in volumes.items():
            for hole in volume.holes:
                self._trim(key, Extent(hole.start, hole.end - hole.start), hole.version, dropped=False)

    def add(self, volume_key: int, rows: CopyArray) -> None:
        """Take over copies of blocks."""
        self._copies.setdefault(volume_key, []).append(rows)

    def collect(self, one: ScannedRecord) -> None:
        """Take over what one record says; they come in log order."""
        if isinstance(one.note, VolumeNote):
            known = self.volumes.get(one.note.volume_key) or RecoveredVolume(one.note, 0, 0, HoleMap())
            self.volumes[one.note.volume_key] = known._replace(note=one.note)
            return
        if one.note is not None:
            self._reach(one.note.volume_key, version=one.note.version, size=one.note.size)
            return
        count = one.header.block_count
        entries = one.entries[:count]
        for key in np.unique(entries["volume_key"]).tolist():
            mine = np.flatnonzero((entries["volume_key"] == key) & (entries["kind"] != record.PIN))
            rows = np.zeros(mine.size, COPY_DTYPE)
            for field in ("lba", "version", "checksum"):
                rows[field] = entries[field][mine]
            rows["offset"] = _offset(self._superblock, one) + BLOCK_SIZE * (mine + 1)
            self.add(key, rows)
            written = rows["version"][entries["kind"][mine] == record.WRITE]
            self._reach(key, version=int(written.max(initial=0)))
        for start, version, value, key, kind, *_ in one.entries[count:].tolist():
            if kind == record.ACKNOWLEDGED:
                self._reach(key, acknowledged=version)
            elif kind in (record.TRIM, record.ZERO, record.DROP):
                self._trim(key, Extent(start, value), version, dropped=kind == record.DROP)
                self._reach(key, version=0 if kind == record.DROP else version)

    def found(self) -> list[SalvageVolume]:
        """Return what is newest of each volume."""
        return [self._newest(key, volume) for key, volume in sorted(self.volumes.items())]

    def _trim(self, volume_key: int, extent: Extent, version: int, *, dropped: bool) -> None:
        self._trims.setdefault(volume_key, []).append(_Trim(extent, version, dropped))

    def _reach(self, volume_key: int, *, version: int = 0, acknowledged: int = 0, size: int = 0) -> None:
        known = self.volumes.get(volume_key)
        if known is not None:
            self.volumes[volume_key] = known._replace(
                note=known.note._replace(size=size or known.note.size),
                version=max(known.version, version),
                acknowledged=max(known.acknowledged, acknowledged),
            )

    def _newest(self, volume_key: int, volume: RecoveredVolume) -> SalvageVolume:
        """Keep the newest version of each block that is not in the store, unless it was trimmed since."""
        rows = np.concatenate(self._copies.get(volume_key, [np.zeros(0, COPY_DTYPE)]))
        rows = np.unique(rows[rows["version"] > np.uint64(volume.acknowledged)])  # sorted by lba
        keep = np.ones(rows.size, np.bool_)
        holes = HoleMap()
        for trim in sorted(self._trims.get(volume_key, []), key=lambda trim: trim.version):
            first, end = np.searchsorted(rows["lba"], (trim.extent.start, trim.extent.end))
            keep[first:end] &= rows["version"][first:end] >= np.uint64(trim.version)
            if trim.version > volume.acknowledged and not trim.dropped:
                holes.add(trim.extent, trim.version)
        rows = rows[keep]
        if rows.size:
            _, first_of, sizes = np.unique(rows["lba"], return_index=True, return_counts=True)
            rows = rows[rows["version"] == np.repeat(np.maximum.reduceat(rows["version"], first_of), sizes)]
        return _volume(volume._replace(holes=holes), rows)


def _records(read: ReadDevice, superblock: Superblock, doubts: list[str]) -> Iterator[ScannedRecord]:
    """Yield the whole records of the newest life of each zone."""
    geometry, tag = superblock.geometry, device_tag(superblock)
    size = geometry.zone_blocks << BLOCK_SHIFT
    for zone in range(geometry.zone_count):
        offset = geometry.zones_offset + zone * size
        view, unreadable = read_around(read, offset, size)
        if unreadable:
            doubts.append(f"{len(unreadable)} blocks of zone {zone} can't be read")
        found = list(later_records(view, zone, 0, tag))
        newest = max((one.header.incarnation for one in found), default=0)
        yield from (one for one in found if one.header.incarnation == newest)


def _of_one_log(
    read: ReadDevice, superblock: Superblock, found: list[ScannedRecord], durable: int
) -> list[ScannedRecord]:
    """Return the records that are provably of one history, sorted by log position."""
    starts: dict[int, int] = {}
    for one in found:
        starts.setdefault(one.header.life, one.header.log_position)
    alive = [one for one in found if not _is_dead(one, starts)]
    durable = max(durable, *(one.header.durable_position for one in alive), 0)
    accepted: list[ScannedRecord] = []
    for one in alive:
        header, before = one.header, accepted[-1].header if accepted else None
        if before is not None and header.log_position == before.log_position:
            continue  # two histories claim it, and the first was taken
        if header.log_position >= durable:
            follows = before is None or header.log_position == before.log_position + 1
            chains = before is None or header.previous_xxh3 == before.header_xxh3
            if not (follows and chains and _has_whole_data(read, superblock, one)):
                break
        accepted.append(one)
    return accepted


def _is_dead(one: ScannedRecord, starts: dict[int, int]) -> bool:
    position, durable, life = one.header.log_position, one.header.durable_position, one.header.life
    return any(start <= position and durable <= start and other != life for other, start in starts.items())


def _has_whole_data(read: ReadDevice, superblock: Superblock, one: ScannedRecord) -> bool:
    """Compare its data blocks with their checksums; those that can't be read tell nothing, as in recovery."""
    count = one.header.block_count
    first = _offset(superblock, one) + BLOCK_SIZE
    view, unreadable = read_around(read, first, count << BLOCK_SHIFT) if count else (memoryview(b""), {})
    return all(
        checksum(view[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT]) == expected
        for i, expected in enumerate(one.entries["checksum"][:count].tolist())
        if first + i * BLOCK_SIZE not in unreadable
    )


def _missing(records: list[ScannedRecord], since: int | None) -> int:
    """Count the log positions that are lacking between a checkpoint and the last record."""
    positions = [one.header.log_position for one in records if since is None or one.header.log_position >= since]
    if not positions:
        return 0
    first = positions[0] if since is None else since
    return positions[-1] + 1 - first - len(positions)


def _checkpointed(
    read: ReadDevice, superblock: Superblock, chosen: ChosenCheckpoint
) -> tuple[dict[int, RecoveredVolume], list[tuple[int, CopyArray]]]:
    """Return the volumes of a whole checkpoint and, by volume key, the blocks that it shows."""
    base, layout = superblock.checkpoint_offsets[chosen.area], chosen.header.layout
    table = b"".join(bytes(read(base + c.offset, c.padded_size)[: c.size]) for c in layout.volume_chunks)
    volumes = {}
    for state in checkpoint.decode_volumes(table, layout, place="checkpoint"):
        holes = HoleMap()
        for start, count, version in state.holes.tolist():
            holes.add(Extent(start, count), version)
        volumes[state.note.volume_key] = RecoveredVolume(state.note, state.version, state.acknowledged, holes)
    copies: list[tuple[int, CopyArray]] = []
    for chunk in layout.place_chunks:
        keys, versions, checksums, counts = checkpoint.decode_places(
            read(base + chunk.offset, chunk.padded_size), chunk.count
        )
        held = np.flatnonzero((keys != 0) & (counts > 0))
        rows = np.zeros(held.size, COPY_DTYPE)
        rows["lba"] = keys[held] & np.uint64(LBA_MAX)
        rows["version"], rows["checksum"] = versions[held], checksums[held]
        rows["offset"] = superblock.zones_offset + (held + chunk.first) * BLOCK_SIZE
        volume_keys = keys[held] >> np.uint64(LBA_BITS)
        copies += [(int(key), rows[volume_keys == key]) for key in np.unique(volume_keys)]
    return volumes, copies


def _offset(superblock: Superblock, one: ScannedRecord) -> int:
    return superblock.zones_offset + (one.zone * superblock.zone_blocks + one.block) * BLOCK_SIZE

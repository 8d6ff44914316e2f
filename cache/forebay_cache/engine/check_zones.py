"""Checking the zones: their records, the blocks these describe, and what the map says of both.

Looked at are the zones that hold mapped blocks and those that the log ran through since the older checkpoint. What
other zones hold is dead, and may be torn. A zone of clean blocks may have been given up and be half overwritten when
the power was cut, and the checkpoint still shows what it held before; reads meet wrong checksums there and fetch
again. That is no finding, so such a zone is passed over if a header of a later life is in it, or if its damage begins
near its front and is more than one flipped bit.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.check_areas import ChosenCheckpoint
from forebay_cache.engine.device_reads import ReadDevice, read_around
from forebay_cache.engine.findings import Findings
from forebay_cache.engine.recovery import Recovered, RecoveredVolume, device_tag
from forebay_cache.engine.zone_scan import Opening, ScannedRecord, ZoneScan, scan_zone
from forebay_cache.engine.zones import ZoneState
from forebay_cache.format import record
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError, UnreadableError
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS, LBA_MAX

Reached = Callable[[int, int], None]
"""Told how many bytes of how many are checked."""

REUSE_INTACT_MAX: Final = 8
"""Blocks and headers at the front of a zone that may have stayed whole when torn writes of a later life hit it."""


class _Seal(NamedTuple):
    zone: int
    next_zone: int
    chain: int


class ZoneCheck:
    """One pass over the zones of a device."""

    def __init__(
        self,
        read: ReadDevice,
        checkpoints: list[ChosenCheckpoint],
        recovered: Recovered,
        findings: Findings,
        *,
        with_blocks: bool,
    ) -> None:
        self._read = read
        self._checkpoints = checkpoints
        self._recovered = recovered
        self._map = recovered.map
        self._zones = recovered.zones
        self._findings = findings
        self._with_blocks = with_blocks
        self._tag = device_tag(recovered.superblock)
        self._seals: dict[int, _Seal] = {}  # by the log position behind it
        self._starts: dict[int, tuple[int, int]] = {}  # zone and chain, by the log position of its first record
        self._unreadable: set[int] = set()

    def run(self, reached: Reached) -> None:
        """Check every zone that holds something, then the log's way from zone to zone."""
        size = self._zones.zone_blocks << BLOCK_SHIFT
        used: list[int] = self._map.used_zones.tolist()
        for count, zone in enumerate(used, 1):
            self._check_zone(zone)
            reached(count * size, len(used) * size)
        self._follow_log(set(used))
        for position, seal in self._seals.items():
            start = self._starts.get(position)
            if start is not None and start != (seal.next_zone, seal.chain):
                expected, found = (seal.next_zone, hex(seal.chain)), (start[0], hex(start[1]))
                what = f"log position {position} behind zone {seal.zone}: zone and previous checksum"
                self._findings.differ("record-chain", f"zone {start[0]} block 0", what, expected=expected, found=found)

    def _follow_log(self, seen: set[int]) -> None:
        """Check the zones of the log since the older checkpoint that hold no mapped block any more."""
        newest, oldest = self._checkpoints[0].header, self._checkpoints[-1].header
        zone, position = oldest.replay_zone, oldest.log_position
        for _ in range(self._zones.zone_count):
            if position >= newest.log_position or zone == newest.replay_zone:
                return
            if zone not in seen:
                self._check_zone(zone)
            behind = [(at, seal) for at, seal in self._seals.items() if seal.zone == zone]
            if not behind:
                return  # that it is missing is a finding already
            position, zone = behind[0][0], behind[0][1].next_zone

    # --- one zone ---------------------------------------------------------------------------------------------

    def _check_zone(self, zone: int) -> None:
        end, findings = self._recovered.point, self._findings
        self._check_state(zone)
        view = self._view(zone)
        if self._was_expendable(zone) and self._tells_of_reuse(zone, view):
            return
        scan = self._scan(zone, view)
        for gap in scan.gaps:
            findings.add("record-header" if gap.block else "zone-opening", self._place(zone, gap.block), gap.text)
        whole = scan.end == end.block if zone == end.zone else scan.sealed
        if not whole:
            text = scan.text or "the log goes on elsewhere: expected a SEAL, found none"
            findings.add("record-header" if scan.end else "zone-opening", self._place(zone, scan.end), text)
        self._check_records(scan, whole=whole)
        if self._with_blocks:
            self._check_blocks(zone, view)
        if scan.records and scan.records[0].block == 0:
            first = scan.records[0].header
            self._starts[first.log_position] = (zone, first.previous_xxh3)
        if scan.sealed:
            last = scan.records[-1].header
            self._seals[last.log_position + 1] = _Seal(zone, last.next_zone, last.header_xxh3)

    def _scan(self, zone: int, view: memoryview) -> ZoneScan:
        zones, end = self._zones, self._recovered.point
        return scan_zone(
            view,
            zone,
            device_tag=self._tag,
            opening=Opening(zones.incarnations[zone], zones.first_positions[zone]),
            stop=end.block if zone == end.zone else None,
            durable=self._checkpoints[0].header.log_position,
        )

    def _was_expendable(self, zone: int) -> bool:
        """Tell whether the zone may have been filled anew by records that a power cut took away."""
        oldest = self._checkpoints[-1].header
        opened, blocks = self._zones.first_positions[zone], self._zones.zone_blocks
        if opened >= oldest.log_position or zone in (oldest.replay_zone, self._recovered.point.zone):
            return False
        first = self._zones.place_at(zone, 0)
        keys = self._map.key_array[first : first + blocks]
        versions = self._map.version_array[first : first + blocks]
        volumes = self._recovered.volumes
        for volume_key in np.unique(keys[keys != 0] >> np.uint64(LBA_BITS)).tolist():
            mine = keys >> np.uint64(LBA_BITS) == np.uint64(volume_key)
            if volume_key in volumes and bool((versions[mine] > np.uint64(volumes[volume_key].acknowledged)).any()):
                return False
        return True

    def _tells_of_reuse(self, zone: int, view: memoryview) -> bool:
        """Look for traces of a later life, whose headers may be torn: then for damage that begins near the front."""
        incarnation = self._zones.incarnations[zone]
        behind = self._zones.first_positions[zone] + self._zones.zone_blocks  # a zone holds fewer records than blocks
        for at in range(0, view.nbytes, BLOCK_SIZE):
            block = view[at : at + BLOCK_SIZE]
            fields = record.peek_header(block)
            later = (fields.device, fields.zone) == (self._tag, zone) and fields.incarnation > incarnation
            # One flipped bit makes a higher incarnation, but not at a later log position or with a sum that matches.
            if later and (fields.log_position >= behind or record.is_summed(bytearray(block))):
                return True
        scan = self._scan(zone, view)
        bad = scan.gaps[0].block if scan.gaps else self._zones.zone_blocks if scan.sealed else scan.end
        good = 0
        linked = self._map.linked_mask(self._zones.place_at(zone, 0), self._zones.zone_blocks)
        for one in scan.records:
            if one.block > bad or good > REUSE_INTACT_MAX:
                break
            good += 1
            for i, expected in enumerate(one.entries["checksum"][: one.header.block_count].tolist(), one.block + 1):
                block = view[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT]
                if self._with_blocks and linked[i]:
                    if checksum(block) != expected:
                        return good <= REUSE_INTACT_MAX and not _is_one_bit_off(block, partial(_sums_to, expected))
                    good += 1
        if bad == self._zones.zone_blocks or good > REUSE_INTACT_MAX:
            return False
        block = view[bad << BLOCK_SHIFT : (bad + 1) << BLOCK_SHIFT]
        return not (record.is_summed(bytearray(block)) or _is_one_bit_off(block, record.is_summed))

    def _check_state(self, zone: int) -> None:
        newest, live = self._checkpoints[0], int(self._map.live_array[zone])
        opened = self._zones.first_positions[zone]
        if newest.states[zone] in (ZoneState.FREE, ZoneState.EMPTY) and opened < newest.header.log_position and live:
            found = f"{live} mapped blocks, opened at log position {opened}"
            self._findings.differ("zone-state", f"zone {zone}", "a free zone", expected="no block", found=found)

    def _check_records(self, scan: ZoneScan, *, whole: bool) -> None:
        """Check each record's entries; `described` marks the blocks about which some record, or nobody, can tell."""
        described = np.zeros(self._zones.zone_blocks, np.bool_)
        for gap in scan.gaps:
            described[gap.block : gap.end] = True
        if not whole:
            described[scan.end :] = True
        for one in scan.records:
            header = one.header
            if header.durable_position > header.log_position:
                found, most = header.durable_position, header.log_position
                place = self._place(scan.zone, one.block)
                self._findings.differ(
                    "record-durable", place, "durable log position", expected=f"at most {most}", found=found
                )
            described[one.block + 1 : one.block + header.size] = True
            self._check_places(one)
            self._check_dirty(one)
        first = self._zones.place_at(scan.zone, 0)
        filled = self._filled(first, self._zones.zone_blocks)
        for i in np.flatnonzero(filled & ~described).tolist():
            what = f"record of {self._name(first + i)}"
            self._findings.differ("place-entry", self._offset(first + i), what, expected="one", found="none")

    def _check_places(self, one: ScannedRecord) -> None:
        """Compare the mapped places of a record with its entries."""
        table, count = self._map, one.header.block_count
        first = self._zones.place_at(one.zone, one.block) + 1
        rows, part = one.entries[:count], slice(first, first + count)
        keys = rows["volume_key"].astype(np.uint64) << np.uint64(LBA_BITS) | rows["lba"]
        same = (table.key_array[part] == keys) & (table.version_array[part] == rows["version"])
        same &= table.checksum_array[part] == rows["checksum"]
        for i in np.flatnonzero(self._filled(first, count) & ~same).tolist():
            expected = (hex(int(keys[i])), hex(int(rows["version"][i])), hex(int(rows["checksum"][i])))
            place = first + i
            found = (hex(table.keys[place]), hex(table.versions[place]), hex(table.checksums[place]))
            what = "key, version and checksum of a block"
            self._findings.differ("place-entry", self._offset(place), what, expected=expected, found=found)

    def _check_dirty(self, one: ScannedRecord) -> None:
        """Every change that is not in the store is in the map, or in a hole, or something newer is."""
        volumes = self._recovered.volumes
        for index, (lba, version, value, volume_key, kind, *_) in enumerate(one.entries.tolist()):
            volume = volumes.get(volume_key)
            pinned = kind == record.PIN
            changes = pinned or kind in (record.WRITE, record.FILL, record.MOVE, record.TRIM, record.ZERO)
            if volume is None or not changes or version <= volume.acknowledged:
                continue
            last = lba if index < one.header.block_count else lba + value - 1
            for block in {lba, last}:
                place = self._map.find(volume_key << LBA_BITS | block)
                hole = volume.holes.find(block)
                found = self._map.versions[place] if place >= 0 else hole.version if hole is not None else 0
                what = f"version of block {block} of volume {volume.note.name}"
                where = self._place(one.zone, one.block)
                if found < version and not pinned:
                    self._findings.differ("dirty-lost", where, what, expected=hex(version), found=hex(found))
                cut = volume.cut_of(version)
                if cut < len(volume.ends) and not self._is_in_cut(volume, cut, block, version):
                    what += f" in the cut that ends at {volume.ends[cut].version:#x}"
                    self._findings.differ("pinned-lost", where, what, expected=hex(version), found="none")

    def _is_in_cut(self, volume: RecoveredVolume, cut: int, block: int, version: int) -> bool:
        """Tell whether a closed cut has this version of a block, or a newer one of its own."""
        key, end = volume.note.volume_key << LBA_BITS | block, volume.ends[cut].version
        place = self._map.find(key)
        if place >= 0 and version <= self._map.versions[place] <= end:
            return True
        hole = volume.closed_holes[cut].find(block)
        if hole is not None and hole.version >= version:
            return True
        return int(self._map.find_held(np.array([key], np.uint64), above=version - 1, to=end)[0]) >= 0

    def _check_blocks(self, zone: int, view: memoryview) -> None:
        """Compare the mapped blocks with their checksums."""
        first = self._zones.place_at(zone, 0)
        for i in np.flatnonzero(self._filled(first, self._zones.zone_blocks)).tolist():
            expected = self._map.checksums[first + i]
            found = checksum(view[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT])
            if found != expected and first + i not in self._unreadable:
                what = f"checksum of {self._name(first + i)}"
                place = self._offset(first + i)
                self._findings.differ("block-checksum", place, what, expected=hex(expected), found=hex(found))

    # --- reading ----------------------------------------------------------------------------------------------

    def _view(self, zone: int) -> memoryview:
        """Return the bytes of a zone, with zeros where they can't be read or need not be."""
        first = self._zones.place_at(zone, 0)
        size = self._zones.zone_blocks << BLOCK_SHIFT
        with contextlib.suppress(UnreadableError):  # told below
            view = None if self._with_blocks else self._headers(first, size)
            if view is not None:
                return view
        return self._readable(first, size)

    def _headers(self, first: int, size: int) -> memoryview | None:
        """Read the headers only, going from one to the next; None where one does not tell where the next is."""
        view = memoryview(bytearray(size))
        at = 0
        while at < size:
            block = self._read(self._zones.offset_of(first) + at, BLOCK_SIZE)
            view[at : at + BLOCK_SIZE] = block
            try:
                header, _ = record.decode_record(block, place="")
            except CorruptionError:
                return None
            at += header.size << BLOCK_SHIFT
            if header.kind == record.SEAL or first + (at >> BLOCK_SHIFT) == self._end_place:
                return view
        return None

    @property
    def _end_place(self) -> int:
        return self._zones.place_at(self._recovered.point.zone, self._recovered.point.block)

    def _readable(self, first: int, size: int) -> memoryview:
        """Read block by block around those that can't be read."""
        start = self._zones.offset_of(first)
        view, unreadable = read_around(self._read, start, size)
        for offset, error in unreadable.items():
            place = first + (offset - start >> BLOCK_SHIFT)
            self._unreadable.add(place)
            self._findings.add("read-error", self._offset(place), str(error))
        return view

    def _filled(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Return which places of a run hold a block, mapped or pinned."""
        filled: npt.NDArray[np.bool_] = self._map.key_array[first : first + count] != 0
        return filled

    # --- words ------------------------------------------------------------------------------------------------

    def _place(self, zone: int, block: int) -> str:
        return f"zone {zone} block {block} at offset {self._zones.offset_of(self._zones.place_at(zone, block))}"

    def _offset(self, place: int) -> str:
        return f"offset {self._zones.offset_of(place)}"

    def _name(self, place: int) -> str:
        key, version = self._map.keys[place], self._map.versions[place]
        volume = self._recovered.volumes.get(key >> LBA_BITS)
        if volume is None:
            return f"block {key & LBA_MAX} of volume key {key >> LBA_BITS}"
        state = "dirty" if version > volume.acknowledged else "clean"
        return f"{state} block {key & LBA_MAX} of volume {volume.note.name}"


def _sums_to(expected: int, block: bytearray) -> bool:
    return checksum(block) == expected


def _is_one_bit_off(block: memoryview, is_whole: Callable[[bytearray], bool]) -> bool:
    """Tell whether flipping one bit back makes a damaged block whole."""
    copy = bytearray(block)
    for bit in range(8 * BLOCK_SIZE):
        copy[bit >> 3] ^= 1 << (bit & 7)
        if is_whole(copy):
            return True
        copy[bit >> 3] ^= 1 << (bit & 7)
    return False

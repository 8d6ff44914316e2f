"""Checking what recovery makes of a device: blocks, holes and changes against the table of volumes."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.findings import Findings
from forebay_cache.engine.recovery import Recovered, RecoveredVolume
from forebay_cache.format import cut_end
from forebay_cache.format.volume_note import CLOSED, LEFT_DIRTY, SNAPSHOT
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, LBA_BITS, LBA_MAX, epoch_of

PlaceArray = npt.NDArray[np.int64]


def check_volumes(recovered: Recovered, findings: Findings) -> None:
    """Check every volume, and that every mapped block belongs to one."""
    table = recovered.map
    places = np.flatnonzero(table.linked_mask(0, table.place_count))
    volume_keys = table.key_array[places] >> np.uint64(LBA_BITS)
    order = np.argsort(volume_keys, kind="stable")
    places, volume_keys = places[order], volume_keys[order]
    for volume_key in np.unique(volume_keys).tolist():
        first, end = np.searchsorted(volume_keys, (volume_key, volume_key + 1))
        volume = recovered.volumes.get(volume_key)
        if volume is None:
            place = _offset(recovered, places[first])
            text = f"{end - first} mapped blocks of volume key {volume_key}: expected a known one, found none"
            findings.add("place-orphan", place, text)
        else:
            _check_blocks(recovered, volume, places[first:end], findings)
    for volume in recovered.volumes.values():
        _check_counters(volume, findings)
        _check_holes(recovered, volume, findings)
        _check_ends(volume, findings)
    _check_names(recovered, findings)


def newest_of(volume: RecoveredVolume) -> int:
    """Return the newest version that anything of a volume may have."""
    return max(volume.version, volume.acknowledged)


def _check_blocks(recovered: Recovered, volume: RecoveredVolume, places: PlaceArray, findings: Findings) -> None:
    table = recovered.map
    lbas = table.key_array[places] & np.uint64(LBA_MAX)
    versions = table.version_array[places]
    name, size = volume.note.name, volume.note.size // BLOCK_SIZE
    newest = newest_of(volume)

    def note(code: str, bad: npt.NDArray[np.bool_], what: str, expected: str, found: Callable[[int], str]) -> None:
        for i in np.flatnonzero(bad).tolist():
            where = f"{what} of block {int(lbas[i])} of volume {name}"
            findings.differ(code, _offset(recovered, places[i]), where, expected=expected, found=found(i))

    note("place-range", lbas >= np.uint64(size), "number", f"below {size}", lambda i: str(int(lbas[i])))
    ahead = versions > np.uint64(newest)
    note("version-ahead", ahead, "version", f"at most {newest:#x}", lambda i: hex(int(versions[i])))
    if volume.note.flags & CLOSED:
        dirty = (versions > np.uint64(volume.acknowledged)) & ~ahead
        expected = f"at most {volume.acknowledged:#x}, as the volume was released"
        note("dirty-released", dirty, "version", expected, lambda i: hex(int(versions[i])))


def _check_counters(volume: RecoveredVolume, findings: Findings) -> None:
    """Nothing is of a newer epoch than the volume's row; but of one that is not attached the store's version may be:
    while it is being attached that is logged before the row."""
    place = f"volume {volume.note.name}"
    newest, epoch = newest_of(volume), volume.note.epoch
    arriving = bool(volume.note.flags & (CLOSED | LEFT_DIRTY)) and newest == volume.acknowledged
    if epoch_of(newest) > epoch and not (arriving or volume.note.flags & SNAPSHOT):  # which has none
        findings.differ("version-ahead", place, "epoch", expected=f"at most {epoch}", found=epoch_of(newest))
    for hole in volume.holes.newer_than(newest):
        what = f"version of the hole at block {hole.start}"
        findings.differ("version-ahead", place, what, expected=f"at most {newest:#x}", found=hex(hole.version))


def _check_ends(volume: RecoveredVolume, findings: Findings) -> None:
    """Snapshots that wait for the store have names and ids of their own; a released volume has none."""
    place = f"volume {volume.note.name}"
    names: set[str] = set()
    ids: set[bytes] = set()
    for end in volume.ends:
        if end.kind == cut_end.SNAPSHOT and (end.name in names or end.snapshot in ids):
            text = f"snapshot {end.name} at {end.version:#x}: expected a name and an id of its own, found twins"
            findings.add("snapshot-twice", place, text)
        names.add(end.name)
        ids.add(end.snapshot)
        if volume.note.flags & CLOSED:
            expected = f"at most {volume.acknowledged:#x}, as the volume was released"
            findings.differ("dirty-released", place, "version of an end of a cut", expected=expected, found=end.version)


def _check_holes(recovered: Recovered, volume: RecoveredVolume, findings: Findings) -> None:
    """Holes lie in their volume, and no mapped block lies in a hole."""
    table = recovered.map
    place = f"volume {volume.note.name}"
    size = volume.note.size // BLOCK_SIZE
    for hole in volume.holes:
        if hole.end > size:
            what = f"end of the hole at block {hole.start}"
            findings.differ("hole-range", place, what, expected=f"at most {size}", found=hole.end)
            continue
        for lba in _mapped(recovered, volume.note.volume_key, Extent(hole.start, hole.end - hole.start)):
            found = table.find(volume.note.volume_key << LBA_BITS | lba)
            text = f"block {lba} of volume {volume.note.name} in the hole from {hole.start} to {hole.end}"
            findings.differ(
                "hole-mapped",
                _offset(recovered, found),
                text,
                expected="no place",
                found=f"version {table.versions[found]:#x}",
            )


def _mapped(recovered: Recovered, volume_key: int, extent: Extent) -> list[int]:
    """Return the mapped blocks of an extent, which may be far longer than the device."""
    table = recovered.map
    if extent.count <= table.place_count // 32:
        found = table.find_run(volume_key << LBA_BITS | extent.start, extent.count)
        return [extent.start + int(i) for i in np.flatnonzero(found >= 0)]
    first = np.uint64(volume_key << LBA_BITS | extent.start)
    inside = (table.key_array - first < np.uint64(extent.count)) & table.linked_mask(0, table.place_count)
    lbas: list[int] = (table.key_array[inside] & np.uint64(LBA_MAX)).tolist()
    return sorted(lbas)


def _check_names(recovered: Recovered, findings: Findings) -> None:
    ids: dict[bytes, str] = {}
    attached: dict[str, int] = {}
    for key, volume in recovered.volumes.items():
        note = volume.note
        if note.volume_id in ids:
            text = f"id {note.volume_id.hex()}: expected one volume, found {ids[note.volume_id]} and {note.name}"
            findings.add("volume-twice", f"volume key {key}", text)
        ids[note.volume_id] = note.name
        if note.flags & (CLOSED | LEFT_DIRTY):
            continue
        if note.name in attached:
            text = f"attached name {note.name}: expected one volume, found keys {attached[note.name]} and {key}"
            findings.add("volume-twice", f"volume key {key}", text)
        attached[note.name] = key


def _offset(recovered: Recovered, place: int) -> str:
    return f"offset {recovered.zones.offset_of(int(place))}"

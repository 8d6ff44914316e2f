"""What the offline commands find on the device of a daemon that died: fsck nothing, salvage what the history says."""

from collections.abc import Iterator

from sim_cache import CacheHost
from sim_judges import ZEROS, Branch, Official, State
from sim_world import Violation

from forebay_cache.engine.check import check_device
from forebay_cache.engine.salvage import SalvageVolume, search_device
from forebay_cache.format.volume_note import CLOSED, LEFT_DIRTY
from forebay_core.checksums import checksum
from forebay_core.units import BLOCK_SIZE


def check_offline(host: CacheHost) -> None:
    """Look at the device of a host that is down, and that nothing has damaged."""
    findings = check_device(host.disk.read, host.size)
    if findings:
        raise Violation(f"fsck of {host.name} finds {[(one.code, one.place, one.text) for one in findings][:4]}")
    for volume in search_device(host.disk.read, host.size).volumes:
        branch = host.tap.branches.get(volume.note.volume_id)
        official = host.officials.get(volume.note.volume_id)
        known = official is not None and official.branches.get(volume.note.epoch) is branch
        if branch is not None and official is not None and known and volume.version >= branch.base_version:
            state = _expected(volume, branch, official)
            if state is not None:
                _check_salvaged(host, volume, branch, state)


def _expected(volume: SalvageVolume, branch: Branch, official: Official) -> State | None:
    """Return what a volume was at the version that is saved. One that died while it was being attached may be the
    store's already while its row is of the epoch before: None if the store has moved on since."""
    detached = volume.note.flags & (CLOSED | LEFT_DIRTY)
    if detached and branch.submitted < volume.acknowledged == volume.version <= official.version:
        return official.state if volume.version == official.version else None
    if volume.version > branch.submitted:
        raise Violation(f"salvage of {branch.name}: version {volume.version:#x} beyond {branch.submitted:#x}")
    return branch.state_at(volume.version)


def _check_salvaged(host: CacheHost, volume: SalvageVolume, branch: Branch, state: State) -> None:
    """Compare what is saved of a volume with what it was."""
    saved: dict[int, bytes] = {}
    for rows in (volume.clean, volume.dirty):
        for lba, _, expected, offset in rows.tolist():
            content = bytes(host.disk.read(offset, BLOCK_SIZE))
            if rows is volume.clean and checksum(content) != expected:
                continue  # of a zone that was being reused when the power went: the command leaves it out as well
            saved[lba] = content
    for hole in (*volume.holes, *volume.clean_holes):
        saved.update(dict.fromkeys(range(hole.start, hole.end), ZEROS))
    for lba, content in saved.items():
        if state.get(lba, ZEROS) != content:
            raise Violation(f"salvage of {branch.name}: block {lba} is not as it was at {volume.version:#x}")
    for lba in _changed(branch, volume):
        if lba not in saved and state.get(lba, ZEROS) != ZEROS:
            raise Violation(f"salvage of {branch.name}: block {lba}, which only the device has, is missing")


def _changed(branch: Branch, volume: SalvageVolume) -> Iterator[int]:
    """Yield the blocks that were changed since the store acknowledged something."""
    for change in branch.changes:
        if volume.acknowledged < change.version <= volume.version:
            yield from range(change.start, change.start + change.count)

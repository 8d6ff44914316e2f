"""Salvage: what a cache device holds of a volume becomes a sparse raw file, with a map of what is where.

The file holds the blocks of changes that are not in the store, what is cached clean, and, if the store is asked and
stands where the device's changes go on, the rest from there. Every block is compared with its checksum before it is
written; a bad one comes from the store if it is clean there, else it is left out and listed. The file appears under
its name only when it is whole and durable; a crash leaves at most a file whose name ends in `.part`.
"""

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from forebay_cache.engine.salvage import CopyArray, Salvage, SalvageVolume
from forebay_cache.service.stopped_device import StoppedDevice
from forebay_core.checksums import checksum
from forebay_core.errors import ForebayError, UnreadableError
from forebay_core.extents import Extent, from_blocks, overlapping, subtract
from forebay_core.units import BLOCK_SIZE, epoch_of, format_size, sequence_of
from forebay_tools.printing import Json
from forebay_tools.progress import Progress
from forebay_tools.target import Target, open_target
from forebay_wire.messages import VolumeRow

MAP_SUFFIX: Final = ".map.json"

Fill = Callable[[Target, Sequence[Extent]], Awaitable[int]]
"""Writes what the store has, but for some extents; returns bytes."""


class Saved(NamedTuple):
    """What became of a volume. Extents are sorted; `bad` holds blocks of which no whole copy exists."""

    volume: SalvageVolume
    dirty: list[Extent]
    zeroed: list[Extent]
    cached: list[Extent]
    bad: list[int]
    stored_bytes: int
    from_store: VolumeRow | None
    doubts: list[str]

    @property
    def change_count(self) -> int:
        """Changes that are not in the store."""
        return max(0, sequence_of(self.volume.version) - sequence_of(self.volume.acknowledged))


def choose_volume(salvage: Salvage, name: str) -> SalvageVolume:
    """Return the volume of a name or an id in hex.

    Raises:
        ForebayError: there is none, or several.
    """
    found = [one for one in salvage.volumes if name in (one.note.name, one.note.volume_id.hex())]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(one.note.volume_id.hex() for one in found)
        raise ForebayError(f"{len(found)} volumes were named {name}; give the id instead: {ids}")
    known = ", ".join(sorted(one.note.name for one in salvage.volumes)) or "none"
    raise ForebayError(f"the device knows no volume {name!r}; it knows: {known}")


def check_store(volume: SalvageVolume, row: VolumeRow) -> None:
    """See to it that the store still shows the state on which the device's changes were made.

    Raises:
        ForebayError: it is another volume, or has changed since.
    """
    if row.id != volume.note.volume_id:
        raise ForebayError(
            f"the store has another volume under the name {row.name} ({row.id.hex()}, not "
            f"{volume.note.volume_id.hex()}); leave --store out"
        )
    own = epoch_of(row.version) == volume.note.epoch and volume.acknowledged <= row.version <= volume.version
    if row.version != volume.acknowledged and not own:
        raise ForebayError(
            f"volume {row.name} is at sequence {sequence_of(row.version)} of epoch {epoch_of(row.version)} in the "
            f"store, but the device's changes go on from sequence {sequence_of(volume.acknowledged)} of epoch "
            f"{epoch_of(volume.acknowledged)}, which it can't tell any more; leave --store out to save what is here"
        )


async def save(
    device: StoppedDevice,
    volume: SalvageVolume,
    path: Path,
    *,
    force: bool,
    doubts: list[str],
    row: VolumeRow | None,
    fill: Fill | None,
) -> Saved:
    """Write the file and its map.

    Raises:
        ForebayError: one of them exists and `force` is not given, or the store can't fill the rest.
    """
    map_path = path.with_name(path.name + MAP_SUFFIX)
    if map_path.exists() and not force:
        raise ForebayError(f"{map_path}: exists; give another name, or --force to overwrite it")
    progress = Progress("saving", (volume.dirty.size + volume.clean.size) * BLOCK_SIZE, sys.stderr)
    try:
        with open_target(path, volume.note.size, force=force) as target:
            written = from_blocks(np.unique(volume.dirty["lba"]))
            zeroed = [piece for hole in volume.holes for piece in subtract(hole, overlapping(written, hole))]
            if target.zero_holes:  # a device shows what was on it before
                target.leave_hole(Extent(0, volume.note.size // BLOCK_SIZE))
            copier = _Copier(device, target, volume.note.size // BLOCK_SIZE, progress)
            cached, bad_clean = copier.copy(volume.clean)
            stored = 0
            if fill is not None:  # it has the damaged clean blocks as well
                stored, bad_clean = await fill(target, _merged(cached, _merged(written, zeroed))), []
            dirty, bad = copier.copy(volume.dirty)
            saved = Saved(volume, dirty, zeroed, cached, sorted(bad + bad_clean), stored, row, doubts)
            map_path.write_text(json.dumps(saved_json(saved)) + "\n")
    finally:
        progress.close()
    return saved


def saved_json(saved: Saved) -> dict[str, Json]:
    """Return what the map file holds: extents as [first block, blocks, state], in blocks of 4096 bytes."""
    volume = saved.volume
    size = volume.note.size // BLOCK_SIZE
    extents: list[tuple[int, int, str]] = [(lba, 1, "bad") for lba in saved.bad]
    named = (("dirty", saved.dirty), ("dirty-hole", saved.zeroed), ("cached", saved.cached))
    for state, some in (*named, ("cached-hole", _rest_of_holes(saved))):
        extents += [(one.start, one.count, state) for one in some]
    extents.sort()
    rest = "stored" if saved.from_store is not None else "absent"
    covered = [Extent(start, count) for start, count, _ in extents]
    extents += [(one.start, one.count, rest) for one in subtract(Extent(0, size), covered)]
    return {
        "name": volume.note.name,
        "id": volume.note.volume_id.hex(),
        "size": volume.note.size,
        "epoch": volume.note.epoch,
        "acknowledged_epoch": epoch_of(volume.acknowledged),
        "acknowledged_sequence": sequence_of(volume.acknowledged),
        "last_epoch": epoch_of(volume.version),
        "last_sequence": sequence_of(volume.version),
        "changes": saved.change_count,
        "committed_ns": saved.from_store.committed_ns if saved.from_store is not None else None,
        "bad_blocks": saved.bad,
        "doubts": saved.doubts,
        "extents": [list(one) for one in sorted(extents)],
    }


def summary(saved: Saved) -> list[str]:
    """Return lines for people."""
    volume = saved.volume
    dirty = sum(one.count for one in saved.dirty)
    zeroed = sum(one.count for one in saved.zeroed)
    cached = sum(one.count for one in saved.cached)
    lines = [
        f"volume {volume.note.name}: {saved.change_count} changes that are not in the store, sequence "
        f"{sequence_of(volume.acknowledged) + 1} to {sequence_of(volume.version)}: {format_size(dirty * BLOCK_SIZE)} "
        f"written, {format_size(zeroed * BLOCK_SIZE)} trimmed"
        if saved.change_count
        else f"volume {volume.note.name}: nothing that is not in the store",
        f"{format_size(cached * BLOCK_SIZE)} cached, {format_size(saved.stored_bytes)} from the store"
        + ("" if saved.from_store is not None else "; what is in none of these reads as zeros, see the map"),
    ]
    lines += [f"block {lba} is damaged and left out" for lba in saved.bad]
    return lines + [f"not whole: {doubt}" for doubt in saved.doubts]


class _Copier:
    """Copies blocks from the device, comparing each with its checksum."""

    def __init__(self, device: StoppedDevice, target: Target, size_blocks: int, progress: Progress) -> None:
        self._device = device
        self._target = target
        self._size_blocks = size_blocks
        self._progress = progress
        self._done = 0

    def copy(self, rows: CopyArray) -> tuple[list[Extent], list[int]]:
        """Copy the first whole copy of each block; return what was written and the blocks without one."""
        good: list[int] = []
        bad: list[int] = []
        for lba, _, expected, offset in rows.tolist():
            self._done += 1
            if good and good[-1] == lba:
                continue
            block = self._read(offset)
            if block is None or checksum(block) != expected or lba >= self._size_blocks:
                if not bad or bad[-1] != lba:
                    bad.append(lba)
                continue
            self._target.write(Extent(lba, 1), memoryview(block))
            good.append(lba)
            if self._done % 256 == 0:
                self._progress.reach(self._done * BLOCK_SIZE)
        return from_blocks(good), sorted(set(bad) - set(good))

    def _read(self, offset: int) -> bytearray | None:
        try:
            return self._device.read(offset, BLOCK_SIZE)
        except UnreadableError:
            return None


def _rest_of_holes(saved: Saved) -> list[Extent]:
    """Return the clean holes; a mapped block is never in one, and the changed ones were made later."""
    newer = sorted((*saved.dirty, *saved.zeroed))
    return [piece for one in saved.volume.clean_holes for piece in subtract(one, overlapping(newer, one))]


def _merged(first: list[Extent], second: list[Extent]) -> list[Extent]:
    """Return sorted, disjoint extents that hold the blocks of both lists."""
    merged: list[Extent] = []
    for one in sorted((*first, *second)):
        if merged and one.start <= merged[-1].end:
            last = merged[-1]
            merged[-1] = Extent(last.start, max(last.end, one.end) - last.start)
        else:
            merged.append(one)
    return merged

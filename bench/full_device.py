"""Makes a cache device that is full of clean blocks of one volume, without writing the blocks: they are holes.

Every place but those of the first zone, where the log goes on, holds a block of zeros with its right checksum. So a
daemon that starts on it serves the volume warm, whether or not there is a store. The last zones may be dirty; which
block lies where is scattered, so that neither keys nor places come in an order that a real cache would not have.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from forebay_cache.engine.limits import ZONES_SPARE_MAX
from forebay_cache.engine.zones import ZoneState
from forebay_cache.format import checkpoint
from forebay_cache.format.superblock import Superblock, encode_superblock, plan_geometry
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.checksums import ZERO_BLOCK, checksum
from forebay_core.units import BLOCK_SIZE, LBA_BITS, make_version, parse_size

VOLUME = "full"
_DEVICE = b"full cache bench"
_VOLUME_ID = b"full volume test"
_STORE = b"full cache store"
_CLEAN = make_version(1, 1)
_DIRTY = make_version(1, 2)
_STRIDE = 2_654_435_761
"""A prime: block numbers are spread over the volume by it. It is larger than the largest device has blocks."""


class FullDevice(NamedTuple):
    """What was made; `volume_size` in bytes. Of the blocks the last `dirty_count` that `lba_of` numbers are dirty."""

    block_count: int
    volume_size: int
    dirty_count: int

    def lba_of(self, number: int) -> int:
        """Return the block that lies at the place of this number, counted from the first filled one."""
        return number * _STRIDE % self.block_count


def make_full_device(path: Path, size: int, *, dirty_size: int = 0) -> FullDevice:
    """Make the sparse file of `size` bytes anew, with about `dirty_size` bytes of blocks that are not upstream."""
    geometry = plan_geometry(size)
    superblock = Superblock(_DEVICE, 1, *geometry, 0)
    free_count = min(ZONES_SPARE_MAX, geometry.zone_count // 2) + 1  # as many as reclaim would make free at once
    first_place = free_count * geometry.zone_blocks
    made = FullDevice(geometry.place_count - first_place, 0, dirty_size // BLOCK_SIZE)
    made = made._replace(volume_size=made.block_count * BLOCK_SIZE)
    header = checkpoint.CheckpointHeader(
        device=_DEVICE,
        sequence=1,
        log_position=geometry.zone_count,
        previous_xxh3=0,
        replay_zone=0,
        replay_block=0,
        replay_incarnation=0,
        place_count=geometry.place_count,
        zone_count=geometry.zone_count,
        volume_count=1,
        hole_count=0,
        chunk_places=checkpoint.CHUNK_PLACES,
        table_xxh3=0,
    )
    layout = header.layout
    volumes = _volume_table(made)
    area = geometry.checkpoint_offsets[0]
    sums = []
    dirty = bytearray()
    with path.open("wb") as file:
        for chunk in layout.chunks:
            if chunk in layout.volume_chunks:
                block = volumes[chunk.first : chunk.first + chunk.count].ljust(chunk.padded_size, b"\0")
            elif chunk in layout.zone_chunks:
                block = _zone_chunk(chunk, free_count)
            else:
                first_dirty = geometry.place_count - made.dirty_count
                dirty.append(chunk.first + chunk.count > first_dirty)
                block = _place_chunk(chunk, made, first_place=first_place, first_dirty=first_dirty)
            sums.append(checksum(block))
            os.pwrite(file.fileno(), block, area + chunk.offset)
        table = checkpoint.encode_table(sums, bytes(dirty))
        os.pwrite(file.fileno(), table, area + layout.table.offset)
        header = header._replace(table_xxh3=checksum(table))
        os.pwrite(file.fileno(), checkpoint.encode_checkpoint_header(header), area)
        os.pwrite(file.fileno(), encode_superblock(superblock) * 2, 0)
        file.truncate(size)
        os.fdatasync(file.fileno())
    return made


def _volume_table(made: FullDevice) -> bytes:
    note = VolumeNote(1, 0, _VOLUME_ID, made.volume_size, 1, VOLUME, _STORE)
    holes = np.zeros(0, checkpoint.HOLE_DTYPE)
    newest = _DIRTY if made.dirty_count else _CLEAN
    return checkpoint.encode_volumes([checkpoint.VolumeState(note, newest, _CLEAN, holes)])


def _zone_chunk(chunk: checkpoint.Chunk, free_count: int) -> bytes:
    """Return rows as if the zones had been filled one after the other, the first ones never."""
    rows = np.zeros(chunk.count, checkpoint.ZONE_DTYPE)
    zones = np.arange(chunk.first, chunk.first + chunk.count)
    filled = zones >= free_count
    rows["first_position"] = np.where(filled, zones, 0)
    rows["incarnation"] = filled
    rows["state"] = np.where(filled, ZoneState.FULL, ZoneState.FREE)
    return checkpoint.encode_zones(rows)


def _place_chunk(chunk: checkpoint.Chunk, made: FullDevice, *, first_place: int, first_dirty: int) -> bytes:
    places = np.arange(chunk.first, chunk.first + chunk.count, dtype=np.uint64)
    filled = places >= np.uint64(first_place)
    lbas = (places - np.uint64(first_place)) * np.uint64(_STRIDE) % np.uint64(made.block_count)
    keys = np.where(filled, lbas | np.uint64(1 << LBA_BITS), np.uint64(0))
    version = np.where(places >= np.uint64(first_dirty), np.uint64(_DIRTY), np.uint64(_CLEAN))
    return checkpoint.encode_places(
        keys,
        np.where(filled, version, np.uint64(0)),
        np.where(filled, np.uint64(checksum(ZERO_BLOCK)), np.uint64(0)),
        filled.astype(np.uint8),
    )


if __name__ == "__main__":
    print(make_full_device(Path(sys.argv[1]), parse_size(sys.argv[2])))

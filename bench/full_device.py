"""Makes a cache device that is full of clean blocks of one volume, without writing the blocks: they are holes.

Every place but those of the first zone, where the log goes on, holds a block of zeros with its right checksum. So a
daemon that starts on it serves the volume warm, whether or not there is a store.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from forebay_cache.format import checkpoint
from forebay_cache.format.superblock import Superblock, encode_superblock, plan_geometry
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.checksums import ZERO_BLOCK, checksum
from forebay_core.units import BLOCK_SIZE, LBA_BITS, make_version, parse_size

VOLUME = "full"
_DEVICE = b"full cache bench"
_VOLUME_ID = b"full volume test"
_VERSION = make_version(1, 1)


class FullDevice(NamedTuple):
    """What was made; `volume_size` in bytes."""

    block_count: int
    volume_size: int


def make_full_device(path: Path, size: int) -> FullDevice:
    """Make the sparse file of `size` bytes anew."""
    geometry = plan_geometry(size)
    superblock = Superblock(_DEVICE, 1, *geometry, 0)
    block_count = geometry.place_count - geometry.zone_blocks
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
        chunk_count=0,
        table_xxh3=0,
    )
    layout = header.layout
    volumes = _volume_table(block_count)
    area = geometry.checkpoint_offsets[0]
    sums = []
    with path.open("wb") as file:
        for chunk in layout.chunks:
            if chunk in layout.volume_chunks:
                block = volumes[chunk.first : chunk.first + chunk.count].ljust(chunk.padded_size, b"\0")
            elif chunk in layout.zone_chunks:
                block = _zone_chunk(chunk)
            else:
                block = _place_chunk(chunk, first_block=geometry.zone_blocks)
            sums.append(checksum(block))
            os.pwrite(file.fileno(), block, area + chunk.offset)
        table = checkpoint.encode_table(sums)
        os.pwrite(file.fileno(), table, area + layout.table.offset)
        header = header._replace(table_xxh3=checksum(table))
        os.pwrite(file.fileno(), checkpoint.encode_checkpoint_header(header), area)
        os.pwrite(file.fileno(), encode_superblock(superblock) * 2, 0)
        file.truncate(size)
        os.fdatasync(file.fileno())
    return FullDevice(block_count, block_count * BLOCK_SIZE)


def _volume_table(block_count: int) -> bytes:
    note = VolumeNote(1, 0, _VOLUME_ID, block_count * BLOCK_SIZE, 1, VOLUME)
    holes = np.zeros(0, checkpoint.HOLE_DTYPE)
    return checkpoint.encode_volumes([checkpoint.VolumeState(note, _VERSION, _VERSION, holes)])


def _zone_chunk(chunk: checkpoint.Chunk) -> bytes:
    """Return rows as if the zones had been filled one after the other, the first one never."""
    rows = np.zeros(chunk.count, checkpoint.ZONE_DTYPE)
    rows["first_position"] = np.arange(chunk.first, chunk.first + chunk.count)
    rows["incarnation"] = rows["first_position"] > 0
    return checkpoint.encode_zones(rows)


def _place_chunk(chunk: checkpoint.Chunk, *, first_block: int) -> bytes:
    """Return places whose block is their own number less that of the first filled one."""
    places = np.arange(chunk.first, chunk.first + chunk.count, dtype=np.uint64)
    filled = places >= np.uint64(first_block)
    keys = np.where(filled, (places - np.uint64(first_block)) | np.uint64(1 << LBA_BITS), np.uint64(0))
    return checkpoint.encode_places(
        keys,
        np.where(filled, np.uint64(_VERSION), np.uint64(0)),
        np.where(filled, np.uint64(checksum(ZERO_BLOCK)), np.uint64(0)),
        filled.astype(np.uint8),
    )


if __name__ == "__main__":
    print(make_full_device(Path(sys.argv[1]), parse_size(sys.argv[2])))

"""Checking superblocks and checkpoints, each part for itself, before anything is built from them.

A checkpoint's header is wiped before its area is used again, so a header that is there vouches for its whole area.
"""

from typing import NamedTuple

import numpy as np

from forebay_cache.engine.device_reads import ReadDevice
from forebay_cache.engine.findings import Findings
from forebay_cache.engine.zones import ZoneState
from forebay_cache.format import checkpoint
from forebay_cache.format.checkpoint import CheckpointHeader, Chunk, U64Array, VolumeState
from forebay_cache.format.superblock import DeviceRefusedError, Refusal, Superblock, decode_superblock
from forebay_core.checksums import ZERO_BLOCK
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE, LBA_BITS, Buffer


class ChosenCheckpoint(NamedTuple):
    """A checkpoint all of whose parts are whole, and its zone rows."""

    area: int
    header: CheckpointHeader
    states: bytes


def check_superblocks(read: ReadDevice, device_size: int, findings: Findings) -> Superblock | None:
    """Check both copies; return the one that is used, or None if there is none or the device does not hold it."""
    found: list[Superblock] = []
    for index in range(2):
        place = f"superblock {'AB'[index]} at offset {index * BLOCK_SIZE}"
        with findings.noting("superblock-bad", place):
            try:
                found.append(decode_superblock(read(index * BLOCK_SIZE, BLOCK_SIZE), place=place))
            except DeviceRefusedError as error:
                what = "blank, as on no device of ours" if error.refusal is Refusal.BLANK else str(error)
                findings.add("superblock-bad", place, what)
    if not found:
        return None
    newest = max(found, key=lambda one: one.generation)
    for one in found:
        if (one.device, one.geometry) != (newest.device, newest.geometry):
            expected, other = (newest.device.hex(), newest.geometry), (one.device.hex(), one.geometry)
            findings.differ("superblock-differs", "superblocks", "device and geometry", expected=expected, found=other)
    if newest.geometry.size > device_size:
        findings.differ("device-short", "device", "bytes", expected=newest.geometry.size, found=device_size)
        return None
    return newest


def check_checkpoints(read: ReadDevice, superblock: Superblock, findings: Findings) -> list[ChosenCheckpoint]:
    """Check both areas; return the whole checkpoints, newest first."""
    headers: list[tuple[int, CheckpointHeader]] = []
    blank: list[int] = []
    for area, offset in enumerate(superblock.checkpoint_offsets):
        place = f"checkpoint area {area} at offset {offset}"
        with findings.noting("checkpoint-header", place):
            block = read(offset, BLOCK_SIZE)
            if block == ZERO_BLOCK:
                blank.append(area)
                continue
            header = checkpoint.decode_checkpoint_header(
                block, device=superblock.device, size_max=superblock.checkpoint_size, place=place
            )
            headers.append((area, header))
    if len(blank) == 2:
        findings.add("checkpoint-header", "checkpoint areas", "both are blank, expected a checkpoint in one of them")
    headers.sort(key=lambda one: one[1].sequence, reverse=True)
    whole = []
    for area, header in headers:
        states = _check_body(read, superblock, area, header, findings)
        if states is not None:
            whole.append(ChosenCheckpoint(area, header, states))
    if len(headers) == 2 and headers[0][1].sequence != headers[1][1].sequence + 1:
        expected, found = headers[1][1].sequence + 1, headers[0][1].sequence
        findings.differ("checkpoint-content", "checkpoint areas", "newest sequence", expected=expected, found=found)
    return whole


def _check_body(
    read: ReadDevice, superblock: Superblock, area: int, header: CheckpointHeader, findings: Findings
) -> bytes | None:
    """Check table, chunks and contents; return the states of the zones if all chunks are whole."""
    base = superblock.checkpoint_offsets[area]
    place = f"checkpoint area {area} at offset {base}"
    layout = header.layout
    before = len(findings.rows)
    sums: tuple[int, ...] = ()
    with findings.noting("checkpoint-table", place):
        sums, _ = checkpoint.decode_table(
            read(base + layout.table.offset, layout.table.padded_size), header, place=place
        )
    if not sums:
        return None
    table = bytearray()
    states = bytearray()
    places = _Places(superblock.geometry.place_count)
    volumes_end = len(layout.volume_chunks)
    zones_end = volumes_end + len(layout.zone_chunks)
    for index, (chunk, expected) in enumerate(zip(layout.chunks, sums, strict=True)):
        where = f"{place} + {chunk.offset}"
        with findings.noting("checkpoint-chunk", where):
            block = read(base + chunk.offset, chunk.padded_size)
            checkpoint.verify_chunk(block, expected, place=where)
            if index < volumes_end:
                table += memoryview(block)[: chunk.size]
            elif index < zones_end:
                states += _check_zone_rows(block, chunk, where, findings)
            else:
                places.add(block, chunk)
    if len(findings.rows) > before:
        return None
    if header.zone_count != superblock.zone_count or header.place_count > superblock.geometry.place_count:
        expected_counts = (superblock.zone_count, superblock.geometry.place_count)
        found_counts = (header.zone_count, header.place_count)
        findings.differ("checkpoint-content", place, "zones and places", expected=expected_counts, found=found_counts)
    with findings.noting("checkpoint-content", place):
        _check_holes(checkpoint.decode_volumes(bytes(table), layout, place=place), place)
        places.check(place)
    return bytes(states) if len(findings.rows) == before else None


def _check_zone_rows(block: Buffer, chunk: Chunk, place: str, findings: Findings) -> bytes:
    rows = checkpoint.decode_zones(block, chunk.count)
    highest = int(rows["state"].max(initial=0))
    if highest > max(ZoneState) or rows["reserved"].any():
        findings.differ("checkpoint-content", place, "zone states", expected=f"0..{max(ZoneState)}", found=highest)
    return rows["state"].tobytes()


def _check_holes(volumes: list[VolumeState], place: str) -> None:
    for volume in volumes:
        starts, counts = volume.holes["start"], volume.holes["count"]
        ends = starts[:-1] + counts[:-1]
        bad = np.flatnonzero(starts[1:] < ends)
        if bad.size:
            at = int(bad[0])
            raise CorruptionError(
                place=place,
                what=f"hole order of volume {volume.note.name}",
                expected=f"a hole from block {int(ends[at])} on",
                found=int(starts[at + 1]),
            )


class _Places:
    """Keys, versions and checksums of all places of a checkpoint.

    A block may stand at two places: they were copied at different moments. The same version of it is the same bytes.
    """

    def __init__(self, place_count: int) -> None:
        self._place_count = place_count
        self._parts: list[tuple[U64Array, U64Array, U64Array]] = []

    def add(self, block: Buffer, chunk: Chunk) -> None:
        """Take over a whole chunk."""
        keys, versions, checksums, _ = checkpoint.decode_places(block, chunk.count)
        held = keys != 0
        self._parts.append((keys[held], versions[held], checksums[held]))

    def check(self, place: str) -> None:
        """Compare the places that hold one version of one block.

        Raises:
            CorruptionError: a key is none, or two checksums differ.
        """
        if not self._parts:
            return
        keys, versions, checksums = (np.concatenate(one) for one in zip(*self._parts, strict=True))
        if keys.size and int(keys.min()) >> LBA_BITS == 0:
            raise CorruptionError(place=place, what="place key", expected="that of a volume", found=int(keys.min()))
        order = np.lexsort((versions, keys))
        keys, versions, checksums = keys[order], versions[order], checksums[order]
        twin = (keys[1:] == keys[:-1]) & (versions[1:] == versions[:-1]) & (checksums[1:] != checksums[:-1])
        if twin.any():
            at = int(np.argmax(twin))
            raise CorruptionError(
                place=place,
                what=f"checksums of one version of block key {int(keys[at]):#x}",
                expected=int(checksums[at]),
                found=int(checksums[at + 1]),
            )

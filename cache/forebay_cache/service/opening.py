"""Opening a cache device before anything is served: read its superblock, format it if it may be, recover its state.

Everything here blocks; the event loop does not run yet.

Invariants:
    Only a blank device is formatted unasked. With --format a device of ours is too, unless it holds changes that are
    not in the store, and so is one whose superblock is foreign or damaged.
    The device is synced before it is read: recovery sees what a power cut would leave. If a write or sync of it has
    failed, it is read from the disk, and not from memory.
Crash while formatting: the superblocks are written last, so the device is still what it was, or blank; or it has
neither superblocks nor is blank, where --format was asked for, and must be asked for again.
"""

import logging
import os
import secrets
import time
from typing import Final

from forebay_cache.engine.recovery import Recovered, blank_device, recover
from forebay_cache.format.superblock import (
    SUPERBLOCK_COUNT,
    Chosen,
    DeviceRefusedError,
    Refusal,
    Superblock,
    check_fits,
    choose_copy,
    encode_superblock,
    plan_geometry,
)
from forebay_cache.service.device_file import DeviceFile, drop_pages
from forebay_cache.service.failure_mark import FailureMark
from forebay_core.errors import CorruptionError, ForebayError, UnreadableError
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, ID_SIZE, Buffer

_READ_SIZE_MAX: Final = 1 << 30
_WRITE_SIZE: Final = 1 << 20
_LOG = logging.getLogger(__name__)


def recover_device(file: DeviceFile, *, zone_size: int, format_anew: bool, mark: FailureMark) -> Recovered:
    """Return all that is on the device, which is formatted first if it is blank or shall be; clears the mark.

    Raises:
        DeviceRefusedError: it belongs to something else or is damaged, and `format_anew` was not asked for.
        WrongUsageError: it is too small.
        ForebayError: what was durable on it is damaged, it can't be read or written, or it holds changes that
            formatting would lose.
    """
    try:
        recovered = _open(file, zone_size=zone_size, format_anew=format_anew, mark=mark)
        mark.clear()
        return recovered
    except OSError as error:
        mark.set()
        raise ForebayError(f"{file.path}: can't be read or written ({error.strerror})") from error


def _open(file: DeviceFile, *, zone_size: int, format_anew: bool, mark: FailureMark) -> Recovered:
    try:
        if mark.is_set:
            _LOG.warning(
                "%s: a write or sync of it failed before; it is read from the disk, not from memory", file.path
            )
            drop_pages(file.fd)
        else:
            os.fdatasync(file.fd)
        chosen = _choose(file)
        if chosen is None:
            return _recover(file, _format(file, zone_size))
        check_fits(chosen.superblock, file.size, place=str(file.path))
        if format_anew:
            _refuse_loss(file, chosen.superblock)
            return _recover(file, _format(file, zone_size))
        recovered = _recover(file, chosen.superblock)
        _repair_copies(file, chosen)
        return recovered
    except DeviceRefusedError as error:
        if not format_anew:
            raise ForebayError(f"{error}; give another --device, or --format to lose what is on it") from error
        _LOG.warning("%s; formatted as asked", error)
        return _recover(file, _format(file, zone_size))
    except CorruptionError as error:
        raise ForebayError(
            f"{file.path}: {error}; forebay cache salvage saves the changes that are only here, --format starts anew"
        ) from error


def _choose(file: DeviceFile) -> Chosen | None:
    """Return the superblock, or None for a blank device."""
    blocks = [_read_copy(file, index) for index in range(SUPERBLOCK_COUNT)]
    try:
        return choose_copy(blocks[0], blocks[1], place=str(file.path))
    except DeviceRefusedError as error:
        if error.refusal is not Refusal.BLANK:
            raise
    if file.foreign_offset is not None:
        raise DeviceRefusedError(
            Refusal.FOREIGN,
            f"{file.path}: holds something else (expected zeros as in its first blocks, found other bytes at offset "
            f"{file.foreign_offset})",
        )
    return None


def _read_copy(file: DeviceFile, index: int) -> Buffer | None:
    """Return one copy of the superblock, or None if it can't be read."""
    try:
        return _read(file, index * BLOCK_SIZE, BLOCK_SIZE)
    except UnreadableError as error:
        _LOG.error("%s superblock %s: %s", file.path, "AB"[index], error)
        return None


def _repair_copies(file: DeviceFile, chosen: Chosen) -> None:
    """Write invalid copies of the superblock anew: the device hangs by the other one.

    A copy that can't be written, because its block is worn out, is told and left: the device works as it did before.
    """
    for index, error in chosen.refused.items():
        _LOG.error("%s; the other copy is used", error)
        if error.refusal is Refusal.OTHER_VERSION:
            continue  # whoever knows that version may know better
        try:
            _write(file, index * BLOCK_SIZE, encode_superblock(chosen.superblock))
            os.fdatasync(file.fd)
        except OSError as failure:
            _LOG.error("%s superblock %s: can't be written (%s)", file.path, "AB"[index], failure.strerror)
        else:
            _LOG.warning("%s superblock %s: written anew from the other copy", file.path, "AB"[index])


def _refuse_loss(file: DeviceFile, superblock: Superblock) -> None:
    """Refuse to format a device of ours while somebody's acknowledged writes are only there."""
    try:
        recovered = _recover(file, superblock)
    except CorruptionError as error:
        _LOG.warning("%s; formatted as asked", error)
        return
    for volume in recovered.volumes.values():
        if volume.version > volume.acknowledged:
            raise ForebayError(
                f"{file.path}: holds changes of volume {volume.note.name} that are not in the store yet; start without "
                "--format and drain it, or remove the file (wipe the block device) to lose them"
            )


def _recover(file: DeviceFile, superblock: Superblock) -> Recovered:
    began_s = time.monotonic()
    recovered = recover(
        lambda offset, size: _read(file, offset, size), superblock, bucket_seed=int.from_bytes(superblock.device[8:])
    )
    _LOG.info(
        "%s: recovered in %.2f s, %d records replayed",
        file.path,
        time.monotonic() - began_s,
        recovered.records_replayed,
    )
    for finding in recovered.findings:
        _LOG.error("%s: %s", file.path, finding)
    return recovered


def _format(file: DeviceFile, zone_size: int) -> Superblock:
    geometry = plan_geometry(file.size, zone_size >> BLOCK_SHIFT)
    superblock = Superblock(
        secrets.token_bytes(ID_SIZE),
        1,
        geometry.zone_blocks,
        geometry.zone_count,
        geometry.checkpoint_offsets,
        geometry.checkpoint_size,
        geometry.zones_offset,
        time.time_ns(),
    )
    writes = blank_device(superblock)
    body, superblocks = writes[:-SUPERBLOCK_COUNT], writes[-SUPERBLOCK_COUNT:]
    # Old superblocks must not outlive the old content: with --format there may be some.
    _write(file, 0, bytes(SUPERBLOCK_COUNT * BLOCK_SIZE))
    os.fdatasync(file.fd)
    for part in (body, superblocks):
        for offset, block in part:
            _write(file, offset, block)
        os.fdatasync(file.fd)
    _LOG.info("%s: formatted, %d zones of %d blocks", file.path, geometry.zone_count, geometry.zone_blocks)
    return superblock


def _read(file: DeviceFile, offset: int, size: int) -> Buffer:
    assert 0 < size <= _READ_SIZE_MAX
    buffer = bytearray(size)
    view = memoryview(buffer)
    at = 0
    while at < size:
        try:
            count = os.preadv(file.fd, (view[at:],), offset + at)
        except OSError as error:
            raise UnreadableError(place=f"{size} bytes at offset {offset}", reason=str(error.strerror)) from error
        if count == 0:
            raise ForebayError(f"{file.path}: ends at offset {offset + at}, expected at least {offset + size} bytes")
        at += count
    return buffer


def _write(file: DeviceFile, offset: int, block: bytes) -> None:
    view = memoryview(block)
    at = 0
    while at < len(block):
        at += os.pwrite(file.fd, view[at : at + _WRITE_SIZE], offset + at)

"""Where an export goes: a new sparse file that gets its name when it is whole, or a block device.

A block device is overwritten in place, holes included; its old content must not shine through.
"""

import contextlib
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, format_size

_PART_NAME_SIZE: Final = 200
_BLKZEROOUT: Final = 0x127F
_ZERO_RANGE: Final = struct.Struct("=QQ")


class Target:
    """An open target. Calls may come from several threads: they touch different bytes.

    `zero_holes` tells whether holes must be written; a new file has them already.
    """

    def __init__(self, descriptor: int, *, zero_holes: bool) -> None:
        self.descriptor = descriptor
        self.zero_holes = zero_holes

    def write(self, extent: Extent, plain: memoryview) -> None:
        """Write the blocks of an extent where they lie in a raw image."""
        self.write_at(extent.start * BLOCK_SIZE, plain)

    def write_at(self, offset: int, plain: memoryview) -> None:
        """Write bytes."""
        while plain:
            count = os.pwrite(self.descriptor, plain, offset)
            offset += count
            plain = plain[count:]

    def leave_hole(self, extent: Extent) -> None:
        """Make an extent read as zeros."""
        if self.zero_holes:
            fcntl.ioctl(
                self.descriptor, _BLKZEROOUT, _ZERO_RANGE.pack(extent.start * BLOCK_SIZE, extent.count * BLOCK_SIZE)
            )


@contextlib.contextmanager
def open_target(path: Path, size: int, *, force: bool) -> Iterator[Target]:
    """Open a target of `size` bytes; when the block ends without an error it is durable and has its name.

    Raises:
        ForebayError: it exists and `force` is not given, is no file or block device, or is too small.
        OSError: it can't be made or written.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    else:
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ForebayError(f"{path}: is neither a file nor a block device; give another name")
        if not force:
            raise ForebayError(f"{path}: exists; give another name, or --force to overwrite it")
    with _open_device(path, size) if stat.S_ISBLK(mode) else _open_file(path, size, force=force) as target:
        yield target


@contextlib.contextmanager
def _open_file(path: Path, size: int, *, force: bool) -> Iterator[Target]:
    path = path.resolve()
    part = path.with_name(_part_name(path.name))
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size)
        yield Target(descriptor, zero_holes=False)
        os.fsync(descriptor)
        if force:
            part.rename(path)
        else:
            _rename_to_new(part, path)
        _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _part_name(name: str) -> str:
    """Return a name of at most 255 bytes, which is what most file systems take; letters may have several."""
    begin = os.fsencode(name)[:_PART_NAME_SIZE].decode(errors="ignore")
    return f".{begin}.{secrets.token_hex(4)}.part"


def _rename_to_new(part: Path, path: Path) -> None:
    """Rename a file, but never over another one.

    Raises:
        ForebayError: somebody took the name meanwhile.
    """
    try:
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without links: an empty file holds the name for a moment.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            part.rename(path)
        else:
            part.unlink()
    except FileExistsError as error:
        raise ForebayError(f"{path}: was made by somebody else meanwhile; give another name, or --force") from error


@contextlib.contextmanager
def _open_device(path: Path, size: int) -> Iterator[Target]:
    # O_EXCL without O_CREAT: the kernel refuses a device that is mounted or otherwise in use.
    descriptor = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        found = os.lseek(descriptor, 0, os.SEEK_END)
        if found < size:
            raise ForebayError(f"{path}: has {format_size(found)}, the volume needs {format_size(size)}")
        yield Target(descriptor, zero_holes=True)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

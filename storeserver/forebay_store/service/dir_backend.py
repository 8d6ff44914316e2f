"""Segments as files of one folder.

A segment is written under a temporary name, made durable, and only then linked to its own name, which fails if that
is taken; the folder is made durable before `create` returns. Invariant: a file under a segment's name is whole.
Crash: leaves at most a temporary file, which the next start removes.
After a failed sync nothing is known of what the disk holds (a second one would prove nothing), so creating is refused
until the backend is opened anew. A full disk is no such failure: the temporary file is thrown away. Nor is a temporary
file that could not be opened for want of descriptors or memory.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError, ForebayError, NoSpaceError, UnreadableError
from forebay_core.units import Buffer
from forebay_store.engine.ports import BackendError, NothingKeptError, SegmentExistsError, SegmentMissingError
from forebay_store.format.segment import parse_name
from forebay_store.service.new_file import NewFileWriter
from forebay_store.service.open_files import OpenFiles

TEMPORARY_SUFFIX: Final = ".tmp"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_UNREADABLE: Final = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EREMOTEIO)
"""What disks and file systems that find a bad checksum answer: damage to just those bytes, and lasting."""


class DirBackend:
    """The six verbs over a folder that this process alone writes to."""

    def __init__(self, folder: Path) -> None:
        """Open an existing folder."""
        self._folder = folder
        self._error = ""
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = OpenFiles(folder)
        self._writer = NewFileWriter()

    def recover(self) -> None:
        """Remove what a crash left and make the names durable that it had no time for; before anything is read.

        Raises:
            BackendError: the disk can't do it.
        """
        try:
            for name in os.listdir(self._folder):
                if is_temporary(name):
                    os.unlink(self._folder / name)
            os.fsync(self._fd)
        except OSError as error:
            raise self._fatal("left by a crash", error) from error

    def close(self) -> None:
        """Close all files."""
        self._files.close()
        os.close(self._fd)

    def create(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write a segment; on return it is durable and whole under its name."""
        if self._error:
            raise BackendError(self._error)
        assert parse_name(name) is not None
        temporary = self._folder / (name + TEMPORARY_SUFFIX)
        try:
            self._writer.write(temporary, buffers)
            os.link(temporary, self._folder / name)
        except FileExistsError as error:
            self._remove(temporary)
            raise SegmentExistsError(f"segment {name} exists already: does another store write here?") from error
        except NothingKeptError:
            self._remove(temporary)  # without memory it may have got its name before it failed
            raise
        except OSError as error:
            self._remove(temporary)
            raise self._failure(name, error) from error
        try:
            os.unlink(temporary)
            os.fsync(self._fd)
        except OSError as error:
            raise self._fatal(name, error) from error

    def read_range(self, name: str, offset: int, size: int) -> Buffer:
        """Return exactly these bytes; waits for the disk."""
        return self._read(name, offset, size, 0)

    def read_now(self, name: str, offset: int, size: int) -> Buffer | None:
        """Return the bytes if that needs no wait for the disk, else None; errors are left to `read_range`."""
        try:
            return self._read(name, offset, size, os.RWF_NOWAIT)
        except ForebayError:
            return None

    def read(self, name: str) -> Buffer:
        """Return a whole segment."""
        return self._read(name, 0, self.stat(name), 0)

    def list(self) -> list[str]:
        """Return the names, sorted; what bears one and is no file (a pipe would hang its reader) is no segment."""
        with os.scandir(self._folder) as entries:
            return sorted(
                one.name for one in entries if parse_name(one.name) is not None and (one.is_file() or one.is_symlink())
            )

    def delete(self, names: Sequence[str]) -> None:
        """Remove segments; the removal is durable on return."""
        try:
            for name in names:
                self._files.forget(name)
                (self._folder / name).unlink(missing_ok=True)
            os.fsync(self._fd)
        except OSError as error:
            raise self._fatal(", ".join(names), error) from error

    def stat(self, name: str) -> int:
        """Return the bytes of a segment."""
        try:
            return os.stat(self._folder / name).st_size
        except OSError as error:
            raise _read_failure(name, error) from error

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._fatal(path.name, error) from error

    def _failure(self, name: str, error: OSError) -> ForebayError:
        if error.errno in _FULL:
            return NoSpaceError(f"the disk under {self._folder} is full; nothing of segment {name} was kept")
        return self._fatal(name, error)

    def _fatal(self, name: str, error: OSError) -> BackendError:
        self._error = f"writing segment {name} in {self._folder} failed: {error.strerror}"
        return BackendError(self._error)

    def _read(self, name: str, offset: int, size: int, flags: int) -> Buffer:
        buffer = bytearray(size)
        view = memoryview(buffer)
        try:
            with self._files.use(name) as fd:
                at = 0
                while at < size:
                    count = os.preadv(fd, [view[at:]], offset + at, flags)
                    if count == 0:
                        raise CorruptionError(
                            place=f"segment {name} offset {offset + at}", what="size", expected=size, found=at
                        )
                    at += count
        except OSError as error:
            raise _read_failure(name, error, offset) from error
        return buffer


def is_temporary(name: str) -> bool:
    """Tell whether a file is what a crash left of a segment."""
    return name.endswith(TEMPORARY_SUFFIX) and parse_name(name.removesuffix(TEMPORARY_SUFFIX)) is not None


def _read_failure(name: str, error: OSError, offset: int = 0) -> ForebayError:
    if error.errno in _UNREADABLE:
        return UnreadableError(place=f"segment {name} offset {offset}", reason=str(error.strerror))
    if error.errno == errno.ENOENT:
        return SegmentMissingError(place=f"segment {name}", what="segment", expected="a file", found="nothing")
    return BackendError(f"reading segment {name} failed: {error.strerror}")

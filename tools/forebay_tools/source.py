"""An image to import: which parts of a raw file hold data, cut into frames.

Images are untrusted. Here only plain bytes are read; a qcow2 becomes a raw file first, see `qcow2`. Frames hold the
blocks of one aligned group of 16, so that later reads of neighbours need one frame; zero blocks are left out.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forebay_core.checksums import zero_blocks
from forebay_core.errors import ForebayError
from forebay_core.extents import Extent, from_blocks
from forebay_core.frame import FRAME_BLOCKS_MAX, FRAME_SIZE_MAX, FrameBuilder
from forebay_core.units import BLOCK_SIZE, MIB, VOLUME_SIZE_MAX, format_size
from forebay_wire.limits import PAYLOAD_SIZE_MAX

FORMATS: Final = ("raw", "qcow2")
GROUP_SIZE: Final = FRAME_BLOCKS_MAX * BLOCK_SIZE
PART_SIZE: Final = 8 * MIB
"""Plain bytes of one part at most: large enough for the disk below the store, small enough to have several."""
assert PART_SIZE % GROUP_SIZE == 0
# Even when every block of a part lies alone in its frame.
assert PART_SIZE // BLOCK_SIZE * (FRAME_SIZE_MAX - (FRAME_BLOCKS_MAX - 1) * BLOCK_SIZE) <= PAYLOAD_SIZE_MAX

_PROBE_SIZE: Final = 512
_QCOW2_MAGIC: Final = b"QFI\xfb"
_FOREIGN: Final = (
    (0, b"KDMV", "VMDK image"),
    (0, b"COWD", "VMDK image"),
    (0, b"# Disk DescriptorFile", "VMDK image"),
    (0, b"vhdxfile", "VHDX image"),
    (0, b"conectix", "VHD image"),
    (64, b"\x7f\x10\xda\xbe", "VDI image"),
    (0, b"QED\0", "QED image"),
    (0, b"\x1f\x8b\x08", "gzip file"),
    (0, b"\xfd7zXZ\0", "xz file"),
    (0, b"\x28\xb5\x2f\xfd", "zstd file"),
    (0, b"BZh", "bzip2 file"),
)


class Part(NamedTuple):
    """Frames to send as one message. `done`: bytes of the image read when it was complete.

    `holes`: sorted extents that shall read as zeros; none where the volume is new.
    """

    frames: list[bytes]
    blocks: int
    done: int
    holes: Sequence[Extent] = ()


class RawSource:
    """A raw file or block device, open for reading. `size` is a whole number of blocks, zeros fill the last one.

    `padding_size`: bytes of those zeros.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = open_image(path)
        try:
            self._file_size = os.lseek(self.descriptor, 0, os.SEEK_END)
            if not 0 < self._file_size <= VOLUME_SIZE_MAX:
                limit = format_size(VOLUME_SIZE_MAX)
                raise ForebayError(f"{path}: has {self._file_size} bytes; an image has at least one, at most {limit}")
            self._status = os.fstat(self.descriptor)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.size = -(-self._file_size // BLOCK_SIZE) * BLOCK_SIZE
        self.padding_size = self.size - self._file_size
        self.data_size = sum(end - start for start, end in self.runs())

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def parts(self) -> Iterator[Part]:
        """Return the parts in order; those of zeros alone are skipped. Reads and computes: for a thread of its own.

        Raises:
            ForebayError: the file changed under our hands, so that what was read is no state it ever had.
            OSError: it can't be read.
        """
        builder = FrameBuilder()
        window = memoryview(bytearray(PART_SIZE))
        frames: list[bytes] = []
        blocks = done = 0
        for start, end in self.runs():
            at = start
            while at < end:
                size = min(end - at, PART_SIZE - blocks * BLOCK_SIZE)
                # Keep room for whole groups only: a group that is cut in two would cost later readers two frames.
                piece = window[: max(size // GROUP_SIZE * GROUP_SIZE, min(size, GROUP_SIZE))]
                self.fill(piece, at)
                blocks += build_frames(builder, at // BLOCK_SIZE, piece, frames)
                at += piece.nbytes
                done += piece.nbytes
                if blocks * BLOCK_SIZE > PART_SIZE - GROUP_SIZE:
                    yield Part(frames, blocks, done)
                    frames, blocks = [], 0
        if frames:
            yield Part(frames, blocks, done)
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Make sure that the file is as it was when it was opened; raises as `parts`."""
        check_unchanged(self.path, self.descriptor, self._status)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Return start and end of what may hold data, widened to whole groups and the end of the last block."""
        at = 0
        while at < self.size:
            start, end = self._next_data(at)
            start = max(at, start // GROUP_SIZE * GROUP_SIZE)
            end = min(self.size, -(-end // GROUP_SIZE) * GROUP_SIZE)
            if start < end:
                yield start, end
            at = end

    def _next_data(self, at: int) -> tuple[int, int]:
        try:
            start = os.lseek(self.descriptor, at, os.SEEK_DATA)
            return start, os.lseek(self.descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return self.size, self.size
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # block devices and some file systems don't say
                return at, self.size
            raise

    def fill(self, piece: memoryview, at: int) -> None:
        """Read the bytes of the image from offset `at` on; behind its end there are zeros.

        Raises:
            ForebayError: the file is shorter than it was.
            OSError: it can't be read.
        """
        filled = 0
        while filled < piece.nbytes:
            count = os.preadv(self.descriptor, [piece[filled:]], at + filled)
            if count == 0:
                break
            filled += count
        if at + filled < min(at + piece.nbytes, self._file_size):
            raise ForebayError(
                f"{self.path}: ends at byte {at + filled}, it was cut while being imported; import again"
            )
        if filled < piece.nbytes:
            piece[filled:] = bytes(piece.nbytes - filled)


def build_frames(builder: FrameBuilder, first_lba: int, window: memoryview, frames: list[bytes]) -> int:
    """Append frames of the window's blocks that are not zero, and return how many blocks they hold."""
    return build_chosen_frames(builder, first_lba, window, np.flatnonzero(~zero_blocks(window)), frames)


def build_chosen_frames(
    builder: FrameBuilder, first_lba: int, window: memoryview, data: npt.NDArray[np.int64], frames: list[bytes]
) -> int:
    """Append frames of the blocks of a window with the given sorted indices, and return how many that are."""
    groups = (data + first_lba) // FRAME_BLOCKS_MAX
    bounds = np.flatnonzero(np.diff(groups)) + 1
    for chosen in np.split(data, bounds) if data.size else ():
        first, last = int(chosen[0]), int(chosen[-1])
        if last - first + 1 == chosen.size:
            extents = [Extent(first_lba + first, chosen.size)]
            plain: bytes | memoryview = window[first * BLOCK_SIZE : (last + 1) * BLOCK_SIZE]
        else:
            runs = from_blocks(chosen.astype(np.uint64))
            extents = [Extent(first_lba + run.start, run.count) for run in runs]
            plain = b"".join(window[run.start * BLOCK_SIZE : run.end * BLOCK_SIZE] for run in runs)
        frames.append(builder.build(extents, plain))
    return int(data.size)


def detect_format(path: Path) -> str:
    """Return the format of an image by its first bytes: one of FORMATS.

    Raises:
        ForebayError: it is of a known kind that can't be imported.
    """
    descriptor = open_image(path)
    try:
        first = os.pread(descriptor, _PROBE_SIZE, 0)
    finally:
        os.close(descriptor)
    if first.startswith(_QCOW2_MAGIC):
        return "qcow2"
    for offset, magic, kind in _FOREIGN:
        if first[offset : offset + len(magic)] == magic:
            raise ForebayError(
                f"{path}: looks like a {kind}; make it raw or qcow2 first, or say --format raw if it is a raw image"
            )
    return "raw"


def check_unchanged(path: Path, descriptor: int, before: os.stat_result) -> None:
    """Compare an image with what it was; a block device does not tell.

    Raises:
        ForebayError: it was written meanwhile.
    """
    now = os.fstat(descriptor)
    if stat.S_ISREG(now.st_mode) and _state(now) != _state(before):
        raise ForebayError(f"{path}: was written while being imported; stop who writes it and import again")


def _state(status: os.stat_result) -> tuple[int, int, int]:
    # Whoever writes may put the time of writing back, as rsync does; the time of that change nobody can set.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_image(path: Path) -> int:
    """Return a descriptor of a regular file or block device, open for reading.

    Raises:
        ForebayError: it is something else.
        OSError: it can't be opened.
    """
    # O_NONBLOCK: a FIFO given by mistake must not hang us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(descriptor)
        raise ForebayError(f"{path}: is neither a file nor a block device; give an image")
    return descriptor

"""The process that makes frames for the daemon: `python -m forebay_cache.service.builder_worker DEVICE FD LEVEL`.

It reads dirty blocks through the page cache they were written to, compares them with their checksums, leaves out
zeros, compresses the rest. Requests and answers are datagrams on the inherited socket FD; frames go back in a memory
file that comes with the answer, so the daemon neither copies nor parses them.

Request, little-endian: u64 count, then count times u64 lba, u64 offset, u64 checksum, as three arrays.

Answer, 32 bytes, little-endian, with the memory file as attached descriptor:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  ------------------------------------------------------------
         0     4  u32   status         0 built, 1 the device could not be read
         4     4  u32   frame_count    frames at the start of the memory file, one behind the other
         8     4  u32   hole_count     extents that were all zeros
        12     4  u32   corrupt_count  blocks that differ from their checksum; then there are no frames
        16     8  u64   plain_size     bytes of blocks inside the frames
        24     8  u64   frames_size    bytes of the frames; behind them the tables

Tables: frame_count times u32 size, hole_count packed extents, corrupt_count times u64 lba, then as often u64 found.

Crash: the daemon starts another one and asks again. It ends when the daemon is gone, however that died: its socket
then reads end of file. Signals that stop the daemon are ignored, because the last cuts are built after them.
"""

import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from forebay_cache.engine.ports import BuildRequest, BuiltPart, U64Array
from forebay_core.checksums import ZERO_CHECKSUM, block_checksums, is_zero
from forebay_core.extents import Extent, from_blocks, pack
from forebay_core.frame import FRAME_BLOCKS_MAX, FrameBuilder
from forebay_core.units import BLOCK_SIZE, Buffer

BUILD_BLOCKS_MAX: Final = 4096
"""Blocks of one request: the arrays fit one datagram, the blocks 16 MiB of memory."""

FRAME_GAP_BLOCKS_MAX: Final = 16
"""A larger gap between blocks begins another frame: who reads one block should not get far away ones."""

READ_RUN_BLOCKS_MAX: Final = 256
REQUEST_HEADER: Final = struct.Struct("<Q")
ANSWER: Final = struct.Struct("<IIIIQQ")
DATAGRAM_SIZE_MAX: Final = REQUEST_HEADER.size + BUILD_BLOCKS_MAX * 24
STATUS_BUILT: Final = 0
STATUS_UNREADABLE: Final = 1
assert ANSWER.size == 32
assert READ_RUN_BLOCKS_MAX <= 1024  # IOV_MAX


NICENESS: Final = 10
"""Guests come first: destaging takes what the daemon and the virtual machines leave of the processor."""


class Blocks(NamedTuple):
    """What one request names, read from the device in the order of the lbas."""

    lbas: U64Array
    plain: memoryview
    checksums: list[int]


def encode_request(request: BuildRequest) -> bytes:
    """Return the datagram that asks for a part."""
    arrays = (request.lbas, request.offsets, request.checksums)
    assert len({array.size for array in arrays}) == 1
    return REQUEST_HEADER.pack(request.lbas.size) + b"".join(array.astype("<u8").tobytes() for array in arrays)


def decode_request(datagram: bytes) -> BuildRequest:
    """Return what the daemon asks for."""
    (count,) = REQUEST_HEADER.unpack_from(datagram)
    assert len(datagram) == REQUEST_HEADER.size + count * 24
    arrays = np.frombuffer(datagram, "<u8", offset=REQUEST_HEADER.size).reshape(3, count)
    return BuildRequest(arrays[0], arrays[1], arrays[2])


def build_part(fd: int, request: BuildRequest, builder: FrameBuilder) -> BuiltPart:
    """Return frames and holes of the blocks, or those that are corrupt.

    Raises:
        OSError: the device can't be read, or ends too early.
    """
    plain = _read_blocks(fd, request.offsets)
    found = block_checksums(plain)
    wrong = np.flatnonzero(found != request.checksums)
    if wrong.size:
        return BuiltPart((), (), 0, request.lbas[wrong].tolist(), found[wrong].tolist())
    zero = [
        index
        for index in np.flatnonzero(found == ZERO_CHECKSUM).tolist()
        if is_zero(plain[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    ]
    kept = np.delete(np.arange(found.size), zero)
    blocks = Blocks(request.lbas, plain, found.tolist())
    frames = [_build_frame(blocks, group, builder) for group in _groups(request.lbas[kept], kept.tolist())]
    return BuiltPart(frames, from_blocks(request.lbas[zero]), len(kept) * BLOCK_SIZE, (), ())


def _read_blocks(fd: int, offsets: U64Array) -> memoryview:
    """Read blocks to where they belong, neighbours on the device in one call."""
    plain = memoryview(bytearray(offsets.size * BLOCK_SIZE))
    order = np.argsort(offsets, kind="stable")
    sorted_offsets = offsets[order].astype(np.int64)
    breaks = np.flatnonzero(np.diff(sorted_offsets) != BLOCK_SIZE) + 1
    for run in np.split(order, breaks):
        for at in range(0, run.size, READ_RUN_BLOCKS_MAX):
            indexes = run[at : at + READ_RUN_BLOCKS_MAX].tolist()
            _read_run(fd, int(offsets[indexes[0]]), [plain[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in indexes])
    return plain


def _read_run(fd: int, offset: int, targets: Sequence[memoryview]) -> None:
    size = len(targets) * BLOCK_SIZE
    if os.preadv(fd, targets, offset) == size:
        return
    # A short read is rare; block by block it either goes on or names the place.
    for index, target in enumerate(targets):
        at = offset + index * BLOCK_SIZE
        if os.preadv(fd, (target,), at) != BLOCK_SIZE:
            raise OSError(f"block at offset {at} is cut short")


def _groups(lbas: U64Array, indexes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the blocks of each frame, as indexes into the request."""
    group: list[int] = []
    before = -1
    for lba, index in zip(lbas.tolist(), indexes, strict=True):
        if group and (len(group) == FRAME_BLOCKS_MAX or lba - before > FRAME_GAP_BLOCKS_MAX):
            yield group
            group = []
        group.append(index)
        before = lba
    if group:
        yield group


def _build_frame(blocks: Blocks, group: list[int], builder: FrameBuilder) -> bytes:
    first, last = group[0], group[-1]
    plain: Buffer
    if last - first + 1 == len(group):
        plain = blocks.plain[first * BLOCK_SIZE : (last + 1) * BLOCK_SIZE]
    else:
        plain = b"".join(blocks.plain[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE] for index in group)
    extents: list[Extent] = from_blocks(blocks.lbas[group])
    return builder.build(extents, plain, [blocks.checksums[index] for index in group])


def send_answer(channel: socket.socket, part: BuiltPart | None) -> None:
    """Send a part, or None for a device that can't be read."""
    if part is None:
        channel.send(ANSWER.pack(STATUS_UNREADABLE, 0, 0, 0, 0, 0))
        return
    sizes = [memoryview(frame).nbytes for frame in part.frames]
    tables = (
        np.array(sizes, "<u4").tobytes(),
        pack(part.holes),
        np.array(part.corrupt, "<u8").tobytes(),
        np.array(part.found, "<u8").tobytes(),
    )
    memory = os.memfd_create("forebay-part", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.writelines((*part.frames, *tables))
        counts = (len(part.frames), len(part.holes), len(part.corrupt))
        answer = ANSWER.pack(STATUS_BUILT, *counts, part.plain_size, sum(sizes))
        socket.send_fds(channel, [answer], [memory])
    finally:
        os.close(memory)


def main(device: str, channel_fd: int, level: int) -> None:
    """Answer requests until the daemon is gone."""
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    builder = FrameBuilder(level)
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with socket.socket(fileno=channel_fd) as channel:
            while datagram := channel.recv(DATAGRAM_SIZE_MAX):
                try:
                    part: BuiltPart | None = build_part(fd, decode_request(datagram), builder)
                except OSError as error:
                    sys.stderr.write(f"forebay: builder: {device} can't be read: {error}\n")
                    part = None
                send_answer(channel, part)
    except (BrokenPipeError, ConnectionResetError):
        return  # the daemon is gone
    finally:
        os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

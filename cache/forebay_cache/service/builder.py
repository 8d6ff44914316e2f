"""The builder of frames, in processes of their own: compression would stall the event loop's thread for the GIL.

Measured 2026-11 (2 shared, loaded cores): one worker builds 285 MiB/s of incompressible blocks and 600 MiB/s of
compressible ones; the daemon spends about 1 ms on a part of 4 MiB.

Invariants:
    A worker has at most one request; the others wait here, in order.
    A request is given to at most two workers: one that dies twice is answered with None.
    Frames are views of the worker's memory file; the file is gone with the last of them.
Crash: workers end with the daemon, whatever killed it.
"""

import asyncio
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from forebay_cache.engine.ports import BuildRequest, BuiltPart
from forebay_cache.service.builder_worker import ANSWER, BUILD_BLOCKS_MAX, STATUS_BUILT, encode_request
from forebay_core.extents import EXTENT_DTYPE, Extent

TRIES_MAX: Final = 2
WAITING_MAX: Final = 4096
"""Requests that wait; the engine has one per part of the cuts it is building."""

EXIT_TIMEOUT_S: Final = 5.0

_LOG = logging.getLogger(__name__)


class _Job(NamedTuple):
    request: BuildRequest
    done: Callable[[BuiltPart | None], None]
    tries: int


class ProcessBuilder:
    """Implements the engine's `Builder` port over `workers` processes."""

    def __init__(self, device: str, *, level: int, workers: int, loop: asyncio.AbstractEventLoop) -> None:
        assert workers > 0
        self._waiting: deque[_Job] = deque()
        self._workers = [_Worker(device, level, loop, self._ended) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    @property
    def pids(self) -> list[int]:
        """Processes that are running."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def build(self, request: BuildRequest, done: Callable[[BuiltPart | None], None]) -> None:
        """Build one part of at most BUILD_BLOCKS_MAX blocks."""
        assert 0 < request.lbas.size <= BUILD_BLOCKS_MAX
        assert len(self._waiting) < WAITING_MAX
        self._waiting.append(_Job(request, done, 1))
        self._give()

    def close(self) -> None:
        """End the processes; requests that are still waiting are never completed."""
        self._waiting.clear()
        for worker in self._workers:
            worker.stop()

    def _give(self) -> None:
        for worker in self._workers:
            if not self._waiting:
                return
            if worker.job is None:
                worker.give(self._waiting.popleft())

    def _ended(self, job: _Job, part: BuiltPart | None, died: bool) -> None:
        """A worker is free again, or dead."""
        if died and job.tries < TRIES_MAX:
            self._waiting.appendleft(job._replace(tries=job.tries + 1))
            part_done = None
        else:
            part_done = job.done
        self._give()
        if part_done is not None:
            part_done(part)


class _Worker:
    """One process and the socket to it. Started again at the next request after it died."""

    def __init__(
        self,
        device: str,
        level: int,
        loop: asyncio.AbstractEventLoop,
        ended: Callable[[_Job, BuiltPart | None, bool], None],
    ) -> None:
        self._device = device
        self._level = level
        self._loop = loop
        self._ended = ended
        self._channel: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.job: _Job | None = None

    def start(self) -> None:
        """Start the process."""
        assert self.process is None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        module = "forebay_cache.service.builder_worker"
        command = [sys.executable, "-m", module, self._device, str(theirs.fileno()), str(self._level)]
        with theirs:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        self._channel = ours
        self._loop.add_reader(ours, self._answered)

    def give(self, job: _Job) -> None:
        """Send a request; the answer or the process's death calls `ended`."""
        assert self.job is None
        self.job = job
        try:
            if self._channel is None:
                self.start()
            assert self._channel is not None
            self._channel.send(encode_request(job.request))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died while idle; the reader sees that next
        except OSError as error:
            _LOG.error("the builder can't be started or asked: %s", error)
            self._loop.call_soon(self._died)

    def stop(self) -> None:
        """End the process; a hung one is killed."""
        self.job = None
        process = self._disconnect()
        if process is not None:
            try:
                process.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _answered(self) -> None:
        assert self._channel is not None
        try:
            message, fds, _, _ = socket.recv_fds(self._channel, ANSWER.size, 1)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message, fds = b"", []
        if not message:
            self._died()
            return
        job, self.job = self.job, None
        assert job is not None
        self._ended(job, _part(message, fds), False)

    def _died(self) -> None:
        process = self._disconnect()
        if process is not None:
            process.kill()
            _LOG.error("builder process %d died with %d", process.pid, process.wait())
        job, self.job = self.job, None
        if job is not None:
            self._ended(job, None, True)

    def _disconnect(self) -> subprocess.Popen[bytes] | None:
        process, self.process = self.process, None
        if self._channel is not None:
            self._loop.remove_reader(self._channel)
            self._channel.close()
            self._channel = None
        return process


def _part(message: bytes, fds: list[int]) -> BuiltPart | None:
    """Return the part that an answer and its memory file hold."""
    status, frame_count, hole_count, corrupt_count, plain_size, frames_size = ANSWER.unpack(message)
    if status != STATUS_BUILT:
        return None
    (fd,) = fds
    try:
        memory = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
    at = frames_size + frame_count * 4
    sizes = np.frombuffer(memory[frames_size:at], "<u4").tolist()
    holes = np.frombuffer(memory[at : at + hole_count * EXTENT_DTYPE.itemsize], EXTENT_DTYPE).tolist()
    at += hole_count * EXTENT_DTYPE.itemsize
    corrupt = np.frombuffer(memory[at : at + corrupt_count * 16], "<u8").tolist()
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    frames = [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return BuiltPart(
        frames, [Extent(*row) for row in holes], plain_size, corrupt[:corrupt_count], corrupt[corrupt_count:]
    )

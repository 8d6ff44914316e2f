"""An io_uring: reads and syncs that the kernel does without a thread of ours.

Why: a Python thread that comes back from a system call waits for the GIL, and the event loop, which gives the GIL
away at each of its own calls, then waits for that thread. With eight reading threads a `preadv` that never blocks took
the loop 130 us instead of 1 (2 shared cores, loaded, 2026-11).

The ring memory is shared with the kernel without fences of ours, which x86-64 allows (loads are not reordered with
loads, nor stores with stores); elsewhere `Ring` says that it is unavailable, as it does where the kernel or a sandbox
forbids it, and threads do the work.

Submission entry, 64 bytes, little-endian (struct io_uring_sqe of Linux):

    offset  size  type  field       meaning
    ------  ----  ----  ----------  ------------------------------------------
         0     1  u8    opcode      22 READ, 3 FSYNC
         1     1  u8    flags       0
         2     2  u16   priority    0
         4     4  i32   fd          the file
         8     8  u64   offset      bytes; 0 of FSYNC
        16     8  u64   address     of the buffer; 0 of FSYNC
        24     4  u32   size        bytes; 0 of FSYNC: the whole file
        28     4  u32   op_flags    0; 1 of FSYNC: as fdatasync
        32     8  u64   tag         comes back with the completion
        40    24  24x   unused      0

Completion entry, 16 bytes: u64 tag, i32 result (bytes, or a negative errno), u32 flags.

Invariants:
    At most `entries` commands are in flight, so the completion queue, twice as long, never overflows.
    Whoever prepares a read keeps its memory until the completion.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from typing import Final

READ: Final = 22
FSYNC: Final = 3
_FSYNC_DATASYNC: Final = 1
SUBMISSION: Final = struct.Struct("<BBHiQQIIQ24x")
COMPLETION: Final = struct.Struct("<QiI")
PARAMS: Final = struct.Struct("<10I 7I 4x Q 7I 4x Q")
assert SUBMISSION.size == 64
assert COMPLETION.size == 16
assert PARAMS.size == 120

_SETUP: Final = 425
_ENTER: Final = 426
_REGISTER: Final = 427
_REGISTER_EVENTFD: Final = 4
_ENTER_GETEVENTS: Final = 1
_FEATURES_NEEDED: Final = 3  # one mapping for both rings, completions are never dropped
_OFFSET_RINGS: Final = 0
_OFFSET_ENTRIES: Final = 0x10000000
_U32_MASK: Final = 0xFFFFFFFF


class Ring:
    """One io_uring with an eventfd that tells of completions. For one thread."""

    def __init__(self, entries: int) -> None:
        """Make a ring of `entries`, a power of two.

        Raises:
            OSError: the kernel, a sandbox or this processor does not allow it.
        """
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise OSError(errno.ENOSYS, "io_uring is used on Linux on x86-64 only")
        # PyDLL keeps the GIL: submitting never waits. CDLL gives it away, for waiting.
        self._enter_now = _syscall(ctypes.PyDLL(None, use_errno=True))
        self._enter_wait = _syscall(ctypes.CDLL(None, use_errno=True))
        params = bytearray(PARAMS.size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(params))
        self._fd = _check(self._enter_now(_SETUP, entries, address, 0, 0, 0, 0))
        try:
            self._map(PARAMS.unpack(params))
            self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                event_fd = ctypes.c_int(self.event_fd)
                register = (_REGISTER, self._fd, _REGISTER_EVENTFD, ctypes.addressof(event_fd), 1, 0, 0)
                _check(self._enter_now(*register))
            except BaseException:
                os.close(self.event_fd)
                raise
        except BaseException:
            os.close(self._fd)
            raise
        self._entry_count = entries
        self._prepared = 0
        self.in_flight = 0

    @property
    def has_room(self) -> bool:
        """Whether one more command may be prepared."""
        return self.in_flight < self._entry_count

    def prepare_read(self, fd: int, offset: int, address: int, size: int, tag: int) -> None:
        """Queue a read of `size` bytes at a byte offset into memory at `address`; `submit` starts it."""
        self._prepare(READ, fd, offset, address, size, 0, tag)

    def prepare_sync(self, fd: int, tag: int) -> None:
        """Queue an fdatasync; it covers what was written before `submit` starts it."""
        self._prepare(FSYNC, fd, 0, 0, 0, _FSYNC_DATASYNC, tag)

    def _prepare(self, opcode: int, fd: int, offset: int, address: int, size: int, op_flags: int, tag: int) -> None:
        assert self.in_flight < self._entry_count
        tail = self._words[self._sq_tail]
        at = (tail & self._sq_mask) * SUBMISSION.size
        SUBMISSION.pack_into(self._entries, at, opcode, 0, 0, fd, offset, address, size, op_flags, tag)
        self._words[self._sq_tail] = (tail + 1) & _U32_MASK
        self._prepared += 1
        self.in_flight += 1

    def submit(self) -> bool:
        """Start what was prepared. False: the kernel is short of something, try again later."""
        while self._prepared:
            count = self._enter_now(_ENTER, self._fd, self._prepared, 0, 0, 0, 0)
            if count >= 0:
                self._prepared -= count
            elif ctypes.get_errno() in (errno.EAGAIN, errno.EBUSY):
                return False
            elif ctypes.get_errno() != errno.EINTR:
                _check(count)
        return True

    def wait(self) -> None:
        """Wait for a completion; only when something is in flight."""
        assert self.in_flight > 0
        count = self._enter_wait(_ENTER, self._fd, self._prepared, 1, _ENTER_GETEVENTS, 0, 0)
        if count >= 0:
            self._prepared -= count
        elif ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
            _check(count)

    def completions(self) -> list[tuple[int, int]]:
        """Take what is complete, as (tag, result)."""
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        taken: list[tuple[int, int]] = []
        while head != tail:
            tag, result, _ = COMPLETION.unpack_from(self._rings, self._cqes + (head & self._cq_mask) * COMPLETION.size)
            taken.append((tag, result))
            head = (head + 1) & _U32_MASK
        words[self._cq_head] = head
        self.in_flight -= len(taken)
        return taken

    def close(self) -> None:
        """Free the ring; nothing may be in flight."""
        assert self.in_flight == 0
        self._words.release()
        self._rings.close()
        self._entries.close()
        os.close(self.event_fd)
        os.close(self._fd)

    def _map(self, params: tuple[int, ...]) -> None:
        sq_entries, cq_entries, features = params[0], params[1], params[5]
        if features & _FEATURES_NEEDED != _FEATURES_NEEDED:
            raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
        _, sq_tail, sq_mask, _, _, _, sq_array = params[10:17]
        cq_head, cq_tail, cq_mask, _, _, cqes, _ = params[18:25]
        size = max(sq_array + sq_entries * 4, cqes + cq_entries * COMPLETION.size)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._rings = mmap.mmap(self._fd, size, flags=flags, offset=_OFFSET_RINGS)
        self._entries = mmap.mmap(self._fd, sq_entries * SUBMISSION.size, flags=flags, offset=_OFFSET_ENTRIES)
        self._words = memoryview(self._rings)[: size & ~3].cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = sq_tail // 4, cq_head // 4, cq_tail // 4
        self._sq_mask, self._cq_mask = self._words[sq_mask // 4], self._words[cq_mask // 4]
        self._cqes = cqes
        for index in range(sq_entries):
            self._words[sq_array // 4 + index] = index  # entry i is always at place i


def _syscall(library: ctypes.CDLL) -> "ctypes._FuncPointer":
    # A function of its own for each, so that the declarations of others do not matter.
    function = library["syscall"]
    function.argtypes = [ctypes.c_long] * 7
    function.restype = ctypes.c_long
    return function


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)

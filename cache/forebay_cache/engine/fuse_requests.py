"""What the kernel asks of the FUSE front, turned into NBD requests, and their answers turned into replies.

Invariants:
    Every request but FORGET and INTERRUPT is replied to once; the NBD cookie of a request is the kernel's number of it.
    The slot of a large read or write is given back when that is answered, never before.
    Bytes in flight stay below IN_FLIGHT_SIZE_MAX plus one request: `full` tells the shell to read no more.
Crash: the mount is dead, its users see ENOTCONN; the next front mounts anew.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from forebay_cache.engine.fuse_folder import EPERM, EROFS, FuseFolder, VolumeFile
from forebay_cache.engine.nbd_client import NbdClient, Request, Status, decode_statuses
from forebay_cache.engine.payload_slots import Slot
from forebay_cache.format import fuse, nbd
from forebay_core.units import MIB, Buffer

EINTR: Final = 4
EIO: Final = 5
ENXIO: Final = 6
EINVAL: Final = 22
ENOSPC: Final = 28
ENOSYS: Final = 38
EOPNOTSUPP: Final = 95

COPY_SIZE_MAX: Final = 64 * 1024
"""A payload up to this is copied out of the slot it came in; a larger one, or a read as large, keeps the slot."""

IN_FLIGHT_MAX: Final = 512
IN_FLIGHT_SIZE_MAX: Final = 128 * MIB
BACKGROUND_MAX: Final = 128
"""Asynchronous requests that the kernel sends before it waits for answers; a loop device sends all of its own so."""

ZERO_SIZE_MAX: Final = 2048 * MIB
"""Bytes zeroed by one NBD request, whose length has 32 bits."""

STATUS_SIZE_MAX: Final = 1024 * MIB
assert BACKGROUND_MAX < IN_FLIGHT_MAX
assert BACKGROUND_MAX * fuse.WRITE_SIZE_MAX <= IN_FLIGHT_SIZE_MAX

_OPEN_FLAGS: Final = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH | fuse.FOPEN_PARALLEL_DIRECT_WRITES
_INIT_FLAGS: Final = (
    fuse.INIT_ASYNC_READ | fuse.INIT_BIG_WRITES | fuse.INIT_ASYNC_DIO | fuse.INIT_PARALLEL_DIROPS | fuse.INIT_MAX_PAGES
)
_CHANGING_NAMES: Final = frozenset((6, 8, 9, 10, 11, 12, 13, 35, 45, 51))
"""SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, CREATE, RENAME2, TMPFILE: that is for `attach` and `detach`."""

_UNANSWERED: Final = (fuse.OP_FORGET, fuse.OP_BATCH_FORGET)


class Connections(Protocol):
    """The shell's part: it brings bytes to the daemon and back."""

    def open(self, file: VolumeFile, *, statuses: bool) -> NbdClient:
        """Return a client whose connection is being made, again and again until it is closed."""

    def close(self, client: NbdClient) -> None:
        """Say goodbye."""


class Zeroing(NamedTuple):
    """A FALLOCATE that goes on behind what was asked so far."""

    offset: int
    end: int
    flags: int


class FuseRequests:
    """One mount. `send` writes one reply, in one piece or several."""

    def __init__(self, folder: FuseFolder, connections: Connections, send: Callable[[Sequence[Buffer]], None]) -> None:
        self.given_back: list[Slot] = []
        self.ended = False
        self._folder = folder
        self._connections = connections
        self._send = send
        self._opened: dict[int, VolumeFile] = {}
        self._next_opened = 0
        self._asked: dict[int, NbdClient] = {}
        self._interrupted: set[int] = set()
        self._zeroings: dict[int, Zeroing] = {}
        self._seeks: dict[int, tuple[VolumeFile, int]] = {}
        self._size_in_flight = 0
        self._kept: dict[int, Slot] = {}

    @property
    def full(self) -> bool:
        """Whether no more requests should be read."""
        return len(self._asked) >= IN_FLIGHT_MAX or self._size_in_flight >= IN_FLIGHT_SIZE_MAX

    def take(self, head: bytearray, slot: Slot, size: int) -> bool:
        """Take one request of the kernel, which fills `head` and goes on in the slot: a WRITE's payload stands there.

        Tell whether the slot is kept: `given_back` has it later.
        """
        _size, opcode, unique, node, _uid, _gid, _pid = fuse.REQUEST_HEADER.unpack_from(head)
        body = memoryview(head)[fuse.REQUEST_HEADER.size : size]
        if opcode == fuse.OP_WRITE:
            return self._write(unique, body, slot)
        if size > len(head):
            body = memoryview(bytes(body) + slot.view[: size - len(head)])
        if opcode == fuse.OP_READ:
            return self._read(unique, body, slot)
        match opcode:
            case fuse.OP_FSYNC:
                file = self._file(body)
                self._ask(file, Request(unique, nbd.CMD_FLUSH, 0, 0))
            case fuse.OP_FALLOCATE:
                self._fallocate(unique, body)
            case fuse.OP_LSEEK:
                self._seek(unique, body)
            case _:
                self._other(opcode, unique, node, body)
        return False

    # --- reading and writing ----------------------------------------------------------------------------------

    def _read(self, unique: int, body: memoryview, slot: Slot) -> bool:
        opened, offset, length, _, _, _ = fuse.IO_REQUEST.unpack_from(body)
        file = self._opened[opened]
        length = min(length, file.size - offset)
        if length <= 0:
            self._send((fuse.encode_error(unique, 0),))
            return False
        if length <= COPY_SIZE_MAX or slot.place is None:
            self._ask(file, Request(unique, nbd.CMD_READ, offset, length))
            return False
        self._kept[unique] = slot
        self._ask(file, Request(unique, nbd.CMD_READ, offset, length, slot.view[:length], place=slot.place))
        return True

    def _write(self, unique: int, body: memoryview, slot: Slot) -> bool:
        opened, offset, length, _, _, flags = fuse.IO_REQUEST.unpack_from(body)
        file = self._opened[opened]
        if offset + length > file.size:
            self._send((fuse.encode_error(unique, ENOSPC),))
            return False
        fua = nbd.CMD_FLAG_FUA if flags & fuse.O_DSYNC else 0
        payload = slot.view[:length]
        kept = int(length) > COPY_SIZE_MAX
        if kept:
            self._kept[unique] = slot
            request = Request(unique, nbd.CMD_WRITE, offset, length, payload, fua, slot.place)
        else:
            request = Request(unique, nbd.CMD_WRITE, offset, length, bytes(payload), fua)
        self._ask(file, request)
        return kept

    def _fallocate(self, unique: int, body: memoryview) -> None:
        """Punching holes and zeroing both zero every byte, and whole blocks become holes."""
        opened, offset, length, mode = fuse.FALLOCATE_REQUEST.unpack_from(body)
        file = self._opened[opened]
        if mode & ~fuse.FALLOC_KEEP_SIZE not in (fuse.FALLOC_PUNCH_HOLE, fuse.FALLOC_ZERO_RANGE):
            self._send((fuse.encode_error(unique, EOPNOTSUPP),))
            return
        end = offset + length
        if end > file.size and not mode & fuse.FALLOC_KEEP_SIZE:
            self._send((fuse.encode_error(unique, ENOSPC),))
            return
        flags = nbd.CMD_FLAG_NO_HOLE if mode & fuse.FALLOC_ZERO_RANGE else 0
        self._zero(file, unique, Zeroing(offset, min(end, file.size), flags))

    def _zero(self, file: VolumeFile, unique: int, rest: Zeroing) -> None:
        length = min(rest.end - rest.offset, ZERO_SIZE_MAX)
        if length <= 0:
            self._send((fuse.encode_error(unique, 0),))
            return
        self._zeroings[unique] = rest._replace(offset=rest.offset + length)
        self._ask(file, Request(unique, nbd.CMD_WRITE_ZEROES, rest.offset, length, flags=rest.flags))

    def _ask(self, file: VolumeFile, request: Request) -> None:
        client = file.client
        assert client is not None  # it is there while the file is open
        self._asked[request.cookie] = client
        self._size_in_flight += request.length if request.command <= nbd.CMD_WRITE else 0
        client.submit(request)

    def answered(self, request: Request, error: int, body: Buffer) -> None:
        """Reply to the kernel; see `Answered`."""
        unique, command = request.cookie, request.command
        client = self._asked.pop(unique)
        if command <= nbd.CMD_WRITE:
            self._size_in_flight -= request.length
        if (slot := self._kept.pop(unique, None)) is not None:
            self.given_back.append(slot)
        if self._interrupted and unique in self._interrupted:
            self._interrupted.discard(unique)
            return
        if error:
            self._zeroings.pop(unique, None)
            self._seeks.pop(unique, None)
            self._send((fuse.encode_error(unique, error),))
        elif command == nbd.CMD_READ:
            header = fuse.REPLY_HEADER.pack(fuse.REPLY_HEADER.size + request.length, 0, unique)
            self._send((header, body))
        elif command == nbd.CMD_WRITE:
            self._send((fuse.encode_reply(unique, fuse.U32.pack(request.length)),))
        elif command == nbd.CMD_FLUSH:
            self._send((fuse.encode_error(unique, 0),))
        elif command == nbd.CMD_WRITE_ZEROES:
            self._zeroed(client, unique)
        else:
            self._sought(unique, request.offset, decode_statuses(body))

    def _zeroed(self, client: NbdClient, unique: int) -> None:
        rest = self._zeroings.pop(unique)
        length = min(rest.end - rest.offset, ZERO_SIZE_MAX)
        if not length:
            self._send((fuse.encode_error(unique, 0),))
            return
        self._zeroings[unique] = rest._replace(offset=rest.offset + length)
        self._asked[unique] = client
        client.submit(Request(unique, nbd.CMD_WRITE_ZEROES, rest.offset, length, flags=rest.flags))

    # --- holes ------------------------------------------------------------------------------------------------

    def _seek(self, unique: int, body: memoryview) -> None:
        opened, offset, whence = fuse.SEEK_REQUEST.unpack_from(body)
        file = self._opened[opened]
        if whence not in (fuse.SEEK_DATA, fuse.SEEK_HOLE):
            self._send((fuse.encode_error(unique, EINVAL),))
            return
        self._look(unique, file, whence, offset)

    def _look(self, unique: int, file: VolumeFile, whence: int, offset: int) -> None:
        if offset >= file.size:
            self._send((fuse.encode_error(unique, ENXIO),))
            return
        if file.statuses is None:
            file.statuses = self._connections.open(file, statuses=True)
        self._seeks[unique] = (file, whence)
        self._asked[unique] = file.statuses
        length = min(file.size - offset, STATUS_SIZE_MAX)
        file.statuses.submit(Request(unique, nbd.CMD_BLOCK_STATUS, offset, length))

    def _sought(self, unique: int, offset: int, statuses: Sequence[Status]) -> None:
        file, whence = self._seeks.pop(unique)
        for status in statuses:
            if status.hole == (whence == fuse.SEEK_HOLE):
                self._send((fuse.encode_reply(unique, fuse.U64.pack(offset)),))
                return
            offset += status.length
        if offset >= file.size and whence == fuse.SEEK_HOLE:
            self._send((fuse.encode_reply(unique, fuse.U64.pack(file.size)),))
            return
        self._look(unique, file, whence, offset)

    # --- the rest ---------------------------------------------------------------------------------------------

    def _other(self, opcode: int, unique: int, node: int, body: memoryview) -> None:
        match opcode:
            case fuse.OP_OPEN:
                self._send((self._open(unique, node, body),))
            case fuse.OP_RELEASE:
                self._close(self._opened.pop(fuse.U64.unpack_from(body)[0]))
                self._send((fuse.encode_error(unique, 0),))
            case fuse.OP_INTERRUPT:
                self._interrupt(fuse.U64.unpack_from(body)[0])
            case fuse.OP_INIT:
                self._send((_greeting(unique, body),))
            case fuse.OP_DESTROY:
                self.ended = True
            case _ if opcode in _CHANGING_NAMES:
                self._send((fuse.encode_error(unique, EPERM),))
            case _ if opcode not in _UNANSWERED:
                reply = self._folder.answer(opcode, unique, node, body)
                self._send((reply if reply is not None else fuse.encode_error(unique, ENOSYS),))

    def _open(self, unique: int, node: int, body: memoryview) -> bytes:
        file = self._folder.find(node)
        flags = fuse.U32.unpack_from(body)[0]
        if file is None:
            return fuse.encode_error(unique, ENXIO)
        if file.read_only and flags & fuse.O_ACCMODE:
            return fuse.encode_error(unique, EROFS)
        if not file.openings:
            file.client = self._connections.open(file, statuses=False)
        file.openings += 1
        self._next_opened += 1
        self._opened[self._next_opened] = file
        return fuse.encode_reply(unique, fuse.OPEN_REPLY.pack(self._next_opened, _OPEN_FLAGS))

    def _close(self, file: VolumeFile) -> None:
        """Nothing is in flight for a file that is closed: the kernel waits for its replies first."""
        self._folder.closed(file)
        if file.openings:
            return
        for client in (file.client, file.statuses):
            if client is not None:
                self._connections.close(client)  # first: the daemon may still fill the slots
                client.fail(EIO)  # reads that were interrupted
        file.client = file.statuses = None

    def _interrupt(self, unique: int) -> None:
        """Somebody who waits is being killed: let him go, unless his write is on its way and could still arrive.

        A request that no daemon has is forgotten; of a read that one has, only the answer is.
        """
        client = self._asked.get(unique)
        request = client.pending.get(unique) if client is not None else None
        if client is None or request is None:
            return
        if client.abandon(unique):
            self.answered(request, EINTR, b"")
        elif request.command in (nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_BLOCK_STATUS):
            self._interrupted.add(unique)
            self._seeks.pop(unique, None)
            self._send((fuse.encode_error(unique, EINTR),))

    def _file(self, body: memoryview) -> VolumeFile:
        return self._opened[fuse.U64.unpack_from(body)[0]]


def _greeting(unique: int, body: memoryview) -> bytes:
    """Answer INIT."""
    _major, minor, readahead, flags = fuse.INIT_REQUEST.unpack_from(body)
    pages = fuse.WRITE_SIZE_MAX // 4096
    reply = fuse.INIT_REPLY.pack(
        fuse.MAJOR,
        min(fuse.MINOR, minor),
        readahead,
        flags & _INIT_FLAGS,
        BACKGROUND_MAX,
        BACKGROUND_MAX * 3 // 4,
        fuse.WRITE_SIZE_MAX,
        1,
        pages,
        0,
        0,
    )
    return fuse.encode_reply(unique, reply)

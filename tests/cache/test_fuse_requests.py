"""The FUSE front's decisions: one reply to each request, and a write's buffer is free only when it is answered."""

import errno
import struct
from collections.abc import Sequence

import pytest

from forebay_cache.engine.fuse_folder import FuseFolder, Served, VolumeFile
from forebay_cache.engine.fuse_requests import IN_FLIGHT_MAX, FuseRequests
from forebay_cache.engine.nbd_client import NbdClient, Request, State
from forebay_cache.engine.payload_slots import Place, Slot
from forebay_cache.format import fuse, nbd
from forebay_core.units import Buffer

SIZE = 1 << 20
GIB = 1 << 30


class Rig:
    """A front without kernel and daemon; `asked` is what the daemon would be."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, int, bytes]] = []
        self.closed = 0
        self.folder = FuseFolder(uid=7, gid=8)
        self.requests = FuseRequests(self.folder, self, self._send)
        self.unique = 0

    def open(self, file: VolumeFile, *, statuses: bool) -> NbdClient:
        return NbdClient(file.name, self.requests.answered, statuses=statuses)

    def close(self, client: NbdClient) -> None:
        self.closed += 1

    def _send(self, parts: Sequence[Buffer]) -> None:
        reply = b"".join(parts)
        size, error, unique = struct.unpack_from("<IiQ", reply)
        assert size == len(reply)
        self.replies.append((unique, -error, reply[16:]))

    def take(self, opcode: int, body: bytes = b"", *, node: int = 2) -> bool:
        self.unique += 2
        message = fuse.REQUEST_HEADER.pack(40 + len(body), opcode, self.unique, node, 0, 0, 0) + body
        head = bytearray(message[: fuse.PAYLOAD_OFFSET].ljust(fuse.PAYLOAD_OFFSET, b"?"))
        self.slot = Slot(memoryview(bytearray(SIZE)), Place(1, 4096))
        self.slot.view[: max(0, len(message) - len(head))] = message[len(head) :]
        return self.requests.take(head, self.slot, len(message))

    def reply(self) -> tuple[int, bytes]:
        """Return the only reply since the last one, which is to the newest request."""
        [(unique, error, body)] = self.replies
        self.replies.clear()
        assert unique == self.unique
        return error, body

    def opened(self, name: str = "disk", flags: int = 2, **served: bool) -> VolumeFile:
        file = self.folder.serve(name, Served(SIZE, **{"read_only": False, **served}))
        self.take(fuse.OP_OPEN, struct.pack("<II", flags, 0), node=file.node)
        assert self.reply()[0] == 0
        return file

    def asked(self, file: VolumeFile) -> list[Request]:
        assert file.client is not None
        return list(file.client.pending.values())

    def answer(self, file: VolumeFile, request: Request, body: bytes = b"", error: int = 0) -> None:
        assert file.client is not None
        del file.client.pending[request.cookie]
        self.requests.answered(request, error, body)


def transfer(offset: int, length: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return fuse.IO_REQUEST.pack(1, offset, length, 0, 0, flags) + payload


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_read_is_one_request_and_its_bytes_are_the_reply(rig: Rig) -> None:
    file = rig.opened()
    rig.take(fuse.OP_READ, transfer(4096, 8))
    [request] = rig.asked(file)
    assert request[1:4] == (nbd.CMD_READ, 4096, 8)
    rig.answer(file, request, b"12345678")
    assert rig.reply() == (0, b"12345678")


def test_a_read_stops_at_the_end(rig: Rig) -> None:
    file = rig.opened()
    rig.take(fuse.OP_READ, transfer(SIZE - 512, 4096))
    assert rig.asked(file)[0].length == 512
    rig.take(fuse.OP_READ, transfer(SIZE, 4096))
    assert rig.reply() == (0, b"")


def test_the_slot_of_a_large_write_is_given_back_when_it_is_answered_and_not_before(rig: Rig) -> None:
    file = rig.opened()
    assert rig.take(fuse.OP_WRITE, transfer(0, 128 * 1024, b"x" * (128 * 1024)))
    [request] = rig.asked(file)
    assert (bytes(request.payload), request.place) == (b"x" * (128 * 1024), Place(1, 4096))
    assert rig.requests.given_back == []
    rig.answer(file, request)
    assert rig.requests.given_back == [rig.slot]
    assert rig.reply() == (0, struct.pack("<II", 128 * 1024, 0))


def test_a_large_read_keeps_its_slot_for_the_bytes_and_gives_it_back_behind_the_reply(rig: Rig) -> None:
    file = rig.opened()
    assert rig.take(fuse.OP_READ, transfer(4096, 128 * 1024))
    [request] = rig.asked(file)
    assert (request.place, len(request.payload)) == (Place(1, 4096), 128 * 1024)
    rig.slot.view[: 128 * 1024] = b"y" * (128 * 1024)
    assert rig.requests.given_back == []
    rig.answer(file, request, request.payload)
    assert rig.reply() == (0, b"y" * (128 * 1024))
    assert rig.requests.given_back == [rig.slot]


def test_the_slot_of_a_read_that_was_interrupted_is_kept_until_the_daemon_answers(rig: Rig) -> None:
    file = rig.opened()
    file.client.state = State.READY
    rig.take(fuse.OP_READ, transfer(4096, 128 * 1024))
    [request] = rig.asked(file)
    slot = rig.slot
    rig.take(fuse.OP_INTERRUPT, struct.pack("<Q", request.cookie))
    assert rig.requests.given_back == []
    rig.answer(file, request, request.payload)
    assert rig.requests.given_back == [slot]


def test_a_small_write_does_not_look_into_the_slot_again(rig: Rig) -> None:
    file = rig.opened()
    assert not rig.take(fuse.OP_WRITE, transfer(0, 4096, b"x" * 4096))
    rig.slot.view[:] = bytes(SIZE)
    [request] = rig.asked(file)
    assert (request.payload, request.place) == (b"x" * 4096, None)


def test_a_write_of_a_file_opened_with_dsync_is_durable_when_it_is_answered(rig: Rig) -> None:
    file = rig.opened()
    rig.take(fuse.OP_WRITE, transfer(0, 1, b"x", fuse.O_DSYNC))
    rig.take(fuse.OP_WRITE, transfer(0, 1, b"x"))
    assert [request.flags for request in rig.asked(file)] == [nbd.CMD_FLAG_FUA, 0]


def test_a_write_beyond_the_end_is_refused(rig: Rig) -> None:
    rig.opened()
    rig.take(fuse.OP_WRITE, transfer(SIZE - 1, 2, b"xy"))
    assert rig.reply() == (errno.ENOSPC, b"")


def test_fsync_is_a_flush(rig: Rig) -> None:
    file = rig.opened()
    rig.take(fuse.OP_FSYNC, struct.pack("<QII", 1, 0, 0))
    [request] = rig.asked(file)
    assert request.command == nbd.CMD_FLUSH
    rig.answer(file, request)
    assert rig.reply() == (0, b"")


@pytest.mark.parametrize(("mode", "flags"), [(3, 0), (17, nbd.CMD_FLAG_NO_HOLE)])
def test_punching_and_zeroing_zero_every_byte_in_pieces_that_nbd_can_say(rig: Rig, mode: int, flags: int) -> None:
    file = rig.folder.serve("disk", Served(5 * GIB, False))
    rig.take(fuse.OP_OPEN, struct.pack("<II", 2, 0), node=file.node)
    rig.replies.clear()
    rig.take(fuse.OP_FALLOCATE, fuse.FALLOCATE_REQUEST.pack(1, 512, 8 * GIB, mode))
    seen = []
    while rig.asked(file):
        [request] = rig.asked(file)
        seen.append(request[1:4])
        assert request.flags == flags and not rig.replies
        rig.answer(file, request)
    zeroes = nbd.CMD_WRITE_ZEROES
    last = 4 * GIB + 512
    assert seen == [(zeroes, 512, 2 * GIB), (zeroes, 512 + 2 * GIB, 2 * GIB), (zeroes, last, 5 * GIB - last)]
    assert rig.reply() == (0, b"")


@pytest.mark.parametrize("mode", [0, 1, 8, 32])
def test_other_kinds_of_fallocate_are_refused(rig: Rig, mode: int) -> None:
    rig.opened()
    rig.take(fuse.OP_FALLOCATE, fuse.FALLOCATE_REQUEST.pack(1, 0, 4096, mode))
    assert rig.reply()[0] == errno.EOPNOTSUPP


@pytest.mark.parametrize(("whence", "found"), [(fuse.SEEK_DATA, 8192), (fuse.SEEK_HOLE, 4096)], ids=["data", "hole"])
def test_seeking_asks_on_until_it_finds(rig: Rig, whence: int, found: int) -> None:
    file = rig.opened()
    start = 4096 if whence == fuse.SEEK_DATA else 0
    rig.take(fuse.OP_LSEEK, fuse.SEEK_REQUEST.pack(1, start, whence))
    while not rig.replies:
        assert file.statuses is not None
        [request] = file.statuses.pending.values()
        del file.statuses.pending[request.cookie]
        hole = request.offset == 4096
        rig.requests.answered(request, 0, nbd.STATUS_DESCRIPTOR.pack(4096, 3 if hole else 0))
    assert rig.reply() == (0, struct.pack("<Q", found))


def test_truncating_and_new_names_are_refused(rig: Rig) -> None:
    rig.opened()
    for size, error in ((0, errno.EPERM), (SIZE, 0)):
        rig.take(fuse.OP_SETATTR, fuse.SET_ATTRIBUTES.pack(fuse.SET_SIZE, 1, size, 0, 0, 0))
        assert rig.reply()[0] == error
    for opcode in (8, 9, 10, 12, 35):
        rig.take(opcode, b"name\0", node=1)
        assert rig.reply()[0] == errno.EPERM


def test_a_snapshot_is_never_opened_for_writing(rig: Rig) -> None:
    rig.opened("disk@monday", flags=0, read_only=True)
    rig.take(fuse.OP_OPEN, struct.pack("<II", 1, 0))
    assert rig.reply()[0] == errno.EROFS


def test_names_are_those_that_are_served(rig: Rig) -> None:
    rig.folder.serve("disk", Served(SIZE, False))
    rig.folder.serve("disk@monday", Served(SIZE, True))
    rig.take(fuse.OP_READDIR, transfer(0, 4096), node=1)
    body = rig.reply()[1]
    assert body.count(b"disk") == 2 and b"disk@monday" in body
    rig.folder.release("disk")
    rig.take(fuse.OP_LOOKUP, b"disk\0", node=1)
    assert rig.reply()[0] == errno.ENOENT
    rig.take(fuse.OP_LOOKUP, b"disk@monday\0", node=1)
    assert rig.reply()[0] == 0


def test_who_is_being_killed_does_not_wait_for_a_read(rig: Rig) -> None:
    file = rig.opened()
    assert file.client is not None
    file.client.state = State.READY
    rig.take(fuse.OP_READ, transfer(0, 8))
    [request] = rig.asked(file)
    rig.take(fuse.OP_INTERRUPT, struct.pack("<Q", request.cookie))
    assert rig.replies == [(request.cookie, errno.EINTR, b"")]
    rig.answer(file, request, b"12345678")
    assert len(rig.replies) == 1


def test_an_interrupted_write_that_no_daemon_has_is_never_sent(rig: Rig) -> None:
    file = rig.opened()
    rig.take(fuse.OP_WRITE, transfer(0, 1, b"x"))
    [request] = rig.asked(file)
    rig.take(fuse.OP_INTERRUPT, struct.pack("<Q", request.cookie))
    assert rig.replies == [(request.cookie, errno.EINTR, b"")]
    assert rig.asked(file) == []


def test_no_more_is_read_while_too_much_is_in_flight(rig: Rig) -> None:
    file = rig.opened()
    for _ in range(IN_FLIGHT_MAX):
        assert not rig.requests.full
        rig.take(fuse.OP_READ, transfer(0, 8))
    assert rig.requests.full
    rig.answer(file, rig.asked(file)[0], bytes(8))
    assert not rig.requests.full


def test_the_connection_ends_with_the_last_who_closes(rig: Rig) -> None:
    file = rig.opened()
    rig.opened()
    for opened in (1, 2):
        assert rig.closed == 0
        rig.take(fuse.OP_RELEASE, struct.pack("<QIIQ", opened, 0, 0, 0))
    assert rig.closed == 1
    assert file.client is None


def test_owner_and_permissions_can_be_changed_and_are_shown(rig: Rig) -> None:
    file = rig.opened()
    valid = fuse.SET_MODE | fuse.SET_UID | fuse.SET_GID
    rig.take(fuse.OP_SETATTR, fuse.SET_ATTRIBUTES.pack(valid, 0, 0, 0o100660, 64, 105))
    attributes = fuse.ATTRIBUTES.unpack(rig.reply()[1][16:])
    assert attributes[6] == fuse.S_IFREG | 0o660
    assert attributes[8:10] == (64, 105)
    assert attributes[1] == file.size

"""Reads and writes whose bytes are in memory that the client shares, and that no memory can do harm."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import EXTENDED, SIMPLE, STRUCTURED, Client, ServerThread
from ram_volume import LateVolume, RamVolume

from forebay_cache.engine.nbd_limits import CONNECTION_BYTES_MAX
from forebay_cache.engine.nbd_negotiation import ReplyStyle
from forebay_cache.format import nbd, nbd_options
from forebay_cache.format.nbd_options import PAYLOAD_SIZE_MAX
from forebay_cache.service.shared_memory import make_memory, memory_of_peer

SIZE = 8 << 20
MEMORY_SIZE = 4 << 20
IN_MEMORY = nbd.CMD_FLAG_IN_MEMORY
ALL_STYLES = pytest.mark.parametrize("style", [SIMPLE, STRUCTURED, EXTENDED], ids=lambda style: style.name.lower())


class Shared:
    """A memory of this process, which is the client's and the server's."""

    def __init__(self, size: int = MEMORY_SIZE) -> None:
        self.number, self.view = make_memory("test", size)

    def write(self, client: Client, offset: int, place: int, length: int, flags: int = 0) -> int:
        place_bytes = nbd.PLACE.pack(place)
        return client.ask(nbd.CMD_WRITE, offset, length, flags=flags | IN_MEMORY, payload=place_bytes).error

    def read(self, client: Client, offset: int, place: int, length: int, flags: int = 0) -> int:
        """Return the error; the bytes are in the memory then."""
        client.send(self.read_request(client, offset, place, length, flags))
        return client.answer().error

    def read_request(self, client: Client, offset: int, place: int, length: int, flags: int = 0) -> bytes:
        client.request(nbd.CMD_READ)
        size = nbd.EXTENDED_REQUEST.size if client.style is EXTENDED else nbd.REQUEST.size
        # Asked for as something whose answer has no bytes: else the client would wait for them.
        raw = client.request(nbd.CMD_TRIM, offset, length, flags=flags | IN_MEMORY)
        assert len(raw) == size
        return raw[:6] + nbd.CMD_READ.to_bytes(2) + raw[8:] + nbd.PLACE.pack(place)


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    os.close(shared.number)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServerThread]:
    volumes = (
        RamVolume("vol", SIZE),
        RamVolume("frozen@monday", SIZE, read_only=True),
        RamVolume("large", 2 * PAYLOAD_SIZE_MAX),
        LateVolume("late", SIZE, delay_s=None),
    )
    with ServerThread(str(tmp_path / "s"), *volumes) as server:
        yield server


def pattern(size: int, seed: int = 1) -> bytes:
    return bytes((seed * 37 + index * 11 + (index >> 8)) & 0xFF for index in range(size))


@ALL_STYLES
def test_a_payload_is_taken_from_its_place_in_the_memory(
    served: ServerThread, shared: Shared, style: ReplyStyle
) -> None:
    with served.client().go("vol", style, memory=shared.number) as client:
        shared.view[5000 : 5000 + 70000] = pattern(70000)
        assert shared.write(client, 12345, 5000, 70000) == 0
        assert shared.write(client, 0, 5000, 0) == 0
        assert client.write(100, b"inline") == 0
        assert client.read(12345, 70000) == pattern(70000)
        assert client.read(98, 10) == b"\0\0inline\0\0"


@ALL_STYLES
def test_what_is_read_is_put_into_its_place_and_nowhere_else(
    served: ServerThread, shared: Shared, style: ReplyStyle
) -> None:
    with served.client().go("vol", style, memory=shared.number) as client:
        client.write(20480, pattern(5000))
        shared.view[:] = b"x" * MEMORY_SIZE
        assert shared.read(client, 16384, 777, 16384) == 0
        assert bytes(shared.view[777 : 777 + 16384]) == bytes(4096) + pattern(5000) + bytes(7288)
        assert bytes(shared.view[:777]) == b"x" * 777
        assert bytes(shared.view[777 + 16384 :]) == b"x" * (MEMORY_SIZE - 777 - 16384)
        assert shared.read(client, 0, 777, 0) == 0
        assert client.read(20480, 5000) == pattern(5000)


def test_many_at_once_and_cut_anywhere_arrive_in_their_order(served: ServerThread, shared: Shared) -> None:
    with served.client().go("vol", memory=shared.number) as client:
        shared.view[:] = pattern(MEMORY_SIZE)
        sent = b""
        for index in range(16):
            place = nbd.PLACE.pack(index * 4096)
            sent += client.request(nbd.CMD_WRITE, 4096 * (15 - index), 8192, flags=IN_MEMORY, payload=place)
        for at in range(0, len(sent), 7):
            client.send(sent[at : at + 7])
        assert [client.answer().error for _ in range(16)] == [0] * 16
        assert client.read(0, 8192) == bytes(shared.view[15 * 4096 : 17 * 4096])


def test_refusals_keep_the_connection_in_step(served: ServerThread, shared: Shared) -> None:
    with served.client().go("vol", memory=shared.number) as client:
        assert shared.write(client, SIZE - 1, 0, 2) == nbd.NbdError.ENOSPC
        assert shared.write(client, 0, 0, 2, flags=nbd.CMD_FLAG_DF) == nbd.NbdError.EINVAL
        assert shared.write(client, 0, 0, 2, flags=nbd.CMD_FLAG_FUA) == 0
        assert shared.read(client, SIZE - 1, 0, 2) == nbd.NbdError.EINVAL
    with served.client().go("frozen@monday", memory=shared.number) as client:
        assert shared.write(client, 0, 0, 2) == nbd.NbdError.EPERM
        assert client.read(0, 2) == bytes(2)


@pytest.mark.parametrize(
    "place, length", [(MEMORY_SIZE - 1, 2), (MEMORY_SIZE, 1), (2**64 - 1, 1), (0, MEMORY_SIZE + 1)]
)
def test_a_place_outside_of_the_memory_ends_the_connection(
    served: ServerThread, shared: Shared, place: int, length: int
) -> None:
    with served.client().go("vol", memory=shared.number) as client:
        client.send(client.request(nbd.CMD_WRITE, 0, length, flags=IN_MEMORY, payload=nbd.PLACE.pack(place)))
        assert client.at_end()


@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_WRITE])
def test_no_request_is_larger_than_one_whose_bytes_are_sent(served: ServerThread, command: int) -> None:
    shared = Shared(PAYLOAD_SIZE_MAX + 1)
    for length in (PAYLOAD_SIZE_MAX, PAYLOAD_SIZE_MAX + 1):
        with served.client().go("large", memory=shared.number) as client:
            # Of a read we don't tell the client: else it would wait for the bytes.
            raw = client.request(nbd.CMD_WRITE, 0, length, flags=IN_MEMORY, payload=nbd.PLACE.pack(0))
            client.send(raw[:6] + command.to_bytes(2) + raw[8:])
            if length > PAYLOAD_SIZE_MAX:
                assert client.at_end()
            else:
                assert client.answer().error == 0
    os.close(shared.number)


def test_only_reads_and_writes_may_use_the_memory(served: ServerThread, shared: Shared) -> None:
    with served.client().go("vol", memory=shared.number) as client:
        client.send(client.request(nbd.CMD_TRIM, 0, 4096, flags=IN_MEMORY, payload=nbd.PLACE.pack(0)))
        assert client.at_end()


def test_without_a_memory_the_flag_is_unknown(served: ServerThread) -> None:
    with served.client().go("vol") as client:
        assert client.ask(nbd.CMD_WRITE, 0, 8, flags=IN_MEMORY, payload=bytes(8)).error == nbd.NbdError.EINVAL
        assert client.write(0, b"in step") == 0


def test_a_client_that_leaves_while_its_payload_is_used_harms_nobody(served: ServerThread, shared: Shared) -> None:
    late = served.exports.volumes["late"]
    assert isinstance(late, LateVolume)
    with served.client().go("late", memory=shared.number) as client:
        shared.view[:4096] = pattern(4096)
        client.send(client.request(nbd.CMD_WRITE, 0, 4096, flags=IN_MEMORY, payload=nbd.PLACE.pack(0)))
        served.until(lambda: len(late.parked) == 1)
    served.call(late.release)
    written: list[bytes] = []
    served.call(
        lambda: RamVolume.read(late, 0, 4096, lambda _error, chunks: written.append(bytes(chunks[0].buffer or b"")))
    )
    assert written == [pattern(4096)]


def test_what_a_client_that_was_given_up_had_asked_for_is_not_put_into_its_memory(
    served: ServerThread, shared: Shared
) -> None:
    late = served.exports.volumes["late"]
    assert isinstance(late, LateVolume)
    with served.client().go("late", memory=shared.number) as client:
        client.send(shared.read_request(client, 0, 0, 4096))
        served.until(lambda: len(late.parked) == 1)
        shared.view[:4096] = b"x" * 4096
        served.run(lambda: served.server.close_export("late", grace_s=0))
        assert client.answer().error == nbd.NbdError.ESHUTDOWN
        served.call(late.release)
    assert bytes(shared.view[:4096]) == b"x" * 4096


@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_WRITE])
def test_requests_in_memory_wait_for_budget_as_others_do(served: ServerThread, shared: Shared, command: int) -> None:
    late = served.exports.volumes["late"]
    assert isinstance(late, LateVolume)
    at_once = CONNECTION_BYTES_MAX // MEMORY_SIZE
    with served.client().go("late", memory=shared.number) as client:
        raw = [client.request(nbd.CMD_WRITE, 0, MEMORY_SIZE, flags=IN_MEMORY) for _ in range(at_once + 3)]
        client.send(b"".join(one[:6] + command.to_bytes(2) + one[8:] + nbd.PLACE.pack(0) for one in raw))
        for expected in (at_once, 3):
            served.until(lambda expected=expected: len(late.parked) == expected)
            served.call(late.release)
            assert [client.answer().error for _ in range(expected)] == [0] * expected


def sealed(number: int, seals: int) -> int:
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


def memfd(size: int) -> int:
    number = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(number, size)
    return number


@pytest.mark.parametrize("kind", ["unsealed", "empty", "file", "closed", "too large", "another"])
def test_memory_that_could_end_the_server_is_refused(kind: str, tmp_path: Path, served: ServerThread) -> None:
    if kind == "file":
        number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(number, 1 << 20)
    else:
        number = memfd({"empty": 0, "too large": (1 << 30) + 1}.get(kind, 1 << 20))
        if kind != "unsealed":
            sealed(number, fcntl.F_SEAL_SHRINK)
    inode = os.fstat(number).st_ino + (kind == "another")
    if kind == "closed":
        os.close(number)
    with served.client() as client:
        client.greet()
        for payload in (nbd_options.MEMORY.pack(number, inode), b"", bytes(4)):
            [reply] = client.option(nbd_options.OPT_MEMORY, payload)
            assert reply.type == (nbd_options.REP_ERR_POLICY if len(payload) > 4 else nbd_options.REP_ERR_INVALID)
    if kind != "closed":
        os.close(number)


def test_memory_of_another_user_or_behind_another_kind_of_socket_is_none(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    inode = os.fstat(shared.number).st_ino
    with ours, theirs, socket.socket(socket.AF_INET) as other:
        assert memory_of_peer(ours, shared.number, inode) is not None
        assert memory_of_peer(other, shared.number, inode) is None
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert memory_of_peer(ours, shared.number, inode) is None

"""Clients that break the rules, vanish, flood or fall silent: each hurts nobody but itself.

These are the classes of past vulnerabilities that the contract names; each is played over a real socket.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import EXTENDED, STRUCTURED, Client, ServerThread, context_query, export_query, option_bytes
from ram_volume import LateVolume, RamVolume

from forebay_cache.engine.front import IoError
from forebay_cache.engine.nbd_limits import BUDGET_SIZE, CONNECTION_BYTES_MAX, FLOOR, IN_FLIGHT_MAX, RECEIVE_SIZE
from forebay_cache.format import nbd, nbd_options
from forebay_cache.service.nbd_server import NbdSettings
from forebay_core.units import MIB

SIZE = 64 * MIB


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServerThread]:
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE)) as server:
        yield server


def assert_serves(server: ServerThread) -> None:
    with server.client().go("vol") as client:
        assert client.write(0, b"alive") == 0
        assert client.read(0, 5) == b"alive"


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 3) + b"NOTMAGIC" + bytes(8),
        struct.pack(">I", 3) + nbd_options.OPTION.pack(nbd_options.OPTION_MAGIC, 7, 0xFFFFFFFF),
        struct.pack(">I", 3) + option_bytes(nbd_options.OPT_EXPORT_NAME, b"nothing"),
        struct.pack(">I", 3) + option_bytes(nbd_options.OPT_EXPORT_NAME, b"vol\0"),
        struct.pack(">I", 3) + option_bytes(nbd_options.OPT_EXPORT_NAME, b"\xff"),
        struct.pack(">I", 3) + nbd_options.OPTION.pack(nbd_options.OPTION_MAGIC, 1, 4097),
    ],
)
def test_nonsense_in_the_handshake_ends_that_connection_only(served: ServerThread, raw: bytes) -> None:
    with served.client().go("vol") as bystander, served.client() as client:
        client.take(18)
        client.send(raw)
        assert client.at_end()
        assert bystander.read(0, 1) == b"\0"
    assert_serves(served)


@pytest.mark.parametrize("magic", [0, 0x25609514, nbd.EXTENDED_REQUEST_MAGIC])
def test_a_bad_request_magic_ends_that_connection_only(served: ServerThread, magic: int) -> None:
    with served.client().go("vol") as bystander, served.client().go("vol") as client:
        client.send(nbd.REQUEST.pack(magic, 0, nbd.CMD_READ, 1, 0, 512))
        assert client.at_end()
        assert bystander.read(0, 1) == b"\0"


@pytest.mark.parametrize("length", [(32 << 20) + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
def test_an_absurd_payload_ends_that_connection_only(served: ServerThread, style: object, length: int) -> None:
    with served.client().go("vol", style) as client:  # type: ignore[arg-type]
        client.send(client.request(nbd.CMD_WRITE, 0, length))
        assert client.at_end()
    assert_serves(served)


def test_an_absurd_payload_of_any_command_ends_the_connection(served: ServerThread) -> None:
    with served.client().go("vol", EXTENDED) as client:
        client.send(client.request(nbd.CMD_TRIM, 0, 1 << 62, flags=nbd.CMD_FLAG_PAYLOAD_LEN))
        assert client.at_end()


def test_announced_lengths_cost_no_memory(served: ServerThread) -> None:
    """Two hundred clients announce 32 MiB each and send nothing of it."""
    clients = [served.client().go("vol") for _ in range(200)]
    before = resident_bytes()
    for client in clients:
        client.send(client.request(nbd.CMD_WRITE, 0, 32 << 20))
    assert_serves(served)
    assert resident_bytes() - before < 64 * MIB
    for client in clients:
        client.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_option_floods_end(served: ServerThread) -> None:
    with served.client() as client:
        client.greet()
        try:
            for _ in range(100):
                client.send(option_bytes(nbd_options.OPT_LIST) * 100)
            assert_ends(client)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert_serves(served)


def assert_ends(client: Client) -> None:
    try:
        while client.socket.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass


def test_a_client_that_lists_without_reading_is_held_up_and_others_are_served(tmp_path: Path) -> None:
    volumes = [RamVolume(f"volume-{index:04}", 4096) for index in range(1000)]
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", 4096), *volumes) as server, server.client() as client:
        client.greet()
        client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.send(option_bytes(nbd_options.OPT_LIST) * 60000)
        assert_serves(server)


def test_silent_clients_are_dropped_after_the_time_limit(tmp_path: Path) -> None:
    settings = NbdSettings(handshake_timeout_s=0.1)
    with (
        ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server,
        server.client().go("vol") as patient,
        server.client() as silent,
        server.client() as slow,
    ):
        slow.greet()
        slow.send(option_bytes(nbd_options.OPT_LIST)[:5])
        assert silent.take(18)
        assert silent.at_end()
        assert slow.at_end()
        time.sleep(0.15)
        assert patient.read(0, 1) == b"\0"


def test_many_silent_clients_stop_nobody(tmp_path: Path) -> None:
    settings = NbdSettings(negotiating_max=16, connections_max=40)
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server:
        silent = [server.client() for _ in range(100)]
        assert_serves(server)
        assert server.call(lambda: len(server.server._negotiating)) <= 16
        for client in silent:
            client.close()


def test_connections_above_the_limit_are_turned_away(tmp_path: Path) -> None:
    settings = NbdSettings(connections_max=3)
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server:
        clients = [server.client().go("vol") for _ in range(3)]
        with server.client() as fourth:
            assert fourth.at_end()
        clients.pop().close()
        server.until(lambda: server.server.connection_count("vol") == 2)
        assert_serves(server)
        for client in clients:
            client.close()


def test_half_a_write_applies_nothing(served: ServerThread) -> None:
    for sent in (1, 27, 28, 29, 4096, 299_999):
        client = served.client().go("vol")
        raw = client.request(nbd.CMD_WRITE, 8192, 300_000, payload=b"\xee" * 300_000)
        client.send(raw[:sent])
        client.close()
    served.until(lambda: served.server.connection_count("vol") == 0)
    with served.client().go("vol") as client:
        assert client.ask(nbd.CMD_BLOCK_STATUS, 0, SIZE).extents == [(SIZE, 3)]


def test_a_client_may_vanish_with_requests_in_flight(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server:
        client = server.client().go("vol")
        client.send(b"".join(client.request(nbd.CMD_READ, n * 4096, 65536) for n in range(100)))
        client.send(b"".join(client.request(nbd.CMD_WRITE, n * 4096, 4096, payload=bytes(4096)) for n in range(100)))
        client.send(client.request(nbd.CMD_FLUSH) + client.request(nbd.CMD_BLOCK_STATUS, 0, SIZE))
        server.until(lambda: len(volume.parked) == 202)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        other = server.client().go("vol")
        assert server.call(volume.release) == 202
        server.until(lambda: server.server.connection_count("vol") == 1)
        assert volume.clients == 1
        other.send(other.request(nbd.CMD_READ, 0, 4096))
        server.until(lambda: len(volume.parked) == 1)
        server.call(volume.release)
        assert other.answer().error == 0
        other.close()
        server.until(lambda: len(server.server._connections) == 0)
        assert server.call(lambda: server.server._budget.free) == BUDGET_SIZE


def test_disconnecting_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        client.send(client.request(nbd.CMD_WRITE, 0, 5, payload=b"hello"))
        client.send(client.request(nbd.CMD_FLUSH))
        client.send(client.request(nbd.CMD_DISC) + b"nothing behind it is read")
        server.until(lambda: len(volume.parked) == 2)
        server.call(volume.release)
        assert client.answer().error == 0
        assert client.answer().error == 0
        assert client.at_end()
        assert volume.memory[:5] == b"hello"


def test_a_client_that_says_goodbye_without_reading_is_dropped_after_a_while(tmp_path: Path) -> None:
    settings = NbdSettings(linger_timeout_s=0.05)
    volume = RamVolume("vol", SIZE)
    with (
        ServerThread(str(tmp_path / "s"), volume, settings=settings) as server,
        server.client().go("vol") as client,
    ):
        client.write(0, b"x" * (8 << 20))
        client.send(client.request(nbd.CMD_READ, 0, 8 << 20) + client.request(nbd.CMD_DISC))
        server.until(lambda: len(server.server._connections) == 0)
        assert volume.clients == 0


def test_a_client_that_only_closes_its_sending_side_gets_its_answers(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=0.01)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        client.send(b"".join(client.request(nbd.CMD_READ, 0, 4096) for _ in range(50)))
        client.socket.shutdown(socket.SHUT_WR)
        assert sum(client.answer().error for _ in range(50)) == 0
        assert client.at_end()


def test_a_client_that_never_reads_is_read_no_more_and_others_are_served(served: ServerThread) -> None:
    with served.client().go("vol") as greedy, served.client().go("vol") as other:
        other.write(0, b"x" * MIB)
        greedy.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                greedy.send(b"".join(greedy.request(nbd.CMD_READ, 0, MIB) for _ in range(1000)))
        held = served.call(lambda: max(c._account.held for c in served.server._connections))
        assert MIB < held <= CONNECTION_BYTES_MAX
        assert other.read(0, 3) == b"xxx"
    served.until(lambda: len(served.server._connections) == 0)
    assert served.call(lambda: served.server._budget.free) == BUDGET_SIZE


def test_small_requests_without_reading_are_bounded_too(served: ServerThread) -> None:
    with served.client().go("vol") as greedy:
        greedy.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                greedy.send(greedy.request(nbd.CMD_FLUSH) * 4000)
        assert_serves(served)


def test_a_client_that_reads_late_still_gets_everything(served: ServerThread) -> None:
    with served.client().go("vol") as client:
        client.write(0, bytes(range(256)) * 4096)
        client.send(b"".join(client.request(nbd.CMD_READ, n * 5, MIB - n * 5) for n in range(100)))
        memory = bytes(range(256)) * 4096
        for n in range(100):
            assert client.answer().bytes_at(n * 5, MIB - n * 5) == memory[n * 5 :]
        assert client.read(3, 5) == memory[3:8]


def test_requests_in_flight_are_bounded(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        client.send(client.request(nbd.CMD_FLUSH) * (IN_FLIGHT_MAX + 500))
        server.until(lambda: len(volume.parked) == IN_FLIGHT_MAX)
        server.call(lambda: None)
        assert len(volume.parked) == IN_FLIGHT_MAX
        server.call(volume.release)
        server.until(lambda: len(volume.parked) == 500)
        server.call(volume.release)
        assert sum(client.answer().error for _ in range(IN_FLIGHT_MAX + 500)) == 0


def test_small_writes_in_flight_share_buffers(tmp_path: Path) -> None:
    """Each arrives alone and stays in flight: they must not pin a buffer each."""
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        for number in range(200):
            client.send(client.request(nbd.CMD_WRITE, number * 512, 512, payload=bytes(512)))
            server.until(lambda number=number: len(volume.parked) == number + 1)
        [connection] = server.call(lambda: list(server.server._connections))
        assert len({id(reply.args[3]) for reply in connection._transmission._open.values()}) == 1
        server.call(volume.release)
        assert sum(client.answer().error for _ in range(200)) == 0


def test_failed_reads_hold_nothing(served: ServerThread) -> None:
    with served.client().go("vol") as client:
        served.exports.volumes["vol"].failure = IoError.IO
        for _ in range(200):
            assert client.ask(nbd.CMD_READ, 0, MIB).error == 5
        assert served.call(lambda: [c._account.held for c in served.server._connections]) == [0]
        served.exports.volumes["vol"].failure = IoError.OK


def test_a_budget_goes_back_when_it_is_not_used_any_more(tmp_path: Path) -> None:
    settings = NbdSettings(budget_bytes=CONNECTION_BYTES_MAX + 15 * MIB)
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server:
        clients = [server.client().go("vol") for _ in range(6)]
        for client in clients:
            assert client.write(0, bytes(32 << 20)) == 0
        server.until(lambda: server.server._budget.free == CONNECTION_BYTES_MAX + 15 * MIB)
        for client in clients:
            client.close()


def test_payloads_stay_unchanged_until_the_volume_has_them(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=0.02)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        for size in (300, 4096, 60_000, 200_000, 700_000, 3 << 20):
            count = min(400, (24 << 20) // size)
            payloads = [bytes([n & 0xFF, n >> 8]) * (size // 2) for n in range(count)]
            client.send(
                b"".join(client.request(nbd.CMD_WRITE, n * size, size, payload=p) for n, p in enumerate(payloads))
            )
            assert sum(client.answer().error for _ in range(count)) == 0
            assert volume.memory[: count * size] == b"".join(payloads)


@pytest.mark.parametrize("size", [196_000, 197_000, 200_000, RECEIVE_SIZE - 28, RECEIVE_SIZE - 27, 900_000])
def test_a_write_may_arrive_in_parts_cut_anywhere(size: int, served: ServerThread) -> None:
    """Most of all close to its end, where a buffer of just its size has hardly any room left."""
    payload = bytes(range(256)) * (size // 256 + 1)
    with served.client().go("vol") as client:
        for ahead in (0, 100):  # bytes of payload of a request before it in the same buffer
            for missing in (1, 2, 28, 4000, 60_000, 66_000, 70_000):
                first = client.request(nbd.CMD_WRITE, 0, ahead, payload=payload[:ahead]) if ahead else b""
                raw = first + client.request(nbd.CMD_WRITE, 3 * MIB, size, payload=payload[-size:])
                client.send(raw[:-missing])
                if ahead:
                    assert client.answer().error == 0
                [connection] = served.call(lambda: list(served.server._connections))
                held = len(raw) - len(first) - missing
                served.until(lambda one=connection, held=held: one._end - one._start == held)
                client.send(raw[-missing:])
                assert client.answer().error == 0
                assert client.read(3 * MIB, size) == payload[-size:]
                client.write(3 * MIB, bytes(size))


def half_write(server: ServerThread, clients: list[Client]) -> None:
    """Begin a write of 32 MiB and let the server see how large it is, so that it asks for the budget."""
    before = server.call(lambda: sum(c._received for c in server.server._connections))
    for client in clients:
        client.send(client.request(nbd.CMD_WRITE, 0, 32 << 20, payload=bytes(1000)))
    seen = before + len(clients) * (nbd.REQUEST.size + 1000)
    server.until(lambda: sum(c._received for c in server.server._connections) == seen)
    for client in clients:
        client.send(b"x")


def test_clients_that_hog_the_budget_and_stall_are_dropped_for_those_who_wait(tmp_path: Path) -> None:
    settings = NbdSettings(stall_timeout_s=0.2, budget_bytes=CONNECTION_BYTES_MAX + 15 * MIB)
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server:
        hogs = [server.client().go("vol") for _ in range(3)]
        half_write(server, hogs)
        with server.client().go("vol") as small, server.client().go("vol") as large:
            for _ in range(50):  # within its floor nobody waits
                assert small.write(0, bytes(100_000)) == 0
                assert len(small.read(0, FLOOR // 2)) == FLOOR // 2
            assert large.write(0, bytes(30 << 20)) == 0
        for hog in hogs:
            hog.close()


def trickle(clients: list[Client], ended: threading.Event) -> None:
    """Send a byte of each client's write now and then, as long as the server takes it."""
    while not ended.wait(0.02):
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(b"x")


def test_clients_that_trickle_a_large_write_are_dropped_for_those_who_wait(tmp_path: Path) -> None:
    settings = NbdSettings(stall_timeout_s=0.3, budget_bytes=CONNECTION_BYTES_MAX + 15 * MIB)
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server:
        hogs = [server.client().go("vol") for _ in range(3)]
        half_write(server, hogs)
        server.until(lambda: server.server._budget.contended)
        ended = threading.Event()
        thread = threading.Thread(target=trickle, args=(hogs, ended))
        thread.start()
        try:
            with server.client().go("vol") as large:
                assert large.write(0, bytes(30 << 20)) == 0
        finally:
            ended.set()
            thread.join()
        for hog in hogs:
            hog.close()


def test_clients_that_trickle_out_large_replies_are_dropped_for_those_who_wait(tmp_path: Path) -> None:
    settings = NbdSettings(stall_timeout_s=0.3, budget_bytes=CONNECTION_BYTES_MAX + 15 * MIB)
    volume = RamVolume("vol", SIZE)
    volume.written[:] = b"\1" * len(volume.written)
    with (
        ServerThread(str(tmp_path / "s"), volume, settings=settings) as server,
        server.client().go("vol") as hog,
        server.client().go("vol") as large,
    ):
        hog.send(hog.request(nbd.CMD_READ, 0, 32 << 20) * 2)
        hog.take(1000)
        assert held_most(server) == 64 * MIB
        half_write(server, [large])
        server.until(lambda: server.server._budget.contended)
        while server.server._budget.contended:
            hog.take(1)
            time.sleep(0.005)
        large.send(bytes((32 << 20) - 1001))
        assert large.answer().error == 0
        with pytest.raises((EOFError, ConnectionResetError)):
            hog.take(64 << 20)


def held_most(server: ServerThread) -> int:
    return server.call(lambda: max(c._account.held for c in server.server._connections))


def test_half_writers_of_one_volume_do_not_keep_another_volume_waiting(tmp_path: Path) -> None:
    volumes = RamVolume("vol", SIZE), RamVolume("other", SIZE)
    with ServerThread(str(tmp_path / "s"), *volumes) as server:  # nobody is dropped within the test's time
        hogs = [server.client().go("vol") for _ in range(20)]
        half_write(server, hogs)
        server.until(lambda: server.server._budget.contended)
        with server.client().go("other") as other:
            for _ in range(3):
                assert other.write(0, bytes(32 << 20)) == 0
        for hog in hogs:
            hog.close()


def test_stalled_clients_are_left_alone_while_nobody_waits(tmp_path: Path) -> None:
    settings = NbdSettings(stall_timeout_s=0.05)
    with (
        ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings) as server,
        server.client().go("vol") as client,
    ):
        raw = client.request(nbd.CMD_WRITE, 0, 8 << 20, payload=b"\x77" * (8 << 20))
        client.send(raw[:5_000_000])
        time.sleep(0.2)
        client.send(raw[5_000_000:])
        assert client.answer().error == 0


def test_sixty_four_clients_at_once_all_get_served(served: ServerThread) -> None:
    clients = [served.client().go("vol") for _ in range(64)]
    for number, client in enumerate(clients):
        client.send(client.request(nbd.CMD_WRITE, number * 4096, 4096, payload=bytes([number]) * 4096) * 20)
    for number, client in enumerate(clients):
        assert sum(client.answer().error for _ in range(20)) == 0
        assert client.read(number * 4096, 4096) == bytes([number]) * 4096
    assert served.call(lambda: served.server.connection_count("vol")) == 64
    for client in clients:
        client.close()


def test_nothing_sent_behind_a_refused_starttls_is_lost_or_trusted(served: ServerThread) -> None:
    """Without TLS there is no protected part: what follows is simply the next option."""
    with served.client() as client:
        client.greet()
        client.send(option_bytes(nbd_options.OPT_STARTTLS) + option_bytes(nbd_options.OPT_STRUCTURED_REPLY))
        assert client.option_replies(nbd_options.OPT_STARTTLS)[0].type == nbd_options.REP_ERR_UNSUP
        assert client.option_replies(nbd_options.OPT_STRUCTURED_REPLY)[0].type == nbd_options.REP_ACK


def test_a_whole_conversation_in_one_segment_is_understood(served: ServerThread) -> None:
    with served.client() as client:
        client.style = STRUCTURED
        client.send(
            struct.pack(">I", 3)
            + option_bytes(nbd_options.OPT_STRUCTURED_REPLY)
            + option_bytes(nbd_options.OPT_SET_META_CONTEXT, context_query("vol", "base:allocation"))
            + option_bytes(nbd_options.OPT_GO, export_query("vol"))
            + client.request(nbd.CMD_WRITE, 0, 3, payload=b"abc")
            + client.request(nbd.CMD_READ, 0, 3)
            + client.request(nbd.CMD_DISC)
        )
        client.take(18)
        for option in (
            nbd_options.OPT_STRUCTURED_REPLY,
            nbd_options.OPT_SET_META_CONTEXT,
            nbd_options.OPT_GO,
        ):
            assert client.option_replies(option)[-1].type == nbd_options.REP_ACK
        assert client.answer().error == 0
        assert client.answer().bytes_at(0, 3) == b"abc"
        assert client.at_end()

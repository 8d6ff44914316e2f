"""Where the server listens, how it stops, how one export is closed under its clients."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_client import EXTENDED, STRUCTURED, Client, ServerThread
from ram_volume import LateVolume, RamExports, RamVolume

from forebay_cache.format import nbd
from forebay_cache.service.nbd_listeners import inherited_listeners
from forebay_cache.service.nbd_server import NbdServer, NbdSettings
from forebay_core.errors import ForebayError, InUseError, WrongUsageError

SIZE = 1 << 20
ESHUTDOWN = 108


def test_the_socket_is_for_its_owner_unless_told_otherwise(tmp_path: Path) -> None:
    for settings, mode in ((None, 0o600), (NbdSettings(socket_group=os.getgid()), 0o660)):
        with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE), settings=settings):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert not (tmp_path / "s").exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with ServerThread(path, RamVolume("vol", SIZE)) as server, server.client().go() as client:
        assert client.size == SIZE


def test_a_living_socket_or_another_file_is_left_alone(tmp_path: Path) -> None:
    async def listen(path: Path) -> None:
        server = NbdServer(RamExports())
        try:
            await server.listen_unix(str(path))
        finally:
            await server.close()

    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE)) as server:
        with pytest.raises(InUseError):
            asyncio.run(listen(tmp_path / "s"))
        with server.client().go() as client:
            assert client.size == SIZE
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ForebayError, match="not a socket"):
        asyncio.run(listen(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    for path in (tmp_path / "nowhere" / "s", tmp_path / ("x" * 200)):
        with pytest.raises(ForebayError):
            asyncio.run(listen(path))


def test_a_socket_that_another_server_put_there_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ServerThread(str(path), RamVolume("vol", SIZE)):
        path.unlink()
        path.write_text("not ours")
    assert path.read_text() == "not ours"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_tcp_is_served_on_loopback_without_delay(tmp_path: Path, host: str) -> None:
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE)) as server:
        try:
            port = server.run(lambda: server.server.listen_tcp(host, 0))
        except ForebayError as error:
            pytest.skip(f"no {host} here: {error}")
        with socket.create_connection((host, port)) as sock, Client(sock).go("vol", STRUCTURED) as client:
            assert client.write(1, b"over tcp") == 0
            assert client.read(1, 8) == b"over tcp"
            [connection] = server.call(lambda: list(server.server._connections))
            assert connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_other_addresses_need_a_word(tmp_path: Path) -> None:
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", SIZE)) as server:
        for host in ("0.0.0.0", "::", "192.0.2.1"):
            with pytest.raises(WrongUsageError, match="loopback"):
                server.run(lambda host=host: server.server.listen_tcp(host, 0))
        port = server.run(lambda: server.server.listen_tcp("0.0.0.0", 0, allow_remote=True))
        with socket.create_connection(("127.0.0.1", port)) as sock, Client(sock).go("vol") as client:
            assert client.size == SIZE
        with pytest.raises(ForebayError):
            server.run(lambda: server.server.listen_tcp("127.0.0.1", port))
        with pytest.raises(ForebayError):
            server.run(lambda: server.server.listen_tcp("no.such.host.invalid", 1))


def test_inherited_sockets_are_served(tmp_path: Path) -> None:
    """As systemd does it: the listener is descriptor 3, LISTEN_PID the pid after exec."""
    path = str(tmp_path / "inherited")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        script = (
            "import os,sys;os.dup2(int(sys.argv[1]),3);os.environ.update(LISTEN_PID=str(os.getpid()),LISTEN_FDS='1');"
            "os.execv(sys.executable,[sys.executable,*sys.argv[2:]])"
        )
        serve = str(Path(__file__).with_name("serve_ram.py"))
        command = [sys.executable, "-c", script, str(listener.fileno()), serve, "unused", f"vol={SIZE}"]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            with Client.unix(path).go("vol") as client:
                assert client.write(0, b"activated") == 0
        finally:
            server.terminate()
            assert server.wait(20) == 0
            server.communicate()


def test_listen_variables_for_another_process_are_ignored_and_bad_ones_refused() -> None:
    assert inherited_listeners({}, 1, allow_remote=False) == []
    assert inherited_listeners({"LISTEN_FDS": "1", "LISTEN_PID": "2"}, 1, allow_remote=False) == []
    for count in ("0", "-1", "x", "", "65", "99999999999"):
        with pytest.raises(WrongUsageError):
            inherited_listeners({"LISTEN_FDS": count, "LISTEN_PID": "1"}, 1, allow_remote=False)
    environment = {"LISTEN_FDS": "x", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a", "OTHER": "stays"}
    with pytest.raises(WrongUsageError):
        inherited_listeners(environment, 1, allow_remote=False)
    assert environment == {"OTHER": "stays"}


def tcp(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen()
    return listener


def udp() -> socket.socket:
    listener = socket.socket(type=socket.SOCK_DGRAM)
    listener.bind(("127.0.0.1", 0))
    return listener


INHERITED: dict[str, tuple[Callable[[], socket.socket], bool, str]] = {
    "TCP on loopback": (lambda: tcp("127.0.0.1"), False, "1"),
    "TCP on loopback of IPv6": (lambda: tcp("::1"), False, "1"),
    "TCP beyond loopback": (lambda: tcp("0.0.0.0"), False, "descriptor 3 listens on 0.0.0.0 port"),
    "TCP beyond loopback of IPv6": (lambda: tcp("::"), False, "descriptor 3 listens on :: port"),
    "TCP beyond loopback where that is allowed": (lambda: tcp("0.0.0.0"), True, "1"),
    "UDP": (udp, True, "descriptor 3 is no Unix or TCP socket that listens"),
    "a Unix socket that does not listen": (lambda: socket.socket(socket.AF_UNIX), True, "descriptor 3 is no Unix"),
}


@pytest.mark.parametrize("name", INHERITED)
def test_only_sockets_that_clients_may_connect_to_are_inherited(name: str) -> None:
    make, allow_remote, expected = INHERITED[name]
    script = (
        "import os,sys;from forebay_cache.service.nbd_listeners import inherited_listeners as take\n"
        "os.dup2(int(sys.argv[1]),3)\n"
        "try: found=take({'LISTEN_FDS':'1','LISTEN_PID':'1'},1,allow_remote=sys.argv[2]=='True'); print(len(found))\n"
        "except Exception as error: print(type(error).__name__,error)"
    )
    with make() as listener:
        fd = listener.fileno()
        words = [sys.executable, "-c", script, str(fd), str(allow_remote)]
        told = subprocess.run(words, pass_fds=[fd], capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.count("\n") == 1 and expected in told
    assert told == "1\n" or told.startswith("WrongUsageError LISTEN_FDS=1: ")


def test_stopping_finishes_what_is_in_flight_and_refuses_the_rest(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol", EXTENDED) as client:
        client.send(client.request(nbd.CMD_WRITE, 0, 4, payload=b"kept"))
        server.until(lambda: len(volume.parked) == 1)
        closing = asyncio.run_coroutine_threadsafe(server.server.close(10), server.loop)
        server.until(lambda: server.server._closing)
        late = client.ask(nbd.CMD_WRITE, 8, 4, payload=b"late")
        assert (late.error, late.text) == (ESHUTDOWN, "the server is stopping")
        assert client.ask(nbd.CMD_FLUSH).error == ESHUTDOWN
        server.call(volume.release)
        assert client.answer().error == 0
        assert client.at_end()
        closing.result(10)
        assert volume.memory[:12] == b"kept" + bytes(8)
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            server.client()


def test_what_cannot_be_finished_is_answered_eshutdown(tmp_path: Path) -> None:
    volume = LateVolume("vol", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        client.send(client.request(nbd.CMD_READ, 0, 4096) + client.request(nbd.CMD_FLUSH))
        server.until(lambda: len(volume.parked) == 2)
        server.run(lambda: server.server.close(0.05))
        assert [client.answer().error for _ in range(2)] == [ESHUTDOWN, ESHUTDOWN]
        assert client.at_end()
        assert server.call(volume.release) == 2
        server.until(lambda: len(server.server._connections) == 0)


def test_closing_an_export_disconnects_its_clients_only(tmp_path: Path) -> None:
    late = LateVolume("late", SIZE, delay_s=None)
    with ServerThread(str(tmp_path / "s"), late, RamVolume("other", SIZE)) as server:
        idle, busy, other = (server.client().go(name) for name in ("late", "late", "other"))
        busy.send(busy.request(nbd.CMD_WRITE, 0, 4, payload=b"done"))
        server.until(lambda: len(late.parked) == 1)
        assert server.call(lambda: server.server.connection_count("late")) == 2
        closing = asyncio.run_coroutine_threadsafe(server.server.close_export("late"), server.loop)
        assert idle.at_end()
        server.call(late.release)
        assert busy.answer().error == 0
        assert busy.at_end()
        closing.result(10)
        assert late.clients == 0
        assert server.call(lambda: server.server.connection_count("late")) == 0
        assert other.read(0, 4) == bytes(4)
        for client in (idle, busy, other):
            client.close()
        server.run(lambda: server.server.close_export("nobody"))


def test_the_volume_hears_of_clients_coming_and_going(tmp_path: Path) -> None:
    volume = RamVolume("vol", SIZE)
    with ServerThread(str(tmp_path / "s"), volume) as server:
        with server.client().go("vol") as one, server.client().go("vol") as two:
            assert one.read(0, 1) + two.read(0, 1) == b"\0\0"
            assert volume.clients == 2
            one.send(one.request(nbd.CMD_DISC))
            assert one.at_end()
            server.until(lambda: volume.clients == 1)
        server.until(lambda: volume.clients == 0)


def test_an_idle_connection_holds_no_buffer(tmp_path: Path) -> None:
    with ServerThread(str(tmp_path / "s"), RamVolume("vol", 4 << 20)) as server:
        clients = [server.client().go("vol") for _ in range(8)]
        for client in clients:
            assert client.write(0, bytes(2 << 20)) == 0
        buffers = server.call(lambda: [c._buffer for c in server.server._connections])
        assert buffers == [None] * 8
        for client in clients:
            client.close()


def test_no_descriptor_left_is_survived(tmp_path: Path) -> None:
    """A child with few descriptors: clients above the limit wait or are dropped, then service goes on."""
    path = str(tmp_path / "s")
    serve = str(Path(__file__).with_name("serve_ram.py"))
    limit = (
        "import resource,os,sys;resource.setrlimit(resource.RLIMIT_NOFILE,(24,24));"
        "os.execv(sys.executable,sys.argv[1:])"
    )
    command = [sys.executable, "-c", limit, sys.executable, serve, path, f"vol={SIZE}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        silent = [Client.unix(path) for _ in range(40)]
        with Client.unix(path).go("vol") as client:
            assert client.write(0, b"alive") == 0
        for waiting in silent:
            waiting.close()
    finally:
        server.terminate()
        assert server.wait(20) == 0
        server.communicate()

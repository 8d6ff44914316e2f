"""A daemon that is a service has its NBD socket kept while it is away: who connects then waits for the next start."""

import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from servers import Cache
from service_manager import ServiceManager

GREETING = b"NBDMAGIC"
TIMEOUT_S = 30.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Cache]:
    """A cache daemon under a service manager; its store is never there."""
    with ExitStack() as stack:
        manager = ServiceManager(tmp_path)
        stack.callback(manager.close)
        cache = Cache(tmp_path / "cache", tmp_path, store="127.0.0.1:1", size="80MiB", manager=manager)
        stack.callback(cache.stop)
        yield cache


def connect(service: Cache) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(TIMEOUT_S)
    client.connect(str(service.socket))
    return client


def start_again(service: Cache) -> None:
    service.restart(lambda: None)


@pytest.mark.parametrize("end", [Cache.kill, Cache.stop])
def test_who_connects_while_the_daemon_is_away_is_served_by_the_next_one(
    service: Cache, end: Callable[[Cache], None]
) -> None:
    for _ in range(2):  # the second daemon has to have it kept as well
        end(service)
        with connect(service) as client:
            start_again(service)
            assert client.recv(8) == GREETING
    assert stat.S_IMODE(service.socket.stat().st_mode) == 0o600
    assert "inherited" not in service.ready


def test_a_kept_socket_that_nobody_finds_is_replaced(service: Cache) -> None:
    for _ in range(2):
        service.kill()
        service.socket.unlink()
        start_again(service)
        with connect(service) as client:
            assert client.recv(8) == GREETING


def test_a_kept_socket_behind_the_file_of_a_dead_one_is_replaced(service: Cache) -> None:
    service.kill()
    service.socket.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(service.socket))
    start_again(service)
    with connect(service) as client:
        assert client.recv(8) == GREETING

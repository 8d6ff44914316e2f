"""The sockets of the NBD front and their turns, on a loop whose callbacks the test runs itself."""

import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType

import pytest
from ram_volume import RamVolume

from forebay_cache.service import nbd_sockets, turns
from forebay_cache.service.nbd_sockets import Sockets
from forebay_cache.service.turns import Turns


class Loop:
    """What Turns uses of an event loop."""

    def __init__(self) -> None:
        self.soon: deque[Callable[[], None]] = deque()
        self.readers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        self.readers[fd] = call

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def turn(self) -> None:
        """One look at the sockets."""
        for call in self.readers.values():
            call()


class Client:
    """A socket that is watched, and what it was told."""

    def __init__(self, sockets: Sockets, heard: list["Client"], act: Callable[[], None], stack: ExitStack) -> None:
        self.sockets = sockets
        self.heard = heard
        self.act = act
        self.near, self.far = (stack.enter_context(end) for end in socket.socketpair())
        self.written = 0
        self.watch(reading=True)

    def watch(self, *, reading: bool = False, writing: bool = False) -> None:
        self.sockets.watch(self.near.fileno(), self, reading=reading, writing=writing)

    def on_readable(self) -> None:
        self.heard.append(self)
        self.near.recv(100)
        self.act()

    def on_writable(self) -> None:
        self.written += 1


class Rig:
    """Clients of one volume."""

    def __init__(self, stack: ExitStack) -> None:
        self.loop = Loop()
        self.turns = Turns(self.loop)  # type: ignore[arg-type]
        self.sockets = Sockets(self.turns)
        stack.callback(self.sockets.close)
        self.volume = RamVolume("v", 1 << 20)
        self.heard: list[Client] = []
        kick = self.kick
        self.clients = [Client(self.sockets, self.heard, kick, stack) for _ in range(8)]

    def kick(self) -> None:
        self.turns.kick(self.volume)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack)


def test_a_volume_is_kicked_once_for_all_who_gave_it_requests_in_a_turn(rig: Rig) -> None:
    for client in rig.clients:
        client.far.send(b"x")
    rig.loop.turn()
    assert set(rig.heard) == set(rig.clients)
    assert rig.volume.kicks == 1


def test_a_volume_is_kicked_at_once_outside_of_a_turn(rig: Rig) -> None:
    rig.kick()
    assert rig.volume.kicks == 1


@pytest.mark.parametrize("bound", [(nbd_sockets, "LOOK_NS"), (turns, "TURN_NS")], ids=["look", "turn"])
def test_who_was_left_by_a_long_turn_comes_before_who_has_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, bound: tuple[ModuleType, str]
) -> None:
    monkeypatch.setattr(*bound, -1)  # each look is over after one client
    for client in rig.clients:
        client.far.send(b"x")
    for count in range(1, len(rig.clients) + 1):
        rig.loop.turn()
        assert len(rig.heard) == count
        rig.heard[-1].far.send(b"y")
    assert set(rig.heard) == set(rig.clients)


def test_who_listens_for_nothing_is_told_nothing_even_of_the_end(rig: Rig) -> None:
    client = rig.clients[0]
    client.watch()
    client.far.send(b"x")
    client.far.close()
    rig.loop.turn()
    assert not rig.heard
    assert not client.written


def test_who_waits_to_write_hears_of_the_end(rig: Rig) -> None:
    client = rig.clients[0]
    client.watch()
    client.near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            client.near.send(bytes(4096))
    client.watch(writing=True)
    rig.loop.turn()
    assert not client.written
    client.far.close()
    rig.loop.turn()
    assert client.written == 1


def test_an_event_of_a_socket_that_is_closed_meanwhile_is_dropped(rig: Rig) -> None:
    def close_others() -> None:
        for client in rig.clients:
            if client is not rig.heard[0] and client.near.fileno() >= 0:
                client.watch()
                client.near.close()

    for client in rig.clients:
        client.act = close_others
        client.far.send(b"x")
    rig.loop.turn()
    assert len(rig.heard) == 1

"""Slots for payloads: one payload at a time in each, and none that a living daemon may still read is used again."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from forebay_cache.engine.nbd_client import NbdClient, Request, State
from forebay_cache.engine.payload_slots import SLOTS, Memory, PayloadSlots, Place
from forebay_cache.format import fuse, nbd, nbd_options
from forebay_cache.service import fuse_lines
from forebay_cache.service.fuse_lines import Line, Poll, Slots
from forebay_cache.service.shared_memory import memory_of_peer

SIZE = 4096
GREETING = nbd_options.GREETING.pack(nbd_options.NBD_MAGIC, nbd_options.OPTION_MAGIC, 3)
WELCOME = (
    GREETING
    + nbd_options.encode_reply(nbd_options.OPT_MEMORY, nbd_options.REP_ACK)
    + nbd_options.encode_reply(nbd_options.OPT_GO, nbd_options.REP_ACK)
)


def slots(key: int, count: int = 2) -> PayloadSlots:
    return PayloadSlots(Memory(key, 5), memoryview(bytearray(count * SIZE + 1)), SIZE)


def leave(shared: Slots, client: NbdClient) -> None:
    """Have the memory left: the connection of a client ends with a request in it."""
    assert shared.memory is not None
    client.begin(shared.memory)
    client.received(memoryview(WELCOME))
    slot = shared.take()
    client.submit(Request(1, nbd.CMD_WRITE, 0, 4, slot.view[:4], place=slot.place))
    shared.connection_ended(client)


def test_every_slot_is_room_of_its_own_and_one_more_is_not_shared() -> None:
    one = slots(1)
    taken = [one.take() for _ in range(3)]
    for number, slot in enumerate(taken):
        slot.view[:] = bytes([number + 1]) * SIZE
    assert [bytes(slot.view) for slot in taken] == [bytes([number]) * SIZE for number in (1, 2, 3)]
    assert {slot.place for slot in taken} == {Place(1, 0), Place(1, SIZE), None}


def test_what_comes_back_is_used_again_unless_it_is_of_another_memory_or_of_none() -> None:
    old, new = slots(1), slots(2)
    left, mine, none = old.take(), new.take(), slots(3, count=0).take()
    free = new.take()
    for slot in (left, none, mine):
        new.give(slot)
    assert new.take() == mine
    assert new.take().place is None
    assert free.place is not None


def test_a_memory_that_a_daemon_may_still_be_at_work_on_is_left_for_a_new_one() -> None:
    shared = Slots()
    client = NbdClient("disk", lambda *_: None)
    old = shared.memory
    assert old is not None
    client.begin(old)
    slot = shared.take()
    shared.connection_ended(client)
    assert shared.memory == old
    leave(shared, client)
    assert shared.memory is not None and shared.memory.key != old.key
    shared.give(slot)
    taken = [shared.take() for _ in range(SLOTS)]
    assert {one.place.key for one in taken if one.place} == {shared.memory.key}
    assert fcntl.fcntl(shared.memory.number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    os.close(shared.memory.number)


def test_the_descriptor_of_a_memory_that_was_left_stands_for_no_newer_one() -> None:
    shared = Slots()
    assert shared.memory is not None
    number = shared.memory.number
    late = NbdClient("late", lambda *_: None)
    late.begin(shared.memory)
    late.received(memoryview(GREETING))
    offer = bytes(late.outgoing[1])[nbd_options.OPTION.size :]
    front, daemon = socket.socketpair()
    with front, daemon:
        assert memory_of_peer(daemon, *nbd_options.MEMORY.unpack(offer)) is not None
        leave(shared, NbdClient("ended", lambda *_: None))
        assert shared.memory.number == number
        assert memory_of_peer(daemon, *nbd_options.MEMORY.unpack(offer)) is None
    os.close(number)


def test_a_free_slot_that_is_not_shared_gives_way_to_one_that_is() -> None:
    old, new = slots(1), slots(2, count=1)
    shared, spare, left = new.take(), new.take(), old.take()
    assert new.renewed(spare) is spare
    new.give(shared)
    assert new.renewed(left) == shared
    new.give(shared)
    assert new.renewed(spare) == shared
    assert new.renewed(shared) is shared


def test_without_memory_to_be_had_the_front_goes_on_and_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str, _size: int) -> None:
        raise OSError(errno.ENOMEM, "none")

    with monkeypatch.context() as patch:
        patch.setattr(fuse_lines, "make_memory", refuse)
        shared = Slots()
        client = NbdClient("disk", lambda *_: None)
        shared.connection_ended(client)
        assert shared.memory is None
        assert (shared.take().place, len(shared.take().view)) == (None, fuse.WRITE_SIZE_MAX)
    shared.connection_ended(client)
    assert shared.memory is not None
    assert shared.take().place == Place(shared.memory.key, (SLOTS - 1) * fuse.WRITE_SIZE_MAX)
    os.close(shared.memory.number)


def test_a_connection_that_was_offered_an_older_memory_is_made_anew_once_nothing_is_under_way(tmp_path: Path) -> None:
    poll, shared, client = Poll(), Slots(), NbdClient("disk", lambda *_: None)
    ended = NbdClient("ended", lambda *_: None)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(10)
        line = Line(client, str(tmp_path / "s"), poll, shared)
        line.connect()
        first, _ = listener.accept()
        client.received(memoryview(WELCOME))
        line.renew()
        client.submit(Request(1, nbd.CMD_FLUSH, 0, 0))
        leave(shared, ended)
        line.renew()
        assert client.state is State.READY
        client.received(memoryview(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1)))
        line.renew()
        assert (client.state, line.connected) == (State.GREETING, True)
        second, _ = listener.accept()
        client.received(memoryview(WELCOME))
        line.renew()
        assert client.state is State.READY
        line.close()
        first.close()
        second.close()
    assert shared.memory is not None
    os.close(shared.memory.number)

"""Slots for payloads: one payload at a time in each, and none that a living daemon may still read is used again."""

import fcntl
import os

from forebay_cache.engine.nbd_client import NbdClient, Request
from forebay_cache.engine.payload_slots import SLOTS, Memory, PayloadSlots, Place
from forebay_cache.format import nbd, nbd_options
from forebay_cache.service.fuse_front import Slots

SIZE = 4096
WELCOME = (
    nbd_options.GREETING.pack(nbd_options.NBD_MAGIC, nbd_options.OPTION_MAGIC, 3)
    + nbd_options.encode_reply(nbd_options.OPT_MEMORY, nbd_options.REP_ACK)
    + nbd_options.encode_reply(nbd_options.OPT_GO, nbd_options.REP_ACK)
)


def slots(key: int, count: int = 2) -> PayloadSlots:
    return PayloadSlots(Memory(key, 5), memoryview(bytearray(count * SIZE + 1)), SIZE)


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
    client.begin(shared.memory)
    old, slot = shared.memory, shared.take()
    shared.connection_ended(client)
    assert shared.memory == old
    client.received(memoryview(WELCOME))
    client.submit(Request(1, nbd.CMD_WRITE, 0, 4, slot.view[:4], place=slot.place))
    shared.connection_ended(client)
    assert shared.memory.key != old.key
    shared.give(slot)
    taken = [shared.take() for _ in range(SLOTS)]
    assert {one.place.key for one in taken if one.place} == {shared.memory.key}
    assert fcntl.fcntl(shared.memory.number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    os.close(shared.memory.number)

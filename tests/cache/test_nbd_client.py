"""The NBD client of the fronts: what was not answered is asked again, and is answered once."""

import pytest

from forebay_cache.engine.nbd_client import NbdClient, NbdPeerError, Request, State, decode_statuses
from forebay_cache.engine.payload_slots import Memory, Place
from forebay_cache.format import nbd, nbd_options

GREETING = nbd_options.GREETING.pack(nbd_options.NBD_MAGIC, nbd_options.OPTION_MAGIC, 3)
ACK = nbd_options.encode_reply(nbd_options.OPT_GO, nbd_options.REP_ACK)
INFO = nbd_options.encode_reply(
    nbd_options.OPT_GO, nbd_options.REP_INFO, nbd_options.EXPORT_INFORMATION.pack(0, 1 << 20, 1)
)
WELCOME = GREETING + INFO + ACK
READ = Request(1, nbd.CMD_READ, 0, 8)
WRITE = Request(2, nbd.CMD_WRITE, 4096, 4, b"abcd", nbd.CMD_FLAG_FUA)
FLUSH = Request(3, nbd.CMD_FLUSH, 0, 0)


class Rig:
    """A client and what it was answered."""

    def __init__(self, **how: bool) -> None:
        self.answers: list[tuple[int, int, bytes]] = []
        self.client = NbdClient(
            "disk", lambda r, error, body: self.answers.append((r.cookie, error, bytes(body))), **how
        )

    def feed(self, received: bytes) -> int:
        return self.client.received(memoryview(received))

    def sent(self) -> bytes:
        sent = b"".join(self.client.outgoing)
        self.client.outgoing.clear()
        return sent


def reply(cookie: int, body: bytes = b"", error: int = 0) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie) + body


def asked(request: Request) -> bytes:
    header = (nbd.REQUEST_MAGIC, request.flags, request.command, request.cookie, request.offset, request.length)
    return nbd.REQUEST.pack(*header) + bytes(request.payload)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.feed(WELCOME)
    rig.sent()
    assert rig.client.state is State.READY
    return rig


def test_what_is_asked_before_the_connection_stands_is_sent_when_it_does() -> None:
    rig = Rig()
    rig.client.submit(READ)
    assert rig.sent() == b""
    assert rig.feed(GREETING) == len(GREETING)
    assert b"disk" in rig.sent()
    rig.feed(INFO + ACK)
    assert rig.sent() == asked(READ)


def test_what_arrives_byte_by_byte_is_read_as_what_arrives_at_once() -> None:
    rig, waiting = Rig(), b""
    for request in (READ, WRITE):
        rig.client.submit(request)
    for byte in WELCOME + reply(2) + reply(1, b"12345678"):
        waiting += bytes([byte])
        waiting = waiting[rig.feed(waiting) :]
    assert waiting == b""
    assert rig.answers == [(2, 0, b""), (1, 0, b"12345678")]


def test_after_a_reconnect_what_was_not_answered_is_asked_again_in_its_order(rig: Rig) -> None:
    for request in (WRITE, READ, FLUSH):
        rig.client.submit(request)
    rig.feed(reply(1, b"12345678"))
    rig.client.begin()
    assert rig.sent() == b""
    rig.feed(WELCOME)
    assert rig.sent().endswith(asked(WRITE) + asked(FLUSH))
    rig.feed(reply(3) + reply(2))
    assert rig.answers == [(1, 0, b"12345678"), (3, 0, b""), (2, 0, b"")]


def test_a_daemon_on_its_way_out_is_no_error(rig: Rig) -> None:
    rig.client.submit(WRITE)
    rig.feed(reply(2, error=nbd.NbdError.ESHUTDOWN))
    assert rig.answers == []
    rig.client.begin()
    rig.feed(WELCOME + reply(2))
    assert rig.answers == [(2, 0, b"")]


def test_errors_are_handed_on(rig: Rig) -> None:
    rig.client.submit(READ)
    rig.client.submit(WRITE)
    rig.feed(reply(1, error=nbd.NbdError.EIO) + reply(2, error=nbd.NbdError.ENOSPC))
    assert rig.answers == [(1, 5, b""), (2, 28, b"")]


def test_an_export_that_is_gone_is_an_error_at_once_and_ever_after() -> None:
    rig = Rig()
    rig.client.submit(READ)
    rig.feed(GREETING + nbd_options.encode_reply(nbd_options.OPT_GO, nbd_options.REP_ERR_UNKNOWN))
    rig.client.submit(WRITE)
    assert rig.answers == [(1, 5, b""), (2, 5, b"")]
    assert rig.client.pending == {}


def test_only_what_no_daemon_has_can_be_abandoned(rig: Rig) -> None:
    rig.client.submit(WRITE)
    assert not rig.client.abandon(2)
    rig.client.begin()
    assert rig.client.abandon(2)
    rig.feed(WELCOME)
    assert asked(WRITE) not in rig.sent()


def memory_answered(kind: int) -> bytes:
    return GREETING + nbd_options.encode_reply(nbd_options.OPT_MEMORY, kind) + INFO + ACK


def test_a_payload_in_memory_that_the_daemon_has_is_not_sent_but_its_place() -> None:
    rig = Rig()
    rig.client.begin(Memory(3, 7))
    rig.feed(memory_answered(nbd_options.REP_ACK))
    assert nbd_options.MEMORY.pack(7, 3) in rig.sent()
    rig.client.submit(WRITE._replace(place=Place(3, 8192)))
    rig.client.submit(WRITE._replace(cookie=8, place=Place(2, 8192)))
    rig.client.submit(WRITE._replace(cookie=9))
    in_memory = WRITE._replace(flags=WRITE.flags | nbd.CMD_FLAG_IN_MEMORY, payload=nbd.PLACE.pack(8192))
    assert rig.sent() == asked(in_memory) + asked(WRITE._replace(cookie=8)) + asked(WRITE._replace(cookie=9))


def test_the_bytes_of_a_read_are_where_it_said_if_the_daemon_has_that_memory() -> None:
    for key, answer in ((3, reply(1)), (2, reply(1, b"inline!!"))):
        rig = Rig()
        rig.client.begin(Memory(3, 7))
        rig.feed(memory_answered(nbd_options.REP_ACK))
        rig.sent()
        rig.client.submit(READ._replace(payload=b"memory!!", place=Place(key, 0)))
        placed = READ._replace(flags=nbd.CMD_FLAG_IN_MEMORY, payload=nbd.PLACE.pack(0))
        assert rig.sent() == asked(placed if key == 3 else READ)
        assert rig.feed(answer) == len(answer)
        assert rig.answers == [(1, 0, b"memory!!" if key == 3 else b"inline!!")]


@pytest.mark.parametrize("kind", [nbd_options.REP_ERR_POLICY, nbd_options.REP_ERR_UNSUP])
def test_a_daemon_that_does_not_take_the_memory_is_sent_the_payload(kind: int) -> None:
    rig = Rig()
    rig.client.begin(Memory(3, 7))
    rig.feed(memory_answered(kind))
    rig.sent()
    rig.client.submit(WRITE._replace(place=Place(3, 8192)))
    assert rig.sent() == asked(WRITE)
    assert not rig.client.uses(3)


def test_a_memory_is_in_use_while_a_payload_in_it_is_not_answered() -> None:
    rig = Rig()
    rig.client.begin(Memory(3, 7))
    rig.feed(memory_answered(nbd_options.REP_ACK))
    assert not rig.client.uses(3)
    rig.client.submit(WRITE._replace(place=Place(3, 8192)))
    assert rig.client.uses(3)
    assert not rig.client.uses(2)
    rig.feed(reply(2))
    assert not rig.client.uses(3)


def test_another_connection_is_asked_about_the_memory_anew() -> None:
    rig = Rig()
    rig.client.begin(Memory(3, 7))
    rig.feed(memory_answered(nbd_options.REP_ACK))
    rig.client.submit(WRITE._replace(place=Place(3, 8192)))
    rig.client.begin(Memory(4, 9))
    assert not rig.client.uses(3)
    rig.feed(memory_answered(nbd_options.REP_ACK))
    assert rig.sent().endswith(asked(WRITE))


@pytest.mark.parametrize("wrong", [b"\0" * 16, reply(9), nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 0)])
def test_a_reply_to_nothing_that_was_asked_ends_the_connection(rig: Rig, wrong: bytes) -> None:
    rig.client.submit(READ)
    with pytest.raises(NbdPeerError):
        rig.feed(wrong)


@pytest.mark.parametrize("wrong", [b"\0" * 18, GREETING + b"\xff" * 20])
def test_a_server_of_another_kind_is_refused(wrong: bytes) -> None:
    with pytest.raises(NbdPeerError):
        Rig().feed(wrong)


def test_holes_are_told_over_a_connection_of_their_own() -> None:
    rig = Rig(statuses=True)
    ready = nbd_options.encode_reply(nbd_options.OPT_STRUCTURED_REPLY, nbd_options.REP_ACK)
    rig.feed(GREETING + ready + INFO + ACK)
    rig.client.submit(Request(7, nbd.CMD_BLOCK_STATUS, 0, 12288))
    body = nbd.CONTEXT_ID.pack(1) + nbd.STATUS_DESCRIPTOR.pack(4096, 0) + nbd.STATUS_DESCRIPTOR.pack(8192, 3)
    kind = nbd.REPLY_TYPE_BLOCK_STATUS
    rig.feed(nbd.STRUCTURED_CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, kind, 7, len(body)) + body)
    [(cookie, error, statuses)] = rig.answers
    assert (cookie, error, decode_statuses(statuses)) == (7, 0, [(4096, False), (8192, True)])


def test_an_error_of_a_question_about_holes_is_handed_on() -> None:
    rig = Rig(statuses=True)
    rig.feed(GREETING + INFO + ACK)
    rig.client.submit(Request(7, nbd.CMD_BLOCK_STATUS, 0, 12288))
    body = nbd.ERROR_PAYLOAD.pack(5, 2) + b"no"
    rig.feed(nbd.STRUCTURED_CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_ERROR, 7, len(body)) + body)
    assert rig.answers == [(7, 5, b"")]

"""The connection without I/O: its table, the handshake and who tries to cheat in it, and how bytes may arrive."""

import itertools
from collections.abc import Callable, Iterable

import pytest

from forebay_core.errors import AuthenticationError, ForebayError, ProtocolError, StoreUnreachableError
from forebay_core.units import Buffer
from forebay_wire import connection as module
from forebay_wire.connection import (
    TRANSITIONS,
    Connection,
    Greeted,
    LocalProtocolError,
    MessageReceived,
    Ready,
    Received,
    State,
)
from forebay_wire.framing import MESSAGE_HEADER
from forebay_wire.greeting import (
    GREETING,
    VERDICT,
    Authentication,
    Greeting,
    Reason,
    Role,
    Verdict,
    decode_greeting,
    decode_verdict,
    encode_greeting,
    encode_verdict,
)
from forebay_wire.limits import PAYLOAD_SIZE_MAX, READ_BUFFER_SIZE
from forebay_wire.messages import Blocks, Done, Ping, Read, StagePart

KEY = b"the key of both sides"
NODES = {Role.CLIENT: b"client device id", Role.SERVER: b"the store's uuid"}


def end(role: Role, key: bytes | None = KEY, nonce: int = 1) -> Connection:
    return Connection(role, key=key, node=NODES[role], nonce=bytes([nonce, role]) * 16)


def outgoing(connection: Connection) -> bytes:
    return b"".join(connection.take_outgoing())


def joined(buffers: Iterable[Buffer]) -> bytes:
    return b"".join(buffers)


def ready_pair(key: bytes | None = KEY) -> tuple[Connection, Connection]:
    client, server = end(Role.CLIENT, key), end(Role.SERVER, key)
    client_greeting, server_greeting = outgoing(client), outgoing(server)
    assert [type(event) for event in client.feed(server_greeting)] == [Greeted]
    assert [type(event) for event in server.feed(client_greeting)] == [Greeted]
    assert [type(event) for event in server.feed(outgoing(client))] == [Ready]
    assert [type(event) for event in client.feed(outgoing(server))] == [Ready]
    return client, server


def test_every_state_but_closed_can_fail_and_end() -> None:
    for state in State:
        for received in (Received.VIOLATION, Received.END):
            expected = None if state is State.CLOSED else State.CLOSED
            assert TRANSITIONS.get((state, received)) is expected


def test_every_state_is_reached_and_messages_need_authentication() -> None:
    assert set(TRANSITIONS.values()) | {State.GREETING} == set(State)
    assert [state for state, received in TRANSITIONS if received is Received.MESSAGE] == [State.READY]
    assert [key for key, state in TRANSITIONS.items() if state is State.READY and key[0] is not State.READY] == [
        (State.VERDICT, Received.VERDICT)
    ]


@pytest.mark.parametrize("key", [None, KEY])
def test_both_sides_learn_who_the_other_is(key: bytes | None) -> None:
    client, server = ready_pair(key)
    assert client.peer is not None
    assert server.peer is not None
    assert (client.peer.node, server.peer.node) == (NODES[Role.SERVER], NODES[Role.CLIENT])
    assert client.state is server.state is State.READY


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("payload_size", [0, 5000, 3 * READ_BUFFER_SIZE])
@pytest.mark.parametrize("step", [1, 7, 48, 4096, 1 << 30])
def test_bytes_may_arrive_in_any_pieces(key: bytes | None, payload_size: int, step: int) -> None:
    if step == 1 and payload_size > 5000:
        step = 13  # byte by byte a large payload takes too long; the smaller ones cover it
    server = end(Role.SERVER, key)
    client = end(Role.CLIENT, key)
    first = outgoing(client)
    client.feed(outgoing(server))
    payload = bytes(range(251)) * (payload_size // 251)
    stream = first + outgoing(client)
    events = [event for at in range(0, len(stream), step) for event in server.feed(stream[at : at + step])]
    client.feed(outgoing(server))
    stream = joined(
        itertools.chain(
            client.send(1, Ping()), client.send(2, StagePart(b"v" * 16, 1, 1, 1, 0), (payload,)), client.send(3, Ping())
        )
    )
    events += [event for at in range(0, len(stream), step) for event in server.feed(stream[at : at + step])]
    assert [type(event) for event in events] == [Greeted, Ready] + [MessageReceived] * 3
    requests = [event for event in events if isinstance(event, MessageReceived)]
    assert [request.request_id for request in requests] == [1, 2, 3]
    assert bytes(requests[1].payload) == payload
    assert requests[1].size == len(payload) + len(joined(client.send(9, requests[1].message))) - MESSAGE_HEADER.size


def test_a_message_right_behind_the_verdict_is_kept() -> None:
    client, server = ready_pair()
    message = joined(server.send(7, Done()))
    client, server = end(Role.CLIENT), end(Role.SERVER)
    server.feed(outgoing(client))
    client.feed(outgoing(server))
    server.feed(outgoing(client))
    events = client.feed(outgoing(server) + message)
    assert [type(event) for event in events] == [Ready, MessageReceived]


def test_payloads_that_were_handed_out_never_change() -> None:
    client, server = ready_pair()
    kept = []
    for number in range(50):
        payload = bytes([number]) * (READ_BUFFER_SIZE if number % 10 == 0 else 4096)
        kept += server.feed(joined(client.send(number, StagePart(b"v" * 16, 1, 1, 1, 0), (payload,))))
    for number, event in enumerate(kept):
        assert isinstance(event, MessageReceived)
        assert event.payload.readonly
        assert set(bytes(event.payload)) == {number}


def test_events_wait_until_they_are_pulled() -> None:
    client, server = ready_pair()
    stream = joined(buffer for number in range(100) for buffer in client.send(number, Ping()))
    space = server.receive_buffer()
    space[: len(stream)] = stream
    server.received(len(stream))
    for number in range(100):
        event = server.next_event()
        assert isinstance(event, MessageReceived)
        assert event.request_id == number
    assert server.next_event() is None


@pytest.mark.parametrize("role", list(Role))
def test_nothing_larger_than_the_handshake_is_received_before_authentication(role: Role) -> None:
    connection, peer = end(role), end(Role.SERVER if role is Role.CLIENT else Role.CLIENT)
    assert connection.receive_buffer().nbytes == GREETING.size
    connection.feed(outgoing(peer))
    assert connection.receive_buffer().nbytes == VERDICT.size


def test_memory_for_a_large_message_comes_after_the_buffer_is_full() -> None:
    client, server = ready_pair()
    stream = joined(client.send(1, StagePart(b"v" * 16, 1, 1, 1, 0), (bytes(PAYLOAD_SIZE_MAX),)))
    server.feed(stream[: READ_BUFFER_SIZE - 1])
    assert server.receive_buffer().nbytes == 1
    assert [type(event) for event in server.feed(stream[READ_BUFFER_SIZE - 1 :])] == [MessageReceived]
    assert server.receive_buffer().nbytes == READ_BUFFER_SIZE


def failure(connection: Connection, received: bytes, kind: type[ForebayError]) -> str:
    with pytest.raises(kind) as caught:
        connection.feed(received)
    assert connection.state is State.CLOSED
    with pytest.raises(LocalProtocolError):
        connection.feed(b"x")
    with pytest.raises(LocalProtocolError):
        connection.next_event()
    return str(caught.value)


def test_with_another_key_both_sides_say_that_it_differs() -> None:
    client, server = end(Role.CLIENT, b"one key is like this"), end(Role.SERVER, b"another is like that")
    server.feed(outgoing(client))
    client.feed(outgoing(server))
    assert "key differs" in failure(server, outgoing(client), AuthenticationError)
    assert "key differs" in failure(client, outgoing(server), AuthenticationError)


@pytest.mark.parametrize("with_key", list(Role))
def test_with_a_key_on_one_side_both_say_which(with_key: Role) -> None:
    client, server = (end(role, KEY if role is with_key else None) for role in Role)
    client_greeting, server_greeting = outgoing(client), outgoing(server)
    texts = {
        Role.CLIENT: failure(client, server_greeting, AuthenticationError),
        Role.SERVER: failure(server, client_greeting, AuthenticationError),
    }
    without_key = Role.SERVER if with_key is Role.CLIENT else Role.CLIENT
    assert "we have a key and the peer has none" in texts[with_key]
    assert "the peer has a key and we have none" in texts[without_key]
    assert decode_verdict(outgoing(client)).reason is not Reason.ACCEPTED
    assert decode_verdict(outgoing(server)).reason is not Reason.ACCEPTED


def test_a_refusal_says_why_before_the_close() -> None:
    client, server = end(Role.CLIENT), end(Role.SERVER)
    client.feed(outgoing(server))
    told = failure(client, encode_verdict(Verdict(Reason.SENDER_HAS_NO_KEY, bytes(32))), AuthenticationError)
    assert "we have a key and the peer has none" in told


def test_a_busy_server_is_unreachable_not_wrong() -> None:
    client, server = end(Role.CLIENT), end(Role.SERVER)
    server.refuse_busy()
    failure(client, outgoing(server), StoreUnreachableError)


def test_another_version_is_named_on_both_sides() -> None:
    old, new = end(Role.CLIENT), end(Role.SERVER)
    new._own = new._own._replace(version_min=4, version_max=5)
    new._outgoing = [encode_greeting(new._own)]
    old_greeting, new_greeting = outgoing(old), outgoing(new)
    assert "versions 4 to 5, we speak 3 to 3" in failure(old, new_greeting, ProtocolError)
    assert "versions 3 to 3, we speak 4 to 5" in failure(new, old_greeting, ProtocolError)
    assert decode_verdict(outgoing(old)).reason is Reason.VERSION


@pytest.mark.parametrize(
    "change",
    [
        lambda greeting: greeting._replace(features=1),
        lambda greeting: greeting._replace(version_max=9),
        lambda greeting: greeting._replace(node=b"another client's"),
        lambda greeting: greeting._replace(nonce=bytes(32)),
    ],
)
@pytest.mark.parametrize("victim", list(Role))
def test_a_greeting_that_was_changed_on_the_way_spoils_the_proof(
    victim: Role, change: Callable[[Greeting], Greeting]
) -> None:
    client, server = end(Role.CLIENT), end(Role.SERVER)
    greetings = {Role.CLIENT: outgoing(client), Role.SERVER: outgoing(server)}
    greetings[victim] = encode_greeting(change(decode_greeting(greetings[victim])))
    server.feed(greetings[Role.CLIENT])
    client.feed(greetings[Role.SERVER])
    failure(server, outgoing(client), AuthenticationError)


def test_a_recorded_handshake_can_not_be_replayed() -> None:
    client, server = end(Role.CLIENT), end(Role.SERVER, nonce=1)
    recorded = outgoing(client)
    client.feed(outgoing(server))
    recorded += outgoing(client)
    assert [type(event) for event in server.feed(recorded)] == [Greeted, Ready]
    failure(end(Role.SERVER, nonce=2), recorded, AuthenticationError)


def test_a_proof_sent_back_proves_nothing() -> None:
    client = end(Role.CLIENT)
    outgoing(client)
    client.feed(encode_greeting(Greeting(Role.SERVER, Authentication.PRE_SHARED_KEY, bytes(16), bytes(32))))
    failure(client, outgoing(client), AuthenticationError)


def test_a_greeting_sent_back_is_refused() -> None:
    client = end(Role.CLIENT)
    assert "client" in failure(client, outgoing(client), ProtocolError)


def test_a_server_gives_its_proof_to_nobody_without_key() -> None:
    server = end(Role.SERVER)
    outgoing(server)
    server.feed(encode_greeting(Greeting(Role.CLIENT, Authentication.PRE_SHARED_KEY, bytes(16), bytes(32))))
    assert outgoing(server) == b""
    failure(server, encode_verdict(Verdict(Reason.ACCEPTED, bytes(32))), AuthenticationError)
    assert decode_verdict(outgoing(server)) == Verdict(Reason.KEY_DIFFERS, bytes(32))


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n" * 6, b"SSH-2.0-OpenSSH\r\n" * 6, bytes(80), b"\xff" * 80])
@pytest.mark.parametrize("role", list(Role))
def test_garbage_instead_of_a_greeting_is_a_protocol_error(role: Role, garbage: bytes) -> None:
    assert "does not speak" in failure(end(role), garbage, ProtocolError)


def test_garbage_instead_of_a_verdict_is_a_protocol_error() -> None:
    client, server = end(Role.CLIENT), end(Role.SERVER)
    server.feed(outgoing(client))
    failure(server, b"\xee" * VERDICT.size, ProtocolError)


@pytest.mark.parametrize("role", list(Role))
def test_every_flipped_bit_of_a_handshake_ends_it(role: Role) -> None:
    client, server = end(Role.CLIENT), end(Role.SERVER)
    first = {Role.CLIENT: outgoing(client), Role.SERVER: outgoing(server)}
    server.feed(first[Role.CLIENT])
    client.feed(first[Role.SERVER])
    second = {Role.CLIENT: outgoing(client)}
    server.feed(second[Role.CLIENT])
    second[Role.SERVER] = outgoing(server)
    peer = Role.SERVER if role is Role.CLIENT else Role.CLIENT
    stream = first[peer] + second[peer]
    for bit in range(len(stream) * 8):
        flipped = bytearray(stream)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ProtocolError, AuthenticationError)):
            end(role).feed(flipped)
    assert end(role).feed(stream)[-1] == Ready(decode_greeting(first[peer]))


def test_each_side_takes_only_its_kind_of_message() -> None:
    client, server = ready_pair()
    request, reply = joined(client.send(1, Ping())), joined(server.send(1, Done()))
    assert "kind" in failure(client, request, ProtocolError)
    assert "kind" in failure(server, reply, ProtocolError)


def test_garbage_after_the_handshake_is_a_protocol_error() -> None:
    _, server = ready_pair()
    failure(server, b"\x00" * MESSAGE_HEADER.size, ProtocolError)


def test_misuse_is_a_bug_of_ours() -> None:
    client = end(Role.CLIENT)
    with pytest.raises(LocalProtocolError, match="waiting for the peer's greeting"):
        client.send(1, Ping())
    with pytest.raises(LocalProtocolError, match="received nothing"):
        client.received(0)
    client, server = ready_pair()
    with pytest.raises(LocalProtocolError, match="larger"):
        server.send(1, Blocks(b""), (bytes(PAYLOAD_SIZE_MAX + 1),))
    with pytest.raises(LocalProtocolError):
        client.send(1, Read(b"", b"", min_version=1 << 70))
    client.end()
    client.end()
    with pytest.raises(LocalProtocolError, match="waiting for nothing"):
        client.send(1, Ping())
    assert issubclass(LocalProtocolError, AssertionError)


def test_the_documented_errors_are_the_only_ones() -> None:
    assert "LocalProtocolError" in (module.__doc__ or "")
    assert not issubclass(LocalProtocolError, ForebayError)

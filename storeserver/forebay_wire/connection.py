"""One end of a connection, without I/O: bytes go in, events come out, and what to send is returned.

The shell gives `receive_buffer()` to its socket, reports `received(count)`, pulls `next_event()` until it is None, and
sends what `take_outgoing()` and `send()` return. It may stop pulling at any time; then it must stop receiving too.

Invariants:
    Before READY nothing but one greeting and one verdict is received, into 80 and 48 bytes.
    After an error or `end()` the state is CLOSED for good.
Two errors leave it: LocalProtocolError (we misused it, a bug), and ProtocolError or AuthenticationError (the peer broke
the rules or has another key; StoreUnreachableError if it is too busy). After these, `take_outgoing()` holds what the
peer should be told before the connection is closed.
"""

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn, TypeAlias

from forebay_core.errors import ForebayError, ProtocolError
from forebay_core.units import Buffer
from forebay_wire.auth import is_proof, make_proof
from forebay_wire.framing import REPLY, REQUEST, decode_body, encode_message
from forebay_wire.greeting import (
    GREETING,
    NO_PROOF,
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
    judge_greeting,
    refusal,
)
from forebay_wire.messages import AnyMessage
from forebay_wire.reader import MessageReader


class LocalProtocolError(AssertionError):
    """Our own code used a connection in a way that its state does not allow."""


class State(enum.Enum):
    """What the connection waits for."""

    GREETING = "the peer's greeting"
    VERDICT = "the peer's verdict"
    READY = "messages"
    CLOSED = "nothing"


class Received(enum.Enum):
    """What can happen to a connection."""

    GREETING = "a greeting we can go on with"
    VERDICT = "an accepting verdict with a good proof"
    MESSAGE = "a message"
    VIOLATION = "anything else"
    END = "the end of the stream"


TRANSITIONS: Final = {
    (State.GREETING, Received.GREETING): State.VERDICT,
    (State.VERDICT, Received.VERDICT): State.READY,
    (State.READY, Received.MESSAGE): State.READY,
    (State.GREETING, Received.VIOLATION): State.CLOSED,
    (State.VERDICT, Received.VIOLATION): State.CLOSED,
    (State.READY, Received.VIOLATION): State.CLOSED,
    (State.GREETING, Received.END): State.CLOSED,
    (State.VERDICT, Received.END): State.CLOSED,
    (State.READY, Received.END): State.CLOSED,
}


class Greeted(NamedTuple):
    """The peer said who it claims to be; nothing is proven yet."""

    peer: Greeting


class Ready(NamedTuple):
    """The peer is authenticated (if there is a key); messages may be sent."""

    peer: Greeting


class MessageReceived(NamedTuple):
    """A request (to a server) or a reply (to a client)."""

    request_id: int
    message: AnyMessage
    payload: memoryview
    size: int  # bytes of body and payload


Event: TypeAlias = Greeted | Ready | MessageReceived


class Connection:
    """One end of a connection; `nonce` are 32 random bytes that are never used again."""

    def __init__(self, role: Role, *, key: bytes | None, node: bytes, nonce: bytes) -> None:
        authentication = Authentication.NONE if key is None else Authentication.PRE_SHARED_KEY
        self._key = key
        self._own = Greeting(role, authentication, node, nonce)
        self._own_greeting = encode_greeting(self._own)
        self._outgoing: list[Buffer] = [self._own_greeting]
        self._peer: Greeting | None = None
        self._peer_greeting = b""
        self._handshake = memoryview(bytearray(GREETING.size))
        self._filled = 0
        self._reader: MessageReader | None = None
        self._state = State.GREETING
        self._send_kind, self._receive_kind = (REQUEST, REPLY) if role is Role.CLIENT else (REPLY, REQUEST)

    @property
    def state(self) -> State:
        """What the connection waits for."""
        return self._state

    @property
    def peer(self) -> Greeting | None:
        """What the peer said of itself; None before it did. Proven only once the state is READY."""
        return self._peer

    @property
    def held_size(self) -> int:
        """Bytes of memory of a large message that is being received; 0: none is."""
        return 0 if self._reader is None else self._reader.held_size

    def receive_buffer(self) -> memoryview:
        """Return where the next received bytes go; never empty while `next_event` returns None."""
        if self._reader is not None:
            return self._reader.receive_buffer()
        self._require_open()
        return self._handshake[self._filled :]

    def received(self, count: int) -> None:
        """Note that `count` bytes, at least one, arrived in the receive buffer."""
        self._require_open()
        if count < 1:
            raise LocalProtocolError("received nothing; the end of the stream is reported with end()")
        if self._reader is not None:
            self._reader.received(count)
        else:
            self._filled += count

    def next_event(self) -> Event | None:
        """Return what the received bytes mean next, or None when more bytes are needed.

        Raises:
            ProtocolError: the peer broke the rules.
            AuthenticationError: the peer's key is not ours, or only one side has one.
            StoreUnreachableError: the peer is too busy.
        """
        if self._reader is not None:
            return self._next_message(self._reader)
        self._require_open()
        if self._filled < self._handshake.nbytes:
            return None
        whole = bytes(self._handshake)
        match self._state:
            case State.GREETING:
                return self._greeted(whole)
            case _:
                return self._judged(whole)

    def feed(self, received: Buffer) -> list[Event]:
        """Take received bytes of any number and return all events they make; for small connections and tests.

        Raises: as `next_event`.
        """
        events: list[Event] = []
        rest = memoryview(received)
        while rest.nbytes:
            space = self.receive_buffer()
            count = min(space.nbytes, rest.nbytes)
            space[:count] = rest[:count]
            rest = rest[count:]
            self.received(count)
            while (event := self.next_event()) is not None:
                events.append(event)
        return events

    def end(self) -> None:
        """Note that the stream ended or was closed; idempotent."""
        if self._state is not State.CLOSED:
            self._advance(Received.END)

    def send(self, request_id: int, message: AnyMessage, payload: Sequence[Buffer] = ()) -> list[Buffer]:
        """Return the buffers that carry a message: a request from a client, a reply from a server.

        The payload's buffers are among them as they are: they must not change until they are sent.
        """
        if self._state is not State.READY:
            raise LocalProtocolError(f"sent {type(message).__name__} while waiting for {self._state.value}")
        try:
            return encode_message(self._send_kind, request_id, message, payload)
        except (ValueError, OverflowError) as error:
            raise LocalProtocolError(str(error)) from error

    def take_outgoing(self) -> list[Buffer]:
        """Return what the handshake wants to be sent, once; also after an error."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    @property
    def has_outgoing(self) -> bool:
        """Whether `take_outgoing` has something to send."""
        return bool(self._outgoing)

    def refuse_busy(self) -> None:
        """Tell the peer that there are too many connections, and close."""
        self._outgoing.append(encode_verdict(Verdict(Reason.BUSY, NO_PROOF)))
        self.end()

    def _greeted(self, packed: bytes) -> Greeted:
        try:
            peer = decode_greeting(packed)
        except ProtocolError as error:
            self._fail(error)
        self._peer = peer
        self._peer_greeting = packed
        reason = judge_greeting(self._own, peer)
        if reason is not Reason.ACCEPTED:
            self._outgoing.append(encode_verdict(Verdict(reason, NO_PROOF)))
            self._fail(refusal(reason, self._own, peer, by_peer=False))
        if self._own.role is Role.CLIENT:
            self._accept()
        self._handshake = memoryview(bytearray(VERDICT.size))
        self._filled = 0
        self._advance(Received.GREETING)
        return Greeted(peer)

    def _judged(self, packed: bytes) -> Ready:
        peer = self._peer
        assert peer is not None
        try:
            verdict = decode_verdict(packed)
        except ProtocolError as error:
            self._fail(error)
        if verdict.reason is not Reason.ACCEPTED:
            self._fail(refusal(verdict.reason, self._own, peer, by_peer=True))
        if not self._is_proven(verdict.proof, peer.role):
            self._outgoing.append(encode_verdict(Verdict(Reason.KEY_DIFFERS, NO_PROOF)))
            self._fail(refusal(Reason.KEY_DIFFERS, self._own, peer, by_peer=False))
        if self._own.role is Role.SERVER:
            self._accept()
        self._advance(Received.VERDICT)
        self._reader = MessageReader()
        return Ready(peer)

    def _next_message(self, reader: MessageReader) -> MessageReceived | None:
        try:
            raw = reader.next_message()
            if raw is None:
                return None
            header, body, payload = raw
            if header.kind != self._receive_kind:
                raise ProtocolError(f"message kind {header.kind}: expected {self._receive_kind} from this side")
            message = decode_body(body)
        except ProtocolError as error:
            self._fail(error)
        # READY stays READY; the table is not asked on the hot path.
        return MessageReceived(header.request_id, message, payload, header.body_size + header.payload_size)

    def _accept(self) -> None:
        proof = NO_PROOF
        if self._key is not None:
            client_greeting, server_greeting = self._greetings()
            proof = make_proof(
                self._key, self._own.role, client_greeting=client_greeting, server_greeting=server_greeting
            )
        self._outgoing.append(encode_verdict(Verdict(Reason.ACCEPTED, proof)))

    def _is_proven(self, proof: bytes, prover: Role) -> bool:
        if self._key is None:
            return True
        client_greeting, server_greeting = self._greetings()
        return is_proof(proof, self._key, prover, client_greeting=client_greeting, server_greeting=server_greeting)

    def _greetings(self) -> tuple[bytes, bytes]:
        if self._own.role is Role.CLIENT:
            return self._own_greeting, self._peer_greeting
        return self._peer_greeting, self._own_greeting

    def _fail(self, error: ForebayError) -> NoReturn:
        self._advance(Received.VIOLATION)
        raise error

    def _advance(self, received: Received) -> None:
        state = TRANSITIONS.get((self._state, received))
        if state is None:
            raise LocalProtocolError(f"{received.value} while waiting for {self._state.value}")
        self._state = state
        if state is State.CLOSED:
            self._reader = None

    def _require_open(self) -> None:
        if self._state is State.CLOSED:
            raise LocalProtocolError("used after it was closed")

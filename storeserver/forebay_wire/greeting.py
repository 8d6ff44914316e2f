"""The handshake's two fixed-size messages: the greeting, and the verdict that follows it.

Both sides send a greeting at once. Then the client sends its verdict, and the server, if it accepts the client's, its
own. Whoever is not content sends a verdict with a reason and closes. Nothing here has a size that a peer chooses.

Greeting, 80 bytes, little-endian:

    offset  size  type  field           meaning
    ------  ----  ----  --------------  --------------------------------------------------------
         0     8  8s    magic           "FOREBAY" and a newline
         8     2  u16   version_min     oldest protocol version that the sender speaks
        10     2  u16   version_max     newest one
        12     1  u8    role            1 client, 2 server
        13     1  u8    authentication  0 none, 1 HMAC-SHA256 with a pre-shared key
        14     2  u16   reserved        0
        16     8  u64   features        bits both must have to use a feature; unknown ones are ignored
        24    16  16s   node            UUID of the store, or of the cache device or other client
        40    32  32s   nonce           random, new for each connection
        72     8  u64   greeting_xxh3   over the 72 bytes before it

Verdict, 48 bytes, little-endian:

    offset  size  type  field           meaning
    ------  ----  ----  --------------  --------------------------------------------------------
         0     4  u32   magic           0x56574246, "FBWV"
         4     4  u32   reason          0 accepted, else why the sender closes (see Reason)
         8    32  32s   proof           of the key, see forebay_wire.auth; zeros without authentication
        40     8  u64   verdict_xxh3    over the 40 bytes before it
"""

import enum
import struct
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import AuthenticationError, ForebayError, ProtocolError, StoreUnreachableError
from forebay_core.units import ID_SIZE, Buffer

PROTOCOL_VERSION_MIN: Final = 3  # 2 knows no snapshots: a store would commit a cut and forget the one it ends at
PROTOCOL_VERSION_MAX: Final = 3
FEATURES: Final = 0
NONCE_SIZE: Final = 32
PROOF_SIZE: Final = 32
NO_PROOF: Final = bytes(PROOF_SIZE)

GREETING_MAGIC: Final = b"FOREBAY\n"
GREETING: Final = struct.Struct("<8sHHBBHQ16s32sQ")
VERDICT_MAGIC: Final = 0x56574246
VERDICT: Final = struct.Struct("<II32sQ")
assert GREETING.size == 80
assert VERDICT.size == 48

_U64: Final = struct.Struct("<Q")


class Role(enum.IntEnum):
    """Who asks and who answers."""

    CLIENT = 1
    SERVER = 2


class Authentication(enum.IntEnum):
    """How the two sides prove themselves."""

    NONE = 0
    PRE_SHARED_KEY = 1


class Reason(enum.IntEnum):
    """Why the sender of a verdict closes the connection."""

    ACCEPTED = 0
    VERSION = 1
    SENDER_HAS_NO_KEY = 2
    RECEIVER_HAS_NO_KEY = 3
    KEY_DIFFERS = 4
    ROLE = 5
    BUSY = 6


class Greeting(NamedTuple):
    """What one side says of itself."""

    role: Role
    authentication: Authentication
    node: bytes
    nonce: bytes
    version_min: int = PROTOCOL_VERSION_MIN
    version_max: int = PROTOCOL_VERSION_MAX
    features: int = FEATURES


class Verdict(NamedTuple):
    """Whether the sender goes on, and its proof of the key."""

    reason: Reason
    proof: bytes


def encode_greeting(greeting: Greeting) -> bytes:
    """Return the greeting's 80 bytes."""
    assert len(greeting.node) == ID_SIZE
    assert len(greeting.nonce) == NONCE_SIZE
    packed = GREETING.pack(
        GREETING_MAGIC,
        greeting.version_min,
        greeting.version_max,
        greeting.role,
        greeting.authentication,
        0,
        greeting.features,
        greeting.node,
        greeting.nonce,
        0,
    )
    return _sealed(packed)


def decode_greeting(buffer: Buffer) -> Greeting:
    """Return the greeting in exactly 80 bytes.

    Raises:
        ProtocolError: the peer is no Forebay, or the bytes were damaged on the way.
    """
    assert len(buffer) == GREETING.size
    magic, version_min, version_max, role, authentication, _, features, node, nonce, _ = GREETING.unpack(buffer)
    if magic != GREETING_MAGIC:
        raise ProtocolError(f"the peer does not speak the Forebay protocol: it began with {magic!r}")
    _check_seal(buffer, "greeting")
    if role not in tuple(Role) or authentication not in tuple(Authentication) or not version_min <= version_max:
        raise ProtocolError(
            f"greeting with role {role}, authentication {authentication}, versions {version_min} to {version_max}"
        )
    return Greeting(Role(role), Authentication(authentication), node, nonce, version_min, version_max, features)


def encode_verdict(verdict: Verdict) -> bytes:
    """Return the verdict's 48 bytes."""
    assert len(verdict.proof) == PROOF_SIZE
    return _sealed(VERDICT.pack(VERDICT_MAGIC, verdict.reason, verdict.proof, 0))


def decode_verdict(buffer: Buffer) -> Verdict:
    """Return the verdict in exactly 48 bytes.

    Raises:
        ProtocolError: it is none, or the bytes were damaged on the way.
    """
    assert len(buffer) == VERDICT.size
    magic, reason, proof, _ = VERDICT.unpack(buffer)
    if magic != VERDICT_MAGIC:
        raise ProtocolError(f"verdict magic: expected {VERDICT_MAGIC:#x}, found {magic:#x}")
    _check_seal(buffer, "verdict")
    if reason not in tuple(Reason):
        raise ProtocolError(f"the peer closed the connection for reason {reason}, which this version does not know")
    return Verdict(Reason(reason), proof)


def judge_greeting(own: Greeting, peer: Greeting) -> Reason:
    """Return whether two sides with these greetings may go on, as `own` says it to the peer."""
    if peer.role == own.role:
        return Reason.ROLE
    if max(own.version_min, peer.version_min) > min(own.version_max, peer.version_max):
        return Reason.VERSION
    if peer.authentication == own.authentication:
        return Reason.ACCEPTED
    if own.authentication is Authentication.NONE:
        return Reason.SENDER_HAS_NO_KEY
    return Reason.RECEIVER_HAS_NO_KEY


def refusal(reason: Reason, own: Greeting, peer: Greeting, *, by_peer: bool) -> ForebayError:
    """Return the error that ends a handshake for this reason, in words for our side.

    `by_peer` tells whether the peer gave the reason; then sender and receiver are the other way round.
    """
    if by_peer and reason in _SEEN_FROM_THERE:
        reason = _SEEN_FROM_THERE[reason]
    match reason:
        case Reason.VERSION:
            return ProtocolError(
                f"the peer speaks protocol versions {peer.version_min} to {peer.version_max}, "
                f"we speak {own.version_min} to {own.version_max}: upgrade the older side"
            )
        case Reason.SENDER_HAS_NO_KEY:
            return AuthenticationError("the peer has a key and we have none: give this side the peer's key file")
        case Reason.RECEIVER_HAS_NO_KEY:
            return AuthenticationError("we have a key and the peer has none: give the peer the same key file")
        case Reason.KEY_DIFFERS:
            return AuthenticationError("the peer's key differs from ours: give both sides the same key file")
        case Reason.ROLE:
            return ProtocolError(f"both sides want to be {own.role.name.lower()}")
        case Reason.BUSY:
            return StoreUnreachableError("the peer has too many connections: try again later")
        case Reason.ACCEPTED:
            raise AssertionError("an accepted handshake is no error")


_SEEN_FROM_THERE: Final = {
    Reason.SENDER_HAS_NO_KEY: Reason.RECEIVER_HAS_NO_KEY,
    Reason.RECEIVER_HAS_NO_KEY: Reason.SENDER_HAS_NO_KEY,
}


def _sealed(packed: bytes) -> bytes:
    body = packed[: -_U64.size]
    return body + _U64.pack(checksum(body))


def _check_seal(buffer: Buffer, what: str) -> None:
    view = memoryview(buffer)
    (expected,) = _U64.unpack_from(view, view.nbytes - _U64.size)
    found = checksum(view[: -_U64.size])
    if found != expected:
        raise ProtocolError(f"{what} checksum: expected {expected:#x}, found {found:#x}")

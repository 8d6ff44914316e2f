"""The header around every message: sizes, request id and checksums.

A message is a header, a body (one `AnyMessage` as MessagePack) and a payload of raw bytes. The header has a checksum of
its own, so that a flipped size is noticed at once and not after waiting for bytes that never come.

Message header, 40 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  ----------------------------------------------------
         0     4  u32   magic         0x4D574246, "FBWM"
         4     2  u16   kind          1 request (client to server), 2 reply
         6     2  u16   reserved      0
         8     8  u64   request_id    chosen by the client, repeated in the reply
        16     4  u32   body_size     bytes of the body, 1 to BODY_SIZE_MAX
        20     4  u32   payload_size  bytes of the payload, 0 to PAYLOAD_SIZE_MAX
        24     8  u64   content_xxh3  over body and payload
        32     8  u64   header_xxh3   over the 32 bytes before it
"""

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from xxhash import xxh3_64

from forebay_core.checksums import checksum
from forebay_core.errors import ProtocolError
from forebay_core.units import Buffer
from forebay_wire.limits import BODY_SIZE_MAX, PAYLOAD_SIZE_MAX
from forebay_wire.messages import AnyMessage

MESSAGE_MAGIC: Final = 0x4D574246
MESSAGE_HEADER: Final = struct.Struct("<IHHQIIQQ")
REQUEST: Final = 1
REPLY: Final = 2
assert MESSAGE_HEADER.size == 40

_PREFIX: Final = struct.Struct("<IHHQIIQ")
_U64: Final = struct.Struct("<Q")
_encode_body: Final = msgspec.msgpack.Encoder().encode
_decode_body: Final[Callable[[Buffer], AnyMessage]] = msgspec.msgpack.Decoder(AnyMessage).decode


class MessageHeader(NamedTuple):
    """The checked header of one message."""

    kind: int
    request_id: int
    body_size: int
    payload_size: int
    content_xxh3: int


def encode_message(kind: int, request_id: int, message: AnyMessage, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the buffers of one message: header and body joined, then the payload's buffers as they are.

    Raises:
        ValueError: body or payload is larger than a message may be; that is a mistake of the caller.
    """
    body = _encode_body(message)
    payload_size = 0
    if payload:
        digest = xxh3_64(body)
        for part in payload:
            payload_size += part.nbytes if isinstance(part, memoryview) else len(part)
            digest.update(part)
        content_xxh3 = digest.intdigest()
    else:
        content_xxh3 = checksum(body)
    if len(body) > BODY_SIZE_MAX or payload_size > PAYLOAD_SIZE_MAX:
        raise ValueError(
            f"{type(message).__name__} of {len(body)} and {payload_size} bytes is larger than "
            f"{BODY_SIZE_MAX} and {PAYLOAD_SIZE_MAX}"
        )
    prefix = _PREFIX.pack(MESSAGE_MAGIC, kind, 0, request_id, len(body), payload_size, content_xxh3)
    return [prefix + _U64.pack(checksum(prefix)) + body, *payload]


def decode_header(buffer: Buffer, offset: int = 0) -> MessageHeader:
    """Return the checked header at `offset`, which the buffer holds whole.

    Raises:
        ProtocolError: it is not as the table above says, or a size is beyond its limit.
    """
    fields = MESSAGE_HEADER.unpack_from(buffer, offset)
    magic, kind, reserved, request_id, body_size, payload_size, content_xxh3, header_xxh3 = fields
    if magic != MESSAGE_MAGIC:
        raise ProtocolError(f"message magic: expected {MESSAGE_MAGIC:#x}, found {magic:#x}")
    found = checksum(memoryview(buffer)[offset : offset + _PREFIX.size])
    if found != header_xxh3:
        raise ProtocolError(f"message header checksum: expected {header_xxh3:#x}, found {found:#x}")
    if kind not in (REQUEST, REPLY) or reserved != 0:
        raise ProtocolError(f"message kind {kind} and reserved {reserved}: expected 1 or 2, and 0")
    if not (1 <= body_size <= BODY_SIZE_MAX and payload_size <= PAYLOAD_SIZE_MAX):
        raise ProtocolError(
            f"message of {body_size} and {payload_size} bytes: "
            f"at most {BODY_SIZE_MAX} and {PAYLOAD_SIZE_MAX} are allowed"
        )
    return MessageHeader(kind, request_id, body_size, payload_size, content_xxh3)


def decode_body(body: Buffer) -> AnyMessage:
    """Return the message in a body whose checksum has been compared.

    Raises:
        ProtocolError: it is no message of this version.
    """
    try:
        return _decode_body(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise ProtocolError(f"message body of {len(body)} bytes: {error}") from error


def check_content(header: MessageHeader, found: int) -> None:
    """Compare the checksum of the content that arrived.

    Raises:
        ProtocolError: it differs.
    """
    if found != header.content_xxh3:
        raise ProtocolError(
            f"message content checksum of request {header.request_id}: "
            f"expected {header.content_xxh3:#x}, found {found:#x}"
        )

"""Messages on the wire: layout, golden bytes, and that nothing damaged or oversized is ever accepted."""

import struct
import typing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layout_tables
from forebay_core.errors import ProtocolError
from forebay_wire import framing, messages
from forebay_wire.framing import MESSAGE_HEADER, REPLY, REQUEST, decode_body, decode_header, encode_message
from forebay_wire.limits import BODY_SIZE_MAX, PAYLOAD_SIZE_MAX
from forebay_wire.messages import AnyMessage, Done, Failed, Message, Ping
from forebay_wire.reader import MessageReader

KINDS: list[type[Message]] = list(typing.get_args(AnyMessage))
GOLDEN = Path(__file__).with_name("golden_messages.txt")


def sample(kind: type) -> object:
    """Return the value of a type that the golden file holds: every field different from its default."""
    if typing.get_origin(kind) is tuple:
        return (sample(typing.get_args(kind)[0]),)
    if kind is bytes:
        return bytes(range(16))
    if kind is str:
        return "vol-ü"
    if kind is bool:
        return True
    if kind is int:
        return 3 << 44 | 7
    assert issubclass(kind, msgspec.Struct)
    return kind(**{field.name: sample(field.type) for field in msgspec.structs.fields(kind)})


def golden() -> dict[str, str]:
    return dict(line.split(" ", 1) for line in GOLDEN.read_text().splitlines())


def whole(message: AnyMessage, payload: bytes = b"", kind: int = REQUEST, request_id: int = 5) -> bytes:
    return b"".join(encode_message(kind, request_id, message, (payload,) if payload else ()))


def read_one(packed: bytes) -> tuple[AnyMessage, bytes]:
    """Feed the reader as a socket would; fail if that is not exactly one message."""
    reader = MessageReader()
    at = 0
    while True:
        raw = reader.next_message()
        if raw is not None:
            assert at == len(packed)
            assert reader.next_message() is None
            return decode_body(raw.body), bytes(raw.payload)
        space = reader.receive_buffer()
        count = min(space.nbytes, len(packed) - at)
        if count == 0:
            raise EOFError
        space[:count] = packed[at : at + count]
        at += count
        reader.received(count)


def test_the_table_is_the_struct() -> None:
    layout_tables.assert_matches(framing, "Message header", MESSAGE_HEADER)


def test_the_piece_table_is_the_dtype() -> None:
    rows = layout_tables.table(messages, "Piece, 28 bytes")
    fields = messages.PIECE_DTYPE.fields
    assert fields is not None
    assert [row.name for row in rows] == list(fields)
    for row in rows:
        dtype, offset = fields[row.name][:2]
        assert (row.offset, row.size, row.type) == (offset, dtype.itemsize, f"u{8 * dtype.itemsize}")


def test_the_header_is_what_it_always_was() -> None:
    assert whole(Ping(), b"abc", request_id=0x0102030405060708).hex() == (
        "4642574d0100000008070605040302010200000003000000dfd2fbda3997beef17768e123d93579e9103616263"
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_is_what_it_always_was(kind: type[Message]) -> None:
    """After adding a message: append the line that the failure shows to golden_messages.txt; never change one."""
    packed = b"".join(encode_message(REQUEST, 1, sample(kind)))[MESSAGE_HEADER.size :]
    assert f"{kind.__name__} {packed.hex()}" == f"{kind.__name__} {golden().get(kind.__name__)}"
    assert decode_body(packed) == sample(kind)


def test_tags_are_unique_and_every_message_is_in_the_golden_file() -> None:
    tags = [msgspec.msgpack.decode(bytes.fromhex(line))[0] for line in golden().values()]
    assert len(set(tags)) == len(tags)
    assert set(golden()) == {kind.__name__ for kind in KINDS}


def test_an_older_peer_skips_fields_that_a_newer_one_added() -> None:
    assert decode_body(msgspec.msgpack.encode([11, "name", "added later", 7])) == messages.GetVolume("name")


def test_a_read_without_an_epoch_is_not_checked_for_one() -> None:
    read = decode_body(msgspec.msgpack.encode([30, b"v" * 16, b"", 7]))
    assert isinstance(read, messages.Read) and (read.epoch, read.session) == (0, 0)


def test_fields_with_a_default_may_be_missing() -> None:
    assert decode_body(msgspec.msgpack.encode([30, b"v" * 16, b""])) == messages.Read(b"v" * 16, b"", 0)


@pytest.mark.parametrize("payload", [b"", b"payload of a message"])
def test_every_flipped_bit_is_noticed(payload: bytes) -> None:
    packed = whole(Failed("code", "text"), payload)
    for bit in range(len(packed) * 8):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            read_one(bytes(flipped))


def test_a_flipped_size_is_noticed_before_the_rest_arrives() -> None:
    packed = bytearray(whole(Ping(), bytes(100)))
    packed[22] ^= 1  # payload_size: 64 KiB more than will ever come
    with pytest.raises(ProtocolError, match="header checksum"):
        read_one(bytes(packed))


def sealed(kind: int = REQUEST, reserved: int = 0, body_size: int = 2, payload_size: int = 0) -> bytes:
    prefix = struct.pack("<IHHQIIQ", framing.MESSAGE_MAGIC, kind, reserved, 1, body_size, payload_size, 0)
    return prefix + struct.pack("<Q", framing.checksum(prefix))


@pytest.mark.parametrize(
    "packed",
    [
        sealed(body_size=0),
        sealed(body_size=BODY_SIZE_MAX + 1),
        sealed(body_size=2**32 - 1),
        sealed(payload_size=PAYLOAD_SIZE_MAX + 1),
        sealed(payload_size=2**32 - 1),
        sealed(kind=0),
        sealed(kind=3),
        sealed(reserved=1),
    ],
)
def test_a_header_beyond_the_limits_is_refused_before_anything_is_allocated(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(packed)


@pytest.mark.parametrize("body", [BODY_SIZE_MAX, 1])
@pytest.mark.parametrize("payload", [PAYLOAD_SIZE_MAX, 0])
def test_a_header_at_the_limits_is_taken(body: int, payload: int) -> None:
    header = decode_header(sealed(body_size=body, payload_size=payload))
    assert (header.body_size, header.payload_size) == (body, payload)


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x90",
        b"\x91\xcd\x03\xe7",  # an unknown tag
        b"\x91\x03\x00",  # trailing bytes
        b"\x92\x0b\x07",  # a number where a name belongs
        b"\x92\x0b\xa1\xff",  # not UTF-8
        b"\x91\x0b",  # a field is missing
        b"\x92\x03" + b"\x91" * 200_000 + b"\x90",  # nested beyond all measure, in a field that is skipped
        b"\x92\x0b\xdb\xff\xff\xff\xff",  # a string of 4 GiB that is not there
        b"\xdd\xff\xff\xff\xff\x0e",
        b"\x93\x0e\xdd\xff\xff\xff\xff",  # 4 billion volumes that are not there
        b"\x93\x0a\xa1a\xcb" + struct.pack(">d", 1e300),
    ],
)
def test_a_body_that_is_no_message_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_body(body)


def test_what_is_too_large_is_not_encoded() -> None:
    half = bytes(PAYLOAD_SIZE_MAX // 2)
    encode_message(REPLY, 1, Done(), (half, half))
    with pytest.raises(ValueError, match="larger"):
        encode_message(REPLY, 1, Done(), (half, half, b"x"))
    with pytest.raises(ValueError, match="larger"):
        encode_message(REPLY, 1, Failed("x", "y" * BODY_SIZE_MAX))


def test_payload_parts_are_not_copied() -> None:
    parts = (memoryview(b"abc"), bytearray(b"def"))
    buffers = encode_message(REQUEST, 1, Ping(), parts)
    assert all(buffer is part for buffer, part in zip(buffers[1:], parts, strict=True))
    assert read_one(b"".join(buffers)) == (Ping(), b"abcdef")


def test_numpy_payloads_count_in_bytes() -> None:
    words = memoryview(bytes(range(64))).cast("Q")
    buffers = encode_message(REQUEST, 1, Ping(), (words,))
    assert decode_header(bytes(buffers[0])).payload_size == 64


def values(kind: type) -> st.SearchStrategy[object]:
    """Return a strategy for all values of a field's type."""
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=3).map(tuple)
    if kind is int:
        return st.integers(-(2**63), 2**64 - 1)
    if kind in (bytes, str, bool):
        return st.from_type(kind)
    return st.builds(kind, **{field.name: values(field.type) for field in msgspec.structs.fields(kind)})


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    message=st.one_of([values(kind) for kind in KINDS]),
    payload=st.binary(max_size=300_000),
    request_id=st.integers(0, 2**64 - 1),
)
def test_any_message_comes_out_as_it_went_in(message: AnyMessage, payload: bytes, request_id: int) -> None:
    packed = whole(message, payload, request_id=request_id)
    assert decode_header(packed).request_id == request_id
    assert read_one(packed) == (message, payload)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(garbage=st.binary(min_size=MESSAGE_HEADER.size, max_size=200))
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_one(garbage)

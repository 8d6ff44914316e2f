"""The tables of the NBD formats say what the structs do."""

import re
import struct

import pytest

from forebay_cache.format import nbd, nbd_options
from forebay_cache.format.nbd_options import BadOptionError

CODES = {"u16": "H", "u32": "I", "u64": "Q"}
TABLE = re.compile(r"^([A-Z][^\n]*?), (\d+) bytes[^\n]*:\n\n((?:    [^\n]*\n)+)", re.MULTILINE)
ROW = re.compile(r"^ +(\d+) +(\d+)  (\w+) +\w+  +\S", re.MULTILINE)

STRUCTS = {
    "Compact request": nbd.REQUEST,
    "Extended request": nbd.EXTENDED_REQUEST,
    "Simple reply": nbd.SIMPLE_REPLY,
    "Structured chunk": nbd.STRUCTURED_CHUNK,
    "Extended chunk": nbd.EXTENDED_CHUNK,
    "Hole payload": nbd.HOLE_PAYLOAD,
    "Error payload": nbd.ERROR_PAYLOAD,
    "Status descriptor": nbd.STATUS_DESCRIPTOR,
    "Extended status descriptor": nbd.EXTENDED_STATUS_DESCRIPTOR,
    "Greeting": nbd_options.GREETING,
    "Option": nbd_options.OPTION,
    "Option reply": nbd_options.OPTION_REPLY,
    "Answer to EXPORT_NAME": nbd_options.EXPORT_NAME_REPLY,
    "Export information": nbd_options.EXPORT_INFORMATION,
    "Block size information": nbd_options.BLOCK_SIZE_INFORMATION,
}


def tables() -> dict[str, tuple[int, str]]:
    text = (nbd.__doc__ or "") + (nbd_options.__doc__ or "")
    return {name: (int(size), body) for name, size, body in TABLE.findall(text)}


def test_every_struct_has_a_table_and_every_table_a_struct() -> None:
    assert sorted(tables()) == sorted(STRUCTS)


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_tables_agree_with_structs(name: str) -> None:
    size, body = tables()[name]
    at = 0
    codes = ""
    for offset, field_size, kind in ROW.findall(body):
        assert int(offset) == at
        assert int(field_size) == struct.calcsize(">" + CODES[kind])
        at += int(field_size)
        codes += CODES[kind]
    assert at == size == STRUCTS[name].size
    assert STRUCTS[name].format == ">" + codes


def test_golden_bytes_of_requests_and_replies() -> None:
    request = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, nbd.CMD_FLAG_FUA, nbd.CMD_WRITE, 0x0102030405060708, 4096, 512)
    assert request.hex() == "2560951300010001010203040506070800000000000010000000" + "0200"
    extended = nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, 32, nbd.CMD_WRITE, 7, 1 << 40, 1 << 33)
    assert extended.hex() == "21e41c7100200001000000000000000700000100000000000000000200000000"
    assert nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 22, 7).hex() == "67446698000000160000000000000007"
    chunk = nbd.STRUCTURED_DATA.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, 1, 7, 12, 4096)
    assert chunk.hex() == "668e33ef0001000100000000000000070000000c0000000000001000"


def test_golden_bytes_of_the_handshake() -> None:
    greeting = nbd_options.GREETING.pack(nbd_options.NBD_MAGIC, nbd_options.OPTION_MAGIC, 3)
    assert greeting == b"NBDMAGICIHAVEOPT\0\3"
    reply = nbd_options.encode_reply(nbd_options.OPT_GO, nbd_options.REP_ERR_UNKNOWN, b"no")
    assert reply.hex() == "0003e889045565a9000000078000000600000002" + b"no".hex()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\5abcd\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\1a\0",
        b"\0\0\0\1a\0\1",
        b"\0\0\0\1a\0\0x",
        b"\0\0\0\1\0\0\0",
        b"\0\0\0\1\xff\0\0",
        b"\0\0\x10\1" + b"a" * 4097 + b"\0\0",
    ],
)
def test_malformed_export_queries_are_refused(payload: bytes) -> None:
    with pytest.raises(BadOptionError):
        nbd_options.decode_export_query(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0\1a",
        b"\0\0\0\1a\0\0\0\1",
        b"\0\0\0\1a\xff\xff\xff\xff",
        b"\0\0\0\1a\0\0\0\1\0\0\0\5abcd",
        b"\0\0\0\1a\0\0\0\0x",
        b"\0\0\0\1a\0\0\0\1\0\0\0\1\0",
    ],
)
def test_malformed_context_queries_are_refused(payload: bytes) -> None:
    with pytest.raises(BadOptionError):
        nbd_options.decode_context_query(payload)

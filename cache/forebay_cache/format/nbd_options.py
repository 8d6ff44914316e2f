"""NBD, handshake: greeting, options and their replies as bytes. Big-endian; fixed newstyle only.

Greeting, 18 bytes, sent by the server:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------
         0     8  u64   magic          0x4e42444d41474943, "NBDMAGIC"
         8     8  u64   option_magic   0x49484156454f5054, "IHAVEOPT"
        16     2  u16   flags          HANDSHAKE_FLAG_*

The client answers with a u32 of HANDSHAKE_FLAG_*, then sends options.

Option, 16 bytes, followed by its data:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------
         0     8  u64   magic          0x49484156454f5054
         8     4  u32   option         OPT_*
        12     4  u32   length         bytes of data

Option reply, 20 bytes, followed by its data:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------
         0     8  u64   magic          0x0003e889045565a9
         8     4  u32   option         of the option
        12     4  u32   type           REP_*
        16     4  u32   length         bytes of data

Answer to EXPORT_NAME, 10 bytes, followed by 124 zeros unless NO_ZEROES was agreed:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------
         0     8  u64   size           bytes of the export
         8     2  u16   flags          FLAG_*

Export information, 12 bytes:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------
         0     2  u16   type           0
         2     8  u64   size           bytes of the export
        10     2  u16   flags          FLAG_*

Block size information, 14 bytes:

    offset  size  type  field          meaning
    ------  ----  ----  -------------  --------------------------------------------
         0     2  u16   type           3
         2     4  u32   minimum        bytes
         6     4  u32   preferred      bytes
        10     4  u32   maximum        bytes of one payload

Name and description information are a u16 type and the text. INFO and GO carry a u32 size and the name, a u16
count and that many u16 types; LIST and SET of meta contexts a u32 size and the name, a u32 count and that many
times a u32 size and a query. MEMORY carries a u32 descriptor and a u64 inode.
"""

import struct
from typing import Final, NamedTuple

from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, MIB

NBD_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
MEMORY: Final = struct.Struct(">IQ")
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
EXPORT_INFORMATION: Final = struct.Struct(">HQH")
BLOCK_SIZE_INFORMATION: Final = struct.Struct(">HIII")
EXPORT_NAME_ZEROES: Final = bytes(124)

HANDSHAKE_FLAG_FIXED_NEWSTYLE: Final = 1
HANDSHAKE_FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11
OPT_MEMORY: Final = 0x46425901
"""Our own; its data is MEMORY, a descriptor of the client's process and the inode behind it: the number may stand for
another one by the time that we look. Once that is acknowledged, a READ or WRITE may have its bytes in that memory: see
CMD_FLAG_IN_MEMORY."""

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = 0x80000001
REP_ERR_POLICY: Final = 0x80000002
REP_ERR_INVALID: Final = 0x80000003
REP_ERR_UNKNOWN: Final = 0x80000006
REP_ERR_TOO_BIG: Final = 0x80000009
REP_ERR_EXT_HEADER_REQD: Final = 0x8000000A

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11

STRING_SIZE_MAX: Final = 4096
BLOCK_SIZE_MIN: Final = 1
BLOCK_SIZE_PREFERRED: Final = BLOCK_SIZE
PAYLOAD_SIZE_MAX: Final = 32 * MIB

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")


class BadOptionError(ForebayError):
    """The data of a known option is malformed; `reply_type` is what the client is told."""

    def __init__(self, text: str, reply_type: int = REP_ERR_INVALID) -> None:
        super().__init__(text)
        self.reply_type = reply_type


class ExportQuery(NamedTuple):
    """The data of INFO and GO."""

    name: str
    wanted: frozenset[int]


class ContextQuery(NamedTuple):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def decode_export_query(data: bytes) -> ExportQuery:
    """Return the data of INFO or GO.

    Raises:
        BadOptionError: it is malformed.
    """
    name, at = _take_string(data, 0)
    count, at = _take(_U16, data, at)
    if len(data) - at != 2 * count:
        raise BadOptionError(f"{count} information requests do not fit {len(data) - at} bytes")
    return ExportQuery(name, frozenset(struct.unpack_from(f">{count}H", data, at)))


def decode_context_query(data: bytes) -> ContextQuery:
    """Return the data of LIST_META_CONTEXT or SET_META_CONTEXT.

    Raises:
        BadOptionError: it is malformed.
    """
    name, at = _take_string(data, 0)
    count, at = _take(_U32, data, at)
    if count * 4 > len(data) - at:
        raise BadOptionError(f"{count} queries do not fit {len(data) - at} bytes")
    queries: list[str] = []
    for _ in range(count):
        query, at = _take_string(data, at)
        queries.append(query)
    if at != len(data):
        raise BadOptionError(f"{len(data) - at} bytes behind the last query")
    return ContextQuery(name, tuple(queries))


def decode_string(encoded: bytes) -> str:
    """Return an export name or query.

    Raises:
        BadOptionError: it is longer than 4096 bytes, holds a NUL or is not UTF-8.
    """
    if len(encoded) > STRING_SIZE_MAX:
        raise BadOptionError(f"a string of {len(encoded)} bytes; at most {STRING_SIZE_MAX}", REP_ERR_TOO_BIG)
    if 0 in encoded:
        raise BadOptionError("a string holds a NUL byte")
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise BadOptionError("a string is not UTF-8") from error


def encode_reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    """Return one option reply."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply_type, len(data)) + data


def encode_server(name: str) -> bytes:
    """Return the data of one REP_SERVER."""
    encoded = name.encode()
    return _U32.pack(len(encoded)) + encoded


def encode_text(information: int, text: str) -> bytes:
    """Return name or description information."""
    return _U16.pack(information) + text.encode()


def encode_context(context_id: int, name: str) -> bytes:
    """Return the data of one REP_META_CONTEXT."""
    return _U32.pack(context_id) + name.encode()


def _take(field: struct.Struct, data: bytes, at: int) -> tuple[int, int]:
    if len(data) - at < field.size:
        raise BadOptionError("the option's data is too short")
    return field.unpack_from(data, at)[0], at + field.size


def _take_string(data: bytes, at: int) -> tuple[str, int]:
    size, at = _take(_U32, data, at)
    if size > STRING_SIZE_MAX:
        raise BadOptionError(f"a string of {size} bytes; at most {STRING_SIZE_MAX}", REP_ERR_TOO_BIG)
    if size > len(data) - at:
        raise BadOptionError(f"a string of {size} bytes in {len(data) - at}")
    return decode_string(data[at : at + size]), at + size

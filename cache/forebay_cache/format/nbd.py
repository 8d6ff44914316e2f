"""NBD, transmission phase: requests and replies as bytes (doc/proto.md of the NetworkBlockDevice project).

Everything is big-endian. A compact request is answered by simple replies, or by structured chunks when those were
negotiated; with extended headers both requests and replies carry 64-bit lengths.

Compact request, 28 bytes:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   magic   0x25609513
         4     2  u16   flags   CMD_FLAG_*
         6     2  u16   type    CMD_*
         8     8  u64   cookie  returned in every reply
        16     8  u64   offset  first byte
        24     4  u32   length  bytes; WRITE: of the payload that follows

Extended request, 32 bytes:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   magic   0x21e41c71
         4     2  u16   flags   CMD_FLAG_*
         6     2  u16   type    CMD_*
         8     8  u64   cookie  returned in every reply
        16     8  u64   offset  first byte
        24     8  u64   length  bytes; with PAYLOAD_LEN: of the payload that follows

Simple reply, 16 bytes, followed by the bytes of a READ:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   magic   0x67446698
         4     4  u32   error   0 or NbdError
         8     8  u64   cookie  of the request

Structured chunk, 20 bytes, followed by its payload:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   magic   0x668e33ef
         4     2  u16   flags   REPLY_FLAG_DONE on the last chunk
         6     2  u16   type    REPLY_TYPE_*
         8     8  u64   cookie  of the request
        16     4  u32   length  bytes of the payload

Extended chunk, 32 bytes, followed by its payload:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   magic   0x6e8a278c
         4     2  u16   flags   REPLY_FLAG_DONE on the last chunk
         6     2  u16   type    REPLY_TYPE_*
         8     8  u64   cookie  of the request
        16     8  u64   offset  of the request
        24     8  u64   length  bytes of the payload

Hole payload, 12 bytes (that of data is a u64 offset and the bytes):

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     8  u64   offset  first byte
         8     4  u32   length  bytes that read as zeros

Error payload, 6 bytes, followed by the text and, for ERROR_OFFSET, a u64 offset:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   error   NbdError
         4     2  u16   size    bytes of the text

Status descriptor, 8 bytes, behind a u32 context id:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     4  u32   length  bytes
         4     4  u32   flags   STATE_*

Extended status descriptor, 16 bytes, behind a u32 context id and a u32 count of descriptors:

    offset  size  type  field   meaning
    ------  ----  ----  ------  --------------------------------------------------
         0     8  u64   length  bytes
         8     8  u64   flags   STATE_*
"""

import enum
import struct
from typing import Final

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

REQUEST: Final = struct.Struct(">IHHQQI")
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
STRUCTURED_CHUNK: Final = struct.Struct(">IHHQI")
EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
HOLE_PAYLOAD: Final = struct.Struct(">QI")
ERROR_PAYLOAD: Final = struct.Struct(">IH")
STATUS_DESCRIPTOR: Final = struct.Struct(">II")
EXTENDED_STATUS_DESCRIPTOR: Final = struct.Struct(">QQ")

# A chunk's header together with the u64 offset that begins the payload of OFFSET_DATA: packed in one call.
STRUCTURED_DATA: Final = struct.Struct(">IHHQIQ")
EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
assert STRUCTURED_DATA.size == STRUCTURED_CHUNK.size + 8
assert EXTENDED_DATA.size == EXTENDED_CHUNK.size + 8

PLACE: Final = struct.Struct(">Q")

CONTEXT_ID: Final = struct.Struct(">I")
EXTENDED_CONTEXT_ID: Final = struct.Struct(">II")

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1
CMD_FLAG_NO_HOLE: Final = 2
CMD_FLAG_DF: Final = 4
CMD_FLAG_REQ_ONE: Final = 8
CMD_FLAG_FAST_ZERO: Final = 16
CMD_FLAG_PAYLOAD_LEN: Final = 32
CMD_FLAG_IN_MEMORY: Final = 1 << 15
"""Our own, behind OPT_MEMORY: the bytes of a READ or WRITE are in that memory and go over no socket. What follows the
header is PLACE, where."""

REPLY_FLAG_DONE: Final = 1
REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_ERROR: Final = 0x8001
REPLY_TYPE_ERROR_OFFSET: Final = 0x8002

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
STATE_DIRTY: Final = 1
"""Of a context qemu:dirty-bitmap:NAME."""


class NbdError(enum.IntEnum):
    """The errors a reply may carry."""

    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108

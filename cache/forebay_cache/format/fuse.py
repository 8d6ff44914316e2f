"""FUSE, the kernel's protocol on /dev/fuse: requests and replies as bytes (include/uapi/linux/fuse.h, version 7.31).

Little-endian, as the machines are that we run on. Each request is a header and the structure of its opcode; a WRITE
ends with its payload. Each reply is a header and what the opcode answers; the bytes of a READ follow it directly.

Request header, 40 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     4  u32   size          bytes of the whole request
         4     4  u32   opcode        OP_*
         8     8  u64   unique        returned in the reply
        16     8  u64   node          which file, 1 is the folder
        24     4  u32   uid           who asks
        28     4  u32   gid           his group
        32     4  u32   pid           his process
        36     4  4x    unused        not looked at

Reply header, 16 bytes (the error is the negative of an errno, or 0):

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     4  u32   size          bytes of the whole reply
         4     4  u32   error         two's complement
         8     8  u64   unique        of the request

Init request, 16 bytes, of those that we look at:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     4  u32   major         7
         4     4  u32   minor         of the kernel
         8     4  u32   readahead     bytes at most
        12     4  u32   flags         INIT_*

Init reply, 64 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     4  u32   major         7
         4     4  u32   minor         of what we speak
         8     4  u32   readahead     bytes at most
        12     4  u32   flags         INIT_*
        16     2  u16   background    requests that nobody waits for, at most
        18     2  u16   congestion    of them, when the kernel calls the disk busy
        20     4  u32   write_size    bytes of a WRITE at most
        24     4  u32   time_gran     ns
        28     2  u16   pages         of a request at most
        30     2  u16   alignment     0
        32     4  u32   flags2        0
        36    28  28x   unused        not looked at

Read or write request, 40 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   opened        number that OPEN gave
         8     8  u64   offset        first byte
        16     4  u32   length        bytes
        20     4  u32   io_flags      0 for us
        24     8  u64   owner         of locks
        32     4  u32   open_flags    O_* of the file, and O_DSYNC for a write that shall be durable
        36     4  4x    unused        not looked at

Attributes, 88 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   node          number
         8     8  u64   size          bytes
        16     8  u64   sectors       512 bytes each
        24     8  u64   atime         s
        32     8  u64   mtime         s
        40     8  u64   ctime         s
        48    12  12x   fractions     not looked at
        60     4  u32   mode          type and permissions
        64     4  u32   links         names
        68     4  u32   uid           owner
        72     4  u32   gid           group
        76     4  u32   rdev          0
        80     4  u32   block_size    4096
        84     4  u32   flags         0

Set-attributes request, 88 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     4  u32   valid         SET_*: which ones
         4     4  4x    unused1       not looked at
         8     8  u64   opened        number that OPEN gave
        16     8  u64   size          bytes
        24    44  44x   times         not looked at
        68     4  u32   mode          permissions
        72     4  4x    unused2       not looked at
        76     4  u32   uid           owner
        80     4  u32   gid           group
        84     4  4x    unused3       not looked at

Entry prefix, 40 bytes, followed by attributes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   node          number
         8     8  u64   generation    0, numbers are never given again
        16     8  u64   entry_valid   s that the kernel may remember the name
        24     8  u64   attr_valid    s that it may remember the attributes
        32     8  8x    fractions     not looked at

Fallocate request, 32 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   opened        number that OPEN gave
         8     8  u64   offset        first byte
        16     8  u64   length        bytes
        24     4  u32   mode          FALLOC_*
        28     4  4x    unused        not looked at

Seek request, 24 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   opened        number that OPEN gave
         8     8  u64   offset        where to begin
        16     4  u32   whence        SEEK_*
        20     4  4x    unused        not looked at

Open reply, 16 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   opened        our number
         8     4  u32   flags         FOPEN_*
        12     4  4x    unused        not looked at

Directory entry, 24 bytes, followed by the name and zeros up to a multiple of 8:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------
         0     8  u64   node          number
         8     8  u64   offset        where the next READDIR goes on
        16     4  u32   name_size     bytes of the name
        20     4  u32   type          of the file, as in its mode
"""

import struct
from typing import Final

from forebay_core.units import BLOCK_SIZE, MIB

REQUEST_HEADER: Final = struct.Struct("<IIQQIII4x")
REPLY_HEADER: Final = struct.Struct("<IIQ")
INIT_REQUEST: Final = struct.Struct("<IIII")
INIT_REPLY: Final = struct.Struct("<IIIIHHIIHHI28x")
IO_REQUEST: Final = struct.Struct("<QQIIQI4x")
ATTRIBUTES: Final = struct.Struct("<QQQQQQ12xIIIIIII")
SET_ATTRIBUTES: Final = struct.Struct("<I4xQQ44xI4xII4x")
ENTRY_PREFIX: Final = struct.Struct("<QQQQ8x")
FALLOCATE_REQUEST: Final = struct.Struct("<QQQI4x")
SEEK_REQUEST: Final = struct.Struct("<QQI4x")
OPEN_REPLY: Final = struct.Struct("<QI4x")
DIRECTORY_ENTRY: Final = struct.Struct("<QQII")

ATTRIBUTES_PREFIX: Final = bytes(16)
"""GETATTR and SETATTR answer with 0 s of validity before the attributes."""

U32: Final = struct.Struct("<I4x")
U64: Final = struct.Struct("<Q")
STATFS: Final = struct.Struct("<QQQQQIII28x")

OP_LOOKUP: Final = 1
OP_FORGET: Final = 2
OP_GETATTR: Final = 3
OP_SETATTR: Final = 4
OP_OPEN: Final = 14
OP_READ: Final = 15
OP_WRITE: Final = 16
OP_STATFS: Final = 17
OP_RELEASE: Final = 18
OP_FSYNC: Final = 20
OP_INIT: Final = 26
OP_OPENDIR: Final = 27
OP_READDIR: Final = 28
OP_RELEASEDIR: Final = 29
OP_INTERRUPT: Final = 36
OP_DESTROY: Final = 38
OP_BATCH_FORGET: Final = 42
OP_FALLOCATE: Final = 43
OP_LSEEK: Final = 46

INIT_ASYNC_READ: Final = 1 << 0
INIT_BIG_WRITES: Final = 1 << 5
INIT_ASYNC_DIO: Final = 1 << 15
INIT_PARALLEL_DIROPS: Final = 1 << 18
INIT_MAX_PAGES: Final = 1 << 22

SET_MODE: Final = 1 << 0
SET_UID: Final = 1 << 1
SET_GID: Final = 1 << 2
SET_SIZE: Final = 1 << 3

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6

FALLOC_KEEP_SIZE: Final = 1
FALLOC_PUNCH_HOLE: Final = 2
FALLOC_ZERO_RANGE: Final = 16
SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4
O_ACCMODE: Final = 3
O_DSYNC: Final = 0o10000
S_IFDIR: Final = 0o040000
S_IFREG: Final = 0o100000

ROOT_NODE: Final = 1
MAJOR: Final = 7
MINOR: Final = 31
"""Linux 5.4 and newer: what we use is there, and newer kernels speak it."""

WRITE_SIZE_MAX: Final = 1 * MIB
PAYLOAD_OFFSET: Final = REQUEST_HEADER.size + IO_REQUEST.size
"""Where the payload of a WRITE begins. The kernel asks for room for the largest whenever a request is read."""

assert WRITE_SIZE_MAX % BLOCK_SIZE == 0


def encode_error(unique: int, number: int) -> bytes:
    """Return a reply that is an errno, or success without an answer for 0."""
    return REPLY_HEADER.pack(REPLY_HEADER.size, -number & 0xFFFFFFFF, unique)


def encode_reply(unique: int, body: bytes) -> bytes:
    """Return a reply that is no error."""
    return REPLY_HEADER.pack(REPLY_HEADER.size + len(body), 0, unique) + body


def encode_attributes(node: int, *, size: int, mode: int, uid: int, gid: int) -> bytes:
    """Return the attributes of a file or of the folder."""
    return ATTRIBUTES.pack(node, size, size // 512, 0, 0, 0, mode, 1, uid, gid, 0, BLOCK_SIZE, 0)


def encode_directory_entry(node: int, offset: int, name: str, mode: int) -> bytes:
    """Return one entry of READDIR; `offset` is that of the entry behind it."""
    encoded = name.encode()
    padding = bytes(-len(encoded) % 8)
    return DIRECTORY_ENTRY.pack(node, offset, len(encoded), mode >> 12) + encoded + padding

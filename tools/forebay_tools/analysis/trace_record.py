"""Our own trace: a header and records of fixed size, so that 16 bytes are one request.

    offset  size  type  field        meaning
    ------  ----  ----  -----------  ------------------------------
         0     8  s     magic        FBTRACE1
         8     8  u64   started_ns   wall clock at the first record, 0 if not known

Each record behind it, little-endian:

    offset  size  type  field        meaning
    ------  ----  ----  -----------  ------------------------------
         0     4  u32   time_ms      milliseconds since the start, modulo 2^32
         4     4  u32   count_op     blocks in the lower 31 bits; the highest bit is set for a write
         8     8  u64   key          volume in the upper 24 bits, index of the first block in the lower 40
"""

import struct
from typing import Final

import numpy as np

from forebay_core.units import LBA_BITS

MAGIC: Final = b"FBTRACE1"
HEADER: Final = struct.Struct("<8sQ")
RECORD: Final = struct.Struct("<IIQ")
RECORD_DTYPE: Final = np.dtype([("time_ms", "<u4"), ("count_op", "<u4"), ("key", "<u8")])
WRITE_BIT: Final = 1 << 31
COUNT_MASK: Final = WRITE_BIT - 1
VOLUME_MAX: Final = (1 << 64 - LBA_BITS) - 1

assert HEADER.size == RECORD.size == RECORD_DTYPE.itemsize == 16

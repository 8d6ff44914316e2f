"""The sample of accesses in a file of the run directory, so that it outlives the daemon.

Header, 72 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  ------------------------------------------------------------
         0     8  8s    magic         FBSAMPL1
         8    16  16s   device        whose volume keys these are
        24     8  u64   limit         of the sample hash: the share of all blocks
        32     8  u64   accesses      to all blocks, sampled or not
        40     8  u64   span_ns       in which they came
        48     4  u32   volume_count  volume rows that follow
        52     4  u32   reserved      0
        56     8  u64   key_count     keys that follow the volumes, 8 bytes each, in the order of the accesses
        64     8  u64   xxh3          over all that comes before it and behind it

Volume, 24 bytes, little-endian:

    offset  size  type  field       meaning
    ------  ----  ----  ----------  ------------------------------------------------------------
         0     8  u64   volume_key  upper bits of the keys
         8    16  16s   volume_id   whose it was: a key may be another volume's one day

The highest bit of a key is set where the block was missed in a long stream of reads (PASSES). Volumes are numbered from
1 on, so theirs do not reach it.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

from forebay_cache.format.checkpoint import VOLUME_COUNT_MAX
from forebay_core.errors import CorruptionError
from forebay_core.units import LBA_BITS, Buffer

U64Array = npt.NDArray[np.uint64]

HEADER: Final = struct.Struct("<8s16sQQQIIQQ")
VOLUME: Final = struct.Struct("<Q16s")
MAGIC: Final = b"FBSAMPL1"
PASSES: Final = 1 << 63
KEYS_MAX: Final = 1 << 20
FILE_SIZE_MAX: Final = HEADER.size + VOLUME_COUNT_MAX * VOLUME.size + KEYS_MAX * 8
_SUM: Final = struct.Struct("<Q")
_SUM_OFFSET: Final = HEADER.size - _SUM.size
assert HEADER.size == 72


class SavedSample(NamedTuple):
    """What the file says."""

    device: bytes
    limit: int
    accesses: int
    span_ns: int
    volumes: Mapping[int, bytes]
    parts: Sequence[U64Array]


def encode_sample(sample: SavedSample) -> list[Buffer]:
    """Return the bytes of the file, in parts."""
    rows = b"".join(VOLUME.pack(key, volume_id) for key, volume_id in sorted(sample.volumes.items()))
    counts = (len(sample.volumes), 0, sum(part.size for part in sample.parts))
    head = HEADER.pack(MAGIC, sample.device, sample.limit, sample.accesses, sample.span_ns, *counts, 0)[:_SUM_OFFSET]
    keys: list[Buffer] = [part.astype("<u8", copy=False).tobytes() for part in sample.parts]
    digest = xxh3_64(head)
    for part in (rows, *keys):
        digest.update(part)
    return [head + _SUM.pack(digest.intdigest()), rows, *keys]


def decode_sample(content: bytes, *, place: str) -> SavedSample:
    """Return what a file says.

    Raises:
        CorruptionError: it is no such file, or damaged.
    """
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise CorruptionError(place=place, what="magic", expected=MAGIC, found=content[:8])
    _, device, limit, accesses, span_ns, volume_count, reserved, key_count, expected = HEADER.unpack_from(content)
    digest = xxh3_64(content[:_SUM_OFFSET])
    digest.update(content[HEADER.size :])
    if digest.intdigest() != expected:
        raise CorruptionError(place=place, what="checksum", expected=expected, found=digest.intdigest())
    keys_at = HEADER.size + volume_count * VOLUME.size
    size = keys_at + key_count * 8
    if size != len(content) or not limit or reserved or volume_count > VOLUME_COUNT_MAX or key_count > KEYS_MAX:
        raise CorruptionError(place=place, what="header", expected="as its table says", found=content[: HEADER.size])
    volumes = dict(VOLUME.iter_unpack(content[HEADER.size : keys_at]))
    keys = np.frombuffer(content, "<u8", offset=keys_at).astype(np.uint64)
    known = np.isin(volumes_of(keys), np.array(list(volumes), np.uint64))
    return SavedSample(device, limit, accesses, span_ns, volumes, [keys[known]])


def volumes_of(keys: U64Array) -> U64Array:
    """Return the volume key of each sampled key."""
    volumes: U64Array = (keys & np.uint64(PASSES - 1)) >> np.uint64(LBA_BITS)
    return volumes

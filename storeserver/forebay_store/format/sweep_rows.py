"""The rows of changes that hide more of a head than one transaction removes: trims and rollbacks that are being swept.

Table `meta`, key `sweep/`, then the volume's id and u64 first block (big-endian). All of a volume are of one change
and never overlap. Entries of the head between its first block and `end` that are older than `version` don't show any
more: a trim hides all of them, a rollback those that are younger than its snapshot.

Sweep row, 48 bytes, little-endian:

    offset  size  type  field            meaning
    ------  ----  ----  ---------------  --------------------------------------------------------
         0     8  u64   end              first block behind it
         8     8  u64   version          of the change
        16     8  u64   newest_snapshot  of the volume when it was made; 0: there was none
        24     8  u64   shown            version of the snapshot that shows through; 0: it is a trim
        32     8  u64   flags            1: the volume was a clone, so what was never written becomes a hole too;
                                         2: hides what the same change wrote as well
        40     8  u64   row_xxh3         over the key and the row with zeros here
"""

import struct
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError

SWEEP_PREFIX: Final = b"sweep/"
SWEEP_KEY: Final = struct.Struct(">6s16sQ")
SWEEP_ROW: Final = struct.Struct("<QQQQQQ")
SWEEP_CLONE: Final = 1
SWEEP_OWN: Final = 2
_U64: Final = struct.Struct("<Q")
assert SWEEP_ROW.size == 48
assert len(SWEEP_PREFIX) == 6


class Sweep(NamedTuple):
    """Blocks of a volume where something is hidden; fields as in the table above."""

    volume: bytes
    start: int
    end: int
    version: int
    newest_snapshot: int
    shown: int
    is_clone: bool
    hides_own: bool

    def hides(self, version: int) -> bool:
        """Tell whether an entry of the head of this version does not show any more."""
        return self.shown < version < self.version + self.hides_own


def sweep_key(volume: bytes, start: int) -> bytes:
    """Return the key of a row."""
    return SWEEP_KEY.pack(SWEEP_PREFIX, volume, start)


def encode_sweep(sweep: Sweep) -> tuple[bytes, bytes]:
    """Return key and value of a row."""
    key = sweep_key(sweep.volume, sweep.start)
    flags = (SWEEP_CLONE if sweep.is_clone else 0) | (SWEEP_OWN if sweep.hides_own else 0)
    row = SWEEP_ROW.pack(sweep.end, sweep.version, sweep.newest_snapshot, sweep.shown, flags, 0)
    return key, row[: -_U64.size] + _U64.pack(_checksum(key, row))


def decode_sweep(key: bytes, value: bytes) -> Sweep:
    """Return the sweep of a row.

    Raises:
        CorruptionError: it was damaged.
    """
    place = f"index meta {key.hex()}"
    if len(key) != SWEEP_KEY.size or len(value) != SWEEP_ROW.size:
        raise CorruptionError(place=place, what="sweep row size", expected=SWEEP_ROW.size, found=len(value))
    _, volume, start = SWEEP_KEY.unpack(key)
    end, version, newest_snapshot, shown, flags, expected = SWEEP_ROW.unpack(value)
    found = _checksum(key, value)
    if found != expected:
        raise CorruptionError(place=place, what="sweep row checksum", expected=expected, found=found)
    is_clone, hides_own = bool(flags & SWEEP_CLONE), bool(flags & SWEEP_OWN)
    return Sweep(volume, start, end, version, newest_snapshot, shown, is_clone, hides_own)


def _checksum(key: bytes, row: bytes) -> int:
    return checksum(key + row[: -_U64.size])

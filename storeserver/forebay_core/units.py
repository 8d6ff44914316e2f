"""Units and the types that keep them apart.

A block is 4096 bytes, a sector 512. `Lba` counts blocks inside a volume, `offset` counts bytes.

A `Version` orders all changes of one volume: the epoch in the upper 20 bits, the sequence in the lower 44.
Packed into one integer it compares with `<`, fits an array of u64, and costs no tuple. At 100,000 changes a
second the sequence lasts 5.5 years of uninterrupted writing.
"""

import re
from fractions import Fraction
from typing import Final, NewType, TypeAlias

BLOCK_SIZE: Final = 4096
BLOCK_SHIFT: Final = 12
SECTOR_SIZE: Final = 512
assert 1 << BLOCK_SHIFT == BLOCK_SIZE

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

EPOCH_BITS: Final = 20
SEQUENCE_BITS: Final = 44
LBA_BITS: Final = 40
EPOCH_MAX: Final = (1 << EPOCH_BITS) - 1
SEQUENCE_MAX: Final = (1 << SEQUENCE_BITS) - 1
LBA_MAX: Final = (1 << LBA_BITS) - 1
VOLUME_SIZE_MAX: Final = BLOCK_SIZE << LBA_BITS
assert EPOCH_BITS + SEQUENCE_BITS == 64

RATE_UNLIMITED: Final = (1 << 64) - 1
"""A rate in bytes per second that limits nothing."""

RATE_MIN: Final = 512 * KIB
RATE_MAX: Final = TIB
"""Limits of destaging that can be set. Below, not even one block at a time would keep to a peak by the second."""

Lba = NewType("Lba", int)
Epoch = NewType("Epoch", int)
Sequence = NewType("Sequence", int)
Version = NewType("Version", int)
VolumeId = NewType("VolumeId", bytes)
DeviceId = NewType("DeviceId", bytes)
StoreId = NewType("StoreId", bytes)

ID_SIZE: Final = 16
NO_VERSION: Final = Version(0)

Buffer: TypeAlias = bytes | bytearray | memoryview

_UNITS: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE: Final = re.compile(r"(?P<number>\d{1,20}(\.\d{1,12})?) ?((?P<unit>[KMGT]?)(iB|B)?)\Z", re.IGNORECASE | re.ASCII)


def format_store(store: bytes) -> str:
    """Return a store's UUID as its folder's store.toml has it."""
    digits = store.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def make_version(epoch: int, sequence: int) -> Version:
    """Pack an epoch and a sequence into one comparable integer."""
    assert 0 <= epoch <= EPOCH_MAX
    assert 0 <= sequence <= SEQUENCE_MAX
    return Version(epoch << SEQUENCE_BITS | sequence)


def epoch_of(version: int) -> Epoch:
    """Return the epoch of a version."""
    return Epoch(version >> SEQUENCE_BITS)


def sequence_of(version: int) -> Sequence:
    """Return the sequence of a version."""
    return Sequence(version & SEQUENCE_MAX)


def parse_size(text: str) -> int:
    """Return the bytes that a size such as `10GiB`, `512M`, `1.5T` or `4096` names; all units are powers of 1024.

    Raises:
        ValueError: the text is no size, or is not a whole number of bytes.
    """
    match = _SIZE.match(text.strip())
    if match is not None:
        size = Fraction(match["number"]) * _UNITS[match["unit"].upper()]
        if size.denominator == 1:
            return int(size)
    raise ValueError(f"{text!r} is not a size; write for example 10GiB, 512MiB or 4096")


def parse_rate(text: str) -> int:
    """Return the bytes per second that a rate such as `20MiB/s`, or a size, names.

    Raises:
        ValueError: the text is no rate.
    """
    try:
        return parse_size(text.strip().removesuffix("/s"))
    except ValueError:
        raise ValueError(f"{text!r} is not a rate; write for example 20MiB/s") from None


def format_rate(rate: int) -> str:
    """Return bytes per second for people; 0 and RATE_UNLIMITED are no limit."""
    return "no limit" if rate in (0, RATE_UNLIMITED) else f"{format_size(rate)}/s"


def format_size(size: int) -> str:
    """Return bytes for people: `1.5 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")

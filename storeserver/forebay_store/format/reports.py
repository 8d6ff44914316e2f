"""The file of what caches reported they are ahead: a header, then the reports, then the losses.

Reports file, 56 bytes, little-endian:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     8  8s    magic         b"FBREPORT"
         8     4  u32   format        1
        12    16  16s   store         UUID of the store
        28     4  u32   report_count  held reports that follow, the one heard of longest ago first
        32     4  u32   loss_count    losses behind them
        36    12  12s   reserved      zeros
        48     8  u64   file_xxh3     over the file with zeros here

Held report, 44 bytes:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0    16  16s   volume        id
        16     4  u32   epoch         under which the cache held it
        20     8  u64   version       of the newest change that the cache had
        28     8  u64   oldest_ns     since when it had one that the store had not; 0: it had none
        36     8  u64   reported_ns   when the cache said so; both are its wall clock

Loss, 8 bytes behind a held report:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  --------------------------------------------------------
         0     8  u64   lost_from     version of the volume when another cache took it over

The file is no part of the truth: without it nobody knows how far a cache was ahead that is lost together with it.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_store.limits import REPORTS_MAX

REPORTS_MAGIC: Final = b"FBREPORT"
REPORTS_FORMAT: Final = 1
REPORTS_HEADER: Final = struct.Struct("<8sI16sII12sQ")
HELD_REPORT: Final = struct.Struct("<16sIQQQ")
LOSS: Final = struct.Struct("<Q")
REPORTS_SIZE_MAX: Final = REPORTS_HEADER.size + REPORTS_MAX * (2 * HELD_REPORT.size + LOSS.size)
assert REPORTS_HEADER.size == 56
assert HELD_REPORT.size == 44

_U64: Final = struct.Struct("<Q")


class Report(NamedTuple):
    """What a cache said of one volume; fields as in the table above."""

    volume: bytes
    epoch: int
    version: int
    oldest_ns: int
    reported_ns: int


class Loss(NamedTuple):
    """The last report of a cache from which the volume was taken, and where the store stood then."""

    report: Report
    lost_from: int


class Reports(NamedTuple):
    """All of the file."""

    reports: Sequence[Report]
    losses: Sequence[Loss]


def encode_reports(store: bytes, kept: Reports) -> bytes:
    """Return the file's bytes."""
    assert len(kept.reports) <= REPORTS_MAX
    assert len(kept.losses) <= REPORTS_MAX
    header = REPORTS_HEADER.pack(
        REPORTS_MAGIC, REPORTS_FORMAT, store, len(kept.reports), len(kept.losses), bytes(12), 0
    )
    body = b"".join(
        [
            *(HELD_REPORT.pack(*report) for report in kept.reports),
            *(HELD_REPORT.pack(*loss.report) + LOSS.pack(loss.lost_from) for loss in kept.losses),
        ]
    )
    prefix = header[: -_U64.size]
    return prefix + _U64.pack(checksum(header + body)) + body


def decode_reports(content: bytes, *, store: bytes, place: str) -> Reports:
    """Return what the file says.

    Raises:
        CorruptionError: it is damaged, of another format or of another store.
    """
    size = len(content)
    if size < REPORTS_HEADER.size:
        raise CorruptionError(place=place, what="size", expected=f"at least {REPORTS_HEADER.size}", found=size)
    magic, file_format, owner, report_count, loss_count, _, expected = REPORTS_HEADER.unpack_from(content)
    found = checksum(content[: REPORTS_HEADER.size - _U64.size] + bytes(_U64.size) + content[REPORTS_HEADER.size :])
    if found != expected:
        raise CorruptionError(place=place, what="checksum", expected=expected, found=found)
    wanted = (REPORTS_MAGIC, REPORTS_FORMAT, store)
    if (magic, file_format, owner) != wanted:
        raise CorruptionError(
            place=place, what="magic, format and store", expected=wanted, found=(magic, file_format, owner)
        )
    losses_at = REPORTS_HEADER.size + report_count * HELD_REPORT.size
    end = losses_at + loss_count * (HELD_REPORT.size + LOSS.size)
    if size != end or max(report_count, loss_count) > REPORTS_MAX:
        raise CorruptionError(place=place, what="size", expected=end, found=size)
    reports = [Report(*fields) for fields in HELD_REPORT.iter_unpack(content[REPORTS_HEADER.size : losses_at])]
    losses = [
        Loss(Report(*HELD_REPORT.unpack_from(content, at)), LOSS.unpack_from(content, at + HELD_REPORT.size)[0])
        for at in range(losses_at, end, HELD_REPORT.size + LOSS.size)
    ]
    return Reports(reports, losses)

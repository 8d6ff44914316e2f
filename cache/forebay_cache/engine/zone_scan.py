"""Walking the records of one zone, with or without damage: what checking and salvage are built on.

Where a record header is damaged the walk goes on at the next one that was provably part of the same log: one of the
same zone, incarnation and device that knows the damaged record as durable, that lies below a log position which is
known durable, or that stands before such a one. What a power cut left unfinished at the end of the log is known durable
by nobody, so it never counts.

Invariants:
    `records` have rising blocks and log positions; a gap lies before each record that does not chain to the one
    before it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from forebay_cache.format import record
from forebay_cache.format.cut_end import CutEnd
from forebay_cache.format.record import EntryArray, RecordHeader
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE


class ScannedRecord(NamedTuple):
    """One whole record header; its data blocks lie right behind `block`."""

    zone: int
    block: int
    header: RecordHeader
    entries: EntryArray
    note: VolumeNote | CutEnd | None


class Gap(NamedTuple):
    """Blocks `[block, end)` of a zone whose records can't be read; `text` says why."""

    block: int
    end: int
    text: str


class Opening(NamedTuple):
    """What the first record of a zone must say."""

    incarnation: int
    position: int


class ZoneScan(NamedTuple):
    """What a zone holds. `end` is the block behind its last record, `text` says why the walk ended there."""

    zone: int
    records: list[ScannedRecord]
    gaps: list[Gap]
    end: int
    text: str

    @property
    def sealed(self) -> bool:
        """Whether the log left the zone."""
        return bool(self.records) and self.records[-1].header.kind == record.SEAL


def decode_at(view: memoryview, *, zone: int, block: int, device_tag: int) -> ScannedRecord:
    """Return the record whose header is a block of a zone.

    Raises:
        CorruptionError: it is none, a damaged one, or one of another zone or device.
    """
    place = f"zone {zone} block {block}"
    header_block = view[block << BLOCK_SHIFT : (block + 1) << BLOCK_SHIFT]
    header, entries = record.decode_record(header_block, place=place)
    note = record.decode_note(header_block, place=place) if header.kind == record.NOTE and len(entries) else None
    if (header.device, header.zone) != (device_tag, zone):
        raise CorruptionError(
            place=place,
            what="record device and zone",
            expected=(device_tag, zone),
            found=(header.device, header.zone),
        )
    if block + header.size > view.nbytes >> BLOCK_SHIFT:
        raise CorruptionError(
            place=place, what="record size", expected=(view.nbytes >> BLOCK_SHIFT) - block, found=header.size
        )
    return ScannedRecord(zone, block, header, entries, note)


def scan_zone(
    view: memoryview,
    zone: int,
    *,
    device_tag: int,
    opening: Opening | None = None,
    stop: int | None = None,
    durable: int = 0,
) -> ZoneScan:
    """Walk a zone from its first block up to its SEAL, to block `stop`, or to where its records end.

    Without an `opening` the first block is believed; if that is no record, the zone counts as empty. Records below log
    position `durable` are known durable.
    """
    blocks = view.nbytes >> BLOCK_SHIFT if stop is None else stop
    records: list[ScannedRecord] = []
    gaps: list[Gap] = []
    block = 0
    text = ""
    while block < blocks and not (records and records[-1].header.kind == record.SEAL):
        try:
            one = decode_at(view, zone=zone, block=block, device_tag=device_tag)
            opening = opening or Opening(one.header.incarnation, one.header.log_position)
            before = None if not records or (gaps and gaps[-1].end == block) else records[-1]
            _check_follows(before, one, opening)
        except CorruptionError as error:
            text = str(error)
            if opening is None:
                break
            lost = records[-1].header.log_position + 1 if records else opening.position
            found = _resume(view, zone, block, lost=lost, durable=durable, opening=opening, device_tag=device_tag)
            if found is None:
                break
            gaps.append(Gap(block, found, str(error)))
            block = found
            continue
        records.append(one)
        block += one.header.size
    return ZoneScan(zone, records, gaps, block, text)


def _check_follows(before: ScannedRecord | None, one: ScannedRecord, opening: Opening) -> None:
    """Compare a record with the one before it in its zone, or with what its zone began with."""
    header = one.header
    place = f"zone {one.zone} block {one.block}"
    if header.incarnation != opening.incarnation:
        raise CorruptionError(
            place=place, what="record incarnation", expected=opening.incarnation, found=header.incarnation
        )
    if one.block == 0 and header.log_position != opening.position:
        raise CorruptionError(
            place=place, what="record log position", expected=opening.position, found=header.log_position
        )
    if before is not None:
        expected = (before.header.log_position + 1, before.header.header_xxh3)
        if (header.log_position, header.previous_xxh3) != expected:
            raise CorruptionError(
                place=place,
                what="record chain (log position, previous checksum)",
                expected=expected,
                found=(header.log_position, header.previous_xxh3),
            )


def _resume(
    view: memoryview, zone: int, block: int, *, lost: int, durable: int, opening: Opening, device_tag: int
) -> int | None:
    """Return the block of the first later record of the same log, or None if nobody knew record `lost` as durable."""
    first: int | None = None
    for one in later_records(view, zone, block + 1, device_tag):
        header = one.header
        if header.incarnation != opening.incarnation or header.log_position <= lost:
            continue
        if first is None:
            first = one.block
        if header.durable_position > lost or header.log_position < durable:
            return first
    return None


def later_records(view: memoryview, zone: int, block: int, device_tag: int) -> Iterator[ScannedRecord]:
    """Yield the whole headers of a zone from a block on, of whatever life they are."""
    while block < view.nbytes >> BLOCK_SHIFT:
        fields = record.peek_header(view[block << BLOCK_SHIFT : (block << BLOCK_SHIFT) + BLOCK_SIZE])
        if (fields.device, fields.zone) == (device_tag, zone):
            try:
                one = decode_at(view, zone=zone, block=block, device_tag=device_tag)
            except CorruptionError:
                block += 1
                continue
            yield one
            block += one.header.size
        else:
            block += 1

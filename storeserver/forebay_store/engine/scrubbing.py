"""Reading and verifying segments: whole, and frames down to each block. The index is checked by `books`.

Pure but for the ports. What a check finds are places in segments; `shown_at` then tells which blocks of which volumes
and snapshots are damaged by that: it looks at each entry that refers to the segment, and reads what the entry needs.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError, ForebayError
from forebay_core.frame import check_stored, decode_header, open_frame
from forebay_store.engine.cleaning import DamagedPlace
from forebay_store.engine.ports import IndexReader, SegmentBackend
from forebay_store.engine.reading import holds
from forebay_store.engine.replay import load_segment
from forebay_store.format.damage_file import Shown
from forebay_store.format.entries import (
    HISTORY_KEY,
    HeadEntry,
    decode_entry,
    decode_history,
    number_of,
    start_of,
)
from forebay_store.format.index_chunk import unpack_chunk
from forebay_store.format.layout import payload_of
from forebay_store.format.records import FRAME_RECORDS
from forebay_store.format.rows import Table, decode_volume
from forebay_store.format.segment import SegmentName, parse_name
from forebay_store.format.snapshot_rows import decode_snapshot, snapshot_key
from forebay_store.format.space_records import IndexChunk

_PLACE: Final = re.compile(r"segment ([0-9a-f]{8}-[0-9a-f]{12})(?: offset ([0-9]+))?")


def check_segment(backend: SegmentBackend, name: SegmentName, *, store: bytes) -> list[DamagedPlace]:
    """Read a segment and compare all that can be compared; return what is damaged."""
    try:
        segment = load_segment(backend.read(name.text), name, store=store)
    except ForebayError as error:
        return [DamagedPlace(name, 0, 0, str(error))]
    found: list[DamagedPlace] = []
    for placed in segment.decoded.placed:
        payload = payload_of(segment.buffer, placed)
        if isinstance(placed.record, IndexChunk):
            found += check_chunk(name, placed.record, payload, placed.payload_offset)
        elif isinstance(placed.record, FRAME_RECORDS):
            found += _check_frames(name, payload, placed.payload_offset)
    return found


def check_chunk(name: SegmentName, record: IndexChunk, payload: memoryview, offset: int) -> Iterator[DamagedPlace]:
    """Yield the place of a chunk of a checkpoint if it is not as it was written."""
    place = f"segment {name.text} offset {offset}"
    try:
        if checksum(payload) != record.payload_xxh3:
            raise CorruptionError(
                place=place, what="index-chunk", expected=record.payload_xxh3, found=checksum(payload)
            )
        for _ in unpack_chunk(payload, plain_size=record.plain_size, place=place):
            pass
    except CorruptionError as error:
        yield DamagedPlace(name, offset, payload.nbytes, str(error))


def _check_frames(name: SegmentName, payload: memoryview, payload_offset: int) -> Iterator[DamagedPlace]:
    offset = 0
    while offset < payload.nbytes:
        place = f"segment {name.text} offset {payload_offset + offset}"
        size = payload.nbytes - offset
        try:
            header = decode_header(payload, offset, place=place)
            size = header.size
            stored = check_stored(header, payload, offset, place=place)
            if header.cipher == 0:
                open_frame(header, stored, place=place)
        except CorruptionError as error:
            yield DamagedPlace(name, payload_offset + offset, size, str(error))
        offset += size


def place_of(error: CorruptionError) -> DamagedPlace | None:
    """Return where an error that a read met lies, if in a segment."""
    match = _PLACE.search(error.place)
    name = None if match is None else parse_name(match[1])
    if match is None or name is None:
        return None
    return DamagedPlace(name, int(match[2] or 0), 1, str(error))


def shown_at(reader: IndexReader, backend: SegmentBackend, places: Iterable[DamagedPlace]) -> list[Shown]:
    """Return the blocks that are damaged by damage in these places; places that nothing shows come without a name."""
    by_segment: dict[SegmentName, list[DamagedPlace]] = {}
    for place in places:
        by_segment.setdefault(place.segment, []).append(place)
    found: list[Shown] = []
    names = Names(reader)
    for number, version, entry in _all_entries(reader):
        if entry.segment in by_segment:
            text = _wrong(backend, entry, by_segment[entry.segment])
            if text:
                found.append(_shown(names, number, version, entry, text))
    shown = {one.segment for one in found}
    for segment, damaged in sorted(by_segment.items()):
        if segment not in shown:
            found += [Shown("", 0, 0, segment, place.offset, place.text) for place in damaged]
    return sorted(set(found))


def _wrong(backend: SegmentBackend, entry: HeadEntry, places: list[DamagedPlace]) -> str:
    """Return what is wrong with the frame of an entry; an empty text if it lies elsewhere than the damage."""
    end = entry.frame_offset + entry.frame_size
    if not any(
        place.size == 0 or (place.offset < end and entry.frame_offset < place.offset + place.size) for place in places
    ):
        return ""
    place = f"segment {entry.segment.text} offset {entry.frame_offset}"
    try:
        frame = backend.read_range(entry.segment.text, entry.frame_offset, entry.frame_size)
        header = decode_header(frame, place=place)
        stored = check_stored(header, frame, place=place)
        if header.cipher == 0:
            open_frame(header, stored, place=place)
        if header.size != entry.frame_size or not holds(header.extents, entry):
            raise CorruptionError(place=place, what="frame extents", expected=entry.start, found=header.extents)
    except ForebayError as error:
        return str(error)
    return ""


class Names:
    """Names of volumes by their numbers, and of snapshots by their versions."""

    def __init__(self, reader: IndexReader) -> None:
        self._reader = reader
        self._volumes: dict[int, str] | None = None

    def name(self, number: int, version: int) -> str:
        """Return the volume's name, or `volume@snapshot` of the snapshot with this version; 0: the volume."""
        if self._volumes is None:
            rows = [decode_volume(key, value) for key, value in self._reader.scan(Table.VOLUMES, b"")]
            self._volumes = {row.number: row.name for row in rows}
        volume = self._volumes.get(number, "")
        if not version or not volume:
            return volume
        value = self._reader.get(Table.SNAPSHOTS, snapshot_key(number, version))
        return "" if value is None else f"{volume}@{decode_snapshot(snapshot_key(number, version), value).name}"


def _shown(names: Names, number: int, version: int, entry: HeadEntry, text: str) -> Shown:
    return Shown(names.name(number, version), entry.start, entry.length, entry.segment, entry.frame_offset, text)


def _all_entries(reader: IndexReader) -> Iterator[tuple[int, int, HeadEntry]]:
    """Yield volume's number, snapshot's version (0: the head) and entry; rows that are damaged are told by others."""
    for table in (Table.HEAD, Table.HISTORY):
        for key, value in reader.scan(table, b""):
            number, _, version = _split_key(table, key)
            try:
                entry = decode_entry(key, value) if table is Table.HEAD else decode_history(key, value)[0]
            except CorruptionError:
                continue
            if entry.is_data:
                yield number, version, entry


def _split_key(table: Table, key: bytes) -> tuple[int, int, int]:
    if table is Table.HEAD:
        return number_of(key), start_of(key), 0
    number, start, last = HISTORY_KEY.unpack(key)
    return number >> 8, start, last

"""Finding the entries of head and history that show what lies in a segment.

A block that a thousand snapshots saw has a thousand entries in the history. Who went through them for each frame would
take longer with each snapshot, and as long as its view is open LMDB reuses nothing: the file grows by all that is
written. But an entry is found at once by its version: the blocks of one cut have the same, and the list of moves of a
copy names them. What a rollback brought back has another; then some of the segment's live bytes are not accounted for,
and only then everything is gone through.

Invariant: what is found shows the segment; all is found unless the segment was damaged, or a volume is on its way out.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent
from forebay_core.frame import decode_header
from forebay_store.engine.head import overlapping
from forebay_store.engine.moving import has_history
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.replay import LoadedSegment
from forebay_store.engine.views import history_at
from forebay_store.engine.volumes import find_volume
from forebay_store.format.entries import HeadEntry, decode_history, history_key, is_data_in, stored_share
from forebay_store.format.layout import PlacedRecord, payload_of
from forebay_store.format.records import FRAME_RECORDS
from forebay_store.format.rows import Table
from forebay_store.format.segment import SegmentName
from forebay_store.format.space_records import CleanedPart, Move, unpack_moves

Found = dict[int, list[HeadEntry]]


def live_entries(reader: IndexReader, segment: LoadedSegment, live: int) -> Found:
    """Return the entries that show each frame of a segment, by the frame's offset; `live` is what they count for."""
    searches = [
        (placed, _Search(reader, row.number, segment.name, placed))
        for placed in segment.decoded.placed
        if isinstance(placed.record, FRAME_RECORDS)
        if (row := find_volume(reader, placed.record.volume)) is not None
    ]
    found: Found = {}
    if not _search_all(segment, searches, live, found, thorough=False):
        _search_all(segment, searches, live, found, thorough=True)
    return found


def _search_all(
    segment: LoadedSegment,
    searches: "Sequence[tuple[PlacedRecord, _Search]]",
    live: int,
    found: Found,
    *,
    thorough: bool,
) -> bool:
    """Search for the entries of all frames; tell whether all that lives was found."""
    found.clear()
    for placed, search in searches:
        for offset, extents in _frames(segment, placed):
            entries = search.find(offset, extents, thorough=thorough)
            if entries:
                found[offset] = entries
                live -= sum(map(stored_share, entries))
            if live <= 0:
                return True
    return False


def _frames(segment: LoadedSegment, placed: PlacedRecord) -> Iterator[tuple[int, Sequence[Extent]]]:
    """Yield offset in the segment and extents of each frame, up to one that is damaged: who copies it will tell."""
    payload = payload_of(segment.buffer, placed)
    offset = 0
    while offset < payload.nbytes:
        try:
            header = decode_header(payload, offset, place=segment.place)
        except CorruptionError:
            return
        yield placed.payload_offset + offset, header.extents
        offset += header.size


class _Search:
    """Finds the entries that show frames of one record."""

    def __init__(self, reader: IndexReader, number: int, segment: SegmentName, placed: PlacedRecord) -> None:
        self._reader = reader
        self._number = number
        self._segment = segment
        self._with_history = has_history(reader, number)
        self._version = 0  # that all blocks of a cut have; 0: nothing was found yet
        self._moves: defaultdict[int, list[Move]] | None = None
        if isinstance(placed.record, CleanedPart):
            self._moves = defaultdict(list)
            for move in unpack_moves(placed.record.moves):
                self._moves[placed.payload_offset + move.frame_offset].append(move)

    def find(self, offset: int, extents: Sequence[Extent], *, thorough: bool) -> list[HeadEntry]:
        """Return the entries that show a frame; all of them if `thorough`."""
        found = [
            entry
            for extent in extents
            for entry in overlapping(self._reader, self._number, extent.start, extent.end)
            if entry.is_data and (entry.segment, entry.frame_offset) == (self._segment, offset)
        ]
        self._note_version(found)
        if self._with_history:
            known = not thorough and (self._moves is not None or self._version)
            found += self._of_version(offset, extents) if known else self._of_any_version(offset, extents)
            self._note_version(found)
        return found

    def _note_version(self, found: Sequence[HeadEntry]) -> None:
        if found and not self._version:
            self._version = found[0].version

    def _of_version(self, offset: int, extents: Sequence[Extent]) -> Iterator[HeadEntry]:
        if self._moves is None:
            wanted = {(self._version, extent.start, extent.end) for extent in extents}
        else:
            wanted = {(move.version, move.start, move.end) for move in self._moves[offset]}
        for version, start, end in sorted(wanted):
            for entry in history_at(self._reader, self._number, 0, version, start, end):
                shows = entry.is_data and (entry.segment, entry.frame_offset) == (self._segment, offset)
                if shows and entry.version == version:
                    yield entry

    def _of_any_version(self, offset: int, extents: Sequence[Extent]) -> Iterator[HeadEntry]:
        for extent in extents:
            end = history_key(self._number, 0, extent.end, 0)
            for key, value in self._reader.scan(Table.HISTORY, history_key(self._number, 0, extent.start, 0)):
                if key >= end:
                    break
                if is_data_in(value, self._segment):
                    entry, _ = decode_history(key, value)
                    if entry.frame_offset == offset:
                        yield entry

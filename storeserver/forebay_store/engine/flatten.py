"""Flattening: a clone gets the blocks of its origin as its own, a few at a time, and then has no origin any more.

What it reads does not change, so no cache has to know and `changed` lists nothing: blocks that were never written get
the version 1, the clone's first, and blocks that show the origin again keep the version since which they do.
Crash: the copies that are there stay; the next start looks for what is missing.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from forebay_core.units import BLOCK_SIZE
from forebay_store.engine.head import overlapping
from forebay_store.engine.head_change import HeadChange
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.views import View, expect_view, walk
from forebay_store.format.entries import (
    DATA,
    HOLE,
    ORIGIN,
    HeadEntry,
    encode_entry,
    head_key,
    narrow,
)
from forebay_store.format.rows import Table, VolumeState
from forebay_store.limits import FLATTEN_BLOCKS_MAX, SCAN_ENTRIES_MAX

FIRST_VERSION: Final = 1
"""The version of a clone when it is made."""


def wanted(reader: IndexReader, row: VolumeState, start: int) -> tuple[list[HeadEntry], int]:
    """Return data entries that the clone is to get, from block `start` on, and the block to go on from; -1 if there are
    none, and none behind."""
    origin = expect_view(reader, row.origin)
    end = min(row.size, origin.size) // BLOCK_SIZE
    found: list[HeadEntry] = []
    count = 0
    for scanned, entry in enumerate(_missing(reader, row, origin, start, end), 1):
        if entry.kind == DATA:
            if count + entry.length > FLATTEN_BLOCKS_MAX:
                return found, entry.start
            found.append(entry)
            count += entry.length
        if scanned >= SCAN_ENTRIES_MAX:
            return found, entry.end
    return found, end if found else -1


def _missing(reader: IndexReader, row: VolumeState, origin: View, start: int, end: int) -> Iterator[HeadEntry]:
    """Yield what shows of the origin in the clone, and the clone's own entries as holes."""
    for own in walk(reader, View(row, None), start, end) if start < end else ():
        if own is not None and own.kind == ORIGIN:
            for entry in walk(reader, origin, own.start, own.end, through=True):
                if entry is not None:
                    yield entry
        elif own is not None:
            yield own._replace(kind=HOLE)


def put_origin(change: HeadChange, entries: Sequence[HeadEntry]) -> None:
    """Put data of the origin where the clone shows it; its own entries stay."""
    writer, number = change.writer, change.number
    for entry in entries:
        at = entry.start
        for own in list(overlapping(writer, number, entry.start, entry.end)):
            start, stop = max(own.start, entry.start), min(own.end, entry.end)
            if at < start:
                _put(change, narrow(entry, at, start), FIRST_VERSION)
            if own.kind == ORIGIN:
                writer.delete(Table.HEAD, head_key(number, own.start))
                for begin, end in ((own.start, start), (stop, own.end)):
                    if begin < end:
                        writer.put(Table.HEAD, *encode_entry(number, narrow(own, begin, end)))
                _put(change, narrow(entry, start, stop), own.version)
            at = stop
        if at < entry.end:
            _put(change, narrow(entry, at, entry.end), FIRST_VERSION)


def _put(change: HeadChange, entry: HeadEntry, version: int) -> None:
    entry = entry._replace(version=version)
    change.writer.put(Table.HEAD, *encode_entry(change.number, entry))
    change.add(entry)

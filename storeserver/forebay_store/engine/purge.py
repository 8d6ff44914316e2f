"""Giving back what a deleted volume or snapshot had, step by step, each a record of the log.

So the index stays a function of the records, and a crash in between changes nothing: the next start goes on.

An entry that the deleted snapshot was the newest to show belongs to the one before it, if that shows it as well; else
it dies. Which one is before is asked in each step: it may have been deleted meanwhile.
"""

from typing import Final

from forebay_store.engine.head_change import pack_starts, unpack_starts
from forebay_store.engine.live import LiveBytes
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.engine.snapshots import version_before
from forebay_store.format.entries import (
    DATA,
    DISPLACED_KEY,
    HISTORY_KEY,
    LEVEL_BITS,
    LEVEL_SHIFT,
    HeadEntry,
    decode_entry,
    decode_history,
    encode_history,
    head_key,
    history_key,
    number_of,
    stored_share,
)
from forebay_store.format.rows import DELETED_KEY, Table, lost_row

_START_MASK: Final = (1 << LEVEL_SHIFT) - 1


def next_deleted(reader: IndexReader) -> tuple[int, int] | None:
    """Return number and version of what is to be purged next; None if nothing is."""
    for key, _ in reader.scan(Table.DELETED, b""):
        number, version = DELETED_KEY.unpack(key)
        return number, version
    return None


def purge(writer: IndexWriter, live: LiveBytes, number: int, version: int, count: int) -> None:
    """Do one step of about `count` entries; nothing if it was done with already."""
    key = DELETED_KEY.pack(number, version)
    if writer.get(Table.DELETED, key) is None:
        return
    if (_purge_volume if version == 0 else _purge_snapshot)(writer, live, number, version, count):
        writer.delete(Table.DELETED, key)


def _purge_snapshot(writer: IndexWriter, live: LiveBytes, number: int, version: int, count: int) -> bool:
    """Move on or remove some entries; tell whether that was the last of them."""
    rows: list[tuple[bytes, list[int]]] = []
    for key, value in writer.scan(Table.DISPLACED, DISPLACED_KEY.pack(number, version, 0, 0)):
        if DISPLACED_KEY.unpack(key)[:2] != (number, version) or count <= 0:
            break
        rows.append((key, unpack_starts(value)))
        count -= len(rows[-1][1])
    before = version_before(writer, number, version)
    for key, starts in rows:
        writer.delete(Table.DISPLACED, key)
        kept = [start for start in starts if _pass_on(writer, live, number, start, version, before)]
        if kept:
            _, _, displaced_at, chunk = DISPLACED_KEY.unpack(key)
            writer.put(Table.DISPLACED, DISPLACED_KEY.pack(number, before, displaced_at, chunk), pack_starts(kept))
    return count > 0


def _pass_on(writer: IndexWriter, live: LiveBytes, number: int, packed: int, version: int, before: int) -> bool:
    """Give an entry to the snapshot before if that shows it; tell whether it does.

    Raises:
        CorruptionError: the entry is not there.
    """
    level, start = packed >> LEVEL_SHIFT, packed & _START_MASK
    key = history_key(number, level, start, version)
    value = writer.get(Table.HISTORY, key)
    if value is None:
        raise lost_row(Table.HISTORY, key)
    entry, _ = decode_history(key, value)
    writer.delete(Table.HISTORY, key)
    if entry.version > before:
        _take(live, entry)
        return False
    writer.put(Table.HISTORY, *encode_history(number, level, entry, before))
    return True


def _purge_volume(writer: IndexWriter, live: LiveBytes, number: int, _version: int, count: int) -> bool:
    """Remove some entries; tell whether that was the last of them."""
    removed: list[tuple[Table, bytes]] = []
    for key, value in writer.scan(Table.HEAD, head_key(number, 0)):
        if number_of(key) != number or len(removed) == count:
            break
        _take(live, decode_entry(key, value))
        removed.append((Table.HEAD, key))
    for level in range(len(LEVEL_BITS)):
        for key, value in writer.scan(Table.HISTORY, history_key(number, level, 0, 0)):
            if HISTORY_KEY.unpack(key)[0] != number << 8 | level or len(removed) == count:
                break
            _take(live, decode_history(key, value)[0])
            removed.append((Table.HISTORY, key))
    for key, _ in writer.scan(Table.DISPLACED, DISPLACED_KEY.pack(number, 0, 0, 0)):
        if DISPLACED_KEY.unpack(key)[0] != number or len(removed) == count:
            break
        removed.append((Table.DISPLACED, key))
    for table, key in removed:
        writer.delete(table, key)
    return len(removed) < count


def _take(live: LiveBytes, entry: HeadEntry) -> None:
    if entry.kind == DATA:
        live.add(entry.segment, -stored_share(entry))

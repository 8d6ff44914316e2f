"""Volumes, unfinished cuts and marks in the index: reading and writing single rows.

Invariants:
    `names` and `volumes` name each other.
    an attempt's part_count and stored_size are those of its rows in `staged`.
"""

from collections.abc import Iterator
from itertools import takewhile

from forebay_core.errors import CorruptionError, ForebayError
from forebay_core.names import is_name
from forebay_store.engine.live import LiveBytes
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.format.head_rows import stored_share_of
from forebay_store.format.rows import (
    APPLIED_KEY,
    APPLIED_MARK,
    ATTEMPT_KEY,
    DELETED_KEY,
    DELETED_PREFIX,
    INDEX_FORMAT,
    STAGED_KEY,
    STORE_KEY,
    STORE_MARK,
    VOLUMES_KEY,
    VOLUMES_MARK,
    Attempt,
    StagedPart,
    Table,
    VolumeState,
    decode_attempt,
    decode_staged,
    decode_volume,
    encode_attempt,
    encode_staged,
    encode_volume,
)
from forebay_store.format.segment import NO_SEGMENT, SegmentName


def find_volume(reader: IndexReader, volume: bytes) -> VolumeState | None:
    """Return the volume of an id."""
    value = reader.get(Table.VOLUMES, volume)
    return None if value is None else decode_volume(volume, value)


def find_name(reader: IndexReader, name: str) -> VolumeState | None:
    """Return the volume of a name."""
    volume = reader.get(Table.NAMES, name.encode()) if is_name(name) else None
    return None if volume is None else find_volume(reader, volume)


def put_volume(writer: IndexWriter, row: VolumeState) -> None:
    """Set a volume's row; its name never changes."""
    writer.put(Table.VOLUMES, row.id, encode_volume(row))
    writer.put(Table.NAMES, row.name.encode(), row.id)


def delete_volume(writer: IndexWriter, row: VolumeState) -> None:
    """Remove a volume's row and name; its entries are removed in steps, see `forebay_store.engine.purge`."""
    writer.delete(Table.VOLUMES, row.id)
    writer.delete(Table.NAMES, row.name.encode())
    for key in _keys(writer, Table.DELETED, DELETED_PREFIX.pack(row.number)):
        writer.delete(Table.DELETED, key)
    writer.put(Table.DELETED, DELETED_KEY.pack(row.number, 0), b"")


def count_volume(writer: IndexWriter) -> int:
    """Return the number of a volume that is made now."""
    value = writer.get(Table.META, VOLUMES_KEY)
    number: int = 1 + (0 if value is None else VOLUMES_MARK.unpack(value)[0])
    writer.put(Table.META, VOLUMES_KEY, VOLUMES_MARK.pack(number))
    return number


def volumes_made(reader: IndexReader) -> int:
    """Return how many volumes were ever made."""
    value = reader.get(Table.META, VOLUMES_KEY)
    return 0 if value is None else int(VOLUMES_MARK.unpack(value)[0])


def attempts_of(reader: IndexReader, volume: bytes) -> list[Attempt]:
    """Return the unfinished cuts of a volume, oldest first."""
    found: list[Attempt] = []
    for key, value in reader.scan(Table.ATTEMPTS, volume):
        if not key.startswith(volume):
            break
        found.append(decode_attempt(key, value))
    return sorted(found)


def find_attempt(reader: IndexReader, volume: bytes, epoch: int, attempt: int) -> Attempt | None:
    """Return one unfinished cut."""
    key = ATTEMPT_KEY.pack(volume, epoch, attempt)
    value = reader.get(Table.ATTEMPTS, key)
    return None if value is None else decode_attempt(key, value)


def staged_parts(reader: IndexReader, volume: bytes, epoch: int, attempt: int) -> Iterator[tuple[int, StagedPart]]:
    """Yield index and part of an unfinished cut, in the order of the indexes."""
    prefix = ATTEMPT_KEY.pack(volume, epoch, attempt)
    for key, value in reader.scan(Table.STAGED, prefix):
        if not key.startswith(prefix):
            return
        yield STAGED_KEY.unpack(key)[3], decode_staged(value)


def put_staged(
    writer: IndexWriter, live: LiveBytes, volume: bytes, epoch: int, attempt: int, part_index: int, part: StagedPart
) -> None:
    """Stage a part, in place of one of the same index."""
    attempt_key = ATTEMPT_KEY.pack(volume, epoch, attempt)
    staged_key = STAGED_KEY.pack(volume, epoch, attempt, part_index)
    known = find_attempt(writer, volume, epoch, attempt)
    row = known or Attempt(part.segment, part.payload_offset, epoch, attempt, 0, 0)
    value = writer.get(Table.STAGED, staged_key)
    if value is not None:
        older = decode_staged(value)
        live.add(older.segment, -stored_share_of(older))
        row = row._replace(part_count=row.part_count - 1, stored_size=row.stored_size - older.payload_size)
    row = row._replace(part_count=row.part_count + 1, stored_size=row.stored_size + part.payload_size)
    live.add(part.segment, stored_share_of(part))
    writer.put(Table.STAGED, staged_key, encode_staged(part))
    writer.put(Table.ATTEMPTS, attempt_key, encode_attempt(row))


def forget_attempt(writer: IndexWriter, live: LiveBytes, volume: bytes, epoch: int, attempt: int) -> None:
    """Remove an unfinished cut and its parts."""
    prefix = ATTEMPT_KEY.pack(volume, epoch, attempt)
    keys: list[bytes] = []
    for key, value in writer.scan(Table.STAGED, prefix):
        if not key.startswith(prefix):
            break
        part = decode_staged(value)
        live.add(part.segment, -stored_share_of(part))
        keys.append(key)
    for key in keys:
        writer.delete(Table.STAGED, key)
    writer.delete(Table.ATTEMPTS, prefix)


def _keys(reader: IndexReader, table: Table, prefix: bytes) -> list[bytes]:
    """Return the keys that begin so."""
    return list(takewhile(lambda key: key.startswith(prefix), (key for key, _ in reader.scan(table, prefix))))


def read_applied(reader: IndexReader) -> SegmentName:
    """Return the newest segment that the index shows."""
    value = reader.get(Table.META, APPLIED_KEY)
    return NO_SEGMENT if value is None else SegmentName(*APPLIED_MARK.unpack(value))


def write_applied(writer: IndexWriter, segment: SegmentName) -> None:
    """Set the newest segment that the index shows."""
    writer.put(Table.META, APPLIED_KEY, APPLIED_MARK.pack(*segment))


def write_store(writer: IndexWriter, store: bytes) -> None:
    """Mark a new index as that of a store."""
    writer.put(Table.META, STORE_KEY, STORE_MARK.pack(INDEX_FORMAT, store))


def read_store(reader: IndexReader) -> bytes | None:
    """Return the UUID of the store that the index belongs to; None if it bears no mark.

    Raises:
        CorruptionError: the mark is damaged.
        ForebayError: it is of another format.
    """
    value = reader.get(Table.META, STORE_KEY)
    if value is None:
        return None
    if len(value) != STORE_MARK.size:
        raise CorruptionError(place="index meta", what="store mark size", expected=STORE_MARK.size, found=len(value))
    found, store = STORE_MARK.unpack(value)
    if found != INDEX_FORMAT:
        raise ForebayError(f"the index is of format {found}, this store needs {INDEX_FORMAT}; run store rebuild-index")
    return bytes(store)

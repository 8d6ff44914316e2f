"""Volumes, unfinished cuts and marks in the index: reading and writing single rows.

Invariants:
    `names` and `volumes` name each other.
    an attempt's part_count and stored_size are those of its rows in `staged`.
"""

from collections.abc import Iterator

from forebay_core.errors import CorruptionError
from forebay_core.names import is_name
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.format.rows import (
    APPLIED_KEY,
    APPLIED_MARK,
    ATTEMPT_KEY,
    INDEX_FORMAT,
    STAGED_KEY,
    STORE_KEY,
    STORE_MARK,
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
    """Remove a volume's row and name; its head is removed in steps by `purge_head`."""
    writer.delete(Table.VOLUMES, row.id)
    writer.delete(Table.NAMES, row.name.encode())
    writer.put(Table.DELETED, row.id, b"")


def deleted_volumes(reader: IndexReader) -> list[bytes]:
    """Return the volumes whose head is still to be removed."""
    return [key for key, _ in reader.scan(Table.DELETED, b"")]


def purge_head(writer: IndexWriter, volume: bytes, entries_max: int) -> bool:
    """Remove some head entries of a deleted volume; tell whether that was the last of it."""
    keys: list[bytes] = []
    for key, _ in writer.scan(Table.HEAD, volume):
        if not key.startswith(volume) or len(keys) == entries_max:
            break
        keys.append(key)
    for key in keys:
        writer.delete(Table.HEAD, key)
    if len(keys) < entries_max:
        writer.delete(Table.DELETED, volume)
        return True
    return False


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


def put_staged(writer: IndexWriter, volume: bytes, epoch: int, attempt: int, part_index: int, part: StagedPart) -> None:
    """Stage a part, in place of one of the same index."""
    attempt_key = ATTEMPT_KEY.pack(volume, epoch, attempt)
    staged_key = STAGED_KEY.pack(volume, epoch, attempt, part_index)
    known = find_attempt(writer, volume, epoch, attempt)
    row = known or Attempt(part.segment, part.payload_offset, epoch, attempt, 0, 0)
    older = writer.get(Table.STAGED, staged_key)
    if older is not None:
        row = row._replace(
            part_count=row.part_count - 1, stored_size=row.stored_size - decode_staged(older).payload_size
        )
    row = row._replace(part_count=row.part_count + 1, stored_size=row.stored_size + part.payload_size)
    writer.put(Table.STAGED, staged_key, encode_staged(part))
    writer.put(Table.ATTEMPTS, attempt_key, encode_attempt(row))


def forget_attempt(writer: IndexWriter, volume: bytes, epoch: int, attempt: int) -> None:
    """Remove an unfinished cut and its parts."""
    prefix = ATTEMPT_KEY.pack(volume, epoch, attempt)
    keys: list[bytes] = []
    for key, _ in writer.scan(Table.STAGED, prefix):
        if not key.startswith(prefix):
            break
        keys.append(key)
    for key in keys:
        writer.delete(Table.STAGED, key)
    writer.delete(Table.ATTEMPTS, prefix)


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
        CorruptionError: the mark is of another format.
    """
    value = reader.get(Table.META, STORE_KEY)
    if value is None:
        return None
    found, store = STORE_MARK.unpack(value) if len(value) == STORE_MARK.size else (None, b"")
    if found != INDEX_FORMAT:
        raise CorruptionError(place="index meta", what="index format", expected=INDEX_FORMAT, found=found)
    return bytes(store)

"""What would come free if one snapshot were deleted: the entries that nothing else shows.

Those are the ones that it is the newest to show and the snapshot before it does not. No counter is kept for it: taking
and overwriting stay as cheap as they are, and who asks pays for looking at the entries of the snapshot.
"""

from forebay_store.engine.head_change import unpack_starts
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.snapshots import version_before
from forebay_store.format.entries import DISPLACED_KEY, LEVEL_SHIFT, decode_history, history_key, stored_share
from forebay_store.format.rows import Table, lost_row
from forebay_store.format.snapshot_rows import SnapshotState

_START_MASK = (1 << LEVEL_SHIFT) - 1


def unique_size(reader: IndexReader, state: SnapshotState) -> tuple[int, int]:
    """Return the bytes of frames that only this snapshot refers to, and how many entries were looked at.

    Raises:
        CorruptionError: an entry is not there.
    """
    before = version_before(reader, state.number, state.version)
    size = scanned = 0
    for key, value in reader.scan(Table.DISPLACED, DISPLACED_KEY.pack(state.number, state.version, 0, 0)):
        if DISPLACED_KEY.unpack(key)[:2] != (state.number, state.version):
            break
        for packed in unpack_starts(value):
            scanned += 1
            found = history_key(state.number, packed >> LEVEL_SHIFT, packed & _START_MASK, state.version)
            entry = reader.get(Table.HISTORY, found)
            if entry is None:
                raise lost_row(Table.HISTORY, found)
            decoded, _ = decode_history(found, entry)
            if decoded.version > before:
                size += stored_share(decoded)
    return size, scanned

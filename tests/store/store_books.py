"""What must hold in any index of a store, counted anew from its rows."""

from collections import defaultdict

from sim_index import DictIndex

from forebay_store.format.entries import (
    DISPLACED_KEY,
    HISTORY_KEY,
    LEVEL_SHIFT,
    HeadEntry,
    decode_entry,
    decode_history,
    number_of,
    stored_share,
)
from forebay_store.format.head_rows import stored_share_of
from forebay_store.format.rows import SEGMENT_KEY, Table, decode_segment_row, decode_staged, decode_volume
from forebay_store.format.segment import SegmentName
from forebay_store.format.snapshot_rows import CLONE_COUNT, SNAPSHOT_KEY, decode_snapshot


def check_books(index: DictIndex) -> None:
    """Compare counters and lists with what they count and list."""
    rows = index.rows()
    head = [(number_of(key), decode_entry(key, value)) for key, value in rows[Table.HEAD].items()]
    history = [decode_history(key, value)[0] for key, value in rows[Table.HISTORY].items()]
    _check_live(rows, [entry for _, entry in head], history)
    _check_volumes(rows, head)
    _check_displaced(rows)
    _check_clones(rows)


def _check_live(rows: dict[Table, dict[bytes, bytes]], head: list[HeadEntry], history: list[HeadEntry]) -> None:
    live: defaultdict[SegmentName, int] = defaultdict(int)
    for entry in (*head, *history):
        if entry.is_data:
            live[entry.segment] += stored_share(entry)
    for value in rows[Table.STAGED].values():
        part = decode_staged(value)
        live[part.segment] += stored_share_of(part)
    for key, value in rows[Table.SEGMENTS].items():
        assert decode_segment_row(value).live == live.pop(SegmentName(*SEGMENT_KEY.unpack(key)), 0)
    assert not live


def _check_volumes(rows: dict[Table, dict[bytes, bytes]], head: list[tuple[int, HeadEntry]]) -> None:
    versions: defaultdict[int, list[int]] = defaultdict(list)
    for key in rows[Table.SNAPSHOTS]:
        number, version = SNAPSHOT_KEY.unpack(key)
        versions[number].append(version)
    for key, value in rows[Table.VOLUMES].items():
        row = decode_volume(key, value)
        own = [entry for number, entry in head if number == row.number and entry.is_data]
        assert row.stored_size == sum(stored_share(entry) for entry in own)
        assert row.data_blocks == sum(entry.length for entry in own)
        assert row.snapshots == len(versions[row.number])
        assert row.newest_snapshot == max(versions[row.number], default=0)
        assert (key in rows[Table.FLATTENING]) == row.flattening


def _check_displaced(rows: dict[Table, dict[bytes, bytes]]) -> None:
    """Each entry of the history is listed once under its last version, and nothing else is."""
    listed = []
    for key, value in rows[Table.DISPLACED].items():
        number, last, _, _ = DISPLACED_KEY.unpack(key)
        for at in range(0, len(value), 8):
            packed = int.from_bytes(value[at : at + 8], "little")
            level, start = packed >> LEVEL_SHIFT, packed & (1 << LEVEL_SHIFT) - 1
            listed.append(HISTORY_KEY.pack(number << 8 | level, start, last))
    assert sorted(listed) == list(rows[Table.HISTORY])


def _check_clones(rows: dict[Table, dict[bytes, bytes]]) -> None:
    volumes = {key: decode_volume(key, value) for key, value in rows[Table.VOLUMES].items()}
    ids = {row.number: row.id for row in volumes.values()}
    snapshots = [decode_snapshot(key, value) for key, value in rows[Table.SNAPSHOTS].items()]
    ties: defaultdict[bytes, int] = defaultdict(int)
    for row in volumes.values():
        if row.origin:
            ties[row.origin + row.id] += 1
    for one in snapshots:
        if one.origin:
            ties[one.origin + ids[one.number]] += 1
    assert {key: CLONE_COUNT.unpack(value)[0] for key, value in rows[Table.CLONES].items()} == ties
    for one in snapshots:
        assert one.clones == sum(key.startswith(one.id) for key in ties)
    for row in volumes.values():
        assert row.clones == sum(one.clones for one in snapshots if one.number == row.number)

"""The bytes of segments and index rows: tables against structs, golden bytes, any flipped bit is found."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_daemon import frame

from forebay_core.errors import CorruptionError
from forebay_core.extents import Extent, pack
from forebay_store.format import (
    damage_file,
    entries,
    index_chunk,
    part,
    records,
    reports,
    rows,
    segment,
    snapshot_records,
    snapshot_rows,
    space_records,
    space_rows,
    sweep_rows,
)
from forebay_store.format.layout import build_segment, decode_segment, payload_of
from forebay_store.format.part import parse_part, unpack_entries
from forebay_store.format.segment import NO_SEGMENT, SegmentHeader, SegmentName
from forebay_store.service import lmdb_file
from layout_tables import assert_matches

VOLUME = bytes(range(16))
STORE = bytes(range(16, 32))
NAME = SegmentName(1, 1)
RECORDS: list[tuple[records.Record, tuple[bytes, ...]]] = [
    (records.VolumeCreated(VOLUME, 1 << 20, 5, "vm-1"), ()),
    (records.VolumeResized(VOLUME, 2 << 20), ()),
    (records.WriterTaken(VOLUME, 1, b"d" * 16), ()),
    (records.CutPart(VOLUME, 1, 77, 0, pack([Extent(9, 3)])), (frame(0, "a"), frame(4, "b"))),
    (records.CutCommitted(VOLUME, 1, 77, 1, 1, 4, 123, 0), ()),
    (records.AttemptForgotten(VOLUME, 1, 76), ()),
    (records.WriterReleased(VOLUME, 1), ()),
    (records.VolumeDeleted(VOLUME), ()),
    (records.CutCommitted(VOLUME, 1, 77, 0, 5, 5, 123, 0, b"s" * 16, 124, 0, "monday"), ()),
    (records.CutCommitted(VOLUME, 1, 77, 0, 6, 6, 125, 0, size=4 << 20), ()),
    (snapshot_records.SnapshotTaken(VOLUME, b"t" * 16, 126, "tuesday"), ()),
    (snapshot_records.CloneCreated(b"c" * 16, b"t" * 16, 127, "clone"), ()),
    (snapshot_records.FlattenBegun(b"c" * 16), ()),
    (snapshot_records.OriginPart(b"c" * 16), (frame(4, "b"),)),
    (snapshot_records.Flattened(b"c" * 16), ()),
    (snapshot_records.RolledBack(VOLUME, b"t" * 16), ()),
    (snapshot_records.SnapshotDeleted(VOLUME, b"t" * 16), ()),
    (snapshot_records.Purged(1, 9, 4096), ()),
]


def small_segment() -> bytes:
    built = build_segment(SegmentHeader(STORE, NAME, SegmentName(1, 0)), RECORDS)
    whole = b"".join(built.buffers)
    assert built.size == len(whole)
    return whole


def read_all(whole: bytes) -> list[object]:
    """Return everything a reader of the segment trusts, frames included."""
    decoded = decode_segment(whole, place="test")
    found: list[object] = [decoded.header]
    for placed in decoded.placed:
        found.append(placed)
        if isinstance(placed.record, records.PART_RECORDS):
            found.append(parse_part(payload_of(whole, placed), place="test", stored=True))
    return found


@pytest.mark.parametrize(
    ("module", "title", "layout"),
    [
        (segment, "Segment header", segment.SEGMENT_HEADER),
        (segment, "Segment footer", segment.SEGMENT_FOOTER),
        (records, "Record header", records.RECORD_HEADER),
        (records, "store-claimed", records.STORE_CLAIMED_BODY),
        (records, "volume-created", records.VOLUME_CREATED_BODY),
        (records, "volume-resized", records.VOLUME_RESIZED_BODY),
        (records, "volume-deleted", records.VOLUME_DELETED_BODY),
        (records, "writer-taken", records.WRITER_TAKEN_BODY),
        (records, "writer-released", records.WRITER_RELEASED_BODY),
        (records, "cut-part", records.CUT_PART_BODY),
        (records, "cut-committed", records.CUT_COMMITTED_BODY),
        (records, "closing change", records.CLOSING_CHANGE),
        (records, "attempt-forgotten", records.ATTEMPT_FORGOTTEN_BODY),
        (snapshot_records, "snapshot-taken", snapshot_records.SNAPSHOT_TAKEN_BODY),
        (snapshot_records, "snapshot-deleted", snapshot_records.SNAPSHOT_DELETED_BODY),
        (snapshot_records, "rolled-back", snapshot_records.ROLLED_BACK_BODY),
        (snapshot_records, "clone-created", snapshot_records.CLONE_CREATED_BODY),
        (snapshot_records, "flatten-begun", snapshot_records.FLATTEN_BEGUN_BODY),
        (snapshot_records, "origin-part", snapshot_records.ORIGIN_PART_BODY),
        (snapshot_records, "flattened", snapshot_records.FLATTENED_BODY),
        (snapshot_records, "purged", snapshot_records.PURGED_BODY),
        (snapshot_records, "swept", snapshot_records.SWEPT_BODY),
        (sweep_rows, "Sweep row", sweep_rows.SWEEP_ROW),
        (part, "Part entry", part.PART_ENTRY),
        (rows, "Volume row", rows.VOLUME_ROW),
        (rows, "Segment row", rows.SEGMENT_ROW),
        (entries, "Entry", entries.ENTRY),
        (snapshot_rows, "Snapshot row", snapshot_rows.SNAPSHOT_ROW),
        (rows, "Attempt row", rows.ATTEMPT_ROW),
        (rows, "Staged part", rows.STAGED_PART),
        (rows, "Store mark", rows.STORE_MARK),
        (rows, "Applied mark", rows.APPLIED_MARK),
        (space_rows, "Checkpoint mark", space_rows.CHECKPOINT_MARK),
        (space_records, "index-chunk", space_records.INDEX_CHUNK_BODY),
        (space_records, "checkpoint-complete", space_records.CHECKPOINT_COMPLETE_BODY),
        (space_records, "cleaned-part", space_records.CLEANED_PART_BODY),
        (space_records, "Move", space_records.MOVE),
        (space_records, "segments-deleted", space_records.SEGMENTS_DELETED_BODY),
        (index_chunk, "Group header", index_chunk.GROUP_HEADER),
        (damage_file, "Damage file", damage_file.DAMAGE_HEADER),
        (damage_file, "Damaged extent", damage_file.DAMAGED_EXTENT),
        (reports, "Reports file", reports.REPORTS_HEADER),
        (reports, "Held report", reports.HELD_REPORT),
        (reports, "Loss", reports.LOSS),
        (lmdb_file, "Meta page", lmdb_file.META_PAGE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables_are_what_the_code_packs(module: object, title: str, layout: object) -> None:
    assert_matches(module, title, layout)  # type: ignore[arg-type]


def test_segment_bytes_stay_as_they_are() -> None:
    header = build_segment(SegmentHeader(STORE, NAME, SegmentName(1, 0)), RECORDS[:3]).buffers
    assert b"".join(header).hex() == GOLDEN_SEGMENT
    # Frames depend on the zstd version when they compress; these don't.
    assert hashlib.sha256(small_segment()).hexdigest() == GOLDEN_SHA256


def test_a_cut_without_a_closing_change_takes_no_more_bytes_than_before_there_were_any() -> None:
    commit = records.CutCommitted(VOLUME, 1, 77, 1, 1, 4, 123, 0)
    _, body = records.encode_record(commit)
    assert body == records.CUT_COMMITTED_BODY.pack(VOLUME, 1, 77, 1, 0, 1, 4, 123, 0)


def test_row_bytes_stay_as_they_are() -> None:
    entry = entries.HeadEntry(5, 3, entries.DATA, 1 << 44 | 9, NAME, 400, 4000, 16, 2)
    row = rows.VolumeState(VOLUME, "vm-1", 1 << 20, 1, 1 << 44 | 9, 3, 4, 5, 6, 0, 8, b"d" * 16, b"", 7, 9, 2, 1, True)
    snapshot = snapshot_rows.SnapshotState(b"s" * 16, 7, 1 << 44 | 8, "monday", 1 << 20, 5, b"o" * 16, 2)
    assert b"".join(entries.encode_entry(7, entry)).hex() == GOLDEN_ENTRY
    assert b"".join(entries.encode_history(7, 0, entry, 1 << 44 | 10)).hex() == GOLDEN_HISTORY
    assert rows.encode_volume(row).hex() == GOLDEN_ROW
    assert b"".join(snapshot_rows.encode_snapshot(snapshot)).hex() == GOLDEN_SNAPSHOT
    assert entries.decode_entry(*entries.encode_entry(7, entry)) == entry
    assert entries.decode_history(*entries.encode_history(7, 0, entry, 11)) == (entry, 11)
    assert snapshot_rows.decode_snapshot(*snapshot_rows.encode_snapshot(snapshot)) == snapshot
    assert rows.decode_volume(VOLUME, rows.encode_volume(row)) == row


def test_the_bytes_of_a_sweep_stay_as_they_are() -> None:
    record = snapshot_records.Swept(VOLUME, 4096)
    sweep = sweep_rows.Sweep(VOLUME, 5, 1 << 40, 1 << 44 | 9, 1 << 44 | 8, 1 << 44 | 7, True, True)
    assert b"".join(records.encode_record(record)).hex() == GOLDEN_SWEPT
    key, value = sweep_rows.encode_sweep(sweep)
    assert (key + value).hex() == GOLDEN_SWEEP
    assert sweep_rows.decode_sweep(key, value) == sweep
    for damaged in (bytes([value[0] ^ 1]) + value[1:], value[:-1]):
        with pytest.raises(CorruptionError, match="sweep row"):
            sweep_rows.decode_sweep(key, damaged)


def test_a_segment_reads_back_as_it_was_built() -> None:
    decoded = decode_segment(small_segment(), place="test")
    assert decoded.header == SegmentHeader(STORE, NAME, SegmentName(1, 0))
    assert [placed.record for placed in decoded.placed] == [record for record, _ in RECORDS]


def test_any_flipped_bit_of_a_segment_is_found() -> None:
    whole = bytearray(small_segment())
    for bit in range(len(whole) * 8):
        if bit >= 1024 * 8 and bit % 211 and bit < (len(whole) - 512) * 8:
            continue  # Inside the long random frames a sample will do; headers and tables are tried bit by bit.
        whole[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            read_all(bytes(whole))
        whole[bit // 8] ^= 1 << bit % 8
    read_all(bytes(whole))


def test_a_segment_that_is_cut_off_anywhere_or_too_long_is_found() -> None:
    whole = small_segment()
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        with pytest.raises(CorruptionError):
            read_all(whole[:size])
    with pytest.raises(CorruptionError):
        read_all(whole + b"\0")


SPACE_RECORDS: list[records.Record] = [
    space_records.IndexChunk(7, 0, 2, 300, 11),
    space_records.CheckpointComplete(7, 1, SegmentName(1, 5), 2, 12, 299),
    space_records.CleanedPart(
        VOLUME,
        99,
        space_records.pack_names([SegmentName(1, 3), NAME]),
        space_records.pack_moves([space_records.Move(5, 1 << 44 | 9, 3, 400, 0, 4000, 2, 1, 16, 1)]),
    ),
    space_records.SegmentsDeleted(space_records.pack_names([SegmentName(1, 2)])),
]
GOLDEN_SPACE = "9701b04e63aa369922d3cedc3a513230ba3721cde4c3ae5afb134fe5cdddfd9d"


def test_records_of_cleaning_stay_as_they_are_and_read_back() -> None:
    encoded = [b"".join(records.encode_record(record)) for record in SPACE_RECORDS]
    assert hashlib.sha256(b"".join(encoded)).hexdigest() == GOLDEN_SPACE
    for record, whole in zip(SPACE_RECORDS, encoded, strict=True):
        header = records.decode_record_header(memoryview(whole), place="test")
        assert records.decode_body(header, whole[records.RECORD_HEADER.size :], place="test") == record
        for bit in range(len(whole) * 8):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CorruptionError):
                header = records.decode_record_header(memoryview(flipped), place="test")
                records.decode_body(header, flipped[records.RECORD_HEADER.size :], place="test")


def test_rows_of_the_index_come_out_of_a_chunk_as_they_went_in() -> None:
    given_rows = [(rows.Table.HEAD, bytes([at] * 8), bytes([at] * 24)) for at in range(50)]
    given_rows += [
        (rows.Table.NAMES, b"a", b"1" * 16),
        (rows.Table.NAMES, b"bb", b"2" * 16),
        (rows.Table.META, b"m", b""),
    ]
    payload, plain_size = index_chunk.pack_chunk(given_rows)
    assert list(index_chunk.unpack_chunk(payload, plain_size=plain_size, place="test")) == given_rows
    for at in range(len(payload)):
        with pytest.raises(CorruptionError):
            list(index_chunk.unpack_chunk(payload[:at], plain_size=plain_size, place="test"))


def test_what_is_damaged_is_kept_and_a_damaged_file_is_refused() -> None:
    row = damage_file.Shown("vm@s1", 5, 3, NAME, 400, "what is wrong")
    state = damage_file.ScrubState(NAME, 1, 2, 3, 4, True, (row, row._replace(name="", count=0)))
    whole = damage_file.encode_damage(STORE, state)
    assert damage_file.decode_damage(whole, store=STORE, place="test") == state
    for at in range(len(whole)):
        for bad in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            with pytest.raises(CorruptionError):
                damage_file.decode_damage(bad, store=STORE, place="test")
    with pytest.raises(CorruptionError):
        damage_file.decode_damage(whole, store=VOLUME, place="test")


def test_any_flipped_bit_of_a_row_is_found() -> None:
    row = rows.VolumeState(VOLUME, "vm-1", 1 << 20, 1, 9, 3, 4, 5, 6, 0, 8, b"d" * 16, b"")
    value = bytearray(rows.encode_volume(row))
    key, entry = entries.encode_entry(7, entries.HeadEntry(5, 3, entries.DATA, 9, NAME, 400, 4000, 16, 2))
    both = bytearray(key + entry)
    for bit in range(len(value) * 8):
        value[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            rows.decode_volume(VOLUME, bytes(value))
        value[bit // 8] ^= 1 << bit % 8
    for bit in range(len(both) * 8):
        both[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            entries.decode_entry(bytes(both[: len(key)]), bytes(both[len(key) :]))
        both[bit // 8] ^= 1 << bit % 8


def test_a_claim_elsewhere_than_at_the_start_of_an_incarnation_is_refused() -> None:
    claim = (records.StoreClaimed(1), ())
    for name, content in ((NAME, [claim]), (SegmentName(2, 0), RECORDS[:1]), (SegmentName(2, 0), [claim, claim])):
        whole = b"".join(build_segment(SegmentHeader(STORE, name, NO_SEGMENT), content).buffers)
        with pytest.raises(CorruptionError, match="store-claimed"):
            decode_segment(whole, place="test")


def test_the_table_of_a_part_names_every_block() -> None:
    frames = [frame(0, "a", 3), frame(100, "b", 16)]
    table = parse_part(b"".join(frames), place="test", stored=True)
    found = unpack_entries(table.entries)
    assert [(entry.start, entry.length, entry.frame_offset) for entry in found] == [
        (0, 3, 0),
        (100, 16, len(frames[0])),
    ]
    assert table.blocks_end == 116


def test_a_part_that_ends_within_a_frame_is_refused() -> None:
    whole = frame(0, "a", 3)
    for stored in (False, True):
        for size in range(1, len(whole), 501):
            with pytest.raises(CorruptionError):
                parse_part(whole[:size], place="test", stored=stored)


@given(st.binary(max_size=300))
def test_garbage_is_no_segment_and_no_part(garbage: bytes) -> None:
    with pytest.raises(CorruptionError):
        decode_segment(garbage, place="test")
    if garbage:
        with pytest.raises(CorruptionError):
            parse_part(garbage, place="test", stored=True)


@given(st.integers(1, (1 << 20) - 1), st.integers(0, (1 << 32) - 1))
def test_segment_names_sort_as_they_were_written(incarnation: int, number: int) -> None:
    name = SegmentName(incarnation, number)
    assert segment.parse_name(name.text) == name
    assert segment.parse_name(name.text + ".tmp") is None
    assert (name.text < NAME.text) == (name < NAME)


GOLDEN_ENTRY = "00000700000000050900000000100000010010000000d00b900100401fc8aa38"
GOLDEN_HISTORY = "000007000000000000000005000010000000000a0900000000100000010010000000d00b900100401fc8768b"
GOLDEN_ROW = (
    "000010000000000001000000010000000900000000100000030000000000000004000000000000000500000000000000"
    "060000000000000000000000000000000800000000000000090000000000000007000000020000000100000064646464"
    "6464646464646464646464640000000000000000000000000000000004006764c6c49e3b5bfb766d2d31"
)
GOLDEN_SNAPSHOT = (
    "000000070000100000000008737373737373737373737373737373736f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f00001000"
    "000000000500000000000000020000000600e93f0c88b5caeb296d6f6e646179"
)
GOLDEN_SEGMENT = (
    "46425345474d4e540100000000000000101112131415161718191a1b1c1d1e1f01000000010000000100000000000000"
    "000000000000000063e0e1988e737d2a464252430200000036000000000000005889265a2fada8da4908d3502be0e2f5"
    "000102030405060708090a0b0c0d0e0f0000100000000000050000000000000000000000000000000000000000000000"
    "0400766d2d3146425243030000001800000000000000a5b769e03a5daf50c186d34d6c0175e800010203040506070809"
    "0a0b0c0d0e0f00002000000000004642524305000000240000000000000075d8fee630015cceec685befe7523ddf0001"
    "02030405060708090a0b0c0d0e0f01000000646464646464646464646464646464644642534603000000320100000000"
    "00003e95028050d6df9a207761a887c2b6e3"
)
GOLDEN_SWEPT = (
    "46425243190000001400000000000000b9f60feba046c92600b2fac49cf3d442000102030405060708090a0b0c0d0e0f00100000"
)
GOLDEN_SWEEP = (
    "73776565702f000102030405060708090a0b0c0d0e0f0000000000000005000000000001000009000000001000000800"
    "000000100000070000000010000003000000000000009813fe53a8166c1e"
)
GOLDEN_SHA256 = "ef162567a465de75c307ac3987b7fab83ad6170e61a1fa3fdf910c206973b1e9"

"""Records: tables, golden bytes, damage, and that nothing that contradicts itself is accepted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layout_tables
from forebay_cache.format import cut_end, record, volume_note
from forebay_cache.format.cut_end import CUT_END, CutEnd, decode_cut_end, encode_cut_end
from forebay_cache.format.record import (
    ENTRY,
    ENTRY_DTYPE,
    FILL,
    HEADER,
    MOVE,
    PIN,
    RECORD_ENTRIES_MAX,
    WRITE,
    RecordHeader,
    decode_note,
    decode_record,
    encode_record,
    pack_note,
    record_xxh3,
)
from forebay_cache.format.volume_note import (
    CLOSED,
    EXPORT_NAME_SIZE_MAX,
    LEFT_DIRTY,
    READ_ONLY,
    SNAPSHOT,
    VOLUME_NOTE,
    Front,
    FrontKind,
    VolumeNote,
    decode_volume_note,
    encode_volume_note,
)
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE, LBA_MAX, RATE_UNLIMITED, VOLUME_SIZE_MAX

PLAIN = RecordHeader(record.DATA, 0, 0x1122334455667788, 3, 4, 5, 2, 0xAABBCCDDEEFF0011, 2, 1, 0, 0x99)
NOTE = VolumeNote(7, READ_ONLY, bytes(range(16)), 1 << 30, 9, "vm-1@monday", bytes(range(16, 32)), 20 << 20, 60 << 20)


NOTE = NOTE._replace(origin=bytes(range(32, 48)))
TAKEN = CutEnd(7, cut_end.SNAPSHOT, 0x300000009, 1 << 30, 1_700_000_000_000_000_000, bytes(range(48, 64)), "monday")
GROWN = CutEnd(7, cut_end.RESIZE, 0x30000000A, 1 << 31)


def entry(
    kind: int = record.WRITE,
    lba: int = 10,
    version: int = 77,
    value: int = 0x55,
    key: int = 1,
    flags: int = 0,
    mask: int = 0xFF,
    reserved: int = 0,
) -> bytes:
    return ENTRY.pack(lba, version, value, key, kind, flags, mask, reserved)


def sealed(block: bytes) -> bytes:
    """Return the block with a fresh checksum: damage that only the other checks can meet."""
    bare = block[:72] + bytes(8) + block[80:]
    return bare[:72] + checksum(bare).to_bytes(8, "little") + bare[80:]


def data_record(*entries: bytes, blocks: int, kind: int = record.DATA, next_zone: int = 0) -> bytes:
    header = PLAIN._replace(kind=kind, entry_count=len(entries), block_count=blocks, next_zone=next_zone)
    return encode_record(header, b"".join(entries))


SAMPLES = {
    "data": data_record(entry(), entry(record.TRIM, 0, 78, 1 << 40), blocks=1),
    "full": data_record(*(entry(lba=lba) for lba in range(RECORD_ENTRIES_MAX)), blocks=RECORD_ENTRIES_MAX),
    "seal": data_record(blocks=0, kind=record.SEAL, next_zone=12),
    "state": data_record(
        entry(record.ACKNOWLEDGED, 0), entry(record.DROP, 0), entry(record.LIMIT, 0, 5, 7, key=0), blocks=0
    ),
    "note": encode_record(PLAIN._replace(kind=record.NOTE, entry_count=1, block_count=0), pack_note(NOTE)),
    "end": encode_record(PLAIN._replace(kind=record.NOTE, entry_count=1, block_count=0), pack_note(TAKEN)),
}


def test_tables_are_the_code() -> None:
    layout_tables.assert_matches(record, "Header", HEADER)
    layout_tables.assert_matches(record, "Entry", ENTRY)
    layout_tables.assert_matches(volume_note, "VolumeNote", VOLUME_NOTE)
    layout_tables.assert_matches(cut_end, "CutEnd", CUT_END)
    names = [field.name for field in layout_tables.table(record, "Header") if field.name != "reserved"]
    assert names[2:] == list(RecordHeader._fields)
    assert [field.name for field in layout_tables.table(record, "Entry")] == list(ENTRY_DTYPE.names or ())
    for field in layout_tables.table(record, "Entry"):
        assert (ENTRY_DTYPE.fields or {})[field.name][1] == field.offset


def test_golden_bytes() -> None:
    assert SAMPLES["data"][:160].hex() == (
        "4642525204000100887766554433221103000000040000000500000000000000"
        "02000000000000001100ffeeddccbbaa02000000010000000000000000000000"
        "9900000000000000" + SAMPLES["data"][72:80].hex() + "00000000000000000000000000000000"
        "0a000000000000004d00000000000000550000000000000001000000" + "0100ff00"
        "00000000000000004e0000000000000000000000000100000100000005" + "00ff00"
    )
    assert {name: f"{record_xxh3(block):016x}" for name, block in SAMPLES.items()} == {
        "data": "814edf8d98d8bfdc",
        "full": "e1379a1670ff49f5",
        "seal": "92c39ae9b5ede2d5",
        "state": "6e473fa0c7e33b84",
        "note": "e0a2dad36e047804",
        "end": "fe5b1a3ceb390d26",
    }
    assert encode_volume_note(NOTE)[304:].hex() == "00004001000000000000c00300000000" + bytes(range(16, 48)).hex()
    assert (
        encode_cut_end(TAKEN)[:56].hex()
        == (
            "07000000010006000900000003000000000000400000000000002a36fe9c9717"
            + bytes(range(48, 64)).hex()
            + b"monday".hex()
        )
        + "0000"
    )
    kernel = encode_volume_note(NOTE._replace(front=Front(FrontKind.KERNEL, 4096, 3)))
    assert kernel[297:304].hex() == "01001003000000" and encode_volume_note(NOTE)[297:304] == bytes(7)
    assert encode_cut_end(GROWN)[:32].hex() == "07000000020000000a0000000300000000000080000000000000000000000000"
    assert encode_cut_end(GROWN)[32:] == bytes(160)
    assert encode_volume_note(NOTE)[:56].hex() == (
        "0700000001000b00000102030405060708090a0b0c0d0e0f00000040000000000900000000000000"
        + b"vm-1@monday".hex()
        + "0000000000"
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_what_was_encoded_is_decoded(name: str) -> None:
    header, entries = decode_record(SAMPLES[name], place="zone 3")
    assert header.header_xxh3 == record_xxh3(SAMPLES[name])
    notes = {"note": NOTE, "end": TAKEN}
    note = pack_note(notes[name])[ENTRY.size :] if name in notes else b""
    assert encode_record(header, entries.tobytes() + note) == SAMPLES[name]
    assert header.size == 1 + header.block_count


def test_a_volume_row_travels_in_a_note_record() -> None:
    _, entries = decode_record(SAMPLES["note"], place="zone 3")
    assert entries["kind"].tolist() == [record.BLOB]
    assert decode_note(SAMPLES["note"], place="zone 3") == NOTE


def test_the_end_of_a_cut_travels_in_a_note_record() -> None:
    assert decode_note(SAMPLES["end"], place="zone 3") == TAKEN
    other = encode_record(
        PLAIN._replace(kind=record.NOTE, entry_count=1, block_count=0),
        entry(record.BLOB, record.BLOB_CUT_END, 0, CUT_END.size, key=8) + encode_cut_end(TAKEN),
    )
    decode_record(other, place="zone 3")
    with pytest.raises(CorruptionError, match="volume key"):
        decode_note(other, place="zone 3")


def test_entries_stay_when_the_block_is_reused() -> None:
    buffer = bytearray(SAMPLES["data"])
    _, entries = decode_record(memoryview(buffer), place="zone 3")
    buffer[:] = bytes(BLOCK_SIZE)
    assert entries["lba"].tolist() == [10, 0]


@pytest.mark.parametrize("name", SAMPLES)
def test_any_flipped_bit_is_detected(name: str) -> None:
    damaged = bytearray(SAMPLES[name])
    for bit in range(BLOCK_SIZE * 8):
        damaged[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(CorruptionError):
            decode_record(damaged, place="zone 3")
        damaged[bit >> 3] ^= 1 << (bit & 7)


@pytest.mark.parametrize("size", [0, 1, 95, 96, BLOCK_SIZE - 1, BLOCK_SIZE + 1, 2 * BLOCK_SIZE])
def test_a_block_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(CorruptionError):
        decode_record((SAMPLES["data"] * 2)[:size], place="zone 3")


MANY = [entry(lba=lba) for lba in range(20)]


@pytest.mark.parametrize(
    "block",
    [
        data_record(entry(0), blocks=1),
        data_record(entry(10, 0), blocks=0),
        data_record(entry(record.TRIM, 0, 1, 1), entry(), blocks=1),
        data_record(entry(), entry(), blocks=1),
        data_record(entry(), entry(record.TRIM, 0, 1, 1), blocks=2),
        data_record(*MANY, entry(record.TRIM), blocks=21),
        data_record(*MANY, entry(0), blocks=21),
        data_record(*MANY, entry(), blocks=20),
        data_record(entry(lba=LBA_MAX + 1), blocks=1),
        data_record(*MANY, entry(lba=LBA_MAX + 1), blocks=21),
        data_record(entry(key=0), blocks=1),
        data_record(*MANY, entry(key=0), blocks=21),
        data_record(entry(key=1 << 24), blocks=1),
        data_record(*MANY, entry(key=1 << 24), blocks=21),
        data_record(entry(flags=1), blocks=1),
        data_record(*MANY, entry(flags=1), blocks=21),
        data_record(entry(mask=0xFE), blocks=1),
        data_record(*MANY, entry(mask=0x7F), blocks=21),
        data_record(entry(reserved=1), blocks=1),
        data_record(*MANY, entry(reserved=0x80), blocks=21),
        data_record(entry(record.TRIM, 0, 1, 0), blocks=0),
        data_record(entry(record.ZERO, 1, 1, 1 << 40), blocks=0),
        data_record(entry(record.TRIM, (1 << 64) - 1, 1, 1), blocks=0),
        data_record(entry(record.ACKNOWLEDGED, 1), blocks=0),
        data_record(entry(record.LIMIT, 0, 5, 7), blocks=0),
        data_record(entry(record.LIMIT, 0, 8, 7, key=0), blocks=0),
        data_record(entry(record.LIMIT, 0, 0, 7, key=0), blocks=0),
        data_record(entry(record.LIMIT, 1, 5, 7, key=0), blocks=0),
        data_record(entry(record.BLOB, record.BLOB_VOLUME, 0, VOLUME_NOTE.size), blocks=0),
        data_record(entry(), blocks=1, kind=record.NOTE),
        data_record(entry(record.TRIM, 0, 1, 1), blocks=0, kind=record.SEAL),
        data_record(entry(), blocks=1, kind=4),
        data_record(entry(), blocks=1, kind=0),
        sealed(SAMPLES["data"][:7] + b"\1" + SAMPLES["data"][8:]),
        sealed(SAMPLES["data"][:4] + b"\1" + SAMPLES["data"][5:]),
        sealed(SAMPLES["data"][:48] + b"\x7e" + SAMPLES["data"][49:]),
        sealed(SAMPLES["data"][:48] + b"\xff\xff\xff\xff" * 2 + SAMPLES["data"][56:]),
        sealed(SAMPLES["data"][:60] + b"\1" + SAMPLES["data"][61:]),
        sealed(SAMPLES["data"][:80] + b"\1" + SAMPLES["data"][81:]),
        sealed(SAMPLES["data"][:-1] + b"\1"),
    ],
)
def test_a_sealed_record_that_contradicts_itself_is_refused(block: bytes) -> None:
    with pytest.raises(CorruptionError) as caught:
        decode_record(block, place="zone 3 block 17")
    assert "zone 3 block 17" in str(caught.value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.integers(0, BLOCK_SIZE - 1))
def test_sealed_rubbish_is_decoded_or_refused(rubbish: bytes, at: int) -> None:
    block = SAMPLES["data"]
    block = sealed((block[:at] + rubbish + block[at + len(rubbish) :])[:BLOCK_SIZE])
    try:
        header, entries = decode_record(block, place="zone 3")
    except CorruptionError:
        return
    assert header.block_count <= header.entry_count == entries.size <= RECORD_ENTRIES_MAX
    assert np.isin(entries["kind"][: header.block_count], [1, 2, 3, 4]).all()


@pytest.mark.parametrize(
    "note",
    [
        NOTE,
        NOTE._replace(
            volume_key=(1 << 24) - 1, flags=READ_ONLY | LEFT_DIRTY | CLOSED | SNAPSHOT, name="v" * 128 + "@" + "s" * 128
        ),
        NOTE._replace(size=VOLUME_SIZE_MAX, epoch=(1 << 20) - 1, flags=0, name="a"),
        NOTE._replace(size=0),
        NOTE._replace(average=0, peak=0),
        NOTE._replace(average=RATE_UNLIMITED, peak=RATE_UNLIMITED),
        NOTE._replace(front=Front(FrontKind.KERNEL, 512, 1)),
        NOTE._replace(front=Front(FrontKind.KERNEL, 4096, (1 << 32) - 1)),
        NOTE._replace(front=Front(FrontKind.FUSE)),
        NOTE._replace(front=Front(FrontKind.LOOP, 0, 7)),
    ],
)
def test_volume_rows_come_back(note: VolumeNote) -> None:
    assert decode_volume_note(encode_volume_note(note), place="x") == note
    assert len(note.name) <= EXPORT_NAME_SIZE_MAX


ROW = encode_volume_note(NOTE)


@pytest.mark.parametrize(
    "row",
    [
        ROW[:-1],
        bytes(4) + ROW[4:],
        b"\0\0\0\1" + ROW[4:],
        ROW[:4] + b"\x10" + ROW[5:],
        ROW[:6] + b"\0" + ROW[7:],
        ROW[:6] + b"\5" + ROW[7:],
        ROW[:6] + b"\xff\xff" + ROW[8:],
        ROW[:24] + b"\1" + ROW[25:],
        ROW[:39] + b"\1" + ROW[40:],
        ROW[:40] + b"/" + ROW[41:],
        ROW[:40] + b"\xff" + ROW[41:],
        ROW[:60] + b"x" + ROW[61:],
        ROW[:320] + bytes(16) + ROW[336:],
        ROW[:304] + bytes(8) + ROW[312:],
        ROW[:312] + bytes(8) + ROW[320:],
        ROW[:297] + b"\4" + ROW[298:],
        ROW[:297] + b"\1" + ROW[298:],  # a kernel device without a block size
        ROW[:298] + b"\0\2" + ROW[300:],
        ROW[:300] + b"\1" + ROW[301:],
        ROW[:297] + b"\2\0\0\1" + ROW[301:],  # what is only a file has no number
    ],
)
def test_a_volume_row_that_contradicts_itself_is_refused(row: bytes) -> None:
    with pytest.raises(CorruptionError):
        decode_volume_note(row, place="checkpoint A")


@pytest.mark.parametrize(
    "end", [TAKEN, GROWN, TAKEN._replace(name="s" * 128), TAKEN._replace(volume_key=(1 << 24) - 1)]
)
def test_ends_of_cuts_come_back(end: CutEnd) -> None:
    assert decode_cut_end(encode_cut_end(end), place="x") == end


END = encode_cut_end(TAKEN)


@pytest.mark.parametrize(
    "row",
    [
        END[:-1],
        END + b"\0",
        bytes(4) + END[4:],
        b"\0\0\0\1" + END[4:],
        END[:4] + b"\3" + END[5:],
        END[:4] + b"\2" + END[5:],
        END[:6] + b"\0" + END[7:],
        END[:6] + b"\5" + END[7:],
        END[:6] + b"\xff\xff" + END[8:],
        END[:8] + bytes(8) + END[16:],
        END[:16] + b"\1" + END[17:],
        END[:23] + b"\1" + END[24:],
        END[:32] + bytes(16) + END[48:],
        END[:48] + b"/" + END[49:],
        END[:48] + b"\xff" + END[49:],
        END[:-17] + b"x" + END[-16:],
        END[:-1] + b"\1",
    ],
)
def test_the_end_of_a_cut_that_contradicts_itself_is_refused(row: bytes) -> None:
    with pytest.raises(CorruptionError):
        decode_cut_end(row, place="checkpoint A")


@pytest.mark.skipif(record.put_writes_fast is record.put_writes, reason="there is no compiler here")
@given(st.integers(0, RECORD_ENTRIES_MAX), st.integers(0, RECORD_ENTRIES_MAX), st.integers(0, LBA_MAX - 125))
def test_both_twins_put_the_same_entries(index: int, count: int, lba: int) -> None:
    sums = np.arange(count, dtype=np.uint64) + np.uint64((1 << 64) - 200)
    twins = [bytearray(BLOCK_SIZE), bytearray(BLOCK_SIZE)]
    for put, block in zip((record.put_writes, record.put_writes_fast), twins, strict=True):
        if index + count > RECORD_ENTRIES_MAX:
            with pytest.raises(ValueError):
                put(block, index, 7, lba, 1 << 63, sums)
        else:
            put(block, index, 7, lba, 1 << 63, sums)
    assert twins[0] == twins[1]
    assert not any(twins[0][: record.ENTRIES_OFFSET + index * record.ENTRY_SIZE])


@pytest.mark.parametrize("mark", {record.mark_written, record.mark_written_fast})
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([WRITE, FILL, MOVE])), max_size=RECORD_ENTRIES_MAX),
    st.lists(st.integers(0, 30), max_size=RECORD_ENTRIES_MAX),
)
def test_the_written_ones_of_keys_are_marked(mark, entries: list[tuple[int, int]], lbas: list[int]) -> None:
    block = bytearray(BLOCK_SIZE)
    for i, (lba, kind) in enumerate(entries):
        record.ENTRY.pack_into(block, record.ENTRIES_OFFSET + i * record.ENTRY_SIZE, lba, 1, 2, 5, kind, 0, 0xFF, 0)
    keys = np.array([5 << 40 | lba if lba % 3 else lba for lba in lbas], np.uint64)
    written = {5 << 40 | lba for lba, kind in entries if kind == WRITE}
    found = np.zeros(keys.size, np.bool_)
    mark(block, len(entries), keys, found)
    assert found.tolist() == [key in written for key in keys.tolist()]


@pytest.mark.parametrize("mark", {record.mark_written, record.mark_written_fast})
def test_keys_and_entries_that_do_not_fit_are_refused(mark) -> None:
    keys, found = np.zeros(126, np.uint64), np.zeros(126, np.bool_)
    for count, key_count, found_count in ((1, 126, 126), (1, 3, 2), (130, 1, 1)):
        with pytest.raises(ValueError):
            mark(bytearray(BLOCK_SIZE), count, keys[:key_count], found[:found_count])


def test_copies_are_entries_as_their_table_says() -> None:
    block = bytearray(BLOCK_SIZE)
    keys = np.array([7 << 40 | 3, ((1 << 24) - 1) << 40 | LBA_MAX], np.uint64)
    versions, sums = np.array([1 << 63, 5], np.uint64), np.array([9, 10], np.uint64)
    record.put_copies(block, 4, keys, versions, sums, np.array([MOVE, PIN], np.uint8))
    assert record.entries_in(block, 6)[4:].tolist() == [
        (3, 1 << 63, 9, 7, MOVE, 0, 255, 0),
        (LBA_MAX, 5, 10, (1 << 24) - 1, PIN, 0, 255, 0),
    ]
    with pytest.raises(ValueError):
        record.put_copies(block, 124, keys, versions, sums, np.array([MOVE, PIN], np.uint8))

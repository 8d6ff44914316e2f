"""Checkpoints: tables, golden bytes, round trips through an area, and that a damaged one is never believed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layout_tables
from forebay_cache.format import checkpoint
from forebay_cache.format.checkpoint import (
    CHUNK_PLACES,
    CHUNK_SIZE,
    CHUNK_ZONES,
    HEADER,
    HOLE_DTYPE,
    PLACE_SIZE,
    VOLUME_COUNT_MAX,
    VOLUME_ROW,
    ZONE_DTYPE,
    CheckpointHeader,
    CheckpointLayout,
    OriginPages,
    VolumeState,
    area_size,
    choose_checkpoints,
    decode_checkpoint_header,
    decode_places,
    decode_table,
    decode_volumes,
    decode_zones,
    encode_checkpoint_header,
    encode_places,
    encode_table,
    encode_volumes,
    encode_zones,
    hole_count_max,
    verify_chunk,
)
from forebay_cache.format.cut_end import CUT_END, RESIZE, SNAPSHOT, CutEnd
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.checksums import checksum
from forebay_core.errors import CorruptionError
from forebay_core.units import BLOCK_SIZE

DEVICE = bytes(range(16))
SIZE_MAX = 64 << 20
PLACES = ["area A", "area B"]


def holes(*rows: tuple[int, int, int]) -> checkpoint.RowArray:
    return np.array(list(rows), HOLE_DTYPE)


def volume(key: int, *rows: tuple[int, int, int]) -> VolumeState:
    return VolumeState(
        VolumeNote(key, 0, bytes([key]) * 16, 1 << 30, 3, f"vm-{key}", b"s" * 16), 900 + key, 800, holes(*rows)
    )


def taken(key: int, version: int) -> CutEnd:
    return CutEnd(key, SNAPSHOT, version, 1 << 30, 5, bytes([version & 255]) * 16, f"s{version}")


VOLUMES = [
    volume(1),
    volume(2, (0, 5, 7), (100, 1 << 39, 8))._replace(closed_holes=holes((7, 1, 820)), ends=(taken(2, 840),)),
    volume(9, ((1 << 40) - 1, 1, 2))._replace(ends=(taken(9, 801), CutEnd(9, RESIZE, 909, 1 << 31))),
]
HEADER_1 = CheckpointHeader(
    DEVICE, 41, 1000, 0x1122334455667788, 3, 17, 5, 70000, 100, 3, 4, 4096, 0xAABBCCDDEEFF0011, 20, 60, 3
)
BLOCK_1 = encode_checkpoint_header(HEADER_1)


def sealed(block: bytes) -> bytes:
    """Return the block with a fresh checksum."""
    bare = block[:112] + bytes(8) + block[120:]
    return bare[:112] + checksum(bare).to_bytes(8, "little") + bare[120:]


def decode(block: bytes, device: bytes = DEVICE, size_max: int = SIZE_MAX) -> CheckpointHeader:
    return decode_checkpoint_header(block, device=device, size_max=size_max, place="area A")


def layout_of(volumes: list[VolumeState], place_count: int = 0, zone_count: int = 16) -> CheckpointLayout:
    hole_count = sum(one.holes.size + one.closed_holes.size for one in volumes)
    end_count = sum(len(one.ends) for one in volumes)
    return CheckpointLayout(place_count, zone_count, len(volumes), hole_count, end_count=end_count)


class Area:
    """One checkpoint of random contents, written into the bytes of an area as a daemon does."""

    def __init__(self, place_count: int, zone_count: int, volumes: list[VolumeState], seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.volumes = volumes
        self.arrays = [rng.integers(0, 1 << 63, place_count).astype(np.uint64) for _ in range(3)]
        self.counts = rng.integers(0, 256, place_count).astype(np.uint8)
        self.zones = np.zeros(zone_count, ZONE_DTYPE)
        self.zones["incarnation"] = rng.integers(0, 1 << 32, zone_count)
        self.zones["first_position"] = rng.integers(0, 1 << 62, zone_count)
        self.zones["state"] = rng.integers(0, 5, zone_count)
        self.layout = layout_of(volumes, place_count, zone_count)
        self.bytes = bytearray(b"\xee" * self.layout.size)
        self._write()

    def _write(self) -> None:
        layout = self.layout
        table = encode_volumes(self.volumes)
        pieces = [
            table[chunk.first : chunk.first + chunk.count].ljust(chunk.padded_size, b"\0")
            for chunk in layout.volume_chunks
        ]
        pieces += [encode_zones(self.zones[chunk.first : chunk.first + chunk.count]) for chunk in layout.zone_chunks]
        for chunk in layout.place_chunks:
            part = slice(chunk.first, chunk.first + chunk.count)
            keys, versions, checksums = (array[part] for array in self.arrays)
            pieces.append(encode_places(keys, versions, checksums, self.counts[part]))
        chunks = layout.chunks
        assert len(pieces) == len(chunks) == layout.chunk_count
        end = BLOCK_SIZE
        for chunk, piece in zip(chunks, pieces, strict=True):
            assert chunk.offset == end
            assert len(piece) == chunk.padded_size <= CHUNK_SIZE
            self.bytes[chunk.offset : chunk.offset + len(piece)] = piece
            end += len(piece)
        self.dirty = bytes(index % 2 for index in range(layout.place_chunk_count))
        sums = encode_table([checksum(piece) for piece in pieces], self.dirty)
        assert (layout.table.offset, layout.table.padded_size) == (end, len(sums))
        self.bytes[end:] = sums
        assert len(self.bytes) == layout.size
        header = CheckpointHeader(DEVICE, 5, 6, 7, 8, 9, 10, *layout[:5], checksum(sums), end_count=layout.end_count)
        self.bytes[:BLOCK_SIZE] = encode_checkpoint_header(header)

    def part(self, offset: int, size: int) -> bytes:
        return bytes(self.bytes[offset : offset + size])

    def check(self) -> None:
        """Read all of it back, as recovery does, and compare."""
        header = decode(self.part(0, BLOCK_SIZE))
        layout = header.layout
        assert layout == self.layout
        sums, dirty = decode_table(self.part(layout.table.offset, layout.table.padded_size), header, place="area A")
        assert dirty == self.dirty
        chunks = {}
        for chunk, expected in zip(layout.chunks, sums, strict=True):
            chunks[chunk] = self.part(chunk.offset, chunk.padded_size)
            verify_chunk(chunks[chunk], expected, place="area A")
        table = b"".join(chunks[chunk][: chunk.size] for chunk in layout.volume_chunks)
        found = decode_volumes(table, layout, place="area A")
        assert [one[:3] for one in found] == [one[:3] for one in self.volumes]
        assert [one.holes.tolist() for one in found] == [one.holes.tolist() for one in self.volumes]
        assert [one.closed_holes.tolist() for one in found] == [one.closed_holes.tolist() for one in self.volumes]
        assert [one.ends for one in found] == [one.ends for one in self.volumes]
        rows = [decode_zones(chunks[chunk], chunk.count) for chunk in layout.zone_chunks]
        assert b"".join(part.tobytes() for part in rows) == self.zones.tobytes()
        for chunk in layout.place_chunks:
            part = slice(chunk.first, chunk.first + chunk.count)
            for array, slice_ in zip(
                (*self.arrays, self.counts), decode_places(chunks[chunk], chunk.count), strict=True
            ):
                assert np.array_equal(array[part], slice_)


def test_tables_are_the_code() -> None:
    layout_tables.assert_matches(checkpoint, "Header", HEADER)
    layout_tables.assert_matches(checkpoint, "Volume row", VOLUME_ROW)
    names = [field.name for field in layout_tables.table(checkpoint, "Header") if field.name != "reserved"]
    assert names[2:] == list(CheckpointHeader._fields)
    assert [HOLE_DTYPE.fields[name][1] for name in ("start", "count", "version")] == [0, 8, 16]  # type: ignore[index]
    assert [ZONE_DTYPE.fields[name][1] for name in ("first_position", "incarnation", "state")] == [0, 8, 12]  # type: ignore[index]


def test_golden_bytes() -> None:
    assert BLOCK_1[:120].hex() == (
        "46434b5004000000000102030405060708090a0b0c0d0e0f2900000000000000e8030000000000008877665544332211"
        "03000000110000000500000070110100640000000300000004000000001000001100ffeeddccbbaa"
        "14000000000000003c0000000000000003000000000000006e071eff76db92c5"
    )
    assert BLOCK_1[120:] == bytes(BLOCK_SIZE - 120)
    table = encode_volumes(VOLUMES)
    assert len(table) == 3 * 392 + 4 * 24 + 3 * CUT_END.size
    assert table[352:392].hex() == "85030000000000002003000000000000" + bytes(24).hex()
    assert table[760:776].hex() == "02000000010000000100000000000000"
    assert table[1176:1200].hex() == "000000000000000005000000000000000700000000000000"
    rows = np.zeros(1, ZONE_DTYPE)
    rows[0] = (7, 9, 2, (0, 0, 0))
    assert encode_zones(rows)[:17].hex() == "07000000000000000900000002000000" + "00"
    numbers = np.array([1, 2], np.uint64)
    assert encode_places(numbers, numbers + 2, numbers + 4, np.array([7, 8], np.uint8))[:51].hex() == (
        "".join(f"{value:02x}00000000000000" for value in (1, 2, 3, 4, 5, 6)) + "0708" + "00"
    )


@pytest.mark.parametrize(
    ("place_count", "zone_count"),
    [(0, 16), (1, 16), (CHUNK_PLACES - 1, 16), (CHUNK_PLACES, 16), (3 * CHUNK_PLACES + 7, CHUNK_ZONES + 1)],
)
def test_what_was_written_is_read_back(place_count: int, zone_count: int) -> None:
    Area(place_count, zone_count, VOLUMES).check()


def test_a_volume_table_longer_than_a_chunk_is_read_back() -> None:
    many = [(at * 2, 1, 5) for at in range(CHUNK_SIZE // HOLE_DTYPE.itemsize)]
    Area(10, 16, [volume(key) for key in range(1, 200)] + [volume(200, *many)]).check()
    Area(10, 16, []).check()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 32), st.integers(1, 1 << 26), st.integers(0, 1024), st.integers(0, 1 << 22))
def test_the_layout_leaves_no_gap_and_fits_the_area(places: int, zones: int, volumes: int, hole_count: int) -> None:
    layout = CheckpointLayout(places, zones, volumes, hole_count)
    table = layout.table
    assert table.count == layout.chunk_count
    assert layout.size - table.offset - 8 * table.count - layout.place_chunk_count in range(BLOCK_SIZE)
    payload = places * PLACE_SIZE + zones * 16 + layout.volume_size + BLOCK_SIZE
    assert 0 <= table.offset - payload < 3 * BLOCK_SIZE
    if hole_count <= hole_count_max(places):
        assert layout.size <= area_size(places, zones)


def test_any_flipped_bit_of_a_header_is_detected() -> None:
    damaged = bytearray(BLOCK_1)
    for bit in range(BLOCK_SIZE * 8):
        damaged[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(CorruptionError):
            decode_checkpoint_header(damaged, device=DEVICE, size_max=SIZE_MAX, place="area A")
        damaged[bit >> 3] ^= 1 << (bit & 7)


def test_any_flipped_bit_of_a_body_is_detected() -> None:
    area = Area(30, 16, VOLUMES)
    for bit in range(BLOCK_SIZE * 8, len(area.bytes) * 8, 5):
        area.bytes[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(CorruptionError):
            area.check()
        area.bytes[bit >> 3] ^= 1 << (bit & 7)
    area.check()


def test_a_chunk_of_another_checkpoint_is_detected() -> None:
    area, other = Area(1000, 16, VOLUMES, seed=1), Area(1000, 16, VOLUMES, seed=2)
    [chunk] = area.layout.place_chunks
    part = slice(chunk.offset, chunk.offset + chunk.padded_size)
    area.bytes[part] = other.bytes[part]
    with pytest.raises(CorruptionError, match="checkpoint chunk in area A"):
        area.check()


def test_the_newest_valid_checkpoint_comes_first() -> None:
    older = encode_checkpoint_header(HEADER_1._replace(sequence=40))
    for blocks, expected in (
        ([BLOCK_1, older], [(0, 41), (1, 40)]),
        ([older, BLOCK_1], [(1, 41), (0, 40)]),
        ([BLOCK_1, bytes(BLOCK_SIZE)], [(0, 41)]),
        ([BLOCK_1[:-1] + b"\1", older], [(1, 40)]),
    ):
        found = choose_checkpoints(blocks, device=DEVICE, size_max=SIZE_MAX, places=PLACES)
        assert [(index, header.sequence) for index, header in found] == expected


def test_without_any_valid_checkpoint_the_first_error_is_raised() -> None:
    with pytest.raises(CorruptionError, match="checkpoint magic in area A"):
        choose_checkpoints([bytes(BLOCK_SIZE)] * 2, device=DEVICE, size_max=SIZE_MAX, places=PLACES)


@pytest.mark.parametrize(
    "block",
    [
        BLOCK_1[:-1],
        BLOCK_1 + b"\0",
        sealed(BLOCK_1[:4] + b"\2" + BLOCK_1[5:]),
        sealed(BLOCK_1[:6] + b"\1" + BLOCK_1[7:]),
        sealed(BLOCK_1[:-1] + b"\1"),
        sealed(BLOCK_1[:60] + b"\xff\xff\xff\xff" + BLOCK_1[64:]),
        sealed(BLOCK_1[:64] + b"\xff\xff\xff\xff" + BLOCK_1[68:]),
        sealed(BLOCK_1[:68] + (VOLUME_COUNT_MAX + 1).to_bytes(4, "little") + BLOCK_1[72:]),
        sealed(BLOCK_1[:72] + b"\xff\xff\xff\xff" + BLOCK_1[76:]),
        sealed(BLOCK_1[:76] + b"\xff" + BLOCK_1[77:]),
        sealed(BLOCK_1[:88] + bytes(8) + BLOCK_1[96:]),
        sealed(BLOCK_1[:96] + b"\1" + BLOCK_1[97:]),
        sealed(BLOCK_1[:104] + b"\1\4" + BLOCK_1[106:]),
        sealed(BLOCK_1[:111] + b"\4" + BLOCK_1[112:]),
    ],
)
def test_a_sealed_header_that_contradicts_itself_is_refused(block: bytes) -> None:
    with pytest.raises(CorruptionError):
        decode(block)


def test_a_header_of_another_device_or_a_larger_area_is_refused() -> None:
    with pytest.raises(CorruptionError, match="device"):
        decode(BLOCK_1, device=bytes(16))
    assert decode(BLOCK_1, size_max=HEADER_1.layout.size).sequence == 41
    with pytest.raises(CorruptionError, match="counts"):
        decode(BLOCK_1, size_max=HEADER_1.layout.size - 1)


@pytest.mark.parametrize(
    "volumes",
    [
        [volume(1), volume(1)],
        [volume(1, (0, 0, 1))],
        [volume(1, (1 << 40, 1, 1))],
        [volume(1, (1, 1 << 40, 1))],
        [volume(1, ((1 << 64) - 1, 2, 1))],
        [volume(1, (5, (1 << 64) - 1, 1))],
        [volume(1)._replace(closed_holes=holes((0, 0, 1)))],
        [volume(1)._replace(closed_holes=holes((0, 1, 1)))],
        [volume(1)._replace(closed_holes=holes((0, 1, 851)), ends=(taken(1, 850),))],
        [volume(1)._replace(ends=(taken(2, 850),))],
        [volume(1)._replace(ends=(taken(1, 800),))],
        [volume(1)._replace(ends=(taken(1, 902),))],
        [volume(1)._replace(ends=(taken(1, 850), taken(1, 850)))],
    ],
)
def test_volumes_that_contradict_each_other_are_refused(volumes: list[VolumeState]) -> None:
    layout = layout_of(volumes)
    with pytest.raises(CorruptionError):
        decode_volumes(encode_volumes(volumes), layout, place="area A")


def with_origins() -> tuple[list[VolumeState], bytes, CheckpointLayout]:
    pages = [OriginPages(b"\2\1\0\1", [bytearray(b"a" * 4096), bytearray(b"b" * 4096)], 99), OriginPages(b"\2", [], 7)]
    volumes = [VOLUMES[0]._replace(origins=pages[0]), VOLUMES[1], VOLUMES[2]._replace(origins=pages[1])]
    table = encode_volumes(volumes) + b"\2\1\0\1" + b"a" * 4096 + b"b" * 4096 + b"\2"
    return volumes, table, layout_of(volumes)._replace(origin_size=sum(one.size for one in pages))


def test_origin_maps_follow_the_rows_in_their_order() -> None:
    volumes, table, layout = with_origins()
    assert layout.volume_size == len(table)
    found = decode_volumes(table, layout, place="area A")
    assert [one.origins for one in found] == [one.origins for one in volumes]


@pytest.mark.parametrize("fault", ["state", "mixed", "short", "long"])
def test_origin_maps_that_contradict_their_counts_are_refused(fault: str) -> None:
    _, table, layout = with_origins()
    damaged = bytearray(table)
    start = layout.volume_size - layout.origin_size
    if fault in ("state", "mixed"):
        damaged[start + 2] = 3 if fault == "state" else 1
    size = layout.origin_size + {"short": -1, "long": 1}.get(fault, 0)
    with pytest.raises(CorruptionError):
        decode_volumes(bytes(damaged) + b"\0", layout._replace(origin_size=size), place="area A")


def test_hole_counts_that_do_not_add_up_are_refused() -> None:
    table = encode_volumes(VOLUMES)
    for hole_count, end_count in ((3, 3), (5, 3), (4, 2), (4, 4)):
        layout = CheckpointLayout(0, 16, 3, hole_count, end_count=end_count)
        with pytest.raises(CorruptionError):
            decode_volumes(table + bytes(240), layout, place="area A")

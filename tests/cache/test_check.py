"""A check of a cache device finds each kind of damage by its code, and nothing on a device that is as it should be."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_rig import STORE_ID, VOLUME_ID, Rig

from forebay_cache.engine import cut_ends, recovery
from forebay_cache.engine.check import check_device
from forebay_cache.engine.findings import CODES, FINDINGS_MAX, Finding
from forebay_cache.engine.front import IoError
from forebay_cache.engine.holes import Hole
from forebay_cache.format import checkpoint, record, superblock
from forebay_core.checksums import checksum
from forebay_core.errors import UnreadableError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, Epoch, Version, VolumeId, make_version

BLOCKS = 300
ARCHITECTURE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"


def settle(rig: Rig) -> None:
    for _ in range(40):
        rig.tick()
        while rig.device.step() or rig.store.step():
            pass


def trim(rig: Rig, lba: int, count: int) -> None:
    got: list[IoError] = []
    rig.volume.trim(lba * BLOCK_SIZE, count * BLOCK_SIZE, False, got.append)
    rig.volume.kick()
    rig.run_until(lambda: bool(got))


def work(rig: Rig, turns: int, rng: random.Random) -> None:
    for _ in range(turns):
        lba = rng.randrange(BLOCKS)
        count = min(rng.choice((1, 2, 9, 40)), BLOCKS - lba)
        if rng.random() < 0.15:
            trim(rig, lba, count)
        else:
            assert rig.write(lba * BLOCK_SIZE, rng.randbytes(count * BLOCK_SIZE)) == IoError.OK


def worked_in(seed: int = 5, *, size: int = 8 << 20) -> Rig:
    """A device with clean, dirty, trimmed and moved blocks; the store is away at the end, so dirty ones stay."""
    rig = Rig(seed, size=size, blocks=BLOCKS)
    rng = random.Random(seed)
    work(rig, 160, rng)
    assert rig.drain()
    rig.store.away = True
    work(rig, 40, rng)
    assert rig.flush() == IoError.OK
    for _ in range(40):
        rig.tick()
        while rig.device.step():
            pass
    return rig


def check(image: bytes | bytearray, *, with_blocks: bool = True) -> list[Finding]:
    before = bytes(image)
    found = check_device(lambda at, size: bytes(image[at : at + size]), len(image), with_blocks=with_blocks)
    assert bytes(image) == before
    assert all(one.code in CODES and one.place and "\n" not in one.text for one in found)
    return found


def codes(image: bytes | bytearray, *, with_blocks: bool = True) -> set[str]:
    return {one.code for one in check(image, with_blocks=with_blocks)}


def stopped(rig: Rig) -> bytearray:
    """Stop the engine in order, which writes a checkpoint, and return the image."""
    got: list[bool] = []
    rig.engine.stop(got.append)
    for _ in range(10_000):
        if got:
            break
        if not rig.device.step():
            rig.tick()
    assert got == [True]
    rig.device.kill()  # the process is gone
    return rig.device.bytes


# --- a device that is as it should be ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_found_after_work_kills_and_power_cuts(seed: int) -> None:
    rig = Rig(seed, size=8 << 20, blocks=BLOCKS)
    rng = random.Random(seed)
    assert check(rig.device.bytes) == []
    for turn in range(8):
        work(rig, 25, rng)
        for lba in range(0, 90, 9):  # unflushed and unfinished when the end comes
            rig.volume.write(lba * BLOCK_SIZE, rng.randbytes(9 * BLOCK_SIZE), False, lambda error: None)
        rig.volume.kick()
        for _ in range(rng.randrange(40)):
            rig.step()
        if turn % 2:
            rig.device.cut_power()
        else:
            rig.device.kill()
        assert check(rig.device.bytes) == []
        assert check(rig.device.bytes, with_blocks=False) == []
        rig.start()
        rig.attach()
        if turn % 3 == 2:
            assert check(stopped(rig)) == []
            rig.start()
            rig.attach()


# --- damage to the bytes --------------------------------------------------------------------------------------------


class Image:
    """An image to damage, and where things are."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.bytes = bytearray(rig.device.bytes)
        self.superblock = rig.engine.superblock
        self.newest = rig.engine.checkpoints._kept[0]

    @property
    def area(self) -> int:
        return self.superblock.checkpoint_offsets[self.newest.area]

    @property
    def older_area(self) -> int:
        return self.superblock.checkpoint_offsets[1 - self.newest.area]

    @property
    def header(self) -> checkpoint.CheckpointHeader:
        return checkpoint.decode_checkpoint_header(
            self.bytes[self.area : self.area + BLOCK_SIZE],
            device=self.superblock.device,
            size_max=self.superblock.checkpoint_size,
            place="",
        )

    def flip(self, at: int) -> None:
        self.bytes[at] ^= 4

    def records(self) -> list[tuple[int, record.RecordHeader]]:
        """Offset and header of every record of zones that hold mapped blocks, in log order."""
        zones, found = self.rig.engine.zones, []
        for zone in np.flatnonzero(self.rig.engine.map.live_array).tolist():
            block, expected = 0, None
            while block < zones.zone_blocks:
                at = zones.offset_of(zones.place_at(zone, block))
                if self.bytes[at : at + 4] != b"FBRR":
                    break
                header, _ = record.decode_record(self.bytes[at : at + BLOCK_SIZE], place="")
                if header.incarnation != zones.incarnations[zone] or expected not in (None, header.log_position):
                    break
                found.append((at, header))
                expected = header.log_position + 1
                block += header.size
        return sorted(found, key=lambda one: one[1].log_position)

    def old_records(self, *, first: bool | None = None) -> list[tuple[int, record.RecordHeader]]:
        """Those that no replay reads: all, only the first ones of their zones, or only the others."""
        zones, oldest = self.rig.engine.zones, self.rig.engine.checkpoints._kept[-1].position
        return [
            (at, header)
            for at, header in self.records()
            if header.log_position < oldest
            and first in (None, (at - zones.zones_offset) // BLOCK_SIZE % zones.zone_blocks == 0)
        ]

    def new_records(self) -> list[tuple[int, record.RecordHeader]]:
        return [one for one in self.records() if one[1].log_position >= self.newest.position]

    def rewrite(self, at: int, **fields: int) -> None:
        """Change fields of a record header and make its checksum right again."""
        block = self.bytes[at : at + BLOCK_SIZE]
        header, entries = record.decode_record(block, place="")
        self.bytes[at : at + BLOCK_SIZE] = record.encode_record(header._replace(**fields), entries)

    def rewrite_chunk(self, chunk: checkpoint.Chunk, change: Callable[[bytearray], None]) -> None:
        """Change a chunk of the newest checkpoint and make all checksums right again."""
        header, layout = self.header, self.header.layout
        at = self.area + chunk.offset
        block = self.bytes[at : at + chunk.padded_size]
        change(block)
        self.bytes[at : at + chunk.padded_size] = block
        index = layout.chunks.index(chunk)
        table_at = self.area + layout.table.offset
        table = self.bytes[table_at : table_at + layout.table.padded_size]
        table[8 * index : 8 * index + 8] = checksum(block).to_bytes(8, "little")
        self.bytes[table_at : table_at + len(table)] = table
        again = checkpoint.encode_checkpoint_header(header._replace(table_xxh3=checksum(table)))
        self.bytes[self.area : self.area + BLOCK_SIZE] = again

    def entry_of(self, place: int) -> tuple[checkpoint.Chunk, int]:
        """The checkpoint's chunk of a place, and where in it the place stands."""
        number, index = divmod(place, self.header.chunk_places)
        return self.header.layout.place_chunks[number], index

    def mapped_offset(self, *, dirty: bool) -> int:
        return self.rig.engine.zones.offset_of(self.mapped(dirty=dirty))

    def mapped(self, *, dirty: bool) -> int:
        """A mapped place."""
        table = self.rig.engine.map
        newer = table.version_array > np.uint64(self.rig.volume.acknowledged)
        return int(np.flatnonzero(table.linked_mask(0, table.place_count) & (newer == dirty))[3])


def overwrite_superblock(image: Image, **fields: object) -> None:
    other = image.superblock._replace(**fields)
    image.bytes[BLOCK_SIZE : 2 * BLOCK_SIZE] = superblock.encode_superblock(other)


def damage_seal(image: Image) -> None:
    at = next(at for at, header in image.old_records() if header.kind == record.SEAL)
    image.flip(at + 30)


def unchain(image: Image) -> None:
    """The zone a log went to from an older one claims another predecessor."""
    zones = image.rig.engine.zones
    records = image.old_records()
    seals = {header.log_position + 1 for _, header in records if header.kind == record.SEAL}
    at, header = next((at, header) for at, header in records if header.log_position in seals)
    assert (at - zones.zones_offset) // BLOCK_SIZE % zones.zone_blocks == 0
    block = image.bytes[at : at + BLOCK_SIZE]
    _, entries = record.decode_record(block, place="")
    # The next record of the zone must still chain to this one, so its checksum is kept: a forged header.
    again = record.encode_record(header._replace(previous_xxh3=header.previous_xxh3 ^ 1), entries)
    image.bytes[at : at + BLOCK_SIZE] = again
    chain = record.record_xxh3(again)
    while True:
        at += header.size * BLOCK_SIZE
        before = header.log_position
        if image.bytes[at : at + 4] != b"FBRR":
            return
        header, entries = record.decode_record(image.bytes[at : at + BLOCK_SIZE], place="")
        if header.log_position != before + 1 or header.kind == record.SEAL:
            if header.log_position == before + 1:
                image.rewrite(at, previous_xxh3=chain)
            return
        again = record.encode_record(header._replace(previous_xxh3=chain), entries)
        image.bytes[at : at + BLOCK_SIZE] = again
        chain = record.record_xxh3(again)


def first_old_zone(image: Image) -> int:
    zones = image.rig.engine.zones
    return (image.old_records()[0][0] - zones.zones_offset) // (zones.zone_blocks * BLOCK_SIZE)


def change_zone_row(image: Image, field: int, value: int) -> None:
    """Overwrite a byte of the checkpoint's row of an old zone: 8 the incarnation, 12 the state."""
    at = 16 * first_old_zone(image) + field
    image.rewrite_chunk(image.header.layout.zone_chunks[0], lambda block: block.__setitem__(at, value))


def impossible_state(image: Image) -> None:
    image.rewrite_chunk(image.header.layout.zone_chunks[0], lambda block: block.__setitem__(12, 9))


def change_place(image: Image, field: int, dirty: bool = False) -> None:
    """Change key (0), version (1) or checksum (2) of a mapped place in the checkpoint."""
    chunk, index = image.entry_of(image.mapped(dirty=dirty))

    def change(block: bytearray) -> None:
        at = 8 * chunk.count * field + 8 * index
        block[at + 2] ^= 1  # of a key: a block that no other place has, maybe beyond the end of the volume

    image.rewrite_chunk(chunk, change)


def drop_place(image: Image) -> None:
    """The checkpoint forgot a dirty block."""
    chunk, index = image.entry_of(image.mapped(dirty=True))
    image.rewrite_chunk(chunk, lambda block: block.__setitem__(slice(8 * index, 8 * index + 8), bytes(8)))


def last_record_ahead(image: Image) -> None:
    at, header = image.records()[-1]
    image.rewrite(at, durable_position=header.log_position + 5)


BYTES_DAMAGE: list[tuple[str, bool, Callable[[Image], object]]] = [
    # code, after a clean stop (else with a log to replay), what to do
    ("superblock-bad", True, lambda image: image.flip(20)),
    ("superblock-bad", True, lambda image: image.flip(BLOCK_SIZE + 4000)),
    ("superblock-bad", True, lambda image: image.bytes.__setitem__(slice(0, BLOCK_SIZE), bytes(BLOCK_SIZE))),
    ("superblock-differs", True, lambda image: overwrite_superblock(image, device=b"x" * 16)),
    ("device-short", True, lambda image: image.bytes.__delitem__(slice(-BLOCK_SIZE * 64, None))),
    ("checkpoint-header", True, lambda image: image.flip(image.area + 50)),
    ("checkpoint-header", True, lambda image: image.flip(image.superblock.checkpoint_offsets[1 - image.newest.area])),
    ("checkpoint-table", True, lambda image: image.flip(image.area + image.header.layout.table.offset + 3)),
    ("checkpoint-chunk", True, lambda image: image.flip(image.area + image.header.layout.place_chunks[0].offset + 9)),
    ("checkpoint-chunk", True, lambda image: image.flip(image.area + image.header.layout.volume_chunks[0].offset + 9)),
    ("checkpoint-chunk", False, lambda image: image.flip(image.older_area + 5000)),
    ("checkpoint-content", True, impossible_state),
    ("log-damaged", False, lambda image: image.flip(image.new_records()[0][0] + 97)),
    ("record-header", True, lambda image: image.flip(image.old_records(first=False)[3][0] + 97)),
    ("record-header", True, damage_seal),
    ("record-chain", True, unchain),
    ("record-durable", True, last_record_ahead),
    ("zone-opening", True, lambda image: image.flip(image.old_records(first=True)[0][0] + 97)),
    ("zone-opening", True, lambda image: change_zone_row(image, 8, 99)),
    ("zone-state", True, lambda image: change_zone_row(image, 12, 0)),
    ("place-entry", True, lambda image: change_place(image, 0)),
    ("place-entry", True, lambda image: change_place(image, 2)),
    ("block-checksum", True, lambda image: image.flip(image.mapped_offset(dirty=False) + 77)),
    ("block-checksum", True, lambda image: image.flip(image.mapped_offset(dirty=True))),
    ("dirty-lost", True, drop_place),
    ("state-unchecked", True, lambda image: [image.flip(20), image.flip(BLOCK_SIZE + 20)]),
]  # fmt: skip

ALSO = {
    "superblock-differs": {"state-unchecked", "superblock-bad", "checkpoint-header"},
    "device-short": {"state-unchecked"},
    "log-damaged": {"state-unchecked"},
    "zone-opening": {"record-chain", "dirty-lost"},
    "place-entry": {"dirty-lost", "block-checksum", "version-ahead", "checkpoint-content", "place-range"},
    "state-unchecked": {"superblock-bad"},
    "record-durable": {"log-damaged", "state-unchecked"},
    "checkpoint-content": {"log-damaged"},
}
"""What may come along: a checkpoint that is not used any more, or one damage that breaks two rules."""


@pytest.mark.parametrize(
    ("code", "clean", "plant"), BYTES_DAMAGE, ids=[f"{at}-{code}" for at, (code, _, _) in enumerate(BYTES_DAMAGE)]
)
def test_each_damage_is_found(code: str, clean: bool, plant: Callable[[Image], object]) -> None:
    rig = worked_in()
    if clean:
        stopped(rig)
    assert check(rig.device.bytes) == []
    image = Image(rig)
    plant(image)
    found = codes(image.bytes)
    assert code in found
    assert found <= {code} | ALSO.get(code, set()), check(image.bytes)
    if code != "block-checksum":
        assert code in codes(image.bytes, with_blocks=False)
    else:
        assert codes(image.bytes, with_blocks=False) == set()


def test_a_flipped_bit_anywhere_in_what_counts_is_found() -> None:
    """Every bit of superblocks, checkpoints, record headers and mapped blocks is guarded."""
    rig = worked_in()
    stopped(rig)
    image = Image(rig)
    rng = random.Random(1)
    table, zones = rig.engine.map, rig.engine.zones
    used = [0, BLOCK_SIZE]
    used += [at for at, _ in image.records()]
    used += [zones.offset_of(int(place)) for place in np.flatnonzero(table.linked_mask(0, table.place_count))]
    for area, offset in enumerate(image.superblock.checkpoint_offsets):
        header = image.header if area == image.newest.area else None
        size = header.layout.size if header is not None else BLOCK_SIZE
        used += range(offset, offset + size, BLOCK_SIZE)
    for at in rng.sample(used, 60):
        damaged = bytearray(image.bytes)
        damaged[at + rng.randrange(BLOCK_SIZE)] ^= 1 << rng.randrange(8)
        assert check(damaged), at


def given_up_zones(image: Image) -> list[tuple[int, record.RecordHeader]]:
    """The first records of old zones that hold clean blocks only, and so may be filled anew before a sync."""
    zones, table = image.rig.engine.zones, image.rig.engine.map
    found = []
    for at, header in image.old_records(first=True):
        first = zones.place_at(header.zone, 0)
        places = slice(first, first + zones.zone_blocks)
        versions = table.version_array[places][table.key_array[places] != 0]
        if (versions <= np.uint64(image.rig.volume.acknowledged)).all():
            found.append((at, header))
    return found


def test_a_zone_that_an_ended_life_began_to_fill_anew_is_no_finding_though_the_log_went_on_elsewhere() -> None:
    rig = worked_in()
    stopped(rig)
    known = given_up_zones(Image(rig))
    assert known
    for at, header in known:
        image = Image(rig)
        position = image.records()[-1][1].log_position - 1  # below the end: a later life has taken that number too
        assert position >= header.log_position
        image.rewrite(at, incarnation=header.incarnation + 1, log_position=position)
        image.bytes[at + BLOCK_SIZE : at + 2 * BLOCK_SIZE] = bytes(BLOCK_SIZE)
        assert check(image.bytes) == []
        image = Image(rig)
        image.bytes[at + 20] ^= 0x40  # the incarnation: one flipped bit
        assert check(image.bytes)


# --- damage that is whole: what a bug would leave --------------------------------------------------------------------


def clean_place(rig: Rig) -> int:
    table = rig.engine.map
    clean = table.version_array <= np.uint64(rig.volume.acknowledged)
    return int(np.flatnonzero(table.linked_mask(0, table.place_count) & clean)[3])


def shrink(rig: Rig) -> None:
    rig.volume.resize("v", 40 * BLOCK_SIZE, read_only=False)


def forget(rig: Rig) -> None:
    del rig.engine.volumes[rig.volume.key]


def make_ahead(rig: Rig) -> None:
    rig.volume.applied = Version(rig.volume.acknowledged)


def make_epoch_ahead(rig: Rig) -> None:
    rig.volume.epoch = Epoch(0)


def hole_ahead(rig: Rig) -> None:
    rig.volume.holes.add(Extent(299, 1), make_version(1, 1 << 40))


def hole_behind_end(rig: Rig) -> None:
    rig.volume.holes.add(Extent(500, 10), rig.volume.applied)


def hole_over_block(rig: Rig) -> None:
    key = rig.engine.map.keys[clean_place(rig)]
    rig.volume.holes.add(Extent(key & ((1 << 40) - 1), 1), 1)


def hole_over_everything(rig: Rig) -> None:
    rig.volume.holes.add(Extent(0, 300), 1)


def release(rig: Rig) -> None:
    rig.volume.attached = rig.volume.held = False


def second_volume(rig: Rig, volume_id: bytes, name: str) -> None:
    from forebay_cache.engine.volume import CacheVolume

    other = CacheVolume(rig.engine, 77, VolumeId(volume_id), STORE_ID, name, 1 << 20)
    other.attached = other.held = True
    rig.engine.volumes[77] = other


def overlapping_holes(rig: Rig) -> None:
    holes = rig.volume.holes
    holes._ends[250] = (260, 1)
    holes._ends[255] = (258, 1)


STATE_DAMAGE: list[tuple[str, Callable[[Rig], None]]] = [
    ("place-range", shrink),
    ("place-orphan", forget),
    ("version-ahead", make_ahead),
    ("version-ahead", make_epoch_ahead),
    ("version-ahead", hole_ahead),
    ("hole-range", hole_behind_end),
    ("hole-mapped", hole_over_block),
    ("hole-mapped", hole_over_everything),
    ("dirty-released", release),
    ("volume-twice", lambda rig: second_volume(rig, VOLUME_ID, "w")),
    ("volume-twice", lambda rig: second_volume(rig, b"w" * 16, "v")),
    ("checkpoint-content", overlapping_holes),
]

STATE_ALSO = {
    "place-range": {"hole-range"},
    "version-ahead": {"hole-mapped", "dirty-lost"},
    "hole-mapped": {"dirty-lost"},
    "checkpoint-content": {"hole-mapped"},
}


@pytest.mark.parametrize(
    ("code", "spoil"), STATE_DAMAGE, ids=[f"{at}-{code}" for at, (code, _) in enumerate(STATE_DAMAGE)]
)
def test_a_state_that_contradicts_itself_is_found(code: str, spoil: Callable[[Rig], None]) -> None:
    rig = worked_in()
    spoil(rig)
    found = codes(stopped(rig))
    assert code in found
    assert found <= {code} | STATE_ALSO.get(code, set()), check(rig.device.bytes)


def test_a_device_that_cannot_be_read_is_told_block_by_block() -> None:
    rig = worked_in()
    image = bytes(stopped(rig))
    bad = rig.engine.zones.offset_of(clean_place(rig))

    def read(at: int, size: int) -> bytes:
        if at <= bad < at + size:
            raise UnreadableError(place=f"offset {at}", reason="Input/output error")
        return image[at : at + size]

    found = check_device(read, len(image))
    assert [(one.code, one.place) for one in found] == [("read-error", f"offset {bad}")]
    assert check_device(read, len(image), with_blocks=False) == []


def test_findings_are_bounded() -> None:
    rig = worked_in()
    image = Image(rig)
    shrink(rig)
    rig.volume.holes = type(rig.volume.holes)()
    for lba in range(1000, 1000 + 2 * (FINDINGS_MAX + 50), 2):
        rig.volume.holes._ends[lba] = (lba + 1, 1)
    assert Hole(1000, 1001, 1) in list(rig.volume.holes)
    found = check(stopped(rig))
    assert len(found) == FINDINGS_MAX + 1 and found[-1].code == "more"
    assert image.superblock == rig.engine.superblock


def test_every_code_is_provoked_here_and_listed_in_the_documentation() -> None:
    elsewhere = {"read-error", "more", "pinned-lost", "snapshot-twice"}
    provoked = {code for code, _, _ in BYTES_DAMAGE} | {code for code, _ in STATE_DAMAGE} | elsewhere
    assert provoked == set(CODES)
    text = ARCHITECTURE.read_text()
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", text[text.index("<!-- fsck codes -->") :], re.MULTILINE))
    assert listed == CODES


def with_snapshots(seed: int) -> Rig:
    """A device with snapshots that the store does not have, and what they need overwritten, trimmed and moved."""
    rig = worked_in(seed, size=20 << 20)
    rng = random.Random(seed)
    for turn in range(4):
        got: list[object] = []
        rig.engine.cut_ends.snapshot(rig.volume, rng.randbytes(16), f"s{turn}", 1, got.append)
        rig.run_until(lambda got=got: bool(got))
        work(rig, 12, rng)
    rig.engine.cut_ends.resize(rig.volume, rig.volume.size + 8 * BLOCK_SIZE, lambda _: None)
    work(rig, 6, rng)
    settle(rig)
    assert rig.engine.map.held_count > 20
    return rig


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_found_where_snapshots_wait_for_the_store(seed: int) -> None:
    rig = with_snapshots(seed)
    assert not check(rig.device.bytes)
    assert not check(stopped(rig))


def test_a_damaged_pinned_version_is_found() -> None:
    rig = with_snapshots(1)
    place = int(rig.engine.map.held_places()[0])
    image = bytearray(stopped(rig))
    image[rig.engine.zones.offset_of(place) + 7] ^= 1
    assert codes(image) == {"block-checksum"}


def test_a_pinned_version_that_recovery_does_not_find_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = with_snapshots(1)
    image = stopped(rig)
    monkeypatch.setattr(recovery._Replay, "older", lambda self, *_: None)
    monkeypatch.setattr(recovery._Replay, "hold_pinned", lambda self, *_: None)
    assert codes(image) == {"pinned-lost"}


def test_twins_among_pending_snapshots_are_found() -> None:
    rig = with_snapshots(1)
    end = rig.volume.ends[0]
    rig.engine.cut_ends._append(cut_ends._Asked(rig.volume, end, lambda _: None))
    settle(rig)
    assert codes(stopped(rig)) == {"snapshot-twice"}


def test_of_two_cuts_that_are_one_after_a_start_only_the_newest_versions_are_kept() -> None:
    rig = Rig(3, size=8 << 20, blocks=BLOCKS)
    rng = random.Random(3)
    rig.store.away = True
    for turn in range(2):
        for lba in (5, 6, 7):
            assert rig.write(lba * BLOCK_SIZE, rng.randbytes(BLOCK_SIZE)) == IoError.OK
        if turn == 0:
            rig.engine.destage.drain(rig.volume, lambda _: None)  # closes a cut that ends with nothing
            while rig.device.step():
                pass
    trim(rig, 7, 1)
    held = rig.engine.map.held_count
    assert held == 3
    got: list[object] = []
    rig.engine.cut_ends.snapshot(rig.volume, rng.randbytes(16), "s", 1, got.append)
    rig.run_until(lambda: bool(got))
    assert rig.engine.map.held_count == held
    image = stopped(rig)
    recovered = recovery.recover(lambda at, size: bytes(image[at : at + size]), rig.engine.superblock)
    assert recovered.map.held_count == 0
    assert [end.name for end in recovered.volumes[rig.volume.key].ends] == ["s"]
    assert check(image) == []

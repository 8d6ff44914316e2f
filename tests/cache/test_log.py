"""Batches of the log: records that stand behind one another are one command, and each is one by itself."""

from collections.abc import Sequence

import pytest
from engine_rig import Rig

from forebay_cache.engine import writes
from forebay_cache.engine.front import IoError
from forebay_cache.engine.limits import BATCH_RECORDS_MAX
from forebay_cache.format import record
from forebay_core.checksums import block_checksums, checksum
from forebay_core.units import BLOCK_SIZE, Buffer

ZONE_BLOCKS = 512
SIZE = 64 << 20


class Watched:
    """A rig, and what its device was told to write."""

    def __init__(self, *, zone_blocks: int = ZONE_BLOCKS, record_blocks: int = record.RECORD_ENTRIES_MAX) -> None:
        self.rig = Rig(3, size=SIZE, zone_blocks=zone_blocks, record_blocks=record_blocks)
        self.rig.run_until(lambda: self.rig.engine.log.idle)
        self.commands: list[tuple[int, bytes]] = []
        write = self.rig.device.write

        def watched(offset: int, buffers: Sequence[Buffer], done) -> None:
            self.commands.append((offset, b"".join(buffers)))
            write(offset, buffers, done)

        self.rig.device.write = watched  # type: ignore[method-assign]

    def records(self) -> list[tuple[record.RecordHeader, record.EntryArray, bytes]]:
        """All records with data, each with the bytes of its blocks."""
        found = []
        for offset, content in self.commands:
            if offset < self.rig.engine.zones_offset:
                continue
            at = 0
            while at < len(content):
                block = content[at : at + BLOCK_SIZE]
                header, entries = record.decode_record(block, place=f"{offset + at}")
                end = at + header.size * BLOCK_SIZE
                if header.block_count:
                    found.append((header, entries, content[at + BLOCK_SIZE : end]))
                at = end
        return found


def content_of(blocks: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") * (BLOCK_SIZE // 4) for number in range(1, blocks + 1))


@pytest.mark.parametrize("blocks", [1, 2, 125, 126, 256, 375, 376, 450])
def test_a_write_is_one_command_for_three_records(blocks: int) -> None:
    watched = Watched()
    data = content_of(blocks)
    assert watched.rig.write(0, data) == IoError.OK
    records = watched.records()
    assert [header.block_count for header, _, _ in records] == [125] * (blocks // 125) + [blocks % 125] * (
        blocks % 125 > 0
    )
    with_data = [content for offset, content in watched.commands if len(content) > BLOCK_SIZE]
    assert len(with_data) == -(-len(records) // BATCH_RECORDS_MAX)
    assert b"".join(content for _, _, content in records) == data
    for header, entries, content in records:
        assert entries["checksum"].tolist() == [
            checksum(content[at : at + BLOCK_SIZE]) for at in range(0, len(content), BLOCK_SIZE)
        ]
        assert len({*entries["version"].tolist()}) == 1  # a record is one change
        assert header.entry_count == header.block_count
    versions = [entries["version"][0] for _, entries, _ in records]
    assert versions == sorted(set(versions))
    assert watched.rig.read(0, len(data)) == data


def test_each_record_of_a_batch_chains_to_the_one_before() -> None:
    watched = Watched()
    assert watched.rig.write(0, content_of(300)) == IoError.OK
    headers = [header for header, _, _ in watched.records()]
    assert [header.previous_xxh3 for header in headers[1:]] == [header.header_xxh3 for header in headers[:-1]]
    first = headers[0].log_position
    assert [header.log_position for header in headers] == list(range(first, first + 3))


@pytest.mark.parametrize("left", range(2, 12))
def test_a_batch_ends_where_its_zone_ends(left: int) -> None:
    watched = Watched(zone_blocks=64, record_blocks=4)
    log = watched.rig.engine.log
    lba = 0
    while log.room_in_zone > left:  # a header and a block each time
        watched.rig.write(lba * BLOCK_SIZE, bytes(BLOCK_SIZE))
        lba += 1
    data = content_of(20)
    assert watched.rig.write(100 * BLOCK_SIZE, data) == IoError.OK
    assert watched.rig.read(100 * BLOCK_SIZE, len(data)) == data
    watched.rig.restart(power=False)
    assert watched.rig.read(100 * BLOCK_SIZE, len(data)) == data


@pytest.mark.parametrize("blocks_written", [0, 1, 100, 126, 127, 251, 252, 258])
def test_of_a_batch_that_was_cut_short_whole_records_survive(blocks_written: int) -> None:
    watched = Watched()
    rig = watched.rig
    data = content_of(256)
    rig.volume.write(0, data, False, lambda error: None)
    rig.volume.kick()
    offset, content = watched.commands[-1]
    assert len(content) == 259 * BLOCK_SIZE
    rig.device.bytes[offset : offset + blocks_written * BLOCK_SIZE] = content[: blocks_written * BLOCK_SIZE]
    rig.restart(power=False)
    survived = blocks_written // 126 * 125
    assert rig.read(0, len(data)) == data[: survived * BLOCK_SIZE] + bytes(len(data) - survived * BLOCK_SIZE)


def test_a_trim_does_not_stand_before_data_of_its_batch() -> None:
    watched = Watched(record_blocks=4)
    rig = watched.rig
    rig.volume.write(0, content_of(4), False, lambda error: None)  # fills a record
    rig.volume.trim(0, BLOCK_SIZE, False, lambda error: None)
    rig.volume.write(0, content_of(2), False, lambda error: None)
    rig.volume.kick()
    rig.run_until(lambda: rig.engine.log.idle)
    assert [(header.entry_count, header.block_count) for header, _, _ in watched.records()] == [(5, 4), (2, 2)]
    assert rig.read(0, 2 * BLOCK_SIZE) == content_of(2)


def test_room_is_asked_for_once_a_batch() -> None:
    watched = Watched()
    rig, asked = watched.rig, []
    has_room = rig.engine.has_room
    rig.engine.has_room = lambda volume: asked.append(1) or has_room(volume)  # type: ignore[method-assign]
    for lba in range(10):
        rig.volume.write(lba * BLOCK_SIZE, bytes(BLOCK_SIZE), False, lambda error: None)
    assert len(asked) == 1
    rig.volume.kick()
    rig.volume.write(0, bytes(BLOCK_SIZE), False, lambda error: None)
    assert len(asked) == 2


def test_a_volume_at_its_bound_waits_in_the_midst_of_a_batch() -> None:
    watched = Watched()
    rig, answered = watched.rig, []
    rig.volume.appended_max = rig.volume.appended_blocks + 2
    for lba in range(4):
        rig.volume.write(lba * BLOCK_SIZE, bytes(BLOCK_SIZE), False, lambda error, lba=lba: answered.append(lba))
    assert rig.engine.log.gathered is not None
    assert rig.engine.log.gathered.data_count == 2
    assert rig.engine.writes.is_waiting(rig.volume.key)
    rig.volume.appended_max += 1  # room for one more: the first that waits has it, not who comes now
    rig.volume.write(9 * BLOCK_SIZE, bytes(BLOCK_SIZE), False, lambda error: answered.append(9))
    assert rig.engine.log.gathered.data_count == 2
    rig.volume.appended_max += 10
    rig.engine.resume_writers()
    rig.run_until(lambda: len(answered) == 5)
    assert answered == [0, 1, 2, 3, 9]


def test_a_large_write_that_is_let_in_bit_by_bit_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, summed = Watched(record_blocks=4), []
    rig, volume, data = watched.rig, watched.rig.volume, content_of(20)
    answers: list[IoError] = []
    monkeypatch.setattr(writes, "block_checksums", lambda view: summed.append(len(view)) or block_checksums(view))
    volume.appended_max = volume.appended_blocks + 1
    volume.write(0, memoryview(data), False, answers.append)
    while rig.engine.writes.is_waiting(volume.key):
        volume.appended_max = volume.appended_blocks + 1
        rig.engine.resume_writers()
    volume.kick()
    rig.run_until(lambda: answers == [IoError.OK])
    assert len(watched.records()) == 5
    assert rig.read(0, len(data)) == data
    assert summed == [len(data)]


def test_a_write_whose_rest_is_refused_is_not_answered_while_its_first_part_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The payload is the front's again behind the answer, so what is on its way to the device would change."""
    rig = Rig(3, size=64 << 20, zone_blocks=512)
    device, volume = rig.device, rig.volume
    rig.run_until(lambda: rig.engine.log.idle and not (device.writes or device.queue))
    answers: list[IoError] = []
    monkeypatch.setattr(rig.engine, "has_room", lambda _volume: volume.appended_blocks == 0)
    volume.write(0, b"w" * 512 * BLOCK_SIZE, False, answers.append)
    volume.kick()
    assert device.writes and rig.engine.writes.is_waiting(volume.key)
    volume.closing = True
    rig.engine.resume_writers()
    assert not rig.engine.writes.is_waiting(volume.key)
    assert answers == []
    while device.writes:
        device.writes.pop(0)()
    assert answers == [IoError.IO]

"""A damaged index is never put into a checkpoint, and damage to the log is followed by one: one of the two is whole."""

import pytest
from clean_load import EAGER, CleanLoad
from sim_index import DictIndex
from store_twins import STORE

from forebay_core.errors import CorruptionError
from forebay_store.engine.books import Audit, Books
from forebay_store.engine.checkpoint import checkpoint_records
from forebay_store.engine.cleaner import Cleaner
from forebay_store.engine.live import LiveBytes
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.purge import purge
from forebay_store.engine.replay import segment_names
from forebay_store.engine.snapshots import count_clone
from forebay_store.engine.unique import unique_size
from forebay_store.format.entries import DISPLACED_KEY, decode_entry, decode_history
from forebay_store.format.rows import DELETED_KEY, Table, decode_segment_row, decode_volume
from forebay_store.format.segment import SegmentName
from forebay_store.format.snapshot_rows import CLONE_COUNT, decode_snapshot, snapshot_key
from forebay_wire import messages


def loaded(seed: int) -> CleanLoad:
    load = CleanLoad(seed)
    for _ in range(25):
        load.change()
    load.twin.settle()
    return load


def check(load: CleanLoad) -> None:
    with load.twin.index.view() as reader:
        for _ in checkpoint_records(reader, 1, chunk_size=500):
            pass


@pytest.mark.parametrize("seed", range(6))
def test_what_a_store_does_keeps_its_books_right(seed: int) -> None:
    load = loaded(seed)
    check(load)
    load.twin.clean(EAGER)
    check(load)


@pytest.mark.parametrize("table", [Table.HEAD, Table.HISTORY])
def test_no_row_with_data_can_vanish_or_change_unseen(table: Table) -> None:
    load = loaded(3)
    rows = load.twin.index.rows()[table]
    decode = decode_entry if table is Table.HEAD else lambda key, value: decode_history(key, value)[0]
    data = [(key, value) for key, value in rows.items() if decode(key, value).is_data]
    assert len(data) > 5
    for key, value in data[:40]:
        load.twin.index.update(lambda writer, key=key: writer.delete(table, key))  # type: ignore[misc]
        with pytest.raises(CorruptionError, match="live bytes"):
            check(load)
        for bit in (0, 70, 100, 120, 140, 191):
            flipped = (int.from_bytes(value, "little") ^ 1 << bit).to_bytes(len(value), "little")
            load.twin.index.update(lambda writer, key=key, to=flipped: writer.put(table, key, to))  # type: ignore[misc]
            with pytest.raises(CorruptionError, match=f"index {table.value} {key.hex()}"):
                check(load)
        load.twin.index.update(lambda writer, key=key, to=value[:-1]: writer.put(table, key, to))  # type: ignore[misc]
        with pytest.raises(CorruptionError, match="size"):
            check(load)
        load.twin.index.update(lambda writer, key=key, to=value: writer.put(table, key, to))  # type: ignore[misc]
    check(load)


@pytest.mark.parametrize(
    "table",
    [
        Table.HISTORY,
        Table.DISPLACED,
        Table.VOLUMES,
        Table.NAMES,
        Table.SNAPSHOTS,
        Table.SNAPSHOT_IDS,
        Table.SNAPSHOT_NAMES,
        Table.SEGMENTS,
    ],
)
def test_no_row_that_others_tell_of_can_vanish_unseen(table: Table) -> None:
    load = loaded(3)
    rows = {
        key: value
        for key, value in load.twin.index.rows()[table].items()
        if table is not Table.SEGMENTS or decode_segment_row(value).live
    }
    assert rows
    for key, value in rows.items():
        load.twin.index.update(lambda writer, key=key: writer.delete(table, key))  # type: ignore[misc]
        with load.twin.index.view() as reader, pytest.raises(CorruptionError, match="rebuild-index"):
            audit(reader)
        load.twin.index.update(lambda writer, key=key, to=value: writer.put(table, key, to))  # type: ignore[misc]
    with load.twin.index.view() as reader:
        audit(reader)


@pytest.mark.parametrize("table", [Table.NAMES, Table.SNAPSHOT_IDS, Table.SNAPSHOT_NAMES, Table.CLONES])
def test_no_bit_of_a_row_without_a_checksum_can_flip_unseen(table: Table) -> None:
    """A volume that is not found under its name would be made a second time; a clone would lose its origin."""
    load = loaded(3)
    twin, index = load.twin, load.twin.index
    shot = decode_snapshot(*next(iter(index.rows()[Table.SNAPSHOTS].items())))
    volumes = [decode_volume(key, value) for key, value in index.rows()[Table.VOLUMES].items()]
    origin = next(row.name for row in volumes if row.number == shot.number)
    assert isinstance(twin.ask(messages.CloneVolume(origin, shot.name, "clone")), messages.Volume)
    assert isinstance(twin.ask(messages.CreateSnapshot(("clone",), "of-clone")), messages.SnapshotTaken)
    rows = sorted(index.rows()[table].items())
    assert rows
    for key, value in rows[:4]:
        for bit in range(8 * len(value)):
            flipped = (int.from_bytes(value, "little") ^ 1 << bit).to_bytes(len(value), "little")
            index.update(lambda writer, key=key, to=flipped: writer.put(table, key, to))  # type: ignore[misc]
            assert_condemned(index)
        index.update(lambda writer, key=key: writer.delete(table, key))  # type: ignore[misc]
        for bit in range(8 * len(key)):
            other = (int.from_bytes(key, "little") ^ 1 << bit).to_bytes(len(key), "little")
            if other in dict(rows):
                continue
            index.update(lambda writer, to=other, value=value: writer.put(table, to, value))  # type: ignore[misc]
            assert_condemned(index)
            index.update(lambda writer, key=other: writer.delete(table, key))  # type: ignore[misc]
        index.update(lambda writer, key=key, value=value: writer.put(table, key, value))  # type: ignore[misc]
    with index.view() as reader:
        audit(reader)


def test_history_that_is_gone_is_damage_to_whoever_wants_it() -> None:
    """As a bug it would end the next starts as well, for the same step is done again."""
    load = loaded(3)
    index = load.twin.index
    gone = sorted(index.rows()[Table.HISTORY])
    number, last, _, _ = DISPLACED_KEY.unpack(sorted(index.rows()[Table.DISPLACED])[0])
    state = decode_snapshot(key := snapshot_key(number, last), index.rows()[Table.SNAPSHOTS][key])
    index.update(lambda writer: [writer.delete(Table.HISTORY, key) for key in gone])
    index.update(lambda writer: writer.put(Table.DELETED, DELETED_KEY.pack(number, last), b""))
    with pytest.raises(CorruptionError, match=r"index history .* rebuild-index"):
        index.update(lambda writer: purge(writer, LiveBytes(), number, last, 1000))
    with index.view() as reader, pytest.raises(CorruptionError, match=r"index history .* rebuild-index"):
        unique_size(reader, state)


@pytest.mark.parametrize("table", [Table.CLONES, Table.SNAPSHOT_IDS])
def test_an_origin_that_is_gone_is_damage_to_whoever_lets_it_go(table: Table) -> None:
    index = DictIndex()
    index.update(lambda writer: writer.put(Table.CLONES, bytes(32), CLONE_COUNT.pack(1)))
    if table is Table.CLONES:
        index.update(lambda writer: writer.delete(table, bytes(32)))
    with pytest.raises(CorruptionError, match=f"index {table.value} .* rebuild-index"):
        index.update(lambda writer: count_clone(writer, bytes(16), bytes(16), -1))


def assert_condemned(index: DictIndex) -> None:
    with index.view() as reader, pytest.raises(CorruptionError, match="rebuild-index"):
        audit(reader)


def audit(reader: IndexReader) -> None:
    look = Audit(reader)
    while look.step(7):
        pass


def test_the_cleaner_deletes_nothing_once_rows_of_the_index_are_gone() -> None:
    load = loaded(3)
    before = load.twin.rebuilt().rows()
    key = next(key for key, value in load.twin.index.rows()[Table.HEAD].items() if decode_entry(key, value).is_data)
    load.twin.index.update(lambda writer: writer.delete(Table.HEAD, key))
    with pytest.raises(CorruptionError, match="rebuild-index"):
        load.twin.clean(EAGER, damaged=segment_names(load.twin.backend))
    assert load.twin.rebuilt().rows() == before


def test_a_damaged_segment_behind_the_checkpoint_is_followed_by_one_that_makes_it_dispensable() -> None:
    load = loaded(5)
    victim = newest_with_data(load)
    load.twin.backend.segments[victim.text] = bytes(64)
    with pytest.raises(CorruptionError):
        load.twin.rebuilt()
    load.twin.clean(damaged=[victim])
    assert load.twin.rebuilt().rows() == load.twin.index.rows()


def test_a_damaged_checkpoint_is_followed_by_another() -> None:
    load = loaded(6)
    load.twin.clean(damaged=[newest_with_data(load)])
    cleaner = Cleaner(load.twin.index, load.twin.backend, store=STORE)
    cleaner._look(set())
    assert cleaner.space is not None
    parts = [name for name in segment_names(load.twin.backend) if name > cleaner.space.covered]
    for name in parts:
        load.twin.backend.segments[name.text] = bytes(64)
    with pytest.raises(CorruptionError):
        load.twin.rebuilt()
    load.twin.clean(damaged=parts)
    assert load.twin.rebuilt().rows() == load.twin.index.rows()


def test_an_index_with_nothing_in_it_is_whole() -> None:
    books = Books()
    books.add([])
    books.close()


def newest_with_data(load: CleanLoad) -> SegmentName:
    live = load.rows()
    return max(name for name in segment_names(load.twin.backend) if live[name.text][1])

"""The cleaner finds what shows a segment at once, however many snapshots saw its blocks, and misses nothing."""

import pytest
from clean_load import EAGER, CleanLoad
from store_daemon import DEVICE, frame
from store_twins import STORE, DictIndex, StoreTwin
from test_store_snapshots import CountingView

from forebay_core.units import BLOCK_SIZE
from forebay_store.engine import finding
from forebay_store.engine.finding import live_entries
from forebay_store.engine.live import find_segment
from forebay_store.engine.replay import load_segment, segment_names
from forebay_store.format.entries import HeadEntry, decode_entry, decode_history
from forebay_store.format.rows import Table
from forebay_store.format.segment import SegmentName
from forebay_wire import messages

Entries = dict[SegmentName, list[HeadEntry]]


def found_in(twin: StoreTwin) -> tuple[Entries, int]:
    """Return what the search finds of each segment, and the rows that it looked at."""
    view = CountingView(twin.index.tables)
    found: Entries = {}
    for name in segment_names(twin.backend):
        row = find_segment(view, name)
        if row is not None and row.live:
            frames = live_entries(view, load_segment(twin.backend.read(name.text), name, store=STORE), row.live)
            found[name] = [entry for entries in frames.values() for entry in entries]
    return found, view.reads


def all_in(index: DictIndex) -> Entries:
    rows = index.rows()
    found: Entries = {}
    entries = [decode_entry(key, value) for key, value in rows[Table.HEAD].items()]
    entries += [decode_history(key, value)[0] for key, value in rows[Table.HISTORY].items()]
    for entry in entries:
        if entry.is_data:
            found.setdefault(entry.segment, []).append(entry)
    return found


def check_all_is_found(seed: int) -> None:
    load = CleanLoad(seed)
    for _ in range(4):
        for _ in range(12):
            load.change()
        load.twin.settle()
        found, _ = found_in(load.twin)
        expected = all_in(load.twin.index)
        assert {name: sorted(entries) for name, entries in found.items()} == {
            name: sorted(entries) for name, entries in expected.items()
        }
        load.twin.clean(EAGER)


@pytest.mark.parametrize("seed", range(12))
def test_all_entries_of_a_segment_are_found(seed: int) -> None:
    check_all_is_found(seed)


def test_the_tests_notice_when_what_a_rollback_brought_back_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    search = finding._search_all
    monkeypatch.setattr(
        finding, "_search_all", lambda *args, thorough: thorough or search(*args, thorough=False) or True
    )
    with pytest.raises(AssertionError):
        for seed in range(12):
            check_all_is_found(seed)


def overwritten(count: int) -> StoreTwin:
    """Return a store in which 16 blocks were overwritten so many times, with a snapshot each time."""
    twin = StoreTwin()
    created = twin.ask(messages.CreateVolume("vm", 64 * BLOCK_SIZE))
    assert isinstance(created, messages.Volume)
    opened = twin.ask(messages.OpenVolume("vm", DEVICE))
    assert isinstance(opened, messages.Opened)
    key = (created.row.id, opened.epoch, opened.session)
    for number in range(1, count + 1):
        payload = b"".join(frame(lba, (lba, number % 5)) for lba in range(16))
        twin.ask(messages.StagePart(*key, number, 0), payload)
        closing = {"snapshot": twin.random.randbytes(16), "snapshot_name": f"s{number}", "snapshot_ns": 1}
        commit = messages.CommitCut(*key, number, 1, number, number, 1, **closing)  # type: ignore[arg-type]
        assert isinstance(twin.ask(commit), messages.Committed)
    return twin


def test_a_search_costs_the_same_with_many_snapshots_as_with_few() -> None:
    few, many = overwritten(10), overwritten(200)
    per_segment = []
    for twin in (few, many):
        found, reads = found_in(twin)
        assert {name: sorted(entries) for name, entries in found.items()} == {
            name: sorted(entries) for name, entries in all_in(twin.index).items()
        }
        per_segment.append(reads / len(found))
    assert per_segment[1] < 2 * per_segment[0] + 200  # Only the first frame of a part is sought in all versions.

"""Recordings of requests: bounded, told what they lost, and nobody's but who asked."""

import pytest
from engine_rig import Rig

import layout_tables
from forebay_cache.engine import recorder
from forebay_cache.engine.limits import RECORDING_ROWS_MAX, RECORDINGS_MAX
from forebay_cache.engine.recorder import ROW, WRITE_BIT
from forebay_core.errors import ForebayError


def test_the_table_is_the_struct() -> None:
    layout_tables.assert_matches(recorder, "Row", ROW)


def test_requests_are_noted_in_their_order_with_names_once() -> None:
    rig = Rig(1)
    rig.read(0, 4096)  # before anybody listens
    recording = rig.engine.recorder.begin(rig.volume.key)
    rig.write(4096, bytes(8192))
    rig.read(512, 4096)
    taken = recording.take()
    key = rig.volume.key << 40
    rows = [row[1:] for row in ROW.iter_unpack(taken.rows)]
    assert rows == [(WRITE_BIT | 2, key | 1), (2, key)]
    assert (taken.lost, taken.names) == (0, {rig.volume.key: "v"})
    rig.read(0, 4096)
    assert recording.take().names == {}
    rig.engine.recorder.end(recording)
    assert not rig.engine.recorder.is_on


def test_another_volume_is_not_recorded() -> None:
    rig = Rig(1)
    recording = rig.engine.recorder.begin(rig.volume.key + 1)
    rig.read(0, 4096)
    assert recording.take().rows == b""


def test_a_temporary_snapshot_is_recorded_only_by_name() -> None:
    rig = Rig(1)
    rig.volume.temporary = True
    every, one = rig.engine.recorder.begin(None), rig.engine.recorder.begin(rig.volume.key)
    rig.engine.recorder.note(rig.volume, 0, 4096, write=False)
    assert (len(every.take().rows), len(one.take().rows)) == (0, ROW.size)


def test_a_listener_that_takes_nothing_loses_rows_and_is_told() -> None:
    rig = Rig(1)
    recording = rig.engine.recorder.begin(None)
    for _ in range(RECORDING_ROWS_MAX + 3):
        rig.engine.recorder.note(rig.volume, 0, 4096, write=False)
    assert recording.is_half_full
    taken = recording.take()
    assert (len(taken.rows), taken.lost) == (RECORDING_ROWS_MAX * ROW.size, 3)
    assert recording.take() == (b"", 0, {})


def test_only_so_many_listen_at_a_time() -> None:
    rig = Rig(1)
    for _ in range(RECORDINGS_MAX):
        rig.engine.recorder.begin(None)
    with pytest.raises(ForebayError, match="under way already"):
        rig.engine.recorder.begin(None)

"""Planted faults: each breaks the engine on purpose, and the tests that guard it must notice.

A guard that passes with its fault planted proves nothing. The faults are put in by replacing methods of the engine,
here and nowhere else.
"""

from collections.abc import Callable

import numpy as np
import pytest
from engine_rig import Rig
from test_engine_damage import check_damaged, worked_in
from test_engine_model import run_backlog, run_kills, run_power_cuts, run_requests
from test_engine_snapshots import run_kills_with_snapshots, run_power_cuts_with_snapshots, run_snapshots

from forebay_cache.engine import admission, fetches, log, reads, recovery, ring
from forebay_cache.engine.blockmap import BlockMap
from forebay_cache.engine.checkpoints import Checkpoints
from forebay_cache.engine.cut_ends import CutEnds
from forebay_cache.engine.destage import Destage
from forebay_cache.engine.dirty import MergedRuns
from forebay_cache.engine.front import IoError
from forebay_cache.engine.holes import HoleMap
from forebay_cache.engine.reclaim import PlaceArray, Reclaim
from forebay_cache.engine.writes import Writes

SEEDS = 32
Patch = Callable[[pytest.MonkeyPatch], None]


def flush_before_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(log.Log, "when_durable", lambda self, position, settled: settled(True))


def acknowledge_before_written(patch: pytest.MonkeyPatch) -> None:
    append = Writes._append

    def early(self, volume, lba, view, settled) -> None:
        settled(True)
        append(self, volume, lba, view, lambda ok: None)

    patch.setattr(Writes, "_append", early)


def torn_data_accepted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery._Replay, "_matches", lambda self, one: True)


def zone_freed_before_sync(patch: pytest.MonkeyPatch) -> None:
    def free(self) -> None:
        zones, self._empty = self._empty, []
        self._synced(zones)

    patch.setattr(Reclaim, "_free_empty", free)


def moved_blocks_dropped(patch: pytest.MonkeyPatch) -> None:
    keep = Reclaim._to_keep
    patch.setattr(Reclaim, "_to_keep", lambda self, zone, **how: keep(self, zone, **how)[:0])


def pinned_version_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockMap, "find_held", lambda self, keys, *, above, to: np.full(keys.size, -1, np.int64))


def snapshot_answered_before_sync(patch: pytest.MonkeyPatch) -> None:
    append = CutEnds._append

    def early(self, asked) -> None:
        when_durable = self._engine.log.when_durable

        def applied(ok: bool) -> None:
            asked.taken(asked.volume.ends[-1])

        add_note = self._engine.log.add_note
        self._engine.log.add_note = lambda end, settled: add_note(end, applied)
        append(self, asked)
        self._engine.log.add_note, self._engine.log.when_durable = add_note, when_durable

    patch.setattr(CutEnds, "_append", early)


def pinned_version_dropped_by_reclaim(patch: pytest.MonkeyPatch) -> None:
    keep = Reclaim._to_keep

    def linked_only(self, zone: int, **how) -> PlaceArray:
        found = keep(self, zone, **how)
        return found[[self._engine.map.is_linked(place) for place in found.tolist()]] if found.size else found

    patch.setattr(Reclaim, "_to_keep", linked_only)


def pinned_version_lost_when_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockMap, "hold", lambda self, key, version, checksum, place: None)


def cut_merged_over_a_snapshot(patch: pytest.MonkeyPatch) -> None:
    close_at = Destage.close_at

    def merge(self, volume, end) -> None:
        if len(volume.cuts) < 2:
            close_at(self, volume, end)
            return
        last = volume.cuts[-1]
        last.runs += volume.dirty.take()
        last.last_version, last.end = volume.applied, end
        last.merging = MergedRuns(last.runs)

    patch.setattr(Destage, "close_at", merge)


def snapshot_lost_at_recovery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery._Replay, "_note_ends", lambda self, records: None)


def pinned_version_lost_at_recovery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery._Replay, "older", lambda self, *_: None)


def hole_of_a_closed_cut_lost_at_recovery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        recovery,
        "_with_ends",
        lambda volume, ends, _: volume._replace(ends=ends, closed_holes=tuple(HoleMap() for _ in ends)),
    )


def stale_fetch_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fetches.Unit, "touch", lambda self, extent: None)


def held_block_outlives_a_change(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ring.Ring, "forget", lambda self, key, count: None)


def known_blocks_fetched_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(admission.Admission, "known", lambda self, volume, extent: [])


def trim_not_replayed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery._Replay, "_zero", lambda self, volume, kind, extent, version: None)


def older_record_wins(patch: pytest.MonkeyPatch) -> None:
    def place(self, volume, kind, lba, version, block_checksum, place) -> None:
        if self.map.find(volume.note.volume_key << 40 | lba) < 0 and not self.map.keys[place]:
            self.map.insert(volume.note.volume_key << 40 | lba, version, block_checksum, place)

    patch.setattr(recovery._Replay, "_place", place)


def merge_without_second_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writes, "changing", lambda self, volume_key, extent: [])


def checkpoint_header_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Checkpoints, "_write_header", lambda self, one, table_xxh3: self._complete(one))


def cut_sent_before_sync(patch: pytest.MonkeyPatch) -> None:
    close = Destage._close

    def early(self, volume, end=None) -> None:
        when_durable = self._engine.log.when_durable
        self._engine.log.when_durable = lambda position, settled: settled(True)
        close(self, volume, end)
        self._engine.log.when_durable = when_durable

    patch.setattr(Destage, "_close", early)


def run_cuts(seed: int) -> None:
    """Cut the power whenever the store has taken a cut: the device must hold what the store shows."""
    rig = Rig(seed, size=12 << 20, blocks=600)
    for _ in range(6):
        before = rig.store.version
        for _ in range(rig.rng.randrange(1, 12)):
            assert rig.write(rig.rng.randrange(600) * 4096, rig.rng.randbytes(4096)) == IoError.OK
        rig.run_until(lambda before=before: rig.store.version > before)
        rig.restart(power=True)
        assert rig.store.version <= rig.volume.version, "the store ran ahead of the device"


def test_the_store_never_runs_ahead_of_the_device() -> None:
    run_cuts(0)


@pytest.mark.parametrize(
    ("fault", "guard"),
    [
        (flush_before_sync, run_power_cuts),
        (acknowledge_before_written, run_kills),
        (torn_data_accepted, run_power_cuts),
        (moved_blocks_dropped, run_backlog),
        (pinned_version_forgotten, run_snapshots),
        (snapshot_answered_before_sync, run_power_cuts_with_snapshots),
        (pinned_version_dropped_by_reclaim, run_snapshots),
        (pinned_version_lost_when_moved, run_snapshots),
        (cut_merged_over_a_snapshot, run_snapshots),
        (snapshot_lost_at_recovery, run_kills_with_snapshots),
        (pinned_version_lost_at_recovery, run_kills_with_snapshots),
        (hole_of_a_closed_cut_lost_at_recovery, run_kills_with_snapshots),
        (stale_fetch_kept, run_requests),
        (held_block_outlives_a_change, run_requests),
        (known_blocks_fetched_over, run_requests),
        (trim_not_replayed, run_kills),
        (older_record_wins, run_kills),
        (merge_without_second_look, run_requests),
        (checkpoint_header_first, run_kills),
        (cut_sent_before_sync, run_cuts),
    ],
    ids=lambda value: value.__name__,
)
def test_a_planted_fault_is_caught(fault: Patch, guard: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    for seed in range(SEEDS):
        try:
            guard(seed)
        except Exception:  # whatever way the guard fails is a catch
            return
    raise AssertionError(f"{fault.__name__} went unnoticed by {guard.__name__} in {SEEDS} seeds")


def test_unchecked_blocks_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, model = worked_in()
    place = int(rig.engine.map.find(rig.volume.key << 40 | 7))
    if place < 0:
        place = next(p for p in range(rig.engine.map.place_count) if rig.engine.map.is_linked(p))
    damaged = bytearray(rig.device.bytes)
    damaged[rig.engine.zones.offset_of(place) + 9] ^= 1
    monkeypatch.setattr(reads, "_mismatches", lambda buffer, sums: [])
    with pytest.raises(AssertionError, match="is wrong"):
        for _ in range(4):  # the fast path compares on its own; the slow one is what is broken here
            rig.device.now_share = 0.0
            check_damaged(rig, model, bytes(damaged))

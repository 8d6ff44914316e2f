# ruff: noqa: ANN202
"""Planted faults: each breaks one guard of the product, and the simulator must notice. `PLANTED` is the table.

A fault swaps a method or attribute; the product knows nothing of it. `sim_faults.py NAME FIRST:END` runs seeds with one
planted until one is caught, prints the seed and what was noticed, and exits 1 if none was.
"""

import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

import sim_disk
import sim_store
from sim_points import ACTING, Crash, run_points
from sim_run import run_seed

from forebay_cache.engine import admission, cache, fetches, log_end, recovery, ring
from forebay_cache.engine.apply import Apply
from forebay_cache.engine.attaching import Attaching
from forebay_cache.engine.blockmap import BlockMap
from forebay_cache.engine.checkpoints import Checkpoints
from forebay_cache.engine.cut_ends import CutEnds
from forebay_cache.engine.destage import Destage
from forebay_cache.engine.front import IoError
from forebay_cache.engine.holes import HoleMap
from forebay_cache.engine.moving import Moving
from forebay_cache.engine.origin_map import OriginMap
from forebay_cache.engine.reclaim import Reclaim
from forebay_cache.engine.writes import Writes
from forebay_cache.format import record
from forebay_cache.service.store_session import StoreSession
from forebay_core.extents import Extent
from forebay_core.units import sequence_of
from forebay_store.engine import apply as store_apply
from forebay_store.engine import changes, moving, reading, sweeping, views
from forebay_store.engine.store import StoreEngine
from forebay_store.format.part import PART_ENTRY
from forebay_store.service.openers import Openers
from forebay_store.service.shell import StoreShell
from forebay_wire import messages


def ack_before_record_is_written() -> None:
    append = Writes._appended

    def early(self, batch, volume, lba, view, count) -> None:
        append(self, batch, volume, lba, view, count)
        replies, batch.replies = batch.replies, []
        for reply in replies:
            reply(IoError.OK)

    Writes._appended = early
    settled = Writes._append

    def append_early(self, volume, offset, view, told) -> None:
        told(True)
        settled(self, volume, offset, view, lambda ok: None)

    Writes._append = append_early


def flush_answered_before_fsync() -> None:
    def flush(self, volume, reply) -> None:
        reply(IoError.OK)

    Writes.flush = flush


def fsync_does_nothing() -> None:
    end = sim_disk.SimDevice._end_sync
    sim_disk.SimDevice._end_sync = lambda self, covered, done: end(self, 0, done)


def fsync_of_the_wrong_file() -> None:
    sim_store.SimBackend.sync_file = lambda self, name: self._folder.synced.add("another file")


def folder_not_synced() -> None:
    sim_store.SimBackend.sync_folder = lambda self: None


def cut_applied_out_of_order() -> None:
    def commit(reader, row, message):
        first = sequence_of(row.version) + 1
        last = max(message.last, first)
        numbers = (message.part_count, first, last, message.committed_ns, message.in_sync_version)
        return [changes.CutCommitted(row.id, message.epoch, message.attempt, *numbers)]

    changes.commit = commit


def cut_half_applied() -> None:
    apply_part = store_apply._apply_part

    def half(change, trimming, part):
        kept = part.entries[: len(part.entries) // PART_ENTRY.size // 2 * PART_ENTRY.size]
        apply_part(change, trimming, part._replace(entries=kept))

    store_apply._apply_part = half


def holes_of_a_cut_forgotten() -> None:
    apply_part = store_apply._apply_part
    store_apply._apply_part = lambda change, trimming, part: apply_part(change, trimming, part._replace(holes=b""))


def blocks_that_a_trim_hid_shown_until_they_are_swept() -> None:
    views._swept_head = views._head


def checksum_not_checked() -> None:
    cache.Reads._repair = lambda self, volume, request, part, place, answer, sums: request.parts.update(
        {part.start: (part.count, answer)}
    )
    sys.modules["forebay_cache.engine.reads"].checksum = _Anything()  # type: ignore[attr-defined]
    sys.modules["forebay_cache.engine.reads"]._mismatches = lambda buffer, sums: []  # type: ignore[attr-defined]
    sys.modules["forebay_cache.engine.reads"].block_checksums = lambda buffer: _AlikeSums()  # type: ignore[attr-defined]


class _Anything:
    def __call__(self, *_: object) -> "_Anything":
        return self

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class _AlikeSums:
    def __ne__(self, other: object) -> "_AlikeSums":  # type: ignore[override]
        return self

    def any(self) -> bool:
        return False

    def tolist(self) -> "_Anything":
        return _Anything()

    __hash__ = None  # type: ignore[assignment]


def record_chain_not_checked() -> None:
    decode = recovery._Replay._decode

    def lax(self, blocks, point):
        block = blocks[point.block * 4096 : (point.block + 1) * 4096]
        return decode(self, blocks, point._replace(chain=record.peek_header(block).previous_xxh3))

    recovery._Replay._decode = lax


def torn_data_accepted() -> None:
    recovery._Replay._matches = lambda self, one: True


def lost_write_taken_for_the_end() -> None:
    log_end.LogEnd.find_durable = lambda self: 0


def trim_not_logged() -> None:
    def lost(self, volume, kind, extent, settled) -> None:
        settled(True)

    Writes._append_event = lost


def trim_not_replayed() -> None:
    recovery._Replay._zero = lambda self, volume, kind, extent, version: None


def old_epoch_accepted() -> None:
    """A take-over does not raise the epoch, and nobody asks for the session."""
    take = changes.take

    def same_epoch(reader, message):
        return [one._replace(epoch=max(1, one.epoch - 1)) for one in take(reader, message)]

    changes.take = same_epoch
    StoreEngine._expect_writer = lambda self, reader, message: changes.expect_volume(reader, message.volume)


def lost_volume_served_on() -> None:
    """The store does not ask for the epoch of reads, and the cache does not look at the versions that came."""
    reading.expect_epoch = lambda row, epoch: None
    StoreShell._check_session = lambda self, message: None
    fetches.Unit.used = lambda self, pieces: []


def loss_not_told() -> None:
    StoreSession._note_lost = lambda self, reports, reported: None


def zone_freed_before_its_blocks_are_written_elsewhere() -> None:
    """Without the sync alone nothing is lost: before a zone is filled anew a checkpoint has synced its blocks."""
    append = Moving._append_wanted

    def early(self, one) -> None:
        append(self, one)

    Moving._append_wanted = early
    Reclaim._moved = lambda self, zone, whole: self._clear(zone)


def cut_sent_before_sync() -> None:
    close = Destage._close

    def early(self, volume, end=None) -> None:
        when_durable = self._engine.log.when_durable
        self._engine.log.when_durable = lambda position, settled: settled(True)
        close(self, volume, end)
        self._engine.log.when_durable = when_durable

    Destage._close = early


def part_answered_before_durable() -> None:
    append = StoreEngine._append_part

    def early(self, reader, turn, row, message) -> bool:
        appended = append(self, reader, turn, row, message)
        if appended:
            self._answer(turn.ticket, messages.Done())
            self._owners = {serial: owner for serial, owner in self._owners.items() if owner != turn.ticket}
        return appended

    StoreEngine._append_part = early


def moved_blocks_dropped() -> None:
    keep = Reclaim._to_keep
    Reclaim._to_keep = lambda self, zone, **how: keep(self, zone, **how)[:0]


def checkpoint_before_data() -> None:
    Checkpoints._sync = lambda self, then: then()


def checkpoint_counts_before_its_header() -> None:
    Checkpoints._write_header = lambda self, one, table_xxh3: self._complete(one)


def prefix_cut_ignored() -> None:
    """A cut is closed at what was appended last, not at what was applied."""
    close = Destage._close

    def ahead(self, volume, end=None):
        applied, volume.applied = volume.applied, volume.version
        close(self, volume, end)
        volume.applied = applied

    Destage._close = ahead


def pinned_version_overwritten() -> None:
    def forget(self, place) -> None:
        self.key_array[place] = 0

    BlockMap._hold_place = forget


def snapshot_answered_before_durable() -> None:
    append = CutEnds._append

    def early(self, asked):
        log = self._engine.log
        add_note = log.add_note

        def note(end, settled):
            add_note(end, lambda ok: asked.taken(end if ok else None))

        log.add_note = note
        append(self, asked)
        log.add_note = add_note

    CutEnds._append = early


def pinned_version_dropped_at_reclaim() -> None:
    keep = Reclaim._to_keep

    def linked(self, zone, **how):
        found = keep(self, zone, **how)
        return found[[self._engine.map.is_linked(place) for place in found.tolist()]] if found.size else found

    Reclaim._to_keep = linked


def cut_merged_over_a_snapshot() -> None:
    close_at = Destage.close_at

    def merge(self, volume, end):
        last = volume.cuts[-1] if len(volume.cuts) > 1 else None
        if last is None or last.end is None:
            close_at(self, volume, end)
            return
        last.runs += volume.dirty.take()
        for hole in volume.open_holes:
            last.holes.add(Extent(hole.start, hole.end - hole.start), hole.version)
        volume.open_holes = HoleMap()
        last.last_version = volume.applied
        volume.ends.remove(last.end)
        last.end = end

    Destage.close_at = merge


def snapshot_lost_at_recovery() -> None:
    recovery._Replay._note_ends = lambda self, records: None


def older_version_of_a_snapshot_lost_at_recovery() -> None:
    recovery._Replay.older = lambda self, *_: None


def fill_inserted_over_newer_write() -> None:
    def fill(self, block) -> None:
        _, volume_key, lba, version, checksum, place, _ = block
        self._engine.map.insert(volume_key << 40 | lba, version, checksum, place)
        self._engine.policy.inserted(place)

    Apply._fill = fill
    admission.Admission.known = lambda self, volume, extent: []
    fetches.Unit.touch = lambda self, extent: None


def stale_fetch_kept() -> None:
    fetches.Unit.touch = lambda self, extent: None


def held_block_outlives_a_change() -> None:
    ring.Ring.forget = lambda self, key, count: None


def commit_acknowledged_before_durable() -> None:
    begin = StoreEngine._begin

    def early(self, name, turn) -> None:
        begin(self, name, turn)
        message = turn.incoming.message
        if isinstance(message, messages.CommitCut) and turn.serial and not turn.answered:
            self._answer(turn.ticket, messages.Committed(message.epoch << 44 | message.last, False))
            turn.ticket = -turn.ticket

    StoreEngine._begin = early


def older_record_wins() -> None:
    def place(self, volume, kind, lba, version, block_checksum, place) -> None:
        key = volume.note.volume_key << 40 | lba
        if self.map.find(key) < 0 and not self.map.keys[place]:
            self.map.insert(key, version, block_checksum, place)

    recovery._Replay._place = place


def merge_without_second_look() -> None:
    Writes._state_of = lambda self, volume, lba: (0, 0)
    Writes.changing = lambda self, volume_key, extent: []


def origin_map_keeps_what_was_changed() -> None:
    """What the guest of a clone writes or trims stays the origin's in its map."""
    OriginMap.remove = lambda self, extent: None
    OriginMap.remove_many = lambda self, lbas: None


def origin_map_not_replayed() -> None:
    recovery._change_origins = lambda origins, kind, start, version, value: (
        origins.add(Extent(start, value)) if kind == record.ORIGIN else None
    )


def rollback_ends_with_its_first_step() -> None:
    """What a rollback hid shows again when it is swept."""
    sweeping._roll_back = lambda change, row, found, entries_max: (found.end, entries_max)


def stale_blocks_kept_at_attach() -> None:
    """What the store says has changed since is cached on as it was."""
    Attaching.drop = lambda self, volume, stale, version, settled: settled(True)


_BROKEN_FAULT = (TypeError, AttributeError, NameError)
"""These come from a fault that does not fit the product any more: nothing noticed it."""


class Directed(NamedTuple):
    """Crash points at which a fault shows: those with `only` in their text, one way to die, one workload."""

    only: str
    kind: str
    workload: str = "mixed"


def entries_moved_without_being_compared() -> None:
    moving.is_at = lambda entry, old, move: entry.is_data and move.start <= entry.start and entry.end <= move.end


class Planted(NamedTuple):
    """A fault, and where it shows: within how many seeds of a profile, or at crash points."""

    plant: Callable[[], None]
    shows: str | Directed
    seeds: int = 20


def late_open_accepted() -> None:
    Openers.expect_newest = lambda self, peer: None


PLANTED = (
    Planted(ack_before_record_is_written, "all"),
    Planted(flush_answered_before_fsync, "power"),
    Planted(fsync_does_nothing, "power"),
    Planted(fsync_of_the_wrong_file, "power"),
    Planted(folder_not_synced, "power"),
    Planted(cut_applied_out_of_order, "all"),
    Planted(cut_half_applied, "all"),
    Planted(holes_of_a_cut_forgotten, "all"),
    Planted(checksum_not_checked, "media", 60),
    Planted(torn_data_accepted, "power", 40),
    Planted(lost_write_taken_for_the_end, "media", 60),
    Planted(blocks_that_a_trim_hid_shown_until_they_are_swept, "all"),
    Planted(trim_not_logged, "all"),
    Planted(trim_not_replayed, "all"),
    Planted(old_epoch_accepted, "fencing", 40),
    Planted(lost_volume_served_on, "fencing", 60),
    Planted(loss_not_told, "fencing", 40),
    Planted(late_open_accepted, "fencing", 80),
    Planted(moved_blocks_dropped, "full"),
    Planted(checkpoint_counts_before_its_header, Directed("a write", "loss")),
    Planted(checkpoint_before_data, Directed("a write", "checkpoint", "away")),
    Planted(record_chain_not_checked, Directed("a write", "twice", "small")),
    Planted(zone_freed_before_its_blocks_are_written_elsewhere, "full"),
    Planted(cut_sent_before_sync, "all", 40),
    Planted(part_answered_before_durable, Directed("store segment is written", "full")),
    Planted(prefix_cut_ignored, "all"),
    Planted(pinned_version_overwritten, "all"),
    Planted(snapshot_answered_before_durable, "snapshots"),
    Planted(pinned_version_dropped_at_reclaim, "snapshots", 40),
    Planted(cut_merged_over_a_snapshot, "snapshots", 40),
    Planted(snapshot_lost_at_recovery, "snapshots"),
    Planted(older_version_of_a_snapshot_lost_at_recovery, "snapshots", 40),
    Planted(fill_inserted_over_newer_write, "all", 40),
    Planted(stale_fetch_kept, "all", 60),
    Planted(held_block_outlives_a_change, "all", 40),
    Planted(commit_acknowledged_before_durable, "power", 40),
    Planted(older_record_wins, "all"),
    Planted(origin_map_keeps_what_was_changed, "family"),
    Planted(origin_map_not_replayed, "family", 40),
    Planted(entries_moved_without_being_compared, "cleaning", 40),
    Planted(rollback_ends_with_its_first_step, "pasts"),
    Planted(stale_blocks_kept_at_attach, "pasts"),
)


def main() -> int:
    """The command line."""
    name, seeds = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    planted = next(one for one in PLANTED if one.plant.__name__ == name)
    planted.plant()
    noticed = _at_points(planted.shows) if isinstance(planted.shows, Directed) else _in_seeds(planted, seeds)
    print(f"{name}: {noticed or 'unnoticed'}"[:300], flush=True)
    return int(not noticed)


def _in_seeds(planted: Planted, seeds: str) -> str:
    first, _, end = seeds.partition(":")
    for seed in range(int(first), int(end)):
        try:
            run_seed(seed, str(planted.shows))
        except _BROKEN_FAULT:
            raise
        except Exception as error:  # however else it fails, it was noticed
            return f"seed {seed}: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def _at_points(directed: Directed) -> str:
    crash = Crash(directed.kind, ACTING)
    try:
        done = run_points([crash], workload=directed.workload, only=directed.only, stop_early=True)
    except _BROKEN_FAULT:
        raise
    except Exception as error:  # it was noticed without any crash
        return f"no crash: {type(error).__name__}: {error}".splitlines()[0]
    if not done.failures:
        return ""
    *_, said, again = [line for line in done.failures[0].splitlines() if line]
    if said.startswith(tuple(kind.__name__ for kind in _BROKEN_FAULT)):
        raise RuntimeError(done.failures[0])
    return f"{again.rpartition('.py ')[2]}: {said}"


if __name__ == "__main__":
    sys.exit(main())

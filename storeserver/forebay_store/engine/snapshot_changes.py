"""What a request about snapshots and clones comes to: facts for the log, nothing to do, or a refusal.

As in `forebay_store.engine.changes`: pure, and the view shows all earlier changes of the volumes that are named.
"""

from collections.abc import Mapping

from forebay_core.errors import RefusedError
from forebay_store.engine.changes import (
    check_free_name,
    check_fresh,
    check_new,
    expect_name,
    expect_released,
    expect_sequence,
    expect_snapshot,
)
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.rows import clone_names
from forebay_store.engine.snapshots import find_snapshot_name
from forebay_store.engine.views import View, origin_depth
from forebay_store.format.records import Record
from forebay_store.format.snapshot_records import (
    CloneCreated,
    FlattenBegun,
    RolledBack,
    SnapshotDeleted,
    SnapshotTaken,
)
from forebay_store.format.snapshot_rows import SnapshotState
from forebay_store.limits import CLONE_DEPTH_MAX, SNAPSHOTS_PER_VOLUME_MAX
from forebay_wire import messages


def take_snapshot(
    reader: IndexReader,
    message: messages.CreateSnapshot,
    controls: Mapping[bytes, str],
    *,
    now_ns: int,
    fresh_id: bytes,
) -> list[Record]:
    """Decide on CreateSnapshot of a volume that nobody holds."""
    if len(message.volumes) != 1:
        text = f"a snapshot of {len(message.volumes)} volumes: one is needed, more are reserved"
        raise RefusedError(messages.BAD_REQUEST, text)
    row = expect_name(reader, message.volumes[0])
    check_free_name(message.snapshot, "snapshot")
    expect_released(row, "given a snapshot here", controls)
    if find_snapshot_name(reader, row.number, message.snapshot) is not None:
        text = f"volume {row.name} has a snapshot {message.snapshot} already; choose another name"
        raise RefusedError(messages.SNAPSHOT_EXISTS, text)
    if row.snapshots >= SNAPSHOTS_PER_VOLUME_MAX:
        text = f"volume {row.name} has {row.snapshots} snapshots, which is all it may; delete some"
        raise RefusedError(messages.FAILED, text)
    expect_sequence(row)
    check_fresh(reader, fresh_id)
    return [SnapshotTaken(row.id, fresh_id, now_ns, message.snapshot)]


def delete_snapshot(reader: IndexReader, message: messages.DeleteSnapshot) -> list[Record]:
    """Decide on DeleteSnapshot."""
    row = expect_name(reader, message.volume)
    state = expect_snapshot(reader, row, message.snapshot)
    if state.clones:
        raise RefusedError(messages.HAS_CLONES, _has_clones(reader, f"{row.name}@{state.name}", state))
    return [SnapshotDeleted(row.id, state.id)]


def roll_back(reader: IndexReader, message: messages.RollbackVolume, controls: Mapping[bytes, str]) -> list[Record]:
    """Decide on RollbackVolume."""
    row = expect_name(reader, message.volume)
    state = expect_snapshot(reader, row, message.snapshot)
    expect_released(row, "rolled back", controls)
    if row.flattening:
        text = f"volume {row.name} is being flattened and can't be rolled back; wait for the end of that"
        raise RefusedError(messages.VOLUME_IN_USE, text)
    expect_sequence(row)
    return [RolledBack(row.id, state.id)]


def clone(reader: IndexReader, message: messages.CloneVolume, *, now_ns: int, fresh_id: bytes) -> list[Record]:
    """Decide on CloneVolume."""
    row = expect_name(reader, message.volume)
    state = expect_snapshot(reader, row, message.snapshot)
    check_new(reader, message.name, fresh_id)
    if origin_depth(reader, View(row, state)) >= CLONE_DEPTH_MAX:
        text = f"{row.name}@{state.name} reads through {CLONE_DEPTH_MAX} snapshots already; flatten volume {row.name}"
        raise RefusedError(messages.FAILED, text)
    return [CloneCreated(fresh_id, state.id, now_ns, message.name)]


def flatten(reader: IndexReader, message: messages.FlattenVolume) -> list[Record]:
    """Decide on FlattenVolume; nothing to record when it is under way."""
    row = expect_name(reader, message.name)
    if not row.origin:
        raise RefusedError(messages.BAD_REQUEST, f"volume {row.name} is no clone; there is nothing to flatten")
    return [] if row.flattening else [FlattenBegun(row.id)]


def _has_clones(reader: IndexReader, name: str, state: SnapshotState) -> str:
    names = clone_names(reader, state)
    more = f" and {state.clones - len(names)} more" if state.clones > len(names) else ""
    return (
        f"snapshot {name} has clones and can't be deleted: {', '.join(names)}{more}; delete them, or flatten them "
        "and delete those of their snapshots that are older"
    )

"""What a request to change something comes to: facts for the log, nothing to do, or a refusal.

Pure: each function looks at one view of the index in which all earlier changes of the volume show, because a volume's
changes take turns. So what it returns still holds when its records are durable.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from forebay_core.errors import ProtocolError, RefusedError, WrongUsageError
from forebay_core.extents import unpack
from forebay_core.names import NAME_SIZE_MAX, check_name, is_name
from forebay_core.units import BLOCK_SIZE, EPOCH_MAX, ID_SIZE, SEQUENCE_MAX, VOLUME_SIZE_MAX, make_version, sequence_of
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.snapshots import find_snapshot_name
from forebay_store.engine.views import find_view
from forebay_store.engine.volumes import attempts_of, find_name, find_volume, staged_parts, volumes_made
from forebay_store.format.head_rows import blocks_end_of
from forebay_store.format.part import PartTable
from forebay_store.format.records import (
    NO_ORIGIN,
    AttemptForgotten,
    CutCommitted,
    CutPart,
    Record,
    VolumeCreated,
    VolumeDeleted,
    VolumeResized,
    WriterReleased,
    WriterTaken,
)
from forebay_store.format.rows import NOBODY, Table, VolumeState
from forebay_store.format.snapshot_rows import SnapshotState
from forebay_store.limits import (
    ATTEMPTS_PER_VOLUME_MAX,
    CUT_ENTRIES_MAX,
    STAGED_BYTES_MAX,
    STAGED_PARTS_MAX,
    VOLUME_NUMBER_MAX,
)
from forebay_wire import messages
from forebay_wire.limits import HOLES_PER_PART_MAX, PARTS_PER_CUT_MAX

_U64_MAX: Final = (1 << 64) - 1
_TIME_MAX: Final = (1 << 63) - 1

SnapshotChange = (
    messages.CreateSnapshot
    | messages.DeleteSnapshot
    | messages.RollbackVolume
    | messages.CloneVolume
    | messages.FlattenVolume
)
QueuedChange = (
    messages.CreateVolume
    | messages.ResizeVolume
    | messages.DeleteVolume
    | messages.OpenVolume
    | messages.ReleaseVolume
    | messages.CommitCut
    | SnapshotChange
)
Change = QueuedChange | messages.StagePart


class Incoming(NamedTuple):
    """A request to change something, and what came or was made with it."""

    message: Change
    part: PartTable | None  # of a StagePart's payload
    now_ns: int
    fresh_id: bytes  # for a volume or snapshot that it may create


def create(reader: IndexReader, message: messages.CreateVolume, *, now_ns: int, fresh_id: bytes) -> list[Record]:
    """Decide on CreateVolume."""
    _check_size(message.name, message.size)
    check_new(reader, message.name, fresh_id)
    return [VolumeCreated(fresh_id, message.size, now_ns, message.name)]


def check_new(reader: IndexReader, name: str, fresh_id: bytes) -> None:
    """Check that a volume may be made under a name.

    Raises:
        RefusedError: it may not.
    """
    check_free_name(name, "volume")
    if find_name(reader, name) is not None:
        raise RefusedError(messages.VOLUME_EXISTS, f"volume {name} exists already; choose another name")
    if volumes_made(reader) >= VOLUME_NUMBER_MAX:
        text = f"this store made {VOLUME_NUMBER_MAX} volumes, which is all it can; make a new store"
        raise RefusedError(messages.FAILED, text)
    check_fresh(reader, fresh_id)


def check_free_name(name: str, kind: str) -> None:
    """Check that a name may be given.

    Raises:
        RefusedError: it may not.
    """
    try:
        check_name(name, kind)
    except WrongUsageError as error:
        raise RefusedError(messages.BAD_REQUEST, str(error)) from error


def check_fresh(reader: IndexReader, fresh_id: bytes) -> None:
    """Check that nothing has an id that was made here."""
    assert len(fresh_id) == ID_SIZE
    assert find_volume(reader, fresh_id) is None
    assert reader.get(Table.SNAPSHOT_IDS, fresh_id) is None


def resize(reader: IndexReader, message: messages.ResizeVolume, controls: Mapping[bytes, str]) -> list[Record]:
    """Decide on ResizeVolume."""
    row = expect_name(reader, message.name)
    _check_size(message.name, message.size)
    expect_released(row, "resized", controls)
    if message.size < row.size:
        if not message.force:
            raise RefusedError(
                messages.BAD_REQUEST,
                f"volume {message.name} has {row.size} bytes and can't shrink to {message.size} without --force, "
                "which throws away what lies behind; give a larger size",
            )
        expect_sequence(row)
    return [VolumeResized(row.id, message.size)] if message.size != row.size else []


def delete(reader: IndexReader, message: messages.DeleteVolume, controls: Mapping[bytes, str]) -> list[Record]:
    """Decide on DeleteVolume."""
    row = expect_name(reader, message.name)
    expect_released(row, "deleted", controls)
    if row.snapshots:
        raise RefusedError(
            messages.HAS_CLONES,
            f"volume {row.name} has {row.snapshots} snapshot{'s' if row.snapshots > 1 else ''} and can't be deleted; "
            "delete the snapshots first",
        )
    return [VolumeDeleted(row.id)]


def take(reader: IndexReader, message: messages.OpenVolume, controls: Mapping[bytes, str]) -> list[Record]:
    """Decide on OpenVolume; nothing to record when the device holds the volume already."""
    row = expect_name(reader, message.name)
    if len(message.device) != ID_SIZE or message.device == NOBODY:
        raise RefusedError(messages.BAD_REQUEST, f"device id of {len(message.device)} bytes: {ID_SIZE} are needed")
    if message.acknowledged > row.version:
        raise RefusedError(
            messages.STORE_BEHIND,
            f"volume {row.name} stands at version {_show(row.version)} here, but {_show(message.acknowledged)} was "
            "acknowledged: this store lost commits; don't write, look for the newer copy",
        )
    if row.writer == message.device:
        return []
    if row.writer and not message.take_over:
        raise RefusedError(
            messages.VOLUME_IN_USE,
            f"volume {row.name} is held by {_holder(row, controls)}; detach it there, or take it over",
        )
    if row.epoch >= EPOCH_MAX:
        raise RefusedError(messages.FAILED, f"volume {row.name} changed hands {EPOCH_MAX} times; copy it to a new one")
    return [WriterTaken(row.id, row.epoch + 1, message.device)]


def release(row: VolumeState) -> list[Record]:
    """Decide on ReleaseVolume."""
    return [WriterReleased(row.id, row.epoch)]


def commit(reader: IndexReader, row: VolumeState, message: messages.CommitCut) -> list[Record]:
    """Decide on CommitCut; nothing to record when it is applied already."""
    _check_commit(message)
    if make_version(message.epoch, message.last) == row.version:
        return []
    stands = sequence_of(row.version)
    if message.first != stands + 1:
        raise RefusedError(
            messages.OUT_OF_ORDER,
            f"cut {message.first} to {message.last} of volume {row.name} does not follow {stands}, "
            "the last sequence here",
        )
    _check_parts(reader, row, message)
    name = _closing_name(reader, row, message) if message.snapshot else ""
    return [
        CutCommitted(
            row.id,
            message.epoch,
            message.attempt,
            message.part_count,
            message.first,
            message.last,
            message.committed_ns,
            message.in_sync_version,
            message.snapshot or NO_ORIGIN,
            message.snapshot_ns if message.snapshot else 0,
            message.size,
            name,
        )
    ]


def _closing_name(reader: IndexReader, row: VolumeState, message: messages.CommitCut) -> str:
    """Return the name of the snapshot that closes a cut: its own, or another if that is taken by now."""
    check_free_name(message.snapshot_name, "snapshot")
    if find_view(reader, message.snapshot) is not None:
        text = f"the id {message.snapshot.hex()} of snapshot {message.snapshot_name} is taken; take another snapshot"
        raise RefusedError(messages.BAD_REQUEST, text)
    name, suffix = message.snapshot_name, ""
    while find_snapshot_name(reader, row.number, name) is not None:
        suffix += f".{message.last}"
        name = message.snapshot_name[: NAME_SIZE_MAX - len(suffix)] + suffix
    return name


def stage(message: messages.StagePart, row: VolumeState) -> CutPart:
    """Decide on StagePart, but for the limits. Whether it ends where the volume does is asked at its commit: it may be
    staged while the cut before it, which makes the volume larger, is being committed."""
    if not 0 <= message.attempt <= _U64_MAX or not 0 <= message.index < PARTS_PER_CUT_MAX:
        raise RefusedError(
            messages.BAD_REQUEST,
            f"part {message.index} of attempt {message.attempt}: at most {PARTS_PER_CUT_MAX} parts",
        )
    try:
        unpack(message.holes, count_max=HOLES_PER_PART_MAX)
    except ProtocolError as error:
        raise RefusedError(messages.BAD_REQUEST, str(error)) from error
    return CutPart(row.id, message.epoch, message.attempt, message.index, message.holes)


def make_way(reader: IndexReader, row: VolumeState, part: CutPart, size: int) -> list[AttemptForgotten]:
    """Return which of the oldest unfinished cuts are to be forgotten before a part of `size` bytes is staged.

    Raises:
        RefusedError: the attempt itself is too large.
    """
    attempts = attempts_of(reader, row.id)
    own = [one for one in attempts if (one.epoch, one.attempt) == (part.epoch, part.attempt)]
    others = [one for one in attempts if (one.epoch, one.attempt) != (part.epoch, part.attempt)]
    size += sum(one.stored_size for one in own)
    count = 1 + sum(one.part_count for one in own)
    if size > STAGED_BYTES_MAX:
        raise RefusedError(messages.BAD_REQUEST, f"a cut of more than {STAGED_BYTES_MAX} bytes; commit earlier")
    forgotten: list[AttemptForgotten] = []
    while others and (
        len(others) >= ATTEMPTS_PER_VOLUME_MAX
        or size + sum(one.stored_size for one in others) > STAGED_BYTES_MAX
        or count + sum(one.part_count for one in others) > STAGED_PARTS_MAX
    ):
        oldest = others.pop(0)
        forgotten.append(AttemptForgotten(row.id, oldest.epoch, oldest.attempt))
    return forgotten


def is_sweeping(reader: IndexReader, names: Sequence[str]) -> bool:
    """Tell whether something of one of these volumes' heads is hidden and not swept yet."""
    rows = [find_name(reader, name) for name in names]
    return any(row is not None and row.sweeping for row in rows)


def expect_name(reader: IndexReader, name: str) -> VolumeState:
    """Return the volume of a name.

    Raises:
        RefusedError: there is none.
    """
    row = find_name(reader, name)
    if row is None:
        raise RefusedError(messages.NO_SUCH_VOLUME, f"no volume {name[:128]!r} in this store")
    return row


def expect_volume(reader: IndexReader, volume: bytes) -> VolumeState:
    """Return the volume of an id.

    Raises:
        RefusedError: there is none.
    """
    row = find_volume(reader, volume) if len(volume) == ID_SIZE else None
    if row is None:
        raise RefusedError(messages.NO_SUCH_VOLUME, f"no volume of id {volume[:ID_SIZE].hex()} in this store")
    return row


def expect_epoch(row: VolumeState, epoch: int) -> None:
    """Check that an epoch of a volume still lasts.

    Raises:
        RefusedError: FENCED.
    """
    if not row.writer or row.epoch != epoch:
        raise RefusedError(
            messages.FENCED,
            f"epoch {epoch} of volume {row.name} is over, epoch {row.epoch} is "
            f"{'held by device ' + row.writer.hex() if row.writer else 'released'}",
        )


def _check_size(name: str, size: int) -> None:
    if not 0 < size <= VOLUME_SIZE_MAX or size % BLOCK_SIZE:
        raise RefusedError(
            messages.BAD_REQUEST,
            f"size {size} of volume {name[:128]!r}: a multiple of {BLOCK_SIZE} up to {VOLUME_SIZE_MAX} is needed",
        )


def expect_released(row: VolumeState, verb: str, controls: Mapping[bytes, str]) -> None:
    """Check that nobody holds a volume.

    Raises:
        RefusedError: VOLUME_IN_USE; the text names the holder.
    """
    if row.writer:
        raise RefusedError(
            messages.VOLUME_IN_USE,
            f"volume {row.name} is held by {_holder(row, controls)} and can't be {verb}; detach it first",
        )


def expect_sequence(row: VolumeState) -> None:
    """Check that a volume may have one more change.

    Raises:
        RefusedError: its sequence numbers are used up.
    """
    if sequence_of(row.version) >= SEQUENCE_MAX:
        raise RefusedError(messages.FAILED, f"volume {row.name} had {SEQUENCE_MAX} changes; copy it to a new one")


def expect_snapshot(reader: IndexReader, row: VolumeState, name: str) -> SnapshotState:
    """Return the snapshot of a name.

    Raises:
        RefusedError: the volume has none.
    """
    found = find_snapshot_name(reader, row.number, name) if is_name(name) else None
    if found is None:
        raise RefusedError(messages.NO_SUCH_SNAPSHOT, f"volume {row.name} has no snapshot {name[:NAME_SIZE_MAX]!r}")
    return found


def _holder(row: VolumeState, controls: Mapping[bytes, str]) -> str:
    control = controls.get(row.id, "")
    return f"device {row.writer.hex()}" + (f", whose daemon takes commands at {control}," if control else "")


def _check_commit(message: messages.CommitCut) -> None:
    if not (
        0 < message.first <= message.last <= SEQUENCE_MAX
        and 0 <= message.part_count <= PARTS_PER_CUT_MAX
        and 0 <= message.attempt <= _U64_MAX
        and 0 <= message.committed_ns <= _TIME_MAX
        and 0 <= message.in_sync_version <= _U64_MAX
        and len(message.snapshot) in (0, ID_SIZE)
        and message.snapshot != NO_ORIGIN
        and 0 <= message.snapshot_ns <= _TIME_MAX
        and 0 <= message.size <= VOLUME_SIZE_MAX
        and message.size % BLOCK_SIZE == 0
        and not (message.snapshot and message.size)
    ):
        raise RefusedError(
            messages.BAD_REQUEST, f"cut {message.first} to {message.last} in {message.part_count} parts is malformed"
        )


def _check_parts(reader: IndexReader, row: VolumeState, message: messages.CommitCut) -> None:
    expected = entries = 0
    for part_index, part in staged_parts(reader, row.id, message.epoch, message.attempt):
        if part_index != expected or expected == message.part_count:
            break
        expected += 1
        entries += part.entry_count
        blocks_end = blocks_end_of(part)
        if blocks_end * BLOCK_SIZE > row.size:
            text = f"part reaches to block {blocks_end}, volume {row.name} has {row.size // BLOCK_SIZE} blocks"
            raise RefusedError(messages.BAD_REQUEST, text)
        if entries > CUT_ENTRIES_MAX:
            raise RefusedError(messages.BAD_REQUEST, f"a cut of more than {CUT_ENTRIES_MAX} extents; commit earlier")
    if expected < message.part_count:
        raise RefusedError(
            messages.PARTS_MISSING,
            f"part {expected} of {message.part_count} of attempt {message.attempt:#x} of volume {row.name} is not "
            "staged; stage the cut again",
        )


def _show(version: int) -> str:
    return f"{version >> 44}/{sequence_of(version)}"

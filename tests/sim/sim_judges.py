"""The judges: they watch disk, store and guests from outside, keep the history themselves, and say what was broken.

`Branch` is the history of one volume on one cache device, read from the records as they go to the disk: the order of
changes is that of their versions. `Official` is the history that counts: which branch each epoch's cuts come from.
Judges know nothing of the workload, and nothing of the engines' memory but the version at which a volume came back.

Invariants:
    A branch's `live` is its base and all changes written so far; `state_at` is its state at any version.
    `Official.state` is what the store must show at `Official.version`.
    A held volume is changed only by its holder: versions of the epoch that was granted last. A released one is changed
    only by the store, which numbers such a change behind the last one, in whatever epoch that was: a holder that wrote
    nothing leaves none of its own. No holder's change can have that number later, for the next one has a new epoch.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sim_world import Violation

from forebay_cache.format import record
from forebay_cache.format.volume_note import VolumeNote
from forebay_core.checksums import checksum
from forebay_core.errors import ForebayError
from forebay_core.extents import Extent, pack
from forebay_core.units import BLOCK_SIZE, Buffer, epoch_of
from forebay_store.engine.ports import Index, SegmentBackend
from forebay_store.engine.reading import check_frames, plan_read
from forebay_store.engine.replay import replay
from forebay_store.engine.snapshots import snapshots_after
from forebay_store.engine.volumes import find_volume, read_applied
from forebay_store.format.rows import VolumeState
from forebay_wire import messages
from forebay_wire.limits import READ_BLOCKS_MAX
from forebay_wire.pieces import plain_pieces

State = dict[int, bytes]  # block -> content; a block that is not there reads as zeros
ZEROS = bytes(BLOCK_SIZE)


class Change(NamedTuple):
    """One block written (`content`), or an extent zeroed (None)."""

    version: int
    start: int
    count: int
    content: bytes | None


def apply(state: State, change: Change) -> None:
    """Bring a state one change further."""
    if change.content is None:
        for lba in range(change.start, change.start + change.count):
            state.pop(lba, None)
    elif change.content == ZEROS:
        state.pop(change.start, None)
    else:
        state[change.start] = change.content


class Branch:
    """What one device did to one volume since it last took the volume over."""

    def __init__(self, name: str, base_version: int, base: State) -> None:
        self.name = name
        self.base_version = base_version
        self.base = base
        self.changes: list[Change] = []
        self.submitted = base_version
        self.written = base_version
        self.synced = base_version  # newest change that no power cut can take back
        self.live = dict(base)
        self.block_versions: dict[int, int] = {}
        self.acknowledged = base_version  # newest change that a guest was told of
        self.durable = base_version  # newest change that a flush or a snapshot was answered for
        self.snapshots: dict[str, int] = {}  # answered ones: name and version

    def submit(self, change: Change) -> None:
        """A record that holds this is on its way to the disk."""
        if change.version < self.submitted:
            raise Violation(f"{self.name}: change {change.version:#x} is logged behind {self.submitted:#x}")
        self.changes.append(change)
        self.submitted = change.version

    def write(self, version: int) -> None:
        """All changes up to this version are on the disk, as programs see it."""
        first = bisect_right(self.changes, self.written, key=lambda change: change.version)
        for change in self.changes[first:]:
            if change.version > version:
                break
            apply(self.live, change)
            for lba in range(change.start, change.start + change.count):
                self.block_versions[lba] = change.version
        self.written = max(self.written, version)

    def state_at(self, version: int) -> State:
        """Return the state after the change of this version."""
        if version < self.base_version:
            raise Violation(f"{self.name}: version {version:#x} is older than its beginning {self.base_version:#x}")
        state = dict(self.base)
        for change in self.changes:
            if change.version > version:
                break
            apply(state, change)
        return state

    def acknowledge(self, extent: Extent, content: bytes | None) -> int:
        """A guest is told that this was done: it must be in a written record. Return the version."""
        version = self.base_version
        for lba in range(extent.start, extent.end):
            at = (lba - extent.start) * BLOCK_SIZE
            expected = ZEROS if content is None else content[at : at + BLOCK_SIZE]
            if self.live.get(lba, ZEROS) != expected:
                raise Violation(f"{self.name}: block {lba} was acknowledged and is in no record")
            version = max(version, self.block_versions.get(lba, self.base_version))
        self.acknowledged = max(self.acknowledged, version)
        return version

    def flushed(self, version: int) -> None:
        """A guest is told that everything up to this version is durable."""
        self.durable = max(self.durable, version)

    def took(self, name: str, version: int) -> None:
        """An operator is told that this snapshot is taken: nothing takes it back."""
        if version > self.synced:
            raise Violation(f"{self.name}: snapshot {name} was answered, the SSD surely has only {self.synced:#x}")
        self.snapshots[name] = version
        self.flushed(version)

    def check_pending(self, names: Sequence[str], acknowledged: int) -> None:
        """Every snapshot that was answered waits for the store, or is there."""
        lost = [name for name, version in self.snapshots.items() if version > acknowledged and name not in names]
        if lost:
            raise Violation(f"{self.name}: snapshots {lost} were answered and are gone")

    def recover(self, version: int, *, power: bool) -> State:
        """The device came back at this version: forget what is newer. Return the state that must be read now."""
        least = self.durable if power else max(self.acknowledged, self.durable)
        if version < least:
            what = "flushed" if version < self.durable else "acknowledged"
            raise Violation(f"{self.name}: back at {version:#x}, but {least:#x} was {what}")
        if version > self.submitted:
            raise Violation(f"{self.name}: back at {version:#x}, but {self.submitted:#x} is the newest ever logged")
        del self.changes[bisect_right(self.changes, version, key=lambda change: change.version) :]
        self.live = self.state_at(version)
        self.written = self.submitted = self.synced = version
        self.acknowledged = min(self.acknowledged, version)
        self.block_versions = {}
        for change in self.changes:
            self.block_versions.update(dict.fromkeys(range(change.start, change.start + change.count), change.version))
        return dict(self.live)


class LogTap:
    """Reads the records that a cache daemon writes, and tells the branches of its volumes."""

    def __init__(self, zones_offset: int) -> None:
        self._zones_offset = zones_offset
        self.branches: dict[bytes, Branch] = {}  # by volume id
        self.ids: dict[int, bytes] = {}  # volume ids by key on this device
        self._under_way: dict[int, dict[str, tuple[Branch, int]]] = {}  # newest versions by the offset of a write
        self._unsynced: deque[dict[str, tuple[Branch, int]]] = deque()  # of each completed write that no sync covers

    def restart(self) -> None:
        """The daemon died: what it had under way will not be completed; what it wrote is synced before recovery."""
        self._under_way.clear()
        self._unsynced.clear()

    def submitted(self, offset: int, content: bytes) -> None:
        """A write was given to the device."""
        changes = list(self._changes(offset, content))
        for change, branch in changes:
            branch.submit(change)
        if changes:
            self._under_way[offset] = {branch.name: (branch, change.version) for change, branch in changes}

    def completed(self, offset: int, content: bytes) -> None:
        """A write is done."""
        newest = self._under_way.pop(offset, {})
        self._unsynced.append(newest)
        for branch, version in newest.values():
            branch.write(version)

    def synced(self, left: int) -> None:
        """A sync is done; so many of the completed writes are not covered."""
        while len(self._unsynced) > left:
            for branch, version in self._unsynced.popleft().values():
                branch.synced = max(branch.synced, version)

    def _changes(self, offset: int, content: bytes) -> Iterator[tuple[Change, Branch]]:
        """Yield the changes that a write brings: of all records in it, one behind the other."""
        at = 0 if offset >= self._zones_offset else len(content)
        while at < len(content):
            header = record.peek_header(content[at : at + BLOCK_SIZE])
            yield from self._changes_of(offset + at, content[at : at + header.size * BLOCK_SIZE])
            at += header.size * BLOCK_SIZE

    def _changes_of(self, offset: int, content: bytes) -> Iterator[tuple[Change, Branch]]:
        header, entries = record.decode_record(content[:BLOCK_SIZE], place=f"write at offset {offset}")
        if header.kind == record.NOTE:
            note = record.decode_note(content[:BLOCK_SIZE], place=f"write at offset {offset}")
            if isinstance(note, VolumeNote):
                self.ids[note.volume_key] = note.volume_id
            elif (ended := self.branches.get(self.ids.get(note.volume_key, b""))) is not None:
                yield Change(note.version, 0, 0, None), ended  # a snapshot or resize changes no block
            return
        if len(content) != header.size * BLOCK_SIZE:
            raise Violation(f"a record of {header.size} blocks was written as {len(content)} bytes")
        for index, (start, version, value, volume_key, kind, *_) in enumerate(entries.tolist()):
            branch = self.branches.get(self.ids.get(volume_key, b""))
            if index < header.block_count:
                block = content[(index + 1) * BLOCK_SIZE : (index + 2) * BLOCK_SIZE]
                if kind == record.WRITE and checksum(block) != value:
                    raise Violation(f"block {start} was logged with a checksum that is not its own")
                if kind == record.WRITE and branch is not None:
                    yield Change(version, start, 1, block), branch
            elif kind in (record.TRIM, record.ZERO) and branch is not None:
                yield Change(version, start, value, None), branch


class Official:
    """The history of one volume that counts: the cuts that the store may show."""

    def __init__(self, volume_id: bytes, name: str) -> None:
        self.id = volume_id
        self.name = name
        self.version = 0
        self.state: State = {}
        self.epoch = 0
        self.branches: dict[int, Branch] = {}  # by epoch
        self.acknowledged = 0  # newest version that a cache was told the store has
        self.snapshots: dict[bytes, tuple[int, State]] = {}  # by id: version, and what it shows for ever
        self.own: dict[int, State] = {}  # by the version that a change by the store itself would get, what it shows
        self.deleting: set[bytes] = set()  # ids of snapshots that somebody wanted to delete
        self.deleted: set[bytes] = set()  # and of those that were, as the store said

    def begin(self, epoch: int, branch: Branch) -> None:
        """A device was granted an epoch, and its changes count from now on."""
        self.branches[epoch] = branch

    def ask(self, state: State) -> None:
        """The store is about to be asked to make the volume this, or to keep it as a snapshot; it may die over it."""
        self.own[self.version + 1] = dict(state)

    def advance(self, version: int, epoch: int, *, held: bool) -> None:
        """The store shows this version: it must be the past of its holder's branch, or what the store was asked for."""
        if held:
            self.state = self._past(version, epoch)
        elif version in self.own:
            self.state = dict(self.own[version])
        else:
            raise Violation(f"{self.name}: version {version:#x} came while nobody held what epoch {epoch} left")
        self.version = version

    def _past(self, version: int, epoch: int) -> State:
        if epoch_of(version) != epoch:
            raise Violation(f"{self.name}: epoch {epoch_of(version)} changed what epoch {epoch} holds")
        branch = self.branches.get(epoch)
        if branch is None:
            raise Violation(f"{self.name}: the store shows version {version:#x} of an epoch that nobody was granted")
        if branch.base_version > self.version:
            raise Violation(f"{self.name}: {branch.name} began at {branch.base_version:#x}, behind {self.version:#x}")
        if version > branch.synced:
            raise Violation(f"{self.name}: the store shows {version:#x}, the SSD surely has only {branch.synced:#x}")
        return branch.state_at(version)


class StoreJudge:
    """Looks at what readers of the store may see."""

    def __init__(self) -> None:
        self.volumes: dict[bytes, Official] = {}
        self.shown_states = 0
        self.snapshots_compared = 0

    def shown(self, index: Index, backend: SegmentBackend, *, all_of_it: bool = False, damaged: bool = False) -> None:
        """Compare each volume that moved (or all) with its history."""
        with index.view() as reader:
            rows = [row for volume in self.volumes if (row := find_volume(reader, volume)) is not None]
        for row in rows:
            official = self.volumes[row.id]
            if row.epoch < official.epoch or row.version < official.version:
                raise Violation(f"{row.name}: the store went back to epoch {row.epoch}, version {row.version:#x}")
            moved = row.version != official.version
            official.epoch = row.epoch
            if row.version < official.acknowledged:
                raise Violation(f"{row.name}: version {official.acknowledged:#x} was acknowledged and is gone")
            if moved:
                official.advance(row.version, row.epoch, held=bool(row.writer))
            if moved or all_of_it:
                self._compare(index, backend, row, official, damaged=damaged)
                if not damaged:
                    self._compare_snapshots(index, backend, row, official, all_of_it=all_of_it)

    def _compare_snapshots(
        self, index: Index, backend: SegmentBackend, row: VolumeState, official: Official, *, all_of_it: bool
    ) -> None:
        """Each snapshot shows the history at its sequence number, whatever happened since; none goes by itself."""
        with index.view() as reader:
            shown = {one.id: one for one in snapshots_after(reader, row.number, 0)}
        back = official.deleted & shown.keys()
        if back:
            raise Violation(f"{row.name}: {len(back)} snapshots are there again that were deleted")
        gone = official.snapshots.keys() - shown.keys() - official.deleting
        if gone:
            raise Violation(f"{row.name}: {len(gone)} snapshots are gone that nobody deleted")
        for snapshot, state in shown.items():
            is_new = snapshot not in official.snapshots
            if is_new:
                branch = official.branches.get(epoch_of(state.version))
                named = branch.snapshots.get(state.name, official.version) if branch else official.version
                if not state.version == named == official.version:
                    taken = f"it was taken at {named:#x} and came at {official.version:#x}"
                    raise Violation(f"{row.name}@{state.name} is at {state.version:#x}, {taken}")
                official.snapshots[snapshot] = (state.version, dict(official.state))
            if is_new or all_of_it:
                self.snapshots_compared += 1
                found = read_store(index, backend, snapshot, Extent(0, state.size // BLOCK_SIZE))
                if found != official.snapshots[snapshot][1]:
                    raise Violation(f"{row.name}@{state.name} is not what the volume was at {state.version:#x}")

    def _compare(
        self, index: Index, backend: SegmentBackend, row: VolumeState, official: Official, *, damaged: bool
    ) -> None:
        self.shown_states += 1
        whole = Extent(0, row.size // BLOCK_SIZE)
        try:
            found = read_store(index, backend, row.id, whole)
        except ForebayError:
            if not damaged:
                raise
            return
        if found != official.state:
            wrong = [lba for lba in range(whole.count) if found.get(lba) != official.state.get(lba)]
            raise Violation(f"{row.name}: the store at {row.version:#x} is no past of it: blocks {wrong[:8]}")
        if row.data_blocks != len(found) and not row.origin and not row.sweeping:
            raise Violation(f"{row.name}: {row.data_blocks} data blocks are counted, {len(found)} are there")


def read_store(index: Index, backend: SegmentBackend, volume: bytes, extent: Extent) -> State:
    """Return what a reader of the store gets, through the checks of both sides."""
    state: State = {}
    for start in range(extent.start, extent.end, READ_BLOCKS_MAX):
        part = Extent(start, min(READ_BLOCKS_MAX, extent.end - start))
        with index.view() as reader:
            plan = plan_read(reader, messages.Read(volume, pack([part]), through=True))
        buffers = [backend.read_range(one.segment.text, one.offset, one.size) for one in plan.reads]
        payload: Buffer = b"".join(check_frames(plan, buffers))
        for piece in plain_pieces(plan.pieces, payload, [part], place="judge"):
            if piece.plain is not None:
                for at in range(piece.extent.count):
                    state[piece.extent.start + at] = bytes(piece.plain[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
    return state


def check_rebuilt(index: Index, backend: SegmentBackend, empty: Index, *, store: bytes) -> None:
    """Compare the index with what the segments that it shows give alone."""
    with index.view() as reader:
        applied = read_applied(reader)
    replay(backend, empty, store=store, until=applied)
    if empty.rows() != index.rows():  # type: ignore[attr-defined]
        raise Violation("the segments alone give another index")

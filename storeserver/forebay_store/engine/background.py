"""What the store does by itself, a step at a time: sweeping what trims and rollbacks hid, purging what deletions left,
and flattening clones.

Each step is a record of the log, like every other change: a crash in between leaves the rest for the next start.
At most one step of either kind is under way: between two of them everybody else has a turn.

Invariants:
    `_step_serial`, of sweeping or purging, and `_copy_serial` are those of records that did not settle yet; 0: there is
    none.
    `_flattening` has every clone that is being flattened, and from which block on its origin was not looked at;
    `_unreadable` those whose origin could not be read, until `retry_copies`.
Crash: see above; flattening begins at block 0 again, and skips what it finds there.
"""

from typing import Final, NamedTuple

from forebay_core.errors import ForebayError
from forebay_core.units import Buffer
from forebay_store.engine.ports import Index, SegmentMissingError
from forebay_store.engine.purge import next_deleted
from forebay_store.engine.sweeps import first_sweep
from forebay_store.format.part import PartTable
from forebay_store.format.rows import Table
from forebay_store.format.snapshot_records import Flattened, OriginPart, Purged, Swept
from forebay_store.limits import PURGE_ENTRIES_MAX, SWEEP_ENTRIES_MAX

_MISSED_MAX: Final = 8


class CopyOrigin(NamedTuple):
    """Copy some blocks of a clone's origin, from block `start` on, into frames, then call `complete_copy`."""

    volume: bytes
    start: int


class Copied(NamedTuple):
    """Frames that a clone is to get, and the block to go on from; -1: there are none, that was all."""

    payload: tuple[Buffer, ...]
    table: PartTable
    next_start: int


class Background:
    """Says what the next step is."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._steps_wanted = True
        self._step_serial = 0
        self._unreadable: set[bytes] = set()
        self._copying = b""
        self._copy_serial = 0
        self._paused = False
        self._missed = 0  # steps of flattening in a row that found no segment
        with index.view() as reader:
            self._flattening = {key: 0 for key, _ in reader.scan(Table.FLATTENING, b"")}

    @property
    def busy(self) -> bool:
        """Whether blocks are being copied."""
        return bool(self._copying) and self._copy_serial == 0

    @property
    def purging(self) -> bool:
        """Whether entries of what was deleted or hidden are still to be removed, and nothing stops that."""
        return self._step_serial != 0 or (self._steps_wanted and not self._paused)

    @property
    def paused(self) -> bool:
        """Whether a step met a full disk, and nothing was written since."""
        return self._paused

    def want_steps(self) -> None:
        """Something was deleted, trimmed or rolled back."""
        self._steps_wanted = True

    def flatten(self, volume: bytes) -> None:
        """A clone is to be flattened."""
        self._flattening.setdefault(volume, 0)

    def retry_copies(self) -> None:
        """Look again at the clones whose origin could not be read."""
        for volume in sorted(self._unreadable):
            self.flatten(volume)
        self._unreadable.clear()

    def resume(self) -> None:
        """There may be space again."""
        self._paused = False

    def next_step(self) -> Swept | Purged | None:
        """Return the next step of sweeping, for which somebody may wait, or of purging; its serial is to be noted with
        `steps`."""
        if not self._steps_wanted or self._step_serial or self._paused:
            return None
        with self._index.view() as reader:
            swept = first_sweep(reader)
            if swept is not None:
                return Swept(swept.volume, SWEEP_ENTRIES_MAX)
            found = next_deleted(reader)
        if found is None:
            self._steps_wanted = False
            return None
        return Purged(*found, PURGE_ENTRIES_MAX)

    def steps(self, serial: int) -> None:
        """The step of sweeping or purging is in the log."""
        self._step_serial = serial

    def next_copy(self) -> CopyOrigin | None:
        """Return the next step of flattening."""
        if self._copying or self._paused or not self._flattening:
            return None
        self._copying = next(iter(self._flattening))
        return CopyOrigin(self._copying, self._flattening[self._copying])

    def copied(self, copied: Copied | ForebayError | None) -> OriginPart | Flattened | None:
        """Take what was copied, None if the clone is none any more; return the record that says so, if any.

        A clone whose origin can't be read stays one until it is tried again. That a segment is missing may only mean
        that the cleaner moved what was in it meanwhile: look again.
        """
        volume = self._copying
        if isinstance(copied, SegmentMissingError) and self._missed < _MISSED_MAX:
            self._missed += 1
            self._copying = b""
            return None
        self._missed = 0
        if copied is None or isinstance(copied, ForebayError):
            if copied is not None:
                self._unreadable.add(volume)
            del self._flattening[volume]
            self._copying = b""
            return None
        assert copied.next_start >= 0 or copied.table.payload_size == 0
        self._flattening[volume] = copied.next_start
        if copied.table.payload_size:
            return OriginPart(volume)
        if copied.next_start < 0:
            return Flattened(volume)
        self._copying = b""
        return None

    def copies(self, serial: int) -> None:
        """The record of the step is in the log."""
        self._copy_serial = serial

    def settle(self, serial: int) -> None:
        """A record shows in the index."""
        if serial == self._step_serial:
            self._step_serial = 0
        if serial == self._copy_serial:
            self._copy_serial = 0
            if self._flattening[self._copying] < 0:
                del self._flattening[self._copying]
            self._copying = b""

    def refuse(self, serial: int) -> None:
        """A record will never be: there was no space for it. Begin again later."""
        if serial == self._step_serial:
            self._step_serial = 0
            self._paused = True
        if serial == self._copy_serial:
            self._copy_serial = 0
            self._flattening[self._copying] = 0
            self._copying = b""
            self._paused = True

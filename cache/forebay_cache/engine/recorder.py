"""Recordings of what guests ask for, request by request, for whoever wants a trace.

Row, 16 bytes, little-endian:

    offset  size  type  field     meaning
    ------  ----  ----  --------  ----------------------------------------------------------------
         0     4  u32   time_ms   milliseconds since the recording began, modulo 2^32
         4     4  u32   count_op  blocks in the lower 31 bits; the highest bit is set for a write
         8     8  u64   key       volume in the upper 24 bits, index of the first block in the lower 40

Invariants:
    A recording holds at most RECORDING_ROWS_MAX rows; what comes when it is full is counted as lost.
    A guest's request never waits for a recording.
Crash: a recording ends with the daemon.
"""

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from forebay_cache.engine.limits import RECORDING_ROWS_MAX, RECORDINGS_MAX
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SHIFT, BLOCK_SIZE, LBA_BITS

if TYPE_CHECKING:
    from forebay_cache.engine.volume import CacheVolume

ROW: Final = struct.Struct("<IIQ")
WRITE_BIT: Final = 1 << 31


class Taken(NamedTuple):
    """Rows, how many are lost since the last ones, and the names of volumes that are new in them, by key."""

    rows: bytes
    lost: int
    names: dict[int, str]


class Recording:
    """What one listener gets: the requests of one volume, or of all."""

    def __init__(self, volume_key: int | None, now_ns: int) -> None:
        self._volume_key = volume_key
        self._began_ns = now_ns
        self._rows = bytearray(RECORDING_ROWS_MAX * ROW.size)
        self._count = self._lost = 0
        self._known: set[int] = set()
        self._names: dict[int, str] = {}

    @property
    def is_half_full(self) -> bool:
        """Whether it should be taken soon."""
        return self._count * 2 >= RECORDING_ROWS_MAX

    def note(self, volume: "CacheVolume", offset: int, length: int, now_ns: int, *, write: bool) -> None:
        """Note a request."""
        key = volume.key
        if self._volume_key is None:
            if volume.temporary:
                return
        elif self._volume_key != key:
            return
        if self._count >= RECORDING_ROWS_MAX:
            self._lost += 1
            return
        if key not in self._known:
            self._known.add(key)
            self._names[key] = volume.name
        first = offset >> BLOCK_SHIFT
        count = (offset + length + BLOCK_SIZE - 1 >> BLOCK_SHIFT) - first
        time_ms = (now_ns - self._began_ns) // 1_000_000 & 0xFFFFFFFF
        count_op = count | WRITE_BIT if write else count
        ROW.pack_into(self._rows, self._count * ROW.size, time_ms, count_op, key << LBA_BITS | first)
        self._count += 1

    def take(self) -> Taken:
        """Return what came since the last time."""
        taken = Taken(bytes(memoryview(self._rows)[: self._count * ROW.size]), self._lost, self._names)
        self._count = self._lost = 0
        self._names = {}
        return taken


class Recorder:
    """All recordings. `is_on` while there is one: only then it is told of requests."""

    def __init__(self) -> None:
        self.is_on = False
        self.now_ns = 0
        self._recordings: list[Recording] = []

    def begin(self, volume_key: int | None) -> Recording:
        """Record one volume, or all that are no temporary snapshots.

        Raises:
            ForebayError: there are enough recordings.
        """
        if len(self._recordings) >= RECORDINGS_MAX:
            raise ForebayError(f"{RECORDINGS_MAX} recordings are under way already; end one of them first")
        recording = Recording(volume_key, self.now_ns)
        self._recordings.append(recording)
        self.is_on = True
        return recording

    def end(self, recording: Recording) -> None:
        """Record no more."""
        self._recordings.remove(recording)
        self.is_on = bool(self._recordings)

    def note(self, volume: "CacheVolume", offset: int, length: int, *, write: bool) -> None:
        """A guest asked for this."""
        for recording in self._recordings:
            recording.note(volume, offset, length, self.now_ns, write=write)

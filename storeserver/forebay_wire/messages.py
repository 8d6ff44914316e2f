"""The messages: what store, cache, tools and drivers say to each other.

A message is one of these structs as MessagePack (an array: the tag, then the fields in this order; fields are only
ever added at the end, with a default) plus an optional payload of raw bytes. Extent lists and piece tables travel
packed, see `forebay_core.extents` and `PIECE_DTYPE`. Every request is answered by its reply or by `Failed`.

Piece, 28 bytes, little-endian, the answer to one extent or a part of it:

    offset  size  type  field    meaning
    ------  ----  ----  -------  ------------------------------------------------------------
         0     8  u64   start    first block
         8     4  u32   count    blocks
        12     4  u32   frame    index of the frame in the payload; 0xffffffff: a hole, reads as zeros
        16     4  u32   block    index of the first block among the frame's plain blocks; 0 for a hole
        20     8  u64   version  version since which the extent is so; 0: never written
"""

from typing import Final

import msgspec
import numpy as np

PIECE_DTYPE: Final = np.dtype(
    [("start", "<u8"), ("count", "<u4"), ("frame", "<u4"), ("block", "<u4"), ("version", "<u8")]
)
HOLE_FRAME: Final = 0xFFFFFFFF
assert PIECE_DTYPE.itemsize == 28

# Codes of Failed. A code is stable; the text is for people.
NO_SUCH_VOLUME: Final = "no-such-volume"
VOLUME_EXISTS: Final = "volume-exists"
VOLUME_IN_USE: Final = "volume-in-use"
FENCED: Final = "fenced"
OUT_OF_ORDER: Final = "out-of-order"
PARTS_MISSING: Final = "parts-missing"
HISTORY_GONE: Final = "history-gone"
STORE_BEHIND: Final = "store-behind"
WRONG_STORE: Final = "wrong-store"  # said by a cache: the volume lives in another one than it is connected to
CORRUPT: Final = "corrupt"
NO_SPACE: Final = "no-space"
BAD_REQUEST: Final = "bad-request"
NOT_ATTACHED: Final = "not-attached"
STOPPING: Final = "stopping"
FAILED: Final = "failed"


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=False):
    """Base of all messages."""


class VolumeRow(Message, frozen=True, array_like=True):
    """What the store knows of one volume."""

    id: bytes
    name: str
    size: int
    epoch: int
    version: int  # of the newest committed cut; 0 before the first
    committed_ns: int  # wall clock of the cache at the newest committed cut, Unix nanoseconds; 0 before the first
    created_ns: int
    writer: bytes  # device that holds it; empty when released
    stored_size: int  # bytes of frames that the head refers to
    data_blocks: int  # blocks of the head that are not holes
    origin: bytes = b""  # snapshot id a clone reads through to; empty: none


class Failed(Message, frozen=True, array_like=True, tag=1):
    """The answer to a request that was refused or failed; `text` is one line."""

    code: str
    text: str


class Done(Message, frozen=True, array_like=True, tag=2):
    """The answer that says only: done, and durable."""


class Ping(Message, frozen=True, array_like=True, tag=3):
    """Asks for Done; keeps a connection alive and measures it."""


class CreateVolume(Message, frozen=True, array_like=True, tag=10):
    """Create an empty volume; answered by Volume. `size` is a multiple of 4096."""

    name: str
    size: int


class GetVolume(Message, frozen=True, array_like=True, tag=11):
    """Ask for one volume; answered by Volume."""

    name: str


class Volume(Message, frozen=True, array_like=True, tag=12):
    """One volume."""

    row: VolumeRow


class ListVolumes(Message, frozen=True, array_like=True, tag=13):
    """Ask for volumes whose name follows `after`, at most `count_max`; answered by Volumes."""

    after: str = ""
    count_max: int = 256


class Volumes(Message, frozen=True, array_like=True, tag=14):
    """A page of volumes in the order of their names; `more` says that another page follows."""

    rows: tuple[VolumeRow, ...]
    more: bool


class ResizeVolume(Message, frozen=True, array_like=True, tag=15):
    """Grow a volume that has no writer; answered by Volume."""

    name: str
    size: int


class DeleteVolume(Message, frozen=True, array_like=True, tag=16):
    """Delete a volume that has no writer; answered by Done."""

    name: str


class OpenVolume(Message, frozen=True, array_like=True, tag=20):
    """Take or take up again the right to write; answered by Opened.

    The store raises the epoch unless `device` holds the volume already; it always raises the session, which closes
    the older one. Another holder is refused with VOLUME_IN_USE unless `take_over`. `acknowledged` is the newest
    version whose commit this device saw acknowledged (0: none): a store that is behind it refuses with STORE_BEHIND.
    """

    name: str
    device: bytes
    take_over: bool = False
    acknowledged: int = 0


class Opened(Message, frozen=True, array_like=True, tag=21):
    """The right to write under this epoch and session. `row.version` is where the store stands."""

    row: VolumeRow
    epoch: int
    session: int


class ReleaseVolume(Message, frozen=True, array_like=True, tag=22):
    """Give the right to write back; answered by Done."""

    volume: bytes
    epoch: int
    session: int


class Read(Message, frozen=True, array_like=True, tag=30):
    """Read blocks of the head; answered by Blocks. `min_version`: refuse with STORE_BEHIND below it.

    `epoch` and `session` are those of a cache that serves the volume: refused with FENCED when they are over, because
    it must not mix what it holds with what somebody else wrote. 0: not checked, for exports.
    """

    volume: bytes
    extents: bytes
    min_version: int = 0
    epoch: int = 0
    session: int = 0


class Blocks(Message, frozen=True, array_like=True, tag=31):
    """The pieces that answer a Read, covering its extents exactly and in order; the payload is the frames."""

    pieces: bytes


class MapExtents(Message, frozen=True, array_like=True, tag=32):
    """Ask which blocks of one extent hold data; answered by Mapped. `epoch` and `session` as in Read."""

    volume: bytes
    start: int
    count: int
    epoch: int = 0
    session: int = 0


class Mapped(Message, frozen=True, array_like=True, tag=33):
    """Pieces from `start` without data: frame 0 for data, HOLE_FRAME for a hole. May end early, never empty."""

    pieces: bytes


class Changed(Message, frozen=True, array_like=True, tag=34):
    """Ask what was written or trimmed since a version, from block `start` on; answered by Changes.

    Below the volume's floor the answer is Failed with HISTORY_GONE: copy everything.
    """

    volume: bytes
    since: int
    start: int = 0


class Changes(Message, frozen=True, array_like=True, tag=35):
    """A page of pieces as in Mapped; `next_start` is the block to go on from, -1 at the end."""

    pieces: bytes
    next_start: int
    version: int  # what the answer is as of


class StagePart(Message, frozen=True, array_like=True, tag=40):
    """Stage one part of a cut, durable and invisible; answered by Done. The payload is whole frames.

    `attempt` is a random number that names this try at the cut; `index` counts parts from 0. `holes` is a packed
    extent list of blocks that read as zeros from this cut on.
    """

    volume: bytes
    epoch: int
    session: int
    attempt: int
    index: int
    holes: bytes = b""


class CommitCut(Message, frozen=True, array_like=True, tag=41):
    """Make all parts of an attempt visible at once; answered by Committed.

    Applied only if `first` follows the store's last sequence. If the store's last sequence is `last` already, the
    answer is Committed with `already_applied`.
    """

    volume: bytes
    epoch: int
    session: int
    attempt: int
    part_count: int
    first: int
    last: int
    committed_ns: int
    in_sync_version: int = 0  # version of the in-sync set this commit was sent under


class Committed(Message, frozen=True, array_like=True, tag=42):
    """The store stands at `version`, durably."""

    version: int
    already_applied: bool


class HeldReport(Message, frozen=True, array_like=True):
    """How far a cache device is ahead of the store with one volume. Times are its wall clock, Unix nanoseconds."""

    volume: bytes
    epoch: int
    version: int  # of the newest change that the device holds
    oldest_ns: int  # since when it has held a change that the store does not; 0: it has none
    reported_ns: int


class ReportHeld(Message, frozen=True, array_like=True, tag=43):
    """From a cache now and then: what it holds of the volumes whose writer it is; answered by Reported.

    The store keeps the last report of each volume, also over a restart. Reports of a volume that the sender does not
    hold, or of another epoch, are not kept.
    """

    reports: tuple[HeldReport, ...]


class Reported(Message, frozen=True, array_like=True, tag=46):
    """`lost` are the ids of the reported volumes that the sender does not hold any more under the epoch that it said.

    So a cache that asks nothing, because it has all that is read, learns that it must not serve it any longer.
    """

    lost: tuple[bytes, ...]


class GetHeld(Message, frozen=True, array_like=True, tag=44):
    """Ask for the last report about a volume; answered by Held."""

    name: str


class Held(Message, frozen=True, array_like=True, tag=45):
    """The last reports about a volume that the store knows of, `reported_ns` 0 if there was none.

    `report` is of its holder, or of the one that released it; `lost` of the one from which it was taken over, when the
    store stood at `lost_from`.
    """

    report: HeldReport
    lost: HeldReport
    lost_from: int


class GetStoreStatus(Message, frozen=True, array_like=True, tag=50):
    """Ask the store how it is; answered by StoreStatus."""


class StoreStatus(Message, frozen=True, array_like=True, tag=51):
    """Counters since the start of the store, and its size."""

    volumes: int
    segments: int
    segment_bytes: int
    free_bytes: int
    incarnation: int
    reads: int
    cuts: int
    error: str = ""  # why the store refuses changes; empty: it does not


class Attach(Message, frozen=True, array_like=True, tag=60):
    """To a cache daemon: open the volume and serve it; answered by Attached."""

    name: str
    read_only: bool = False
    take_over: bool = False


class Attached(Message, frozen=True, array_like=True, tag=61):
    """Where clients reach the volume."""

    uri: str


class Detach(Message, frozen=True, array_like=True, tag=62):
    """To a cache daemon: drain, stop serving and release; answered by Done. With `leave_dirty` nothing is drained
    and the epoch is kept."""

    name: str
    leave_dirty: bool = False


class Drain(Message, frozen=True, array_like=True, tag=63):
    """To a cache daemon: destage all that was acknowledged before; answered by Done."""

    name: str


class GetCacheStatus(Message, frozen=True, array_like=True, tag=64):
    """To a cache daemon: answered by CacheStatus."""


class LimitStatus(Message, frozen=True, array_like=True):
    """How fast destaging may go, in bytes per second of what is sent as frames; 0: no limit."""

    average: int = 0
    peak: int = 0
    allowed: int = 0  # just now: from average to peak, by the fill of the buffer and the age of what is in it
    own: bool = False  # set by SetLimit, not by the daemon's settings


class VolumeStatus(Message, frozen=True, array_like=True):
    """One attached volume."""

    name: str
    size: int
    uri: str
    read_only: bool
    epoch: int
    sequence: int
    acknowledged_version: int
    dirty_bytes: int
    cached_bytes: int
    hit_blocks: int
    miss_blocks: int
    connections: int
    error: str = ""
    limit: LimitStatus = LimitStatus()
    write_delay_us: int = 0  # how much each written block is slowed just now, because the buffer is nearly full


class CacheStatus(Message, frozen=True, array_like=True, tag=65):
    """The daemon and its attached volumes; counters since its start."""

    device: str
    device_size: int
    capacity_bytes: int  # of data blocks
    cached_bytes: int
    dirty_bytes: int
    free_zones: int
    hit_blocks: int
    miss_blocks: int
    written_blocks: int
    destaged_plain_bytes: int
    destaged_stored_bytes: int
    log_bytes: int
    store: str
    store_connected: bool
    volumes: tuple[VolumeStatus, ...]
    error: str = ""
    limit: LimitStatus = LimitStatus()  # of all volumes together


class SetLimit(Message, frozen=True, array_like=True, tag=66):
    """To a cache daemon: limit the destaging of one volume, or with an empty name of all together; answered by Done.

    Bytes per second; RATE_UNLIMITED is no limit, 0 leaves a value as it is (the other one, if nothing is set yet).
    With `reset` the daemon's settings hold again.
    """

    name: str
    average: int = 0
    peak: int = 0
    reset: bool = False


AnyMessage = (
    Failed
    | Done
    | Ping
    | CreateVolume
    | GetVolume
    | Volume
    | ListVolumes
    | Volumes
    | ResizeVolume
    | DeleteVolume
    | OpenVolume
    | Opened
    | ReleaseVolume
    | Read
    | Blocks
    | MapExtents
    | Mapped
    | Changed
    | Changes
    | StagePart
    | CommitCut
    | Committed
    | ReportHeld
    | Reported
    | GetHeld
    | Held
    | GetStoreStatus
    | StoreStatus
    | Attach
    | Attached
    | Detach
    | Drain
    | GetCacheStatus
    | CacheStatus
    | SetLimit
)

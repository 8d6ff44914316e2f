"""The messages: what store, cache, tools and drivers say to each other.

A message is one of these structs as MessagePack (an array: the tag, then the fields in this order; fields are only
ever added at the end, with a default) plus an optional payload of raw bytes. Extent lists and piece tables travel
packed, see `forebay_core.extents` and `PIECE_DTYPE`. Every request is answered by its reply or by `Failed`.

Piece, 28 bytes, little-endian, the answer to one extent or a part of it:

    offset  size  type  field    meaning
    ------  ----  ----  -------  ------------------------------------------------------------
         0     8  u64   start    first block
         8     4  u32   count    blocks
        12     4  u32   frame    index of the frame in the payload; 0xffffffff: a hole, reads as zeros; 0xfffffffe: of a
                                 clone, not its own: reads as its origin does (only where `through` was not asked for)
        16     4  u32   block    index of the first block among the frame's plain blocks; 0 for a hole
        20     8  u64   version  version since which the extent is so; 0: never written
"""

from typing import Final

import numpy as np

from forebay_wire.cache_messages import (
    Attach,
    Attached,
    CacheStatus,
    Detach,
    Drain,
    GetCacheStatus,
    GetSample,
    LimitStatus,
    PolicyStatus,
    RecordTrace,
    Sample,
    SampledVolume,
    SetLimit,
    TakeTrace,
    TracedVolume,
    TraceRows,
    VolumeStatus,
)
from forebay_wire.message import Message

PIECE_DTYPE: Final = np.dtype(
    [("start", "<u8"), ("count", "<u4"), ("frame", "<u4"), ("block", "<u4"), ("version", "<u8")]
)
HOLE_FRAME: Final = 0xFFFFFFFF
ORIGIN_FRAME: Final = 0xFFFFFFFE
assert PIECE_DTYPE.itemsize == 28

# Codes of Failed. A code is stable; the text is for people.
NO_SUCH_VOLUME: Final = "no-such-volume"
NO_SUCH_SNAPSHOT: Final = "no-such-snapshot"
VOLUME_EXISTS: Final = "volume-exists"
SNAPSHOT_EXISTS: Final = "snapshot-exists"
HAS_CLONES: Final = "has-clones"  # or snapshots: what depends on it must go first
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
    origin_name: str = ""  # that snapshot as `volume@snapshot`
    snapshots: int = 0  # how many it has
    clones: int = 0  # how many volumes have one of its snapshots as their origin
    flattening: bool = False  # the tie to the origin is being cut in the background
    control: str = ""  # where the holder takes commands, `HOST:PORT`; empty: it did not say, or nobody holds it


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
    """Resize a volume; answered by Volume. To the store for one that has no writer, to the cache daemon that has it
    attached for a larger size. A smaller one needs `force`: what lies behind it is trimmed."""

    name: str
    size: int
    force: bool = False


class DeleteVolume(Message, frozen=True, array_like=True, tag=16):
    """Delete a volume that has no writer and no snapshots; answered by Done."""

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
    control: str = ""  # where the cache daemon takes commands over TCP; empty: nowhere


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
    """Read blocks of the head or of a snapshot; answered by Blocks. `volume` is the id of either. `min_version`: refuse
    with STORE_BEHIND below it (of a snapshot not looked at).

    Of a clone, pieces that are not its own are ORIGIN_FRAME: the reader asks the origin for them, and may keep them for
    all its clones. With `through` the store looks there itself; such pieces have version 0.

    `epoch` and `session` are those of a cache that serves the volume: refused with FENCED when they are over, because
    it must not mix what it holds with what somebody else wrote. 0: not checked, for exports.
    """

    volume: bytes
    extents: bytes
    min_version: int = 0
    epoch: int = 0
    session: int = 0
    through: bool = False


class Blocks(Message, frozen=True, array_like=True, tag=31):
    """The pieces that answer a Read, covering its extents exactly and in order; the payload is the frames."""

    pieces: bytes


class MapExtents(Message, frozen=True, array_like=True, tag=32):
    """Ask which blocks of one extent hold data; answered by Mapped. `volume`, `epoch`, `session` and `through` as in
    Read."""

    volume: bytes
    start: int
    count: int
    epoch: int = 0
    session: int = 0
    through: bool = False


class Mapped(Message, frozen=True, array_like=True, tag=33):
    """Pieces from `start` without data: frame 0 for data, HOLE_FRAME for a hole. May end early, never empty."""

    pieces: bytes


class Changed(Message, frozen=True, array_like=True, tag=34):
    """Ask what was written or trimmed since a version, from block `start` on; answered by Changes.

    `volume` is the id of a volume, or of a snapshot: then what had changed when it was taken. What a rollback reverted
    counts as changed. `since` is a version, or, if `since_snapshot` is given, that snapshot's (of the same volume).
    A piece of a clone that reads as its origin again, after a rollback, is ORIGIN_FRAME.
    Below the volume's floor the answer is Failed with HISTORY_GONE: copy everything.
    """

    volume: bytes
    since: int
    start: int = 0
    since_snapshot: bytes = b""


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

    A cut ends at a snapshot or at a resize of the volume: `snapshot` is the id of one that is the change numbered
    `last`, `snapshot_name` and `snapshot_ns` its name and when it was taken; `size` is the volume's size since the
    change numbered `last`, 0 if that is no resize. The store takes the snapshot with the cut, in one step; if another
    one has the name by now, it is called `NAME.LAST`.
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
    snapshot: bytes = b""
    snapshot_name: str = ""
    snapshot_ns: int = 0
    size: int = 0


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


class SnapshotRow(Message, frozen=True, array_like=True):
    """One snapshot."""

    id: bytes
    volume: bytes  # id of its volume
    volume_name: str
    name: str
    version: int  # of the change that it is
    size: int  # of the volume then, bytes
    created_ns: int  # Unix nanoseconds
    unique_size: int = 0  # bytes of frames that nothing else refers to; what deleting it would free
    origin: bytes = b""  # snapshot id that it reads through to; empty: none
    clones: tuple[str, ...] = ()  # names of the volumes made of it
    pending: bool = False  # taken in a cache, not in the store yet


class CreateSnapshot(Message, frozen=True, array_like=True, tag=70):
    """Take a snapshot; answered by SnapshotTaken. To the store for a volume that has no writer, else to the cache
    daemon that has it attached: there it is taken when it is durable on the SSD, or with `stored` when the store has
    it. Several volumes are reserved; one is allowed."""

    volumes: tuple[str, ...]
    snapshot: str
    stored: bool = False


class SnapshotTaken(Message, frozen=True, array_like=True, tag=71):
    """The snapshot, durable."""

    row: SnapshotRow


class ListSnapshots(Message, frozen=True, array_like=True, tag=72):
    """Ask for the snapshots of a volume in the order they were taken, those with a version above `after`; answered by
    Snapshots."""

    volume: str
    after: int = 0
    count_max: int = 256


class Snapshots(Message, frozen=True, array_like=True, tag=73):
    """A page of snapshots; `more` says that another page follows."""

    rows: tuple[SnapshotRow, ...]
    more: bool


class GetSnapshot(Message, frozen=True, array_like=True, tag=74):
    """Ask for one snapshot, by the names of volume and snapshot, or by `id` if that is given; answered by Snapshot."""

    volume: str = ""
    snapshot: str = ""
    id: bytes = b""


class Snapshot(Message, frozen=True, array_like=True, tag=75):
    """One snapshot; `unique_size` is not counted here and 0."""

    row: SnapshotRow


class DeleteSnapshot(Message, frozen=True, array_like=True, tag=76):
    """Delete a snapshot that has no clones; answered by Done. Its space comes back in the background."""

    volume: str
    snapshot: str


class RollbackVolume(Message, frozen=True, array_like=True, tag=77):
    """Make the head of a volume that has no writer what it was when the snapshot was taken; answered by Volume. Newer
    snapshots stay."""

    volume: str
    snapshot: str


class CloneVolume(Message, frozen=True, array_like=True, tag=78):
    """Make a volume whose blocks are those of a snapshot until they are written; answered by Volume."""

    volume: str
    snapshot: str
    name: str


class FlattenVolume(Message, frozen=True, array_like=True, tag=79):
    """Give a clone all blocks of its origin and cut the tie, in the background; answered by Done when that is durably
    noted. A volume without an origin is refused."""

    name: str


class CleanStatus(Message, frozen=True, array_like=True):
    """How the cleaner is; counters since the start of the store."""

    running: bool = False  # a pass asked for by CleanStore is under way, or the cleaner works by itself
    passes: int = 0  # asked for by CleanStore and ended
    segments_freed: int = 0
    bytes_freed: int = 0
    bytes_copied: int = 0
    error: str = ""  # why the last pass ended early; empty: it did not


class ScrubStatus(Message, frozen=True, array_like=True):
    """How the scrub is. Sizes are bytes of segments."""

    running: bool = False
    checked_size: int = 0  # of the pass under way, or of the last one
    total_size: int = 0
    damaged: int = 0  # extents known to be damaged
    started_ns: int = 0  # Unix nanoseconds; 0: never
    finished_ns: int = 0  # when the last whole pass ended; 0: never


class CleanStore(Message, frozen=True, array_like=True, tag=80):
    """Clean now until nothing is worth it; answered by Done at once, see CleanStatus.passes for the end."""


class ScrubStore(Message, frozen=True, array_like=True, tag=81):
    """Begin a scrub, or go on with the one under way; answered by Done at once, see ScrubStatus. `rate` in bytes per
    second, 0: as the store's settings say."""

    rate: int = 0


class DamagedExtent(Message, frozen=True, array_like=True):
    """Blocks that the store can't give back as they were written."""

    volume: str  # name, or `volume@snapshot` of the newest snapshot that shows them; empty: nothing shows them any more
    start: int
    count: int
    segment: str
    offset: int  # of the frame in its segment
    text: str  # what is wrong, one line


class GetDamage(Message, frozen=True, array_like=True, tag=82):
    """Ask for what scrub, cleaner and reads found damaged, from the row of this number on; answered by Damage."""

    after: int = 0
    count_max: int = 256


class Damage(Message, frozen=True, array_like=True, tag=83):
    """A page of damaged extents; `more` says that another page follows."""

    rows: tuple[DamagedExtent, ...]
    more: bool


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
    live_bytes: int = 0  # of segments, referred to by a head, a snapshot or an unfinished cut
    clean: CleanStatus = CleanStatus()
    scrub: ScrubStatus = ScrubStatus()


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
    | CreateSnapshot
    | SnapshotTaken
    | ListSnapshots
    | Snapshots
    | GetSnapshot
    | Snapshot
    | DeleteSnapshot
    | RollbackVolume
    | CloneVolume
    | FlattenVolume
    | CleanStore
    | ScrubStore
    | GetDamage
    | Damage
    | Attach
    | Attached
    | Detach
    | Drain
    | GetCacheStatus
    | CacheStatus
    | SetLimit
    | GetSample
    | Sample
    | RecordTrace
    | TakeTrace
    | TraceRows
)

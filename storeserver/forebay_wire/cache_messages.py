"""The messages that people and drivers exchange with a cache daemon; how they travel, `messages` says."""

from forebay_wire.message import Message


class Attach(Message, frozen=True, array_like=True, tag=60):
    """To a cache daemon: open the volume, or `volume@snapshot` read-only, and serve it; answered by Attached."""

    name: str
    read_only: bool = False
    take_over: bool = False
    front: str = "nbd"  # what it is served through, besides NBD: `nbd` (nothing), `kernel`, `fuse`, `loop`
    block_size: int = 0  # of a kernel device: 512 or 4096; 0 for all others


class Attached(Message, frozen=True, array_like=True, tag=61):
    """Where clients reach the volume."""

    uri: str
    path: str = ""  # of its device or file; empty: it has none
    link: str = ""  # a name of `path` that stays over restarts; empty: it has none


class Detach(Message, frozen=True, array_like=True, tag=62):
    """To a cache daemon: drain, stop serving and release; answered by Done. With `leave_dirty` nothing is drained
    and the epoch is kept. Its device must not be in use; that is waited for so long."""

    name: str
    leave_dirty: bool = False
    timeout_ms: int = 0


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
    pending_snapshots: tuple[str, ...] = ()  # taken, not in the store yet; in their order
    origin: str = ""  # `volume@snapshot` that it is a clone of; empty: none
    origin_cached_bytes: int = 0  # of that snapshot and those it reads through to, shared with their other clones
    front: str = "nbd"  # see Attach
    path: str = ""  # see Attached
    link: str = ""


class PolicyStatus(Message, frozen=True, array_like=True):
    """What the cache policy follows just now, and what it did since the daemon's start; in blocks."""

    worthy_blocks_max: int = 0  # that it finds worth keeping when their place on the SSD is reclaimed
    worthy_blocks: int = 0
    window_blocks_max: int = 0  # of these, that new blocks get without being frequent
    window_blocks: int = 0
    margin_from: int = 0  # uses of a victim from which on another block needs two more than it, not one
    accesses: int = 0
    fetched_blocks: int = 0  # from the store
    admitted_blocks: int = 0  # of them, written to the SSD
    refused_blocks: int = 0
    entered_blocks: int = 0  # that were not cached and were written to the SSD, fetched or by guests
    moved_blocks: int = 0  # written once more because their place was reclaimed
    memory_bytes: int = 0  # that grow with the cache


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
    policy: PolicyStatus = PolicyStatus()


class SetLimit(Message, frozen=True, array_like=True, tag=66):
    """To a cache daemon: limit the destaging of one volume, or with an empty name of all together; answered by Done.

    Bytes per second; RATE_UNLIMITED is no limit, 0 leaves a value as it is (the other one, if nothing is set yet).
    With `reset` the daemon's settings hold again.
    """

    name: str
    average: int = 0
    peak: int = 0
    reset: bool = False


class GetSample(Message, frozen=True, array_like=True, tag=67):
    """To a cache daemon: ask for the sample of accesses that it always takes; answered by Sample."""


class SampledVolume(Message, frozen=True, array_like=True):
    """Whose keys these are; of a snapshot that clones read through to the name is `volume@snapshot`."""

    key: int
    name: str
    attached: bool


class Sample(Message, frozen=True, array_like=True, tag=68):
    """The accesses to a spatially hashed share of all blocks, lately, and the cache as it is.

    The payload is keys in the order of the accesses: u64, little-endian, the volume's key in the upper 24 bits and the
    block in the lower 40. Those whose sample hash is not below `limit` are to be left out.
    """

    limit: int
    accesses: int  # to all blocks, sampled or not
    span_ns: int  # in which they came
    capacity_bytes: int  # of data blocks, as in CacheStatus
    write_price_ppm: int  # the policy's settings
    window_max_ppm: int
    volumes: tuple[SampledVolume, ...]


class RecordTrace(Message, frozen=True, array_like=True, tag=84):
    """To a cache daemon: record what guests ask of a volume, or with an empty name of all, for this connection and
    until it ends; answered by Done."""

    name: str


class TakeTrace(Message, frozen=True, array_like=True, tag=85):
    """Ask for what was recorded since the last time; answered by TraceRows a moment later. With `last` the recording
    ends, and the answer comes at once."""

    last: bool = False


class TracedVolume(Message, frozen=True, array_like=True):
    """A volume that occurs for the first time."""

    key: int
    name: str


class TraceRows(Message, frozen=True, array_like=True, tag=86):
    """The payload is rows as `forebay_cache.engine.recorder` has them; so many before them were lost."""

    lost: int
    volumes: tuple[TracedVolume, ...]

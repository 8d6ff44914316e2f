"""One volume of the cache: who it is, where its history stands, and what of it is not upstream yet.

Invariants:
    `noted` <= `acknowledged` < each closed cut's last version <= `applied` <= `version`, all of one packed order.
    The closed cuts follow one another without a gap, in the order in which they go upstream.
    A held place is pinned exactly if its version is newer than `acknowledged`; else it is dead.
    A mapped block is dirty exactly if its version is newer than `acknowledged`.
    `dirty` lists the lba of each block that became dirty since the last cut closed (a trimmed one may still be listed),
    `open_holes` the holes made since then.
    `ends` are the snapshots and resizes that are in the log, or on their way there, and not upstream.
Crash: rebuilt from checkpoint and records; all that is dirty then belongs to the open cut.
"""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from forebay_cache.engine.changes import Tracked
from forebay_cache.engine.cuts import Cut
from forebay_cache.engine.dirty import DirtyBlocks
from forebay_cache.engine.front import AllocationReply, ChangesReply, ReadReply, Reply
from forebay_cache.engine.holes import HoleMap
from forebay_cache.engine.limits import HOLES_KEPT_MAX
from forebay_cache.engine.origin_map import OriginMap
from forebay_cache.engine.rates import NOT_SET, Shaper
from forebay_cache.engine.slowing import UNBOUNDED
from forebay_cache.engine.streams import Streams, StreamsFast
from forebay_cache.format import cut_end
from forebay_cache.format.cut_end import CutEnd
from forebay_cache.format.volume_note import (
    CLOSED,
    LEFT_DIRTY,
    NBD_ONLY,
    NO_ORIGIN,
    READ_ONLY,
    SNAPSHOT,
    Front,
    VolumeNote,
)
from forebay_core.units import (
    BLOCK_SIZE,
    SEQUENCE_BITS,
    Buffer,
    Epoch,
    StoreId,
    Version,
    VolumeId,
    make_version,
    sequence_of,
)

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine


class _Logged(NamedTuple):
    """See CacheVolume.acknowledgement_logged."""

    position: int
    upstream_position: int
    version: Version


class CacheVolume:
    """State of one volume and the requests that a front may make of it (FrontVolume)."""

    def __init__(
        self, engine: "CacheEngine", key: int, volume_id: VolumeId, store: StoreId, name: str, size: int
    ) -> None:
        assert size % BLOCK_SIZE == 0
        self._engine = engine
        self.key = key
        self.id = volume_id
        self.store = store  # where it lives: what is cached is of no other one
        self._name = name
        self._size = size
        self.read_only = False  # whether changes are refused
        self.epoch = Epoch(0)
        self.attached = False
        self.front: Front = NBD_ONLY  # how it is attached, as its row says
        self.held = False  # attached, or detached with its dirty blocks and epoch kept
        self.destaging = False  # the store granted our epoch and we may send
        self.error = ""
        self.warning = ""
        self.version = Version(0)  # of the newest change given out
        self.applied = Version(0)  # of the newest change that is in the map
        self._acknowledged = Version(0)
        self.noted = Version(0)
        self.holes = HoleMap()
        self.open_holes = HoleMap()
        self.dirty = DirtyBlocks()
        self.trimmed = False  # blocks in `dirty` may be gone
        self.closing = False  # being detached: what still comes is refused
        self.cuts: list[Cut] = []
        self.ends: list[CutEnd] = []
        self._logged: deque[_Logged] = deque()  # acknowledgements in the log that may not be durable yet
        self._durably = _Logged(0, 0, Version(0))  # the newest that is
        self.dirty_since_ns = 0  # wall clock: how old the oldest change is that is not upstream; 0: there is none
        self.opened_ns = 0  # when the open cut got its first change; 0: it has none
        self.connections = 0
        self.own_limit = NOT_SET  # as set by an admin for this volume
        self.shaper = Shaper()
        self.destaged_bytes = 0  # for turns among volumes only: raised to the others' when it joins them
        self.appended_blocks = 0  # written by guests since the start
        self.appended_max = UNBOUNDED  # see Slowing
        self.hit_blocks = 0
        self.miss_blocks = 0
        self.streams: Streams = StreamsFast()
        self.snapshot = False  # it never changes: served read-only, and what clones read through to; see Sources
        self.temporary = False  # a snapshot that no clone needs
        self.origin = VolumeId(b"")  # id of the snapshot that it reads through to; empty: none
        self.source: CacheVolume | None = None  # that snapshot here
        self.origins: OriginMap | None = None  # which of its blocks are known to read as the source's
        # In the store, as far as it has told, by name; of a snapshot: those taken before it.
        self.known_snapshots: dict[str, Tracked] = {}
        self.asking_map = False  # the store is being asked for them

    # --- what a front sees ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name in the store and of the export."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes, whole blocks."""
        return self._size

    def read(self, offset: int, length: int, reply: ReadReply) -> None:
        """See FrontVolume."""
        if self._engine.recorder.is_on:
            self._engine.recorder.note(self, offset, length, write=False)
        self._engine.reads.read(self, offset, length, reply)

    def write(self, offset: int, payload: Buffer, fua: bool, reply: Reply) -> None:
        """See FrontVolume."""
        if self._engine.recorder.is_on:
            self._engine.recorder.note(self, offset, len(payload), write=True)
        self._engine.writes.write(self, offset, payload, fua, reply)

    def flush(self, reply: Reply) -> None:
        """See FrontVolume."""
        self._engine.writes.flush(self, reply)

    def trim(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        """See FrontVolume."""
        self._engine.writes.trim(self, offset, length, fua, reply)

    def write_zeroes(self, offset: int, length: int, fua: bool, reply: Reply) -> None:
        """See FrontVolume."""
        self._engine.writes.write_zeroes(self, offset, length, fua, reply)

    def prefetch(self, offset: int, length: int, reply: Reply) -> None:
        """See FrontVolume."""
        self._engine.reads.prefetch(self, offset, length, reply)

    def allocation(self, offset: int, length: int, reply: AllocationReply) -> None:
        """See FrontVolume."""
        self._engine.allocations.allocation(self, offset, length, reply)

    def tracked(self) -> list[str]:
        """See FrontVolume."""
        return sorted({*self.known_snapshots, *self.pending_snapshots})

    def find_tracked(self, name: str) -> Tracked | None:
        """Return the snapshot of a name that `tracked` gives."""
        for end in self.ends:
            if end.kind == cut_end.SNAPSHOT and end.name == name:
                return Tracked(VolumeId(end.snapshot), Version(end.version))
        return self.known_snapshots.get(name)

    def changes(self, snapshot: str, offset: int, length: int, reply: ChangesReply) -> None:
        """See FrontVolume."""
        self._engine.changes.changes(self, snapshot, offset, length, reply)

    def kick(self) -> None:
        """See FrontVolume."""
        self._engine.log.kick(patient=True)

    def connected(self) -> None:
        """See FrontVolume."""
        self.connections += 1

    def disconnected(self) -> None:
        """See FrontVolume."""
        self.connections -= 1

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def acknowledged(self) -> Version:
        """Newest version that is upstream; the engine keeps all volumes' in one array as well."""
        return self._acknowledged

    @acknowledged.setter
    def acknowledged(self, version: Version) -> None:
        self._acknowledged = version
        self._engine.set_acknowledged(self.key, version)

    @property
    def noted(self) -> Version:
        """What the log says of `acknowledged`; the engine keeps all volumes' in one array as well."""
        return self._noted

    @noted.setter
    def noted(self, version: Version) -> None:
        self._noted = version
        self._engine.set_noted(self.key, version)

    @property
    def block_count(self) -> int:
        """Blocks of the volume."""
        return self._size // BLOCK_SIZE

    @property
    def dirty_blocks(self) -> int:
        """Upper bound of blocks that are not upstream."""
        return len(self.dirty) + sum(cut.block_count for cut in self.cuts)

    @property
    def hole_count(self) -> int:
        """Holes that a checkpoint has to take."""
        return len(self.holes) + sum(len(cut.holes) for cut in self.lasting_cuts)

    @property
    def lasting_cuts(self) -> list[Cut]:
        """The closed cuts that outlive a crash: up to the last one that ends with a snapshot or resize."""
        return self.cuts[: max((i for i, cut in enumerate(self.cuts, 1) if cut.end is not None), default=0)]

    @property
    def refuses(self) -> bool:
        """Whether changes are answered with an error."""
        return bool(self.error) or self.closing

    @property
    def has_changes(self) -> bool:
        """Whether anything, holes and clean overwrites included, is not upstream yet."""
        return self.applied > self.acknowledged

    @property
    def closed_version(self) -> Version:
        """Newest version that a closed cut holds; equals `acknowledged` when there is none."""
        return self.cuts[-1].last_version if self.cuts else self.acknowledged

    @property
    def sent_version(self) -> Version:
        """Where the store stands if it has taken the cut that is on its way; equals `acknowledged` when none is."""
        return self.cuts[0].last_version if self.cuts else self.acknowledged

    @property
    def pending_snapshots(self) -> list[str]:
        """Names of the snapshots that are not in the store yet, in their order."""
        return [end.name for end in self.ends if end.kind == cut_end.SNAPSHOT]

    @property
    def logged_size(self) -> int:
        """Bytes that the volume has behind all that is in the log or on its way there."""
        return self.ends[-1].size if self.ends else self._size

    def sources(self) -> Iterator["CacheVolume"]:
        """Yield the snapshots that it reads through to, nearest first."""
        source = self.source
        while source is not None:
            yield source
            source = source.source

    def acknowledgement_logged(self, position: int, *, version: Version, upstream_position: int) -> None:
        """The log says below `position` that `version` is acknowledged; all before `upstream_position` is upstream."""
        self._logged.append(_Logged(position, upstream_position, version))

    def upstream_position(self, durable: int) -> int:
        """Return the log position below which all is upstream, as a start would see it now; at most `durable`."""
        while self._logged and self._logged[0].position <= durable:
            self._durably = self._logged.popleft()
        return durable if self.version <= self._durably.version else min(durable, self._durably.upstream_position)

    def next_version(self) -> Version:
        """Number one more change, at the moment when it is appended."""
        version = self.version + 1
        if version >> SEQUENCE_BITS != self.epoch:  # the first one of this epoch
            version = make_version(self.epoch, sequence_of(self.version) + 1)
        self.version = Version(version)
        return self.version

    def take_epoch(self, epoch: Epoch) -> None:
        """The store granted this epoch; the sequence goes on."""
        assert epoch >= self.epoch
        self.epoch = epoch

    def adopt(self, version: Version) -> None:
        """The store stands at this version, and we have nothing newer."""
        self.version = max(self.version, version)
        self.applied = max(self.applied, version)
        self.acknowledged = max(self.acknowledged, version)

    def forget_holes(self) -> None:
        """Forget the holes that the store knows as well if there are many: they save fetches, but keep writers out."""
        if len(self.holes) >= HOLES_KEPT_MAX // 2:
            self.holes.forget_up_to(self.acknowledged)

    def resize(self, name: str, size: int, *, read_only: bool) -> None:
        """Take over what the store says about a volume that is being attached; it may not know our last resizes."""
        self._name = name
        self.read_only = read_only
        if not any(end.kind == cut_end.RESIZE for end in self.ends):
            self._size = size

    def grow(self, size: int) -> None:
        """A resize was applied."""
        self._size = size

    def note(self) -> VolumeNote:
        """Return the row as it is behind all that is in the log or on its way there."""
        detached = 0 if self.attached else LEFT_DIRTY if self.held else CLOSED
        flags = (READ_ONLY if self.read_only else 0) | (SNAPSHOT if self.snapshot else 0) | detached
        origin, size = self.origin or NO_ORIGIN, self.logged_size
        limit = self.own_limit
        return VolumeNote(
            self.key, flags, self.id, size, self.epoch, self._name, self.store, *limit, origin=origin, front=self.front
        )

"""Snapshots and resizes of attached volumes: one record each, in order with the writes around it.

Such a change gets its sequence when it is appended. When its record is applied the open cut is closed with it
(`apply`, `destage`); it is taken when a sync has covered the record, while guests write on. It does not wait for room
among the dirty blocks, only for a zone that takes the record.

Invariants:
    `CacheVolume.ends` has every one that is appended and not upstream, in order; so its names are known at once.
    Nobody is told before the change is durable, and everybody once.
Crash: what was not applied was not answered; what was answered is durable.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from forebay_cache.engine.limits import ENDS_PENDING_MAX, SNAPSHOTS_PENDING_MAX, ZONES_RESERVED
from forebay_cache.format.cut_end import RESIZE, SNAPSHOT, CutEnd
from forebay_core.errors import RefusedError
from forebay_core.units import BLOCK_SIZE, VOLUME_SIZE_MAX, format_size
from forebay_wire import messages

if TYPE_CHECKING:
    from forebay_cache.engine.cache import CacheEngine
    from forebay_cache.engine.volume import CacheVolume

Taken = Callable[[CutEnd | None], None]
"""Told once: the change, durable, or None when the device or the volume failed."""


class _Asked(NamedTuple):
    """A change that waits for a zone; key and version of `end` are not its own yet, nor is the size of a snapshot."""

    volume: "CacheVolume"
    end: CutEnd
    taken: Taken


class CutEnds:
    """Appends the changes that cuts end with."""

    def __init__(self, engine: "CacheEngine") -> None:
        self._engine = engine
        self.waiting: deque[_Asked] = deque()  # asked for, not appended

    def snapshot(self, volume: "CacheVolume", snapshot: bytes, name: str, taken_ns: int, taken: Taken) -> None:
        """Take a snapshot under a random id that is new.

        Raises:
            RefusedError: the volume has one of this name, too many wait for the store, or it takes no changes.
        """
        self._refuse(volume)
        waiting = [one.end.name for one in self.waiting if one.volume is volume and one.end.kind == SNAPSHOT]
        pending = [*volume.pending_snapshots, *waiting]
        if name in volume.known_snapshots or name in pending:
            raise RefusedError(messages.SNAPSHOT_EXISTS, f"volume {volume.name} has a snapshot {name} already")
        if len(pending) >= SNAPSHOTS_PENDING_MAX:
            raise RefusedError(
                messages.FAILED,
                f"volume {volume.name}: {len(pending)} snapshots are not in the store yet, more than "
                f"{SNAPSHOTS_PENDING_MAX} may not wait; forebay status says whether the store is there",
            )
        self._ask(_Asked(volume, CutEnd(volume.key, SNAPSHOT, 0, 0, taken_ns, snapshot, name), taken))

    def resize(self, volume: "CacheVolume", size: int, taken: Taken) -> None:
        """Make a volume larger.

        Raises:
            RefusedError: it would be smaller or too large, or it takes no changes.
        """
        self._refuse(volume)
        if size % BLOCK_SIZE or size > VOLUME_SIZE_MAX:
            raise RefusedError(
                messages.BAD_REQUEST,
                f"size {size}: use a multiple of {BLOCK_SIZE} bytes, at most {format_size(VOLUME_SIZE_MAX)}",
            )
        if size < self._size_then(volume):
            raise RefusedError(
                messages.VOLUME_IN_USE,
                f"volume {volume.name} is attached and {format_size(self._size_then(volume))} large: "
                "detach it before it is made smaller",
            )
        self._ask(_Asked(volume, CutEnd(volume.key, RESIZE, 0, size), taken))

    def resume(self) -> None:
        """There may be a free zone again."""
        while self.waiting and (self.waiting[0].volume.refuses or self._has_zone()):
            asked = self.waiting.popleft()
            if asked.volume.refuses:
                asked.taken(None)
            else:
                self._append(asked)

    def fail(self) -> None:
        """The device failed: everybody who waits is told."""
        waiting, self.waiting = self.waiting, deque()
        for asked in waiting:
            asked.taken(None)

    # --- inside -----------------------------------------------------------------------------------------------

    def _refuse(self, volume: "CacheVolume") -> None:
        reason = self._engine.failed or volume.error or ("it is being detached" if volume.closing else "")
        if reason:
            raise RefusedError(messages.FAILED, f"volume {volume.name} takes no changes: {reason}")
        pending = sum(len(one.ends) for one in self._engine.volumes.values()) + len(self.waiting)
        if pending >= ENDS_PENDING_MAX:
            raise RefusedError(
                messages.FAILED,
                f"{pending} snapshots and resizes of this cache are not in the store yet, more than "
                f"{ENDS_PENDING_MAX} may not wait; forebay status says whether the store is there",
            )

    def _size_then(self, volume: "CacheVolume") -> int:
        """Return the size behind all that was asked for."""
        sizes = [one.end.size for one in self.waiting if one.volume is volume and one.end.kind == RESIZE]
        return max([volume.logged_size, *sizes])

    def _ask(self, asked: _Asked) -> None:
        self.waiting.append(asked)
        self._engine.log.kick()
        self.resume()

    def _has_zone(self) -> bool:
        return self._engine.free_zones > ZONES_RESERVED

    def _append(self, asked: _Asked) -> None:
        volume, log = asked.volume, self._engine.log
        size = asked.end.size if asked.end.kind == RESIZE else volume.logged_size
        end = asked.end._replace(version=volume.next_version(), size=max(size, volume.logged_size))
        volume.ends.append(end)

        def applied(ok: bool) -> None:
            if ok:
                log.when_durable(log.applied.position, lambda safe: asked.taken(end if safe else None))
            else:
                asked.taken(None)

        log.add_note(end, applied)
        log.kick()

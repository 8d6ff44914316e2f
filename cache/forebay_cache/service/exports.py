"""The volumes that clients may open now, by export name.

Invariant: a name stands for one volume; a volume that is being detached is not listed any more.
"""

from collections.abc import Sequence

from forebay_cache.engine.front import FrontVolume


class AttachedExports:
    """Implements the fronts' `Exports` port."""

    def __init__(self) -> None:
        self._volumes: dict[str, FrontVolume] = {}

    def add(self, volume: FrontVolume) -> None:
        """List a volume."""
        assert volume.name not in self._volumes
        self._volumes[volume.name] = volume

    def remove(self, name: str) -> None:
        """Stop listing a volume; clients that have it open keep it until they are disconnected."""
        self._volumes.pop(name, None)

    def find(self, name: str) -> FrontVolume | None:
        """Return the volume of this export name; the empty name is the only volume, if there is exactly one."""
        if name == "" and len(self._volumes) == 1:
            return next(iter(self._volumes.values()))
        return self._volumes.get(name)

    def names(self) -> Sequence[str]:
        """Return the export names, sorted."""
        return sorted(self._volumes)

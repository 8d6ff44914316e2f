"""What a start drops of the versions that closed cuts held.

A checkpoint shows what each cut held that was closed then. Where one ended with no snapshot or resize, it is part of
the next one now, which needs the newest version of each block only. The rest must not be kept: the zone that it lay in
may have been given up and filled anew, and who reclaims it would find damaged dirty data.

Crash: nothing is written; the next start does the same.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from forebay_cache.engine.blockmap import BlockMap, PlaceArray
from forebay_cache.engine.dirty import distinct
from forebay_core.units import LBA_BITS, LBA_MAX

if TYPE_CHECKING:
    from forebay_cache.engine.recovery import RecoveredVolume


def prune_held(table: BlockMap, volumes: "Mapping[int, RecoveredVolume]") -> None:
    """Empty the held places whose cut has a newer version of the block, or a newer hole there."""
    places = table.held_places()
    owners = table.key_array.take(places) >> np.uint64(LBA_BITS)
    for volume_key in distinct(owners).tolist():
        volume = volumes.get(volume_key)
        if volume is not None:
            _prune(table, volume, places[owners == np.uint64(volume_key)])


def _prune(table: BlockMap, volume: "RecoveredVolume", places: PlaceArray) -> None:
    places = places[np.lexsort((table.version_array.take(places), table.key_array.take(places)))]
    keys, versions = table.key_array.take(places), table.version_array.take(places)
    cuts, linked = volume.cuts_of(versions), table.find_many(keys)
    superseded = (linked >= 0) & (volume.cuts_of(table.version_array.take(np.maximum(linked, 0))) == cuts)
    superseded[:-1] |= (keys[:-1] == keys[1:]) & (cuts[:-1] == cuts[1:])
    for cut, holes in enumerate(volume.closed_holes):
        superseded |= (cuts == cut) & (holes.versions_at(keys & np.uint64(LBA_MAX)) > versions)
    table.clear_places(places[superseded])

from typing import Final

from forebay_cache.engine.entering import Entered, MapViews
from forebay_core.units import Buffer

NIL: Final[int]

def enter_writes(
    views: MapViews,
    zone_blocks: int,
    packed: Buffer,
    index: int,
    count: int,
    first_place: int,
    acknowledged: int,
    closed: int,
    found: Entered,
    /,
) -> tuple[int, int]: ...

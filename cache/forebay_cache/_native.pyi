from typing import Final

import numpy as np
import numpy.typing as npt

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
def move_counts(
    counts: memoryview, histogram: memoryview, olds: npt.NDArray[np.int64], count: int, first: int, /
) -> None: ...

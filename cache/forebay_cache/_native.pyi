from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.emptying import HeldViews
from forebay_cache.engine.entering import Entered, MapViews, Moved
from forebay_cache.engine.runs import Run
from forebay_core.units import Buffer

NIL: Final[int]

def put_writes(
    block: bytearray, index: int, volume_key: int, lba: int, version: int, checksums: npt.NDArray[np.uint64], /
) -> None: ...
def mark_written(block: Buffer, count: int, keys: npt.NDArray[np.uint64], found: npt.NDArray[np.bool_], /) -> None: ...
def find_runs(views: MapViews, key: int, count: int, /) -> list[Run]: ...
def enter_moves(
    views: MapViews,
    zone_blocks: int,
    packed: Buffer,
    index: int,
    sources: npt.NDArray[np.int64],
    first_place: int,
    found: Moved,
    /,
) -> tuple[int, int]: ...
def enter_writes(
    views: MapViews,
    zone_blocks: int,
    headers: list[bytearray],
    record_blocks: int,
    number: int,
    index: int,
    count: int,
    first_place: int,
    acknowledged: int,
    closed: int,
    found: Entered,
    /,
) -> tuple[int, int]: ...
def clear_places(views: MapViews, second: HeldViews, zone_blocks: int, places: npt.NDArray[np.int64], /) -> int: ...
def find_kept(
    views: MapViews,
    states: npt.NDArray[np.uint8],
    noted: npt.NDArray[np.uint64],
    first_place: int,
    count: int,
    worthy_from: int,
    found: npt.NDArray[np.int64],
    /,
) -> int: ...

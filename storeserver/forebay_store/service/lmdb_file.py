"""Whether an LMDB file is as long as its content, found out before it is mapped: reading a mapped page that the file
does not have kills the process (SIGBUS).

Meta page, 152 bytes, little-endian, at the start of the first two pages; the one with the higher transaction counts:

    offset  size  type  field         meaning
    ------  ----  ----  ------------  -----------------------------------------------
         0    16  16s   page_header   of no interest here
        16     4  u32   magic         0xBEEFC0DE
        20     4  u32   version       of LMDB's format
        24    16  16s   mapping       address and size of the map
        40     4  u32   page_size     bytes of a page
        44    92  92s   trees         roots of the free list and of the tables
       136     8  u64   last_page     index of the highest page ever used
       144     8  u64   transaction   number of the transaction that wrote it

A file that is shorter than its last page may be whole: pages that were taken and given back within one transaction are
never written. Only who walks all of its pages knows, and that is left to a process that may die of it.
"""

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError

META_PAGE: Final = struct.Struct("<16sII16sI92sQQ")
assert META_PAGE.size == 152

_MAGIC: Final = 0xBEEFC0DE
_PAGE_SIZES: Final = tuple(1 << bits for bits in range(8, 17))
_WALK: Final = """
import sys, lmdb
with open("/dev/null", "wb") as nowhere:
    lmdb.open(sys.argv[1], readonly=True, lock=False, create=False).copyfd(nowhere.fileno(), compact=True)
"""


def check_length(folder: Path) -> None:
    """Refuse the LMDB file of a folder if pages of it are missing; what else may be wrong is left to LMDB.

    Raises:
        CorruptionError: it was cut short.
    """
    path = folder / "data.mdb"
    try:
        with path.open("rb") as file:
            expected = _expected_size(file.fileno())
            found = os.fstat(file.fileno()).st_size
    except OSError:
        return  # LMDB says what is wrong with it
    if found < expected and not _is_walkable(folder):
        raise CorruptionError(
            place=f"index {folder}",
            what="LMDB file",
            expected=f"{expected} bytes; run store rebuild-index",
            found=f"{found} bytes",
        )


def _expected_size(descriptor: int) -> int:
    """Return how long the file is if all pages of its newest transaction were written; 0 if it does not say."""
    first = _meta_at(descriptor, 0)
    if first is None:
        return 0
    _, page_size, _ = first
    metas = [meta for meta in (first, _meta_at(descriptor, page_size)) if meta is not None]
    _, _, last_page = max(metas)
    return (last_page + 1) * page_size


def _meta_at(descriptor: int, offset: int) -> tuple[int, int, int] | None:
    """Return transaction, page size and last page of a meta page, or None if it is none."""
    packed = os.pread(descriptor, META_PAGE.size, offset)
    if len(packed) < META_PAGE.size:
        return None
    _, magic, _, _, page_size, _, last_page, transaction = META_PAGE.unpack(packed)
    return (transaction, page_size, last_page) if magic == _MAGIC and page_size in _PAGE_SIZES else None


def _is_walkable(folder: Path) -> bool:
    """Tell whether all pages can be reached; other complaints than death come up again when it is opened."""
    walk = subprocess.run([sys.executable, "-c", _WALK, str(folder)], capture_output=True, check=False)
    return walk.returncode >= 0

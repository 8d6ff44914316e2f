"""`forebay cache fsck`: checks a cache device that is not in use. Nothing is written.

It reads what the disk has. After a failed sync there may be something else in memory, which looks whole.
"""

import contextlib
from pathlib import Path

from forebay_cache.engine.check import check_device
from forebay_cache.engine.check_zones import Reached
from forebay_cache.engine.findings import Finding
from forebay_cache.service.device_file import drop_pages
from forebay_cache.service.stopped_device import open_stopped


def fsck(path: Path, *, with_blocks: bool, reached: Reached) -> list[Finding]:
    """Return what is wrong with a device; an empty list if nothing is.

    Raises:
        WrongUsageError: there is no device.
        InUseError: a daemon uses it.
    """
    with open_stopped(path) as device:
        with contextlib.suppress(OSError):  # what could not be synced is not on the disk, as the check will find
            drop_pages(device.fd)
        return check_device(device.read, device.size, with_blocks=with_blocks, reached=reached)

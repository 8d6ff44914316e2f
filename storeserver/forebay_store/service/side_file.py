"""A small file beside the truth: read whole, and replaced by a new one that was synced first.

The folder is not synced: it is enough that some whole file is there. Crash: leaves the file of before or the new one,
and perhaps a part under the temporary name, which goes at the next read.
"""

import os
from pathlib import Path


def read_side_file(path: Path, new: Path, size_max: int) -> bytes:
    """Return the file's bytes, at most one more than `size_max`; what a crash left as `new` goes.

    Raises:
        OSError: it is not there, or can't be read.
    """
    new.unlink(missing_ok=True)
    with path.open("rb") as file:
        return file.read(size_max + 1)


def replace_side_file(path: Path, new: Path, content: bytes) -> None:
    """Write `content` as `new`, sync it, and give it the name `path`.

    Raises:
        OSError: that failed.
    """
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fdatasync(file.fileno())
    new.rename(path)

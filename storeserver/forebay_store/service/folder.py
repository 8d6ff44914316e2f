"""The data folder of a store: who it is, and that nobody else works in it.

    DIR/store.toml   format = 1 and the store's UUID, written once, last of all when the folder is made
    DIR/lock         locked (flock) by whoever works in the folder
    DIR/segments/    the segments
    DIR/index/       the LMDB index; can be made anew from the segments
    DIR/damage       what is known to be damaged, and how far the scrub is; may be missing, no part of the truth
    DIR/reports      what caches reported they are ahead; may be missing, and is no part of the truth

Crash: a half-made folder holds no store.toml and no segment, and is made again.
"""

import fcntl
import os
import tomllib
import uuid
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError, ForebayError, InUseError, WrongUsageError
from forebay_core.units import KIB

IDENTITY_NAME: Final = "store.toml"
LOCK_NAME: Final = "lock"
SEGMENTS_NAME: Final = "segments"
INDEX_NAME: Final = "index"
NEW_INDEX_NAME: Final = "index.new"
REPORTS_NAME: Final = "reports"
NEW_REPORTS_NAME: Final = "reports.new"
DAMAGE_NAME: Final = "damage"
NEW_DAMAGE_NAME: Final = "damage.new"
OWN_NAMES: Final = frozenset((IDENTITY_NAME, LOCK_NAME, SEGMENTS_NAME, INDEX_NAME, REPORTS_NAME, DAMAGE_NAME))
LEFTOVER_NAMES: Final = frozenset((IDENTITY_NAME + ".new", NEW_INDEX_NAME, NEW_REPORTS_NAME, NEW_DAMAGE_NAME))
FOREIGN_ALLOWED: Final = frozenset(("lost+found",))
FOLDER_FORMAT: Final = 1
IDENTITY_SIZE_MAX: Final = 4 * KIB


class StoreFolder:
    """A locked data folder; close it to let others in."""

    def __init__(self, path: Path, lock: int, store: bytes | None) -> None:
        self.path = path
        self._lock: int | None = lock
        self._store = store

    @property
    def store(self) -> bytes:
        """UUID of the store."""
        assert self._store is not None
        return self._store

    @property
    def has_identity(self) -> bool:
        """Whether the folder says whose it is."""
        return self._store is not None

    @property
    def segments(self) -> Path:
        """Folder of the segments."""
        return self.path / SEGMENTS_NAME

    @property
    def index(self) -> Path:
        """Folder of the index."""
        return self.path / INDEX_NAME

    def write_identity(self, store: bytes) -> None:
        """Say whose folder it is, durably."""
        text = f'format = {FOLDER_FORMAT}\nstore = "{uuid.UUID(bytes=store)}"\n'
        temporary = self.path / (IDENTITY_NAME + ".new")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / IDENTITY_NAME)
        sync_folder(self.path)
        self._store = store

    def close(self) -> None:
        """Unlock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def make_folder(path: Path) -> StoreFolder:
    """Open the folder of a store, making it if there is nothing yet.

    Raises:
        WrongUsageError: the folder holds something else.
        InUseError: another process works in it.
        CorruptionError: its identity file is damaged.
        ForebayError: its identity file is missing.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_foreign(path)
    lock = _lock(path)
    folder = StoreFolder(path, lock, None)
    try:
        folder = StoreFolder(path, lock, _read_identity(path))
        if not folder.has_identity:
            if folder.segments.is_dir() and any(folder.segments.iterdir()):
                raise ForebayError(f"{path / IDENTITY_NAME} is missing; run: forebay store rebuild-index --data {path}")
            folder.segments.mkdir(mode=0o700, exist_ok=True)
            sync_folder(path)
            _sync_above(path)
            folder.write_identity(uuid.uuid4().bytes)
        return folder
    except BaseException:
        folder.close()
        raise


def open_folder(path: Path) -> StoreFolder:
    """Open the folder of a stopped store, to check or to repair it; nothing is made but a lock file that is missing.

    A folder from a backup may have none: without it a store that starts meanwhile would not be kept out.

    Raises:
        WrongUsageError: there is no store in it.
        InUseError: another process works in it.
        CorruptionError: its identity file is damaged.
        ForebayError: it can't be locked.
    """
    if not (path / SEGMENTS_NAME).is_dir():
        raise WrongUsageError(f"{path} holds no store (no folder {SEGMENTS_NAME}); give the folder of a store")
    lock = _lock(path)
    try:
        return StoreFolder(path, lock, _read_identity(path))
    except BaseException:
        os.close(lock)
        raise


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_above(path: Path) -> None:
    """Make the names durable that lead to a new folder: a power cut that takes one takes the store.

    An earlier start may have made them and been killed, so it does not matter which are ours. Those of another file
    system are not, nor are those that this user may not read.
    """
    device = path.stat().st_dev
    for above in path.resolve().parents:
        if above.stat().st_dev != device or not os.access(above, os.R_OK):
            return
        sync_folder(above)


def _check_foreign(path: Path) -> None:
    if (path / IDENTITY_NAME).exists():
        return
    foreign = sorted(set(os.listdir(path)) - OWN_NAMES - LEFTOVER_NAMES - FOREIGN_ALLOWED)
    if foreign:
        raise WrongUsageError(
            f"{path} is no store's folder and not empty (it holds {foreign[0][:80]!r}); give an empty or a new folder"
        )


def _lock(path: Path) -> int:
    try:
        fd = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_CREAT, 0o600)
    except OSError as error:
        raise ForebayError(f"can't open {path / LOCK_NAME} to lock the store: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise InUseError(f"{path} is in use by another process; stop the store that runs there first") from error
    return fd


def _read_identity(path: Path) -> bytes | None:
    place = str(path / IDENTITY_NAME)
    try:
        with (path / IDENTITY_NAME).open("rb") as file:
            text = file.read(IDENTITY_SIZE_MAX).decode()
        identity = tomllib.loads(text)
        found = identity.get("format")
        if found != FOLDER_FORMAT:
            raise CorruptionError(place=place, what="format", expected=FOLDER_FORMAT, found=found)
        return uuid.UUID(str(identity.get("store"))).bytes
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as error:
        raise CorruptionError(
            place=place, what="identity", expected="format and store UUID", found=str(error)
        ) from error

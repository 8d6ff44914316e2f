"""The index in LMDB: the port `forebay_store.engine.ports.Index` over one environment.

NOMETASYNC: a power cut may take back the newest transactions, whole ones, and replay makes them again. Never NOSYNC,
which may leave a damaged file. The map is grown only while no view is open, as LMDB demands.

LMDB keeps the pages of removed rows for later ones and gives none back. So a file that has become mostly that is
replaced by a compact copy. Crash: either file is there, under the same name, and both hold the same rows.
"""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, TypeVar, cast

import lmdb

from forebay_core.errors import CorruptionError, NoSpaceError
from forebay_core.units import KIB, MIB
from forebay_store.engine.ports import BackendError, IndexReader, IndexWriter
from forebay_store.format.rows import Table
from forebay_store.limits import INDEX_SIZE_START
from forebay_store.service.folder import sync_folder
from forebay_store.service.lmdb_file import check_length

Result = TypeVar("Result")
READERS_MAX: Final = 256
PROBE_SIZE: Final = MIB
DATA_NAME: Final = "data.mdb"

SHRINK_SIZE_MIN: Final = 64 * KIB
"""Bytes that a compact copy must win; it must win half of the file as well."""

SHRINK_USED_MAX: Final = 256 * MIB
"""Bytes in use beyond which a running store makes no compact copy: changes wait for it."""

SHRINK_WAIT_S: Final = 1.0
"""How long it waits for a moment without a view; if none comes it is tried another time."""


class LmdbCursor:
    """A place in a table."""

    def __init__(self, cursor: lmdb.Cursor) -> None:
        self._cursor = cursor
        self._found = False

    def seek(self, key: bytes) -> tuple[bytes, bytes] | None:
        """Go to the first key at or after `key`."""
        self._found = self._cursor.set_range(key)
        return cast("tuple[bytes, bytes]", self._cursor.item()) if self._found else None

    def step(self) -> tuple[bytes, bytes] | None:
        """Go on to the next key."""
        self._found = self._cursor.next()
        return cast("tuple[bytes, bytes]", self._cursor.item()) if self._found else None

    def before(self) -> tuple[bytes, bytes] | None:
        """Return the row before the place, or the table's last."""
        if not self._found:
            return cast("tuple[bytes, bytes]", self._cursor.item()) if self._cursor.last() else None
        if not self._cursor.prev():
            self._cursor.first()
            return None
        row = cast("tuple[bytes, bytes]", self._cursor.item())
        self._cursor.next()
        return row


class LmdbView:
    """One transaction; a view when it was begun read-only."""

    def __init__(self, transaction: lmdb.Transaction, tables: dict[Table, lmdb._Database]) -> None:
        self._transaction = transaction
        self._tables = tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of a key."""
        return cast("bytes | None", self._transaction.get(key, db=self._tables[table]))

    def scan(self, table: Table, key: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values from `key` on."""
        cursor = self._transaction.cursor(db=self._tables[table])
        if not cursor.set_range(key):
            return iter(())
        return cast("Iterator[tuple[bytes, bytes]]", cursor.iternext(keys=True, values=True))

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """Return the last key before `key` and its value."""
        cursor = self._transaction.cursor(db=self._tables[table])
        found = cursor.prev() if cursor.set_range(key) else cursor.last()
        return cast("tuple[bytes, bytes]", cursor.item()) if found else None

    def cursor(self, table: Table) -> LmdbCursor:
        """Return a cursor."""
        return LmdbCursor(self._transaction.cursor(db=self._tables[table]))

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Set the value of a key."""
        self._transaction.put(key, value, db=self._tables[table])

    def put_many(self, table: Table, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Set the values of keys; one cursor finds sorted ones faster."""
        self._transaction.cursor(db=self._tables[table]).putmulti(rows)

    def delete(self, table: Table, key: bytes) -> None:
        """Remove a key if it is there."""
        self._transaction.delete(key, db=self._tables[table])


class _OpenView:
    """The span of a view; a class, because a generator would cost each read 5 us more."""

    __slots__ = ("_index", "_transaction")

    def __init__(self, index: "LmdbIndex") -> None:
        self._index = index

    def __enter__(self) -> IndexReader:
        try:
            self._transaction = self._index.begin_view()
        except lmdb.Error as error:
            raise _ours(error, self._index.place) from error
        return LmdbView(self._transaction, self._index.tables)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._transaction.abort()
        self._index.end_view()
        if isinstance(error, lmdb.Error):
            raise _ours(error, self._index.place) from error


class LmdbIndex:
    """The index of one store, open in one process."""

    def __init__(
        self, folder: Path, *, size_start: int = INDEX_SIZE_START, lasting: bool = True, read_only: bool = False
    ) -> None:
        """Open the index of a folder; an empty folder gets a new one. One that is not `lasting` is never synced.

        Raises:
            CorruptionError: the folder holds something else, or a file that was cut short.
            NoSpaceError: the disk is full.
        """
        self.place = str(folder)
        self._folder = folder
        self._lasting = lasting
        self._read_only = read_only
        self._gate = threading.Condition()
        self._writing = threading.Lock()
        self._views = 0
        check_length(folder)
        self._open(size_start)

    def _open(self, map_size: int) -> None:
        with _translated(self.place):
            self._environment = lmdb.open(
                self.place,
                map_size=map_size,
                max_dbs=len(Table),
                max_readers=READERS_MAX,
                metasync=False,
                sync=self._lasting,
                writemap=False,
                meminit=False,
                mode=0o600,
                create=not self._read_only,
                readonly=self._read_only,
                lock=not self._read_only,
            )
            try:
                self.tables: dict[Table, lmdb._Database] = {
                    table: self._environment.open_db(table.value.encode(), create=not self._read_only)
                    for table in Table
                }
            except lmdb.Error:
                self._environment.close()
                raise

    def close(self) -> None:
        """Close; what was committed stays."""
        self._environment.close()

    def sync(self) -> None:
        """Make all transactions durable, whatever NOMETASYNC left open."""
        with _translated(self.place):
            self._environment.sync(True)

    def view(self) -> AbstractContextManager[IndexReader]:
        """Open a consistent view."""
        return _OpenView(self)

    def begin_view(self) -> lmdb.Transaction:
        """Begin a read transaction; the map is not grown until `end_view`."""
        with self._gate:
            self._views += 1
        try:
            return self._environment.begin(write=False)
        except lmdb.Error:
            self.end_view()
            raise

    def end_view(self) -> None:
        """Count a view that is over."""
        with self._gate:
            self._views -= 1
            if self._views == 0:
                self._gate.notify_all()

    def update(self, change: Callable[[IndexWriter], Result]) -> Result:
        """Run `change` in one transaction; again in a larger map if it did not fit."""
        with self._writing:
            while True:
                try:
                    with _translated(self.place), self._environment.begin(write=True) as transaction:
                        return change(LmdbView(transaction, self.tables))
                except _MapFullError:
                    self._grow()

    def depth(self, table: Table) -> int:
        """Return how many pages a look into a table goes through."""
        with _translated(self.place), self._environment.begin() as view:
            return int(view.stat(self.tables[table])["depth"])

    def shrink(self, scratch: Path) -> bool:
        """Replace the file by a compact copy if that gives much room back to the disk; tell whether it did.

        `scratch` is a folder on the same disk that may be made and removed. Changes wait for the copy, views for a few
        milliseconds; a thread that holds a view must not call this.

        Raises:
            NoSpaceError: there is no room for the copy.
            BackendError: the disk failed.
        """
        with self._writing:
            try:
                size, used = (self._folder / DATA_NAME).stat().st_size, self._used_size()
                if used > SHRINK_USED_MAX or size - used < max(SHRINK_SIZE_MIN, size // 2):
                    return False
                return self._replace(scratch)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpaceError(f"the disk under {self.place} is full") from error
                raise BackendError(f"index {self.place} can't be made smaller: {error}") from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _used_size(self) -> int:
        """Return the bytes of pages with rows in them."""
        with _translated(self.place), self._environment.begin() as view:
            trees = [self._environment.stat(), *(view.stat(table) for table in self.tables.values())]
        pages = sum(tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"] for tree in trees)
        return int(pages * trees[0]["psize"])

    def _replace(self, scratch: Path) -> bool:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        with _translated(self.place):
            self._environment.copy(str(scratch), compact=True)
        _make_durable(scratch / DATA_NAME)
        with self._gate:
            if not self._gate.wait_for(lambda: self._views == 0, SHRINK_WAIT_S):
                return False
            map_size = self._environment.info()["map_size"]
            self._environment.close()
            try:
                (scratch / DATA_NAME).replace(self._folder / DATA_NAME)
            finally:
                self._open(map_size)
        sync_folder(self._folder)
        return True

    def _grow(self) -> None:
        with self._gate:
            self._gate.wait_for(lambda: self._views == 0)
            self._environment.set_mapsize(2 * self._environment.info()["map_size"])


def _make_durable(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)
        os.fsync(fd)
    finally:
        os.close(fd)


class _MapFullError(Exception):
    """The map has no room for a transaction, which was taken back."""


@contextmanager
def _translated(place: str) -> Iterator[None]:
    """Turn the errors of LMDB into ours."""
    try:
        yield
    except lmdb.Error as error:
        raise _ours(error, place) from error


def _ours(error: lmdb.Error, place: str) -> Exception:
    match error:
        case lmdb.MapFullError():
            return _MapFullError()
        case lmdb.DiskError():
            return NoSpaceError(f"the disk under {place} is full")
        case lmdb.CorruptedError() | lmdb.InvalidError() | lmdb.PageNotFoundError() | lmdb.VersionMismatchError():
            return CorruptionError(
                place=f"index {place}",
                what="LMDB file",
                expected="a whole one; run store rebuild-index",
                found=str(error),
            )
        case _ if _is_full(place):
            return NoSpaceError(f"the disk under {place} is full")
        case _:
            return BackendError(f"index {place} failed: {error}")


def _is_full(folder: str) -> bool:
    """LMDB reports a write that a full disk cut short as EIO, so ask the disk itself."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_SIZE))
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False

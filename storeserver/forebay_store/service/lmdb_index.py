"""The index in LMDB: the port `forebay_store.engine.ports.Index` over one environment.

NOMETASYNC: a power cut may take back the newest transactions, whole ones, and replay makes them again. Never NOSYNC,
which may leave a damaged file. The map is grown only while no view is open, as LMDB demands.
"""

import errno
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, TypeVar, cast

import lmdb

from forebay_core.errors import CorruptionError, NoSpaceError
from forebay_core.units import MIB
from forebay_store.engine.ports import BackendError, IndexReader, IndexWriter
from forebay_store.format.rows import Table
from forebay_store.limits import INDEX_SIZE_START
from forebay_store.service.lmdb_file import check_length

Result = TypeVar("Result")
READERS_MAX: Final = 256
PROBE_SIZE: Final = MIB


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
        self._gate = threading.Condition()
        self._views = 0
        check_length(folder)
        with _translated(str(folder)):
            self._environment = lmdb.open(
                str(folder),
                map_size=size_start,
                max_dbs=len(Table),
                max_readers=READERS_MAX,
                metasync=False,
                sync=lasting,
                writemap=False,
                meminit=False,
                mode=0o600,
                create=not read_only,
                readonly=read_only,
                lock=not read_only,
            )
            try:
                self.tables: dict[Table, lmdb._Database] = {
                    table: self._environment.open_db(table.value.encode(), create=not read_only) for table in Table
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
        while True:
            try:
                with _translated(self.place), self._environment.begin(write=True) as transaction:
                    return change(LmdbView(transaction, self.tables))
            except _MapFullError:
                self._grow()

    def _grow(self) -> None:
        with self._gate:
            self._gate.wait_for(lambda: self._views == 0)
            self._environment.set_mapsize(2 * self._environment.info()["map_size"])


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

"""The store's index in memory: one transaction at a time, all of it or nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from sortedcontainers import SortedDict

from forebay_core.errors import NoSpaceError
from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.format.rows import Table

Result = TypeVar("Result")


SINCE_MAX = 4


class DictCursor:
    """A place in a sorted dictionary."""

    def __init__(self, rows: SortedDict) -> None:
        self._rows = rows
        self._at = -1

    def seek(self, key: bytes) -> tuple[bytes, bytes] | None:
        self._at = self._rows.bisect_left(key)
        return self._row(self._at)

    def step(self) -> tuple[bytes, bytes] | None:
        self._at += 1
        return self._row(self._at)

    def before(self) -> tuple[bytes, bytes] | None:
        return self._row(self._at - 1)

    def _row(self, at: int) -> tuple[bytes, bytes] | None:
        return self._rows.peekitem(at) if 0 <= at < len(self._rows) else None


class DictView:
    """One transaction over sorted dictionaries; those that it writes to are copied first."""

    def __init__(self, tables: dict[Table, SortedDict]) -> None:
        self.tables = dict(tables)
        self._copied: set[Table] = set()

    def get(self, table: Table, key: bytes) -> bytes | None:
        found: bytes | None = self.tables[table].get(key)
        return found

    def scan(self, table: Table, key: bytes) -> Iterator[tuple[bytes, bytes]]:
        rows = self.tables[table]
        for found in list(rows.irange(key)):
            yield found, rows[found]

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        rows = self.tables[table]
        found = rows.bisect_left(key)
        return rows.peekitem(found - 1) if found else None

    def cursor(self, table: Table) -> DictCursor:
        return DictCursor(self.tables[table])

    def put_many(self, table: Table, rows: Sequence[tuple[bytes, bytes]]) -> None:
        assert list(rows) == sorted(rows)
        self._own(table).update(rows)

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        self._own(table)[key] = value

    def delete(self, table: Table, key: bytes) -> None:
        self._own(table).pop(key, None)

    def _own(self, table: Table) -> SortedDict:
        if table not in self._copied:
            self._copied.add(table)
            self.tables[table] = SortedDict(self.tables[table])
        return self.tables[table]


class DictIndex:
    """An index that keeps nothing but what it holds; with `full` its disk is."""

    def __init__(self) -> None:
        self.tables = {table: SortedDict() for table in Table}
        self.full = False
        self.point: Callable[[str], None] = lambda text: None  # where a crash may strike
        self.since = [self.tables]  # what a power cut may leave: the state at the last sync, and those after it

    def sync(self) -> None:
        self.point("index is synced")
        self.since = [self.tables]

    @contextmanager
    def view(self) -> Iterator[IndexReader]:
        yield DictView(self.tables)

    def update(self, change: Callable[[IndexWriter], Result]) -> Result:
        self.point("index is updated")
        result = self._change(change)
        self.point("index shows it")
        return result

    def _change(self, change: Callable[[IndexWriter], Result]) -> Result:
        if self.full:
            raise NoSpaceError("the index is full")
        view = DictView(self.tables)
        result = change(view)
        self.tables = view.tables
        self.since = [*self.since[-SINCE_MAX:], self.tables]
        return result

    def copy(self) -> "DictIndex":
        """Return the index as it is now, for a later crash to fall back to."""
        other = DictIndex()
        other.tables = dict(self.tables)  # which are never changed, only replaced
        other.since = [other.tables]
        return other

    def rows(self) -> dict[Table, dict[bytes, bytes]]:
        """Return everything."""
        return {table: dict(rows) for table, rows in self.tables.items()}

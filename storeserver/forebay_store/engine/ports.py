"""The ports of the store: the index and the segment backend, as small as they can be.

Both have a twin in memory under tests/store that loses what a crash may lose.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from forebay_core.errors import CorruptionError, ForebayError
from forebay_core.units import Buffer
from forebay_store.format.rows import Table

Result = TypeVar("Result")


class SegmentExistsError(ForebayError):
    """The name is taken: another store writes to the same place."""


class SegmentMissingError(CorruptionError):
    """A segment that the index or another segment names is not there."""


class BackendError(ForebayError):
    """The backend failed in a way that leaves open what is durable; it refuses changes until it is opened anew."""


class NothingKeptError(ForebayError):
    """The system had no file or memory to begin with: nothing was made, the request may be repeated."""


class IndexCursor(Protocol):
    """A place in one table, which must not change meanwhile."""

    def seek(self, key: bytes) -> tuple[bytes, bytes] | None:
        """Go to the first key at or after `key`; return it and its value."""

    def step(self) -> tuple[bytes, bytes] | None:
        """Go on to the next key; return it and its value."""

    def before(self) -> tuple[bytes, bytes] | None:
        """Return the last key before the place, or of the table if `seek` found none, and its value."""


class IndexReader(Protocol):
    """One consistent view of the index: tables of keys and values in the order of the keys' bytes."""

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of a key."""

    def scan(self, table: Table, key: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values from the first key at or after `key`; the table must not change meanwhile."""

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """Return the last key before `key` and its value."""

    def cursor(self, table: Table) -> IndexCursor:
        """Return a cursor that is nowhere yet."""


class IndexWriter(IndexReader, Protocol):
    """A transaction; it sees its own changes."""

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Set the value of a key."""

    def put_many(self, table: Table, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Set the values of keys that are given in their order."""

    def delete(self, table: Table, key: bytes) -> None:
        """Remove a key if it is there."""


class Index(Protocol):
    """The index. One thread changes it, any may look."""

    def view(self) -> AbstractContextManager[IndexReader]:
        """Open a consistent view."""

    def update(self, change: Callable[[IndexWriter], Result]) -> Result:
        """Run `change` in one transaction: all of it is there afterwards, or nothing. It may run more than once.

        Raises:
            NoSpaceError: the disk is full; nothing changed.
        """

    def sync(self) -> None:
        """Make all transactions durable that ended before."""


class SegmentBackend(Protocol):
    """Where segments are kept. Names are those of `SegmentName.text`; calls block and come from threads."""

    def create(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write a segment; on return it is durable and whole under its name.

        Raises:
            SegmentExistsError: there is one of this name; it is unchanged.
            NoSpaceError: the disk is full; nothing remains of it.
            NothingKeptError: it was not even begun.
            BackendError: it is not known what remains.
        """

    def read_range(self, name: str, offset: int, size: int) -> Buffer:
        """Return exactly these bytes.

        Raises:
            SegmentMissingError: there is no such segment.
            CorruptionError: it ends before.
            BackendError: the disk can't read them.
        """

    def read(self, name: str) -> Buffer:
        """Return a whole segment; raises as `read_range` does."""

    def list(self) -> list[str]:
        """Return the names, sorted."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove segments; those that are not there don't matter."""

    def stat(self, name: str) -> int:
        """Return the bytes of a segment.

        Raises:
            SegmentMissingError: there is no such segment.
        """

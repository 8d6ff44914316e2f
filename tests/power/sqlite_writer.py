"""A program that commits rows to a SQLite database (WAL, synchronous=FULL) and prints `ACK n` after each commit.

`sqlite_writer.py FILE` writes until it is killed or a commit fails. `check` says whether a database is whole and up to
an acknowledged row. Old rows are deleted, so the database stays small and the WAL is checkpointed all the time.
"""

import hashlib
import sqlite3
import sys
from pathlib import Path

ROWS_KEPT = 300
WAL_PAGES = 40


def body(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest() * (1 + number % 40)


def connect(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    database.execute("CREATE TABLE IF NOT EXISTS log (number INTEGER PRIMARY KEY, body TEXT)")
    return database


def write(path: str) -> None:
    database = connect(path)
    number = newest(database)
    while True:
        number += 1
        database.execute("BEGIN")
        database.execute("INSERT INTO log VALUES (?, ?)", (number, body(number)))
        database.execute("DELETE FROM log WHERE number <= ?", (number - ROWS_KEPT,))
        database.execute("COMMIT")
        print(f"ACK {number}", flush=True)


def newest(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT coalesce(max(number), 0) FROM log").fetchone()[0])


def check(path: Path, acknowledged: int) -> int:
    """Return the newest row.

    Raises:
        AssertionError: the database is damaged, or an acknowledged row is lost.
    """
    database = connect(str(path))
    try:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        last = newest(database)
        assert last >= acknowledged, f"SQLite acknowledged row {acknowledged} and has {last}"
        rows = database.execute("SELECT number, body FROM log ORDER BY number").fetchall()
        first = max(1, last - ROWS_KEPT + 1)
        assert rows == [(number, body(number)) for number in range(first, last + 1)]
        return last
    finally:
        database.close()


if __name__ == "__main__":
    write(sys.argv[1])

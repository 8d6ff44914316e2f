"""Starts of the store that did not get as far as to find the index whole.

Who follows a damaged branch page of LMDB's file may die of it at once, without a word, and so may the next start. From
the third start on that no audit has followed, a process apart looks at the whole index first: if it dies, or finds
damage, there is a line to say instead.

Crash: the count is that of before or the new one. Kills that have nothing to do with the index cost the next start the
time of an audit.
"""

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError, ForebayError
from forebay_store.engine.books import Audit
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.side_file import read_side_file, replace_side_file

UNPROVED_NAME: Final = "unproved"
NEW_UNPROVED_NAME: Final = "unproved.new"
STARTS_UNPROVED_MAX: Final = 2
CRASHES: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""What a damaged page ends its reader with. Others come from outside, as from who ends the service or wants memory
back, and say nothing of the index."""

_ROWS_PER_LOOK: Final = 4096
_COUNT_SIZE_MAX: Final = 3


def note_start(index: Path) -> int:
    """Count one more start that has not found the index whole; return how many there were before.

    A disk that takes no count does not keep the store from starting.
    """
    path, new = index / UNPROVED_NAME, index / NEW_UNPROVED_NAME
    try:
        before = int(read_side_file(path, new, _COUNT_SIZE_MAX))
    except (OSError, ValueError):
        before = 0
    with suppress(OSError):
        replace_side_file(path, new, b"%d" % min(before + 1, STARTS_UNPROVED_MAX))
    return before


def note_proved(index: Path) -> None:
    """An audit found the index whole."""
    with suppress(OSError):
        (index / UNPROVED_NAME).unlink(missing_ok=True)


def look_apart(index: Path) -> str:
    """Look at all rows of an index in a process of its own; return what is wrong, if anything."""
    done = _run(index)
    return death_of(index, done.returncode) or done.stdout.strip()


def kills_readers(index: Path) -> str:
    """Let a process of its own look at all rows of an index; return a text if it dies of it."""
    return death_of(index, _run(index).returncode)


def _run(index: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", __name__, str(index)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def death_of(index: Path, code: int) -> str:
    """Return a text if the exit code of who read all of an index tells of a crash."""
    return f"index {index}: who reads all of it dies of signal {-code}" if -code in CRASHES else ""


def main() -> None:
    """Write what is wrong with the index that the first argument names, if anything."""
    with suppress(ForebayError):  # others than damage: the start meets them again, and says so
        index = LmdbIndex(Path(sys.argv[1]), read_only=True)
        try:
            with index.view() as reader:
                audit = Audit(reader)
                while audit.step(_ROWS_PER_LOOK):
                    pass
        except CorruptionError as error:
            sys.stdout.write(str(error))


if __name__ == "__main__":
    main()

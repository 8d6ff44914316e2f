"""The mark in an index's folder that says that it is damaged: nothing is read from such an index any more.

It lies beside what it condemns, so it goes with that when the index is made anew. Crash: the mark is there or not; if
not, the next start looks at the rows again.
"""

from pathlib import Path
from typing import Final

from forebay_store.service.folder import sync_folder
from forebay_store.service.side_file import read_side_file, replace_side_file

CONDEMNED_NAME: Final = "condemned"
NEW_CONDEMNED_NAME: Final = "condemned.new"
_TEXT_SIZE_MAX: Final = 1024


def condemn(index: Path, text: str) -> None:
    """Mark an index, durably.

    Raises:
        OSError: that failed.
    """
    content = text.encode(errors="replace")[:_TEXT_SIZE_MAX]
    replace_side_file(index / CONDEMNED_NAME, index / NEW_CONDEMNED_NAME, content)
    sync_folder(index)


def why_condemned(index: Path) -> str:
    """Return what is wrong with an index that is marked; an empty text if it is not."""
    try:
        content = read_side_file(index / CONDEMNED_NAME, index / NEW_CONDEMNED_NAME, _TEXT_SIZE_MAX)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"what was wrong can't be read: {error.strerror}"
    printable = "".join(one if one.isprintable() else "?" for one in content.decode(errors="replace"))
    return printable or "what was wrong is not known"

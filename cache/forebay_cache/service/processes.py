"""Which processes have something open, as far as /proc shows it to us. All of it blocks."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def openers(is_it: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield number and name of each process of whose descriptors, links in /proc, one is it."""
    for pid in pids():
        folder = f"/proc/{pid}/fd"
        if not any(is_it(f"{folder}/{fd}") for fd in names_in(folder)):
            continue
        try:
            name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        except OSError:  # it has ended
            continue
        yield pid, name


def pids() -> list[str]:
    """Return the numbers of all processes."""
    return [name for name in names_in("/proc") if name.isdigit()]


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return what is in a folder; nothing if it can't be looked into, or has gone."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def link_target(link: str) -> str:
    """Return where a link leads; empty if that can't be seen, or it has gone."""
    try:
        return os.readlink(link)
    except OSError:
        return ""

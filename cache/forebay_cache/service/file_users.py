"""Who has a file open: for the message that says why it can't be taken away."""

import os
from pathlib import Path
from typing import Final

USERS_MAX: Final = 3


def users_of(path: Path) -> list[tuple[int, str]]:
    """Return the processes, by number and name, that have a file open; those of others only as far as we may look."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _has_open(folder, str(path)):
            found.append((int(folder.name), _name(folder)))
    return sorted(found)


def describe_users(path: Path) -> str:
    """Return them as words; a loop device or another host's namespace shows no process."""
    users = users_of(path)
    if not users:
        return "somebody whom /proc does not show (a loop device, or another container)"
    named = [f"{name} (process {number})" for number, name in users[:USERS_MAX]]
    more = len(users) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _has_open(folder: Path, path: str) -> bool:
    try:
        with os.scandir(folder / "fd") as entries:
            return any(_points_to(entry.path) == path for entry in entries)
    except OSError:  # it ended, or is somebody else's
        return False


def _points_to(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _name(folder: Path) -> str:
    try:
        return (folder / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"

"""Who has a file open: for the message that says why it can't be taken away."""

from pathlib import Path
from typing import Final

from forebay_cache.service.processes import link_target, openers

USERS_MAX: Final = 3


def describe_users(path: Path) -> str:
    """Return the processes that have a file open, as words; those of others only as far as we may look.

    A loop device or another host's namespace shows no process.
    """
    users = sorted((int(pid), name) for pid, name in openers(lambda link: link_target(link) == str(path)))
    if not users:
        return "somebody whom /proc does not show (a loop device, or another container)"
    named = [f"{name} (process {number})" for number, name in users[:USERS_MAX]]
    more = len(users) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")

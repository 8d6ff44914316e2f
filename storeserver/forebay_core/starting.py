"""What every daemon does when it starts: room for its files, and a word to whoever started it."""

import contextlib
import resource
import sys


def tell_parent(line: str) -> None:
    """Whoever started us may wait for this line; nobody has to."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def raise_file_limit(files_max: int) -> int:
    """Allow this process so many open files, or as many as it may have; return how many of them that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files_max if hard == resource.RLIM_INFINITY else min(files_max, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted

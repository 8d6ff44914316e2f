"""Names of volumes and snapshots: what users type, never used as a path.

A name has 1 to 128 characters: letters, digits, `.`, `_`, `-`, `+`, `:`; the first is a letter or digit.
`volume@snapshot` names a snapshot.
"""

import re
from typing import Final, NamedTuple

from forebay_core.errors import WrongUsageError

NAME_SIZE_MAX: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}\Z")


class SnapshotName(NamedTuple):
    """Names of a volume and of one of its snapshots."""

    volume: str
    snapshot: str

    def __str__(self) -> str:
        return f"{self.volume}@{self.snapshot}"


def check_name(name: str, kind: str = "volume") -> str:
    """Return the name if it may name a volume or snapshot.

    Raises:
        WrongUsageError: it may not; the text says what is allowed.
    """
    if not _NAME.match(name):
        raise WrongUsageError(
            f"{kind} name {name[:80]!r}: use 1 to {NAME_SIZE_MAX} letters, digits and . _ - + : "
            "and begin with a letter or digit"
        )
    return name


def is_name(name: str) -> bool:
    """Tell whether a name may name a volume or snapshot."""
    return _NAME.match(name) is not None


def parse_snapshot_name(text: str) -> SnapshotName:
    """Return the two names in `volume@snapshot`.

    Raises:
        WrongUsageError: one of them is missing or may not be a name, or there is more than one `@`.
    """
    volume, *snapshots = text.split("@")
    if len(snapshots) != 1 or not volume or not snapshots[0]:
        raise WrongUsageError(f"snapshot {text[:80]!r}: write VOLUME@SNAPSHOT, for example vm1@monday")
    return SnapshotName(check_name(volume), check_name(snapshots[0], "snapshot"))

"""How fast destaging may go."""

from typing import Final, NamedTuple


class Limit(NamedTuple):
    """What an admin set, in bytes per second: 0 for both is "not set", RATE_UNLIMITED no limit."""

    average: int
    peak: int


NOT_SET: Final = Limit(0, 0)

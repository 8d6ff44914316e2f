"""Whether a client does enough for the budget that it keeps from others.

Any single byte can't count as progress: a client that sends one every few seconds would keep others waiting for as
long as it likes. What it must move grows with what it holds, so that even the largest request comes to an end.

Invariant: since `_since_s` the client has moved less than it must, or was not judged.
Crash: nothing of this survives.
"""

from forebay_cache.engine.nbd_limits import PROGRESS_SIZE_MIN, STALL_PERIODS_MAX


class Progress:
    """What one client moved in the present period. `total` is all it ever moved, in and out, as the caller counts."""

    __slots__ = ("_since_s", "_start")

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._start = 0

    def stalled(self, total: int, *, keeps: int, now_s: float, period_s: float) -> bool:
        """Tell whether the client moved too little for a period; ask several times in each.

        `keeps` is the budget that is in use and waits for the client alone; 0: none.
        """
        wanted = max(PROGRESS_SIZE_MIN, keeps // STALL_PERIODS_MAX)
        if keeps == 0 or total - self._start >= wanted:
            self._since_s = now_s
            self._start = total
        return now_s - self._since_s >= period_s

"""The bytes that NBD connections hold, and who may hold more.

Each connection may hold FLOOR bytes without asking. What lies above comes from one shared budget, granted in the
order of asking, so that one connection can't starve another. A connection keeps its grant while it uses it and
while nobody waits.

Invariants:
    _free + sum of (granted - FLOOR) over all accounts == size
    an account is in _waiting exactly while need > 0
Crash: nothing of this survives.
"""

from collections import deque
from collections.abc import Callable

from forebay_cache.engine.nbd_limits import BUDGET_SIZE, CONNECTION_BYTES_MAX, FLOOR


class Account:
    """What one connection holds and may hold, in bytes. `ready` is called when a grant it waited for is there."""

    __slots__ = ("granted", "held", "need", "ready", "reserved")

    def __init__(self, ready: Callable[[], None]) -> None:
        self.held = 0
        self.granted = FLOOR
        self.need = 0  # what it waits for
        self.reserved = 0  # what it waited for, was granted and has not asked for again
        self.ready = ready


class Budget:
    """The shared bytes above the floors."""

    def __init__(self, size: int = BUDGET_SIZE) -> None:
        assert size > CONNECTION_BYTES_MAX
        self._free = size
        self._waiting: deque[Account] = deque()

    @property
    def free(self) -> int:
        """Bytes that nobody was granted."""
        return self._free

    @property
    def contended(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def request(self, account: Account, need: int) -> bool:
        """Tell whether `account` may hold `need` bytes more now.

        If not, either its own bytes stand in the way, and it asks again when it holds less; or it waits here, and its
        `ready` is called once it may.
        """
        if account.need:
            return False
        account.reserved = 0
        if account.held + need <= account.granted:
            return True
        if account.held and account.held + need > CONNECTION_BYTES_MAX:
            return False
        missing = account.held + need - account.granted
        if self._waiting or missing > self._free:
            account.need = need
            self._waiting.append(account)
            return False
        self._grant(account, missing)
        return True

    def settle(self, account: Account) -> None:
        """Take back what `account` no longer holds, if it is idle or others wait."""
        excess = account.granted - max(FLOOR, account.held + account.reserved)
        if excess > 0 and not account.need and (self._waiting or account.held + account.reserved <= FLOOR):
            self._grant(account, -excess)
            self._serve()

    def close(self, account: Account) -> None:
        """Take everything back; the account is gone."""
        if account.need:
            self._waiting.remove(account)
        account.need = account.reserved = 0
        self._grant(account, FLOOR - account.granted)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            account = self._waiting[0]
            missing = max(0, account.held + account.need - account.granted)
            if missing > self._free:
                return
            self._waiting.popleft()
            account.need, account.reserved = 0, account.need
            self._grant(account, missing)
            account.ready()

    def _grant(self, account: Account, size: int) -> None:
        self._free -= size
        account.granted += size
        assert self._free >= 0
        assert account.granted >= FLOOR

"""The bytes that NBD connections hold, and who may hold more.

Each connection may hold FLOOR bytes without asking. What lies above comes from one shared budget, granted in the
order of asking, so that one connection can't starve another. A connection keeps its grant while it uses it and
while nobody waits.

The connections of one volume together get more only as long as at least as much stays free: one volume alone gets
half of the budget, each of two a third. So whatever the clients of one volume do, those of another find room, unless
very many volumes are that busy. Who is over that share is passed over, not waited for; one connection of a
volume that holds nothing else may always wait for all that one may have.

Invariants:
    _free + sum of (granted - FLOOR) over all accounts == size
    _shares has the sum of (granted - FLOOR) of each volume's accounts, where it is not 0
    an account is in _waiting exactly while need > 0
Crash: nothing of this survives.
"""

from collections import deque
from collections.abc import Callable

from forebay_cache.engine.nbd_limits import BUDGET_SIZE, CONNECTION_BYTES_MAX, FLOOR


class Account:
    """What one connection holds and may hold, in bytes. `ready` is called when a grant it waited for is there.

    `volume` is set once it is known, and before more than the floor is asked for.
    """

    __slots__ = ("granted", "held", "need", "ready", "reserved", "volume")

    def __init__(self, ready: Callable[[], None], volume: str = "") -> None:
        self.volume = volume
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
        self._shares: dict[str, int] = {}
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
        account.need = need
        self._waiting.append(account)
        if self._first_entitled() is not account or _missing(account) > self._free:
            return False
        self._waiting.pop()
        self._grant(account, _missing(account))
        account.need = 0
        return True

    def settle(self, account: Account) -> None:
        """Take back what `account` no longer holds, if it is idle or others wait; if it waits itself, it needs less."""
        if account.need:
            self._serve()
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
        while (account := self._first_entitled()) is not None:
            missing = _missing(account)
            if missing > self._free:
                return
            self._waiting.remove(account)
            account.need, account.reserved = 0, account.need
            self._grant(account, missing)
            account.ready()

    def _first_entitled(self) -> Account | None:
        """Return who has waited longest of those whose volume may have more; within a volume nobody overtakes."""
        passed: set[str] = set()
        for account in self._waiting:
            if account.volume not in passed:
                if self._is_entitled(account):
                    return account
                passed.add(account.volume)
        return None

    def _is_entitled(self, account: Account) -> bool:
        share, missing = self._shares.get(account.volume, 0), _missing(account)
        return missing == 0 or share == account.granted - FLOOR or share + missing <= self._free - missing

    def _grant(self, account: Account, size: int) -> None:
        self._free -= size
        account.granted += size
        share = self._shares.pop(account.volume, 0) + size
        if share:
            self._shares[account.volume] = share
        assert share >= 0
        assert self._free >= 0
        assert account.granted >= FLOOR


def _missing(account: Account) -> int:
    return max(0, account.held + account.need - account.granted)

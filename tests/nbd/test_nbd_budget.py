"""Who may hold how much: floors, the shared budget, fairness."""

import random

from forebay_cache.engine.nbd_budget import Account, Budget
from forebay_cache.engine.nbd_limits import CONNECTION_BYTES_MAX, FLOOR
from forebay_core.units import MIB

SIZE = CONNECTION_BYTES_MAX + 15 * MIB


def account(woken: list[str] | None = None, name: str = "") -> Account:
    return Account(lambda: woken.append(name) if woken is not None else None)


def hold(budget: Budget, holder: Account, size: int) -> None:
    assert budget.request(holder, size)
    holder.held += size


def test_the_floor_is_never_refused() -> None:
    budget = Budget(SIZE)
    greedy = account()
    hold(budget, greedy, CONNECTION_BYTES_MAX)
    other = account()
    assert not budget.request(other, SIZE - FLOOR)
    small = account()
    assert budget.request(small, FLOOR)


def test_grants_come_in_the_order_of_asking() -> None:
    budget = Budget(SIZE)
    woken: list[str] = []
    first, second, third = account(), account(woken, "second"), account(woken, "third")
    hold(budget, first, CONNECTION_BYTES_MAX)
    assert not budget.request(second, 32 * MIB)
    assert not budget.request(third, 2 * MIB)  # though it would fit: it came later
    assert budget.contended
    first.held = 0
    budget.settle(first)
    assert woken == ["second", "third"]
    assert budget.request(second, 32 * MIB)
    assert budget.request(third, 2 * MIB)
    assert not budget.contended


def test_a_grant_stays_until_it_is_asked_for_again() -> None:
    budget = Budget(SIZE)
    first, second, third = account(), account(), account()
    hold(budget, first, CONNECTION_BYTES_MAX)
    assert not budget.request(second, 32 * MIB)
    first.held = 0
    budget.settle(first)
    budget.settle(second)
    hold(budget, third, SIZE - 32 * MIB - FLOOR)
    assert budget.request(second, 32 * MIB)


def test_who_is_gone_gives_back_and_waits_no_more() -> None:
    budget = Budget(SIZE)
    woken: list[str] = []
    first, second, third = account(), account(woken, "second"), account(woken, "third")
    hold(budget, first, CONNECTION_BYTES_MAX)
    assert not budget.request(second, 32 * MIB)
    assert not budget.request(third, 32 * MIB)
    budget.close(second)
    budget.close(first)
    assert woken == ["third"]
    budget.close(third)
    assert budget.free == SIZE


def test_an_account_in_the_way_of_itself_does_not_queue() -> None:
    budget = Budget(SIZE)
    holder = account()
    hold(budget, holder, CONNECTION_BYTES_MAX)
    assert not budget.request(holder, 1)
    assert not budget.contended


def test_the_budget_adds_up_after_any_history() -> None:
    choose = random.Random(7)
    budget = Budget(SIZE)
    holders = [account() for _ in range(6)]
    for _ in range(3000):
        holder = choose.choice(holders)
        need = choose.choice((4096, MIB, 32 * MIB))
        if choose.random() < 0.6:
            if budget.request(holder, need):
                holder.held += need
        else:
            holder.held -= choose.choice((holder.held, min(holder.held, MIB)))
            budget.settle(holder)
        assert all(h.held <= h.granted for h in holders)
        assert budget.free + sum(h.granted - FLOOR for h in holders) == SIZE
    for holder in holders:
        budget.close(holder)
    assert budget.free == SIZE

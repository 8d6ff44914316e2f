"""Who may hold how much and for how long: floors, the shared budget, fairness, progress."""

import random

from forebay_cache.engine.nbd_budget import Account, Budget
from forebay_cache.engine.nbd_limits import BUDGET_SIZE, CONNECTION_BYTES_MAX, FLOOR, PROGRESS_SIZE_MIN
from forebay_cache.engine.nbd_progress import Progress
from forebay_core.units import MIB

SIZE = CONNECTION_BYTES_MAX + 15 * MIB


def account(woken: list[str] | None = None, name: str = "", volume: str = "") -> Account:
    return Account(lambda: woken.append(name) if woken is not None else None, volume)


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
    first, second, third = account(), account(), account(volume="other")
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
    holders = [account(volume=choose.choice("ab")) for _ in range(6)]
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
        for volume in "ab":
            share = sum(h.granted - FLOOR for h in holders if h.volume == volume)
            assert budget._shares.get(volume, 0) == share
    for holder in holders:
        budget.close(holder)
    assert budget.free == SIZE


def test_one_volume_never_gets_all_and_others_do_not_wait_for_its_clients() -> None:
    budget = Budget(BUDGET_SIZE)
    greedy = [account(volume="greedy") for _ in range(64)]
    given = [holder for holder in greedy if budget.request(holder, 32 * MIB)]
    assert sum(holder.granted - FLOOR for holder in given) <= BUDGET_SIZE // 2
    assert len(given) == 4
    other = account(volume="other")
    for _ in range(10):
        hold(budget, other, 32 * MIB)
        other.held = 0
        budget.settle(other)


def test_who_waits_is_served_when_its_own_replies_are_out() -> None:
    budget = Budget(SIZE)
    woken: list[str] = []
    first, second = account(woken, "first"), account()
    hold(budget, first, 32 * MIB)
    hold(budget, second, 2 * MIB)
    assert not budget.request(first, 33 * MIB)
    first.held = 0
    budget.settle(first)
    assert woken == ["first"]


def test_every_client_of_a_volume_over_its_share_gets_its_turn() -> None:
    choose = random.Random(11)
    budget = Budget(SIZE)
    woken: list[str] = []
    volumes = {str(index): choose.choice("abc") for index in range(12)}
    holders = {name: account(woken, name, volume) for name, volume in volumes.items()}
    done = dict.fromkeys(holders, 0)
    holding: list[Account] = []
    for _ in range(400):
        for name, holder in holders.items():
            if holder not in holding and budget.request(holder, choose.choice((2 * MIB, 32 * MIB))):
                holder.held = holder.granted
                holding.append(holder)
                done[name] += 1
        leaving = holding.pop(choose.randrange(len(holding)))
        leaving.held = 0
        budget.settle(leaving)
    assert min(done.values()) > 10


def test_a_trickle_is_no_progress_and_a_share_of_what_is_held_is() -> None:
    keeps = 32 * MIB
    trickle, enough = Progress(0.0), Progress(0.0)
    for tick in range(1, 40):
        now_s = tick * 7.5
        assert trickle.stalled(tick, keeps=keeps, now_s=now_s, period_s=30) == (now_s >= 30)
        assert not enough.stalled(tick * keeps // 32, keeps=keeps, now_s=now_s, period_s=30)


def test_a_client_that_keeps_nothing_is_never_stalled() -> None:
    progress = Progress(0.0)
    assert not progress.stalled(0, keeps=0, now_s=100.0, period_s=30)
    assert not progress.stalled(0, keeps=1, now_s=129.0, period_s=30)
    assert progress.stalled(PROGRESS_SIZE_MIN - 1, keeps=1, now_s=130.0, period_s=30)
    assert not progress.stalled(PROGRESS_SIZE_MIN, keeps=1, now_s=140.0, period_s=30)

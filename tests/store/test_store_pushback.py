"""Clients are slowed just as much as the cleaner needs when the disk fills, smoothly, and never for nothing."""

from itertools import pairwise

import pytest

from forebay_core.units import GIB, MIB
from forebay_store.engine.pushback import DEAD_SIZE_MIN, DELAY_S_MAX, RATE_MAX, RATE_MIN, Pushback, allowed_rate

PART = 4 * MIB


def delay_s(
    pushback: Pushback, now_s: float, ratio: float, *, live: int = GIB, free: int = 0, low: bool = False
) -> float:
    disk = int(live * ratio)
    return pushback.delay_s(PART, now_s, disk_size=disk, live_size=live, free_size=free, is_disk_low=low)


@pytest.mark.parametrize("ratio", [1.0, 1.2, 1.35])
def test_nobody_waits_while_the_space_is_as_it_is_meant(ratio: float) -> None:
    pushback = Pushback()
    assert [delay_s(pushback, 0.0, ratio) for _ in range(100)] == [0.0] * 100


def test_nobody_waits_for_few_dead_bytes_whatever_their_share() -> None:
    assert allowed_rate(DEAD_SIZE_MIN - 1, 0, 0, is_disk_low=True) == RATE_MAX
    assert delay_s(Pushback(), 0.0, 3.0, live=MIB, low=True) == 0.0


def test_nobody_waits_for_garbage_while_the_disk_has_room_for_it() -> None:
    pushback = Pushback()
    assert [delay_s(pushback, 0.0, 3.0, free=6 * GIB) for _ in range(100)] == [0.0] * 100


def test_the_rate_falls_as_garbage_fills_the_disk() -> None:
    rates = [allowed_rate(3 * GIB, GIB, 6 * GIB - i * 50 * MIB, is_disk_low=False) for i in range(84)]
    assert rates[0] == RATE_MAX and rates[-1] == pytest.approx(RATE_MIN)
    assert all(after <= before <= 1.4 * after for before, after in pairwise(rates))


def test_the_rate_falls_without_a_step() -> None:
    rates = [allowed_rate(int(GIB * (1.34 + i / 1000)), GIB, 0, is_disk_low=False) for i in range(80)]
    assert rates[0] == RATE_MAX and rates[-1] == pytest.approx(RATE_MIN)
    assert all(after <= before <= 1.2 * after for before, after in pairwise(rates))


@pytest.mark.parametrize(("ratio", "low"), [(5.0, False), (1.1, True)])
def test_nothing_waits_longer_than_the_bound_however_much_comes(ratio: float, low: bool) -> None:
    pushback = Pushback()
    delays = [delay_s(pushback, 1.0, ratio, low=low) for _ in range(500)]
    assert delays[0] > 0 and max(delays) == DELAY_S_MAX
    assert delay_s(pushback, 100.0, ratio, low=low) < DELAY_S_MAX  # what waited does not count for ever
    assert delay_s(pushback, 100.0, 1.2, low=False) == 0.0


@pytest.mark.parametrize("cleaned_rate", [12 * MIB, 60 * MIB, 300 * MIB])
def test_a_writer_at_full_speed_settles_where_the_cleaner_keeps_up(cleaned_rate: int) -> None:
    """All that comes makes as much dead, and the cleaner frees at a constant rate while there is something."""
    pushback, now_s, live = Pushback(), 0.0, GIB
    disk, highest, received = float(live) * 1.3, 0.0, 0
    while now_s < 120:
        wait_s = pushback.delay_s(PART, now_s, disk_size=int(disk), live_size=live, free_size=0, is_disk_low=False)
        wait_s += PART / (400 * MIB)
        assert wait_s <= DELAY_S_MAX + 1
        disk = max(live, disk + PART - cleaned_rate * wait_s)
        now_s, received, highest = now_s + wait_s, received + PART, max(highest, disk / live)
    assert highest < 1.41
    assert received / now_s > 0.95 * cleaned_rate  # it is not slowed more than needed

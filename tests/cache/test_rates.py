"""Rate shaping: what is sent keeps to the limits, exactly, by a simulated clock; who is slowed, and who is not."""

from itertools import pairwise

import pytest
from engine_rig import check_books, store_content
from rate_rig import NS, RateRig

from forebay_cache.engine import destage as destage_module
from forebay_cache.engine import rates
from forebay_cache.engine.front import IoError
from forebay_cache.engine.rates import NO_LIMIT, NOT_SET, Limit, Shaper, urgency, write_delay_ns
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, KIB, MIB

BIG = {"blocks": 80_000, "zone_blocks": 1024, "cut_age_ns_max": NS, "cut_blocks_max": 8192}
LIMITS = [(512 * KIB, 512 * KIB), (MIB, 40 * MIB), (600 * KIB, 2 * MIB)]
"""The least there is; slices of several chunks; both buckets at work. More bytes per second prove no more."""


def backlog(seed: int, **settings) -> RateRig:
    """Return a rig with room for 20,000 dirty blocks, more than a minute at 1 MiB per second."""
    return RateRig(seed, **{**BIG, "size": 100 << 20, "dirty_share_max": 0.9, **settings})


def assert_keeps(rig: RateRig, average: int, peak: int, start_ns: int) -> None:
    minute = rig.bytes_between(start_ns, start_ns + 60 * NS)
    assert abs(minute / (60 * average) - 1) <= 0.01, minute / (60 * average)
    assert rig.highest_second(start_ns) <= 1.02 * peak, rig.highest_second(start_ns) / peak


@pytest.fixture
def no_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fill out of the curve."""
    monkeypatch.setattr(rates, "CALM_FILL", 2.0)
    monkeypatch.setattr(rates, "URGENT_FILL", 3.0)


@pytest.mark.usefixtures("no_pressure")
@pytest.mark.parametrize(("average", "peak"), LIMITS)
def test_a_minute_has_the_average_and_no_second_more_than_the_peak(average: int, peak: int) -> None:
    run_minute(average, peak)


def run_minute(average: int, peak: int) -> None:
    """A minute of destaging from a backlog; the curve's part in it is taken out by who calls this."""
    rig = backlog(1)
    rig.limit(average, peak)
    rig.fill(0, 61 * average // BLOCK_SIZE + 1000)
    start_ns = rig.now_ns
    rig.pass_time(60)
    assert_keeps(rig, average, peak, start_ns)
    check_books(rig.engine)


@pytest.mark.usefixtures("no_pressure")
@pytest.mark.parametrize("fault", ["no-peak", "large-slices", "no-average", "not-charged"])
def test_the_minute_notices_a_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    average = peak = 512 * KIB
    if fault == "no-peak":
        monkeypatch.setattr(rates, "PEAK_DEPTH_DIVISOR", 2)
    elif fault == "large-slices":
        monkeypatch.setattr(rates, "PEAK_SLICES_MIN", 10)
    elif fault == "no-average":
        peak = MIB
        monkeypatch.setattr(Shaper, "allowed", property(lambda self: self.limit.peak, lambda self, _: None))
    else:
        monkeypatch.setattr(Shaper, "take", lambda self, size: None)
    with pytest.raises(AssertionError):
        run_minute(average, peak)


@pytest.mark.usefixtures("no_pressure")
def test_an_event_loop_that_is_late_costs_nothing_below_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RateRig, "late_ns", 20_000_000)
    run_minute(MIB, 4 * MIB)


@pytest.mark.usefixtures("no_pressure")
def test_the_limit_of_all_together_holds_for_volumes_with_and_without_their_own() -> None:
    rig = backlog(2, size=160 << 20)
    other = rig.add_volume()
    own, total = 512 * KIB, 1536 * KIB
    rig.limit(own, 2 * own)
    rig.limit(total, 2 * MIB, together=True)
    rig.fill(0, 8_500)
    rig.fill(0, 18_000, other)
    start_ns = rig.now_ns
    rig.pass_time(60)
    minute = rig.bytes_between(start_ns, rig.now_ns)
    assert abs(minute / (60 * total) - 1) <= 0.01
    mine = rig.bytes_between(start_ns, rig.now_ns, rig.volume.id)
    assert abs(mine / (60 * own) - 1) <= 0.01
    assert rig.highest_second(start_ns) <= 1.02 * 2 * MIB


def test_a_drain_goes_at_the_peak() -> None:
    rig = backlog(3)
    rig.limit(MIB, 4 * MIB)
    rig.fill(0, 8000)
    drained: list[bool] = []
    rig.engine.destage.drain(rig.volume, drained.append)
    start_ns = rig.now_ns
    rig.pass_time(7)
    assert not drained
    assert rig.bytes_between(start_ns + NS, start_ns + 7 * NS) >= 0.97 * 6 * 4 * MIB
    rig.pass_time(2)
    assert drained == [True]
    assert rig.highest_second(start_ns) <= 1.02 * 4 * MIB


def test_the_rate_rises_smoothly_with_the_fill_and_the_age_and_never_past_the_peak() -> None:
    fills = [urgency(step / 1000, 0) for step in range(1001)]
    ages = [urgency(0, step * NS) for step in range(1200)]
    for curve in (fills, ages):
        assert curve[0] == 0
        assert curve[-1] == 1
        assert all(0 <= b - a <= 0.004 for a, b in pairwise(curve))
    delays = [write_delay_ns(step / 10_000) for step in range(9500)]
    assert delays[7500] == 0
    assert all(a <= b for a, b in pairwise(delays))
    assert max(b - a for a, b in pairwise(delays[:9001])) < 3000
    assert write_delay_ns(0.95) == write_delay_ns(2.0) == -1


def test_a_fuller_buffer_is_destaged_faster() -> None:
    rig = backlog(4, size=100 << 20, blocks=20_000, dirty_share_max=0.8)
    rig.limit(MIB, 8 * MIB)
    rig.fill(0, 9000)
    start_ns = rig.now_ns
    speeds: list[int] = []
    for _ in range(12):
        rig.pass_time(1)
        assert rig.engine.destage.total.allowed == NO_LIMIT.peak
        assert MIB <= rig.volume.shaper.allowed <= 8 * MIB
        speeds.append(rig.volume.shaper.allowed)
    assert speeds[0] > 2 * MIB
    assert speeds == sorted(speeds, reverse=True)
    assert rig.highest_second(start_ns) <= 1.02 * 8 * MIB


@pytest.mark.usefixtures("no_pressure")
def test_old_data_is_destaged_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "CALM_AGE_NS", 10 * NS)
    monkeypatch.setattr(rates, "URGENT_AGE_NS", 20 * NS)
    rig = backlog(5)
    rig.limit(MIB, 3 * MIB)
    rig.fill(0, 14_000)
    allowed = []
    for _ in range(25):
        rig.pass_time(1)
        allowed.append(rig.volume.shaper.allowed)
    assert allowed[5] == MIB
    assert MIB < allowed[14] < 3 * MIB
    assert allowed[-1] == 3 * MIB


# --- changing limits ----------------------------------------------------------------------------------------------


def test_a_limit_is_changed_and_removed_live() -> None:
    rig = backlog(6)
    rig.fill(0, 12_000)
    rig.limit(MIB, MIB)
    rig.pass_time(3)
    start_ns = rig.now_ns
    rig.pass_time(5)
    assert rig.bytes_between(start_ns, rig.now_ns) <= 1.02 * 5 * MIB
    rig.limit(3 * MIB, 3 * MIB)
    start_ns = rig.now_ns
    rig.pass_time(5)
    assert 0.96 <= rig.bytes_between(start_ns, rig.now_ns) / (5 * 3 * MIB) <= 1.04
    rig.engine.set_limit(rig.volume, lambda _: None, reset=True)
    rig.pass_time(3)
    assert not rig.engine.destage.dirty_blocks
    assert store_content(rig.store.plain(), rig.size)[: 100 * BLOCK_SIZE] == rig.read(0, 100 * BLOCK_SIZE)


def test_a_value_that_is_not_given_stays() -> None:
    rig = RateRig(7)
    rig.limit(MIB, 0)
    assert rig.volume.own_limit == Limit(MIB, MIB)
    rig.limit(0, 3 * MIB)
    assert rig.volume.own_limit == Limit(MIB, 3 * MIB)
    for average, peak in ((4 * MIB, 0), (1, 3 * MIB), (MIB, 1 << 50), (3 * MIB, 2 * MIB)):
        with pytest.raises(ForebayError, match="are no limit"):
            rig.engine.set_limit(rig.volume, lambda _: None, average=average, peak=peak)
    assert rig.volume.own_limit == Limit(MIB, 3 * MIB)
    rig.limit(*NO_LIMIT)
    assert not rig.volume.shaper.limited


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_limits_are_kept_over_a_restart(power: bool, checkpoint: bool) -> None:
    rig = RateRig(8, limit=Limit(9 * MIB, 9 * MIB), total_limit=Limit(99 * MIB, 99 * MIB))
    assert rig.volume.shaper.limit == Limit(9 * MIB, 9 * MIB)
    rig.limit(MIB, 3 * MIB)
    rig.limit(5 * MIB, 6 * MIB, together=True)
    if checkpoint:
        settled: list[bool] = []
        rig.engine.checkpoints.want(settled.append)
        rig.run_until(lambda: bool(settled))
    rig.restart(power=power)
    assert rig.volume.shaper.limit == Limit(MIB, 3 * MIB)
    assert rig.engine.destage.total.limit == Limit(5 * MIB, 6 * MIB)
    for volume in (rig.volume, None):
        rig.engine.set_limit(volume, lambda _: None, reset=True)
    rig.settle()
    rig.restart(power=power)
    assert (rig.volume.own_limit, rig.engine.own_limit) == (NOT_SET, NOT_SET)
    assert rig.volume.shaper.limit == Limit(9 * MIB, 9 * MIB)
    assert rig.engine.destage.total.limit == Limit(99 * MIB, 99 * MIB)


# --- slowing writers ----------------------------------------------------------------------------------------------


class Writer:
    """Writes a block at a time, the next as soon as the last is acknowledged, and notes when that was."""

    def __init__(self, rig: RateRig, volume, *, blocks: int, every: int = 1) -> None:
        self.rig, self.volume, self.blocks, self.every = rig, volume, blocks, every
        self.at_ns: list[int] = []
        self.lba = 0
        self.waiting = False

    def step(self) -> None:
        """Write up to `every` blocks, one after the other, as far as they are acknowledged at once."""
        for _ in range(self.every):
            if self.waiting:
                return
            self.waiting = True
            self.volume.write(self.lba * BLOCK_SIZE, self.rig.rng.randbytes(BLOCK_SIZE), False, self.acknowledged)
            self.volume.kick()
            self.lba = (self.lba + 1) % self.blocks
            self.rig.settle()

    def acknowledged(self, error: IoError) -> None:
        assert error == IoError.OK
        self.waiting = False
        self.at_ns.append(self.rig.now_ns)

    def between(self, start_ns: int, end_ns: int) -> int:
        return sum(start_ns <= at < end_ns for at in self.at_ns)


def test_only_who_holds_most_is_slowed() -> None:
    rig = backlog(9, size=60 << 20, blocks=12_000, zone_blocks=64, dirty_share_max=0.5)
    other = rig.add_volume()
    rig.limit(MIB, 2 * MIB)
    rig.limit(MIB, 2 * MIB, other)
    guilty = Writer(rig, rig.volume, blocks=12_000, every=40)
    innocent = Writer(rig, other, blocks=100)

    def both() -> None:
        guilty.step()
        if rig.now_ns >= RateRig.tick_ns * len(innocent.at_ns):
            innocent.step()
            assert not innocent.waiting, "its writes are acknowledged at once, at every moment"
        assert not rig.engine.slowing.is_slowed(other)

    rig.pass_time(20, both)
    assert rig.engine.slowing.is_slowed(rig.volume)
    end_ns = rig.now_ns
    # Room comes back a cut at a time, so it is not just what is destaged meanwhile.
    slowed = guilty.between(end_ns - 10 * NS, end_ns) * BLOCK_SIZE
    assert 0 < slowed <= 2 * 10 * 2 * MIB
    assert rig.engine.buffer_fill < 1
    assert innocent.between(end_ns - 10 * NS, end_ns) >= 10 * 20 - 1, "one write at every tick"


@pytest.mark.parametrize("average", [1 * MIB, 2 * MIB])
def test_a_writer_is_slowed_and_not_stopped_until_a_cut_is_committed(average: int) -> None:
    """The buffer is small beside what one cut of it takes to be sent: room comes back a few times a minute."""
    rig = backlog(9, size=60 << 20, blocks=12_000, zone_blocks=64, dirty_share_max=0.5)
    rig.limit(average, 2 * average)
    writer = Writer(rig, rig.volume, blocks=12_000, every=40)
    rig.pass_time(40, writer.step)
    gaps = [later - earlier for earlier, later in pairwise(writer.at_ns)]
    assert rig.engine.buffer_fill > 0.7
    assert max(gaps) < 0.5 * NS, sorted(gaps)[-5:]


def test_a_full_buffer_waits_and_never_fails() -> None:
    rig = backlog(10, size=30 << 20, blocks=6000, zone_blocks=64, dirty_share_max=0.5)
    rig.store.away = True
    got = rig.fill(0, 5000)
    rig.pass_time(20)
    written = len(got)
    assert 0 < written < 100
    assert set(got) == {IoError.OK}
    assert rig.engine.buffer_fill <= 1.02
    rig.store.away = False
    rig.pass_time(20)
    assert len(got) == 100
    assert set(got) == {IoError.OK}


# --- the store away, clocks ---------------------------------------------------------------------------------------


def test_an_hour_without_the_store_costs_no_memory_and_ends_at_the_allowed_rate() -> None:
    rig = backlog(11)
    rig.limit(MIB, 3 * MIB)
    rig.fill(0, 8_000)
    rig.tick_ns = NS
    rig.store.away = True
    begun = len(rig.sent)
    paces = 0
    pace = rig.pace

    def count() -> None:
        nonlocal paces
        paces += 1
        pace()

    rig.pace = count  # type: ignore[method-assign]
    rig.pass_time(3600)
    assert len(rig.sent) - begun <= destage_module.SLICES_IN_FLIGHT_MAX
    assert paces < 200, "it waits instead of trying again"
    held = sum(piece.size for cut in rig.volume.cuts for piece in cut.ready)
    assert held <= 2 * 4 * rig.volume.shaper.slice_size_max
    rig.pace = pace  # type: ignore[method-assign]
    rig.store.away = False
    start_ns = rig.now_ns
    rig.pass_time(5)
    assert rig.volume.shaper.allowed == 3 * MIB, "what is an hour old goes at the peak"
    assert 0.97 * 5 * 3 * MIB <= rig.bytes_between(start_ns, rig.now_ns) <= 1.02 * 5 * 3 * MIB
    assert rig.highest_second(start_ns) <= 1.02 * 3 * MIB
    rig.pass_time(20)
    assert rig.engine.destage.dirty_blocks == 0


@pytest.mark.parametrize("limited", [False, True])
def test_a_store_gone_for_ever_leaves_writers_waiting_and_nothing_growing(limited: bool) -> None:
    rig = backlog(12, size=40 << 20, blocks=8000, zone_blocks=64)
    if limited:
        rig.limit(MIB, MIB)
    rig.store.away = True
    got = rig.fill(0, 8000)
    rig.tick_ns = NS
    rig.pass_time(600)
    sent, answered = len(rig.sent), len(got)
    rig.pass_time(24 * 3600 / 20)
    assert (len(rig.sent), len(got)) == (sent, answered)
    assert rig.engine.buffer_fill <= 1.02
    assert rig.read(0, BLOCK_SIZE)


@pytest.mark.parametrize("limited", [False, True])
def test_a_wall_clock_that_jumps_changes_nothing(limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[tuple[int, int, bytes]]:
        rig = backlog(13)
        if limited:
            rig.limit(MIB, 2 * MIB)
        rig.fill(0, 3_000)
        rig.pass_time(13)
        return rig.sent

    straight = run()
    jumps = iter([10**18, -(10**18), 0, 5 * 10**17] * 10_000)
    monkeypatch.setattr(RateRig, "wall_ns", lambda self: max(0, self.now_ns + next(jumps)))
    assert run() == straight

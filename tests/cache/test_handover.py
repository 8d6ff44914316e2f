"""Handing over a cut, step by step, with a crash of either side between any two steps.

The steps of one cut, each of which may be the last thing that happens:

    closed -> synced here -> built -> sent -> staged there -> answered -> (for each slice) ...
    -> commit sent -> applied there -> acknowledgement on its way -> received -> noted in the log

Every one of them is one completion in the rig. So the run without a crash is counted first, then repeated with a
crash before each of its completions: of the cache (killed, or with the power cut), of the store, or of the connection
(answers that were on their way are lost, the store goes on from what it has).
"""

from collections.abc import Callable

import pytest
from engine_rig import STORE_ID, Rig, check_books, store_content

from forebay_cache.engine import destage
from forebay_cache.engine.attaching import StoreView
from forebay_cache.engine.front import IoError
from forebay_cache.engine.ports import UpstreamRefusal
from forebay_core.units import BLOCK_SIZE
from forebay_wire import messages

BLOCKS = 24


class Handover(Rig):
    """Counts completions and calls `crash` before one of them; what the store shows is looked at after each.

    Its way upstream is as the shell's: a request is repeated after a reconnect until it is answered.
    """

    def __init__(self, limited: bool) -> None:
        self.counting = False
        self.steps = 0
        self.crash_at = -1
        self.deaf = False  # answers are lost on their way
        self.requests: dict[int, Callable[[], None]] = {}
        self.states: list[bytes] = []
        self.shown = 0
        super().__init__(7, size=8 << 20, blocks=64, cut_age_ns_max=1, cut_blocks_max=8)
        self.device.now_share = 1.0
        self.states.append(bytes(self.size))
        if limited:
            settled: list[bool] = []
            self.engine.set_limit(self.volume, settled.append, average=512 << 10, peak=512 << 10)
            self.run_until(lambda: bool(settled))
        for verb in ("stage", "commit"):
            call = getattr(self.store, verb)
            setattr(self.store, verb, lambda *words, call=call: self.ask(call, *words))

    def ask(self, call: Callable[..., None], *words: object) -> None:
        *rest, done = words
        number = max(self.requests, default=0) + 1

        def answered(answer: object) -> None:
            if not self.deaf and self.requests.pop(number, None) is not None:
                done(answer)  # type: ignore[operator]

        self.requests[number] = lambda: call(*rest, answered)
        self.requests[number]()

    def step(self) -> bool:
        if self.counting and (self.device.queue or self.device.writes or self.store.queue):
            if self.steps == self.crash_at:
                self.crash_at = -1
                self.counting = False
                self.crash()
                self.counting = True
            self.steps += 1
        stepped = self.device.step() or self.store.step()
        if self.states:
            shown = self.states.index(store_content(self.store.plain(), self.size))
            assert shown >= self.shown, "the store goes back"
            self.shown = shown
        return stepped

    def crash(self) -> None:
        """Nothing breaks; the kinds below break something."""

    def change(self, payload: bytes, lba: int) -> None:
        """Write blocks; the state that follows is known before it can be shown."""
        model = bytearray(self.states[-1])
        model[lba * BLOCK_SIZE : lba * BLOCK_SIZE + len(payload)] = payload
        self.states.append(bytes(model))
        assert self.write(lba * BLOCK_SIZE, payload) == IoError.OK


def begin(kind: type[Handover], limited: bool, crash_at: int) -> Handover:
    rig = kind(limited)
    rig.change(b"a" * (BLOCKS * BLOCK_SIZE), 0)
    rig.counting, rig.crash_at = True, crash_at
    return rig


class CacheKilled(Handover):
    """kill -9: what was under way to the store never arrives."""

    power = False

    def crash(self) -> None:
        self.requests.clear()
        self.store.queue.clear()
        self.restart(power=self.power)
        check_books(self.engine)
        found = self.states.index(self.content())
        assert self.shown <= found, "the store ran ahead of the device"
        assert self.power or found == len(self.states) - 1, "an acknowledged write is lost"
        del self.states[found + 1 :]


class PowerCut(CacheKilled):
    """And what no sync covered is torn."""

    power = True


class CacheKilledStoreGoesOn(CacheKilled):
    """What was under way arrives and is done, and nobody hears of it."""

    def crash(self) -> None:
        self.deaf = True
        while self.store.step():
            pass
        self.deaf = False
        super().crash()


class StoreKilled(Handover):
    """What it had not done is lost; the cache asks again on the next connection."""

    def crash(self) -> None:
        self.store.queue.clear()
        view = StoreView(self.volume.id, "v", self.size, self.store.epoch, self.store.version, STORE_ID)
        self.engine.attaching.reopened(self.volume, view)
        for again in list(self.requests.values()):
            again()


class AnswersLost(StoreKilled):
    """It had done it all, acknowledgements were lost after it applied the cut."""

    def crash(self) -> None:
        self.deaf = True
        while self.store.step():
            pass
        self.deaf = False
        super().crash()


def hand_over(rig: Handover) -> None:
    """Drain, and go on until the acknowledgement is noted and durable here; crashes on the way if it was told to."""
    rig.engine.destage.drain(rig.volume, lambda _: None)
    while rig.step() or rig.volume.has_changes:
        if not (rig.device.queue or rig.device.writes or rig.store.queue):
            rig.tick()


def count_steps(kind: type[Handover], limited: bool) -> int:
    rig = begin(kind, limited, -1)
    hand_over(rig)
    return rig.steps


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a cut of three parts."""
    monkeypatch.setattr(destage, "PART_BLOCKS", BLOCKS // 3)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("kind", [CacheKilled, PowerCut, CacheKilledStoreGoesOn, StoreKilled, AnswersLost])
def test_a_crash_between_any_two_steps_loses_nothing(kind: type[Handover], limited: bool) -> None:
    run_handover(kind, limited)


def run_handover(kind: type[Handover], limited: bool) -> None:
    steps = count_steps(kind, limited)
    assert steps >= 9, "a sync, three parts built and staged, a commit, its note"
    for crash_at in range(steps):
        rig = begin(kind, limited, crash_at)
        hand_over(rig)
        assert rig.crash_at < 0
        rig.change(b"b" * (4 * BLOCK_SIZE), 2)  # a later cut overwrites some of it
        assert rig.drain(), (crash_at, rig.reports)
        assert rig.content() == rig.states[-1]
        assert store_content(rig.store.plain(), rig.size) == rig.states[-1]
        assert not rig.volume.cuts
        moving = rig.engine.destage
        assert (moving._parts, moving._slices, moving._limited_blocks) == (0, 0, 0)
        check_books(rig.engine)


def acknowledged_when_sent(patch: pytest.MonkeyPatch) -> None:
    def commit(self, volume, cut) -> None:
        plain(self, volume, cut)
        self._acknowledged(volume, cut, cut.last_version)

    plain = destage.Destage._commit
    patch.setattr(destage.Destage, "_commit", commit)


def sent_before_sync(patch: pytest.MonkeyPatch) -> None:
    def close(self, volume) -> None:
        when_durable = self._engine.log.when_durable
        self._engine.log.when_durable = lambda position, settled: settled(True)
        plain(self, volume)
        self._engine.log.when_durable = when_durable

    plain = destage.Destage._close
    patch.setattr(destage.Destage, "_close", close)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(acknowledged_when_sent, CacheKilled), (sent_before_sync, PowerCut)],
    ids=lambda value: value.__name__,
)
def test_a_planted_fault_of_handing_over_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], kind: type[Handover], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        run_handover(kind, False)


def test_writers_go_on_at_every_step_of_a_cut() -> None:
    """Destaging never blocks a writer: between any two steps a write is acknowledged without one more step upstream."""
    for at in range(count_steps(CacheKilled, limited=False)):
        rig = begin(CacheKilled, False, -1)
        rig.engine.destage.drain(rig.volume, lambda _: None)
        while rig.steps < at:
            if not rig.step():
                rig.tick()
        rig.store.away = True
        rig.change(b"c" * BLOCK_SIZE, 1)
        rig.store.away = False


def test_a_volume_the_store_does_not_grant_keeps_no_other_waiting() -> None:
    rig = Rig(3, cut_age_ns_max=1)
    stage = rig.store.stage
    held: list[object] = []
    rig.store.stage = lambda *words: held.append(words)  # type: ignore[method-assign]
    assert rig.write(0, b"a" * (300 * BLOCK_SIZE)) == 0
    for _ in range(200):
        if not rig.step():
            rig.tick()
    assert held
    assert rig.engine.destage._parts > 0
    rig.engine.destage.suspend(rig.volume)
    assert rig.engine.destage._parts == 0
    for _ in range(200):
        if not rig.step():
            rig.tick()
    rig.store.stage = stage  # type: ignore[method-assign]
    held[0][-1](UpstreamRefusal(messages.STORE_BEHIND, "late"))  # type: ignore[index]
    assert not rig.volume.error, "an answer to what was given up is not listened to"
    rig.attach()
    assert rig.drain()
    check_books(rig.engine)


def test_whoever_drains_is_told_when_reopening_finds_that_the_store_has_it_all() -> None:
    """The acknowledgement was lost with the daemon; somebody drains before the store is asked again."""
    rig = Rig(4)
    assert rig.write(0, b"a" * BLOCK_SIZE) == IoError.OK
    rig.engine.destage.suspend(rig.volume)
    drained: list[bool] = []
    rig.engine.destage.drain(rig.volume, drained.append)
    rig.store.version = rig.volume.version
    rig.attach()
    rig.run_until(lambda: bool(drained))
    assert drained == [True]

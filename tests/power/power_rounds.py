"""Rounds of load, power cut, restart and judgement, with a snapshot in each. `make soak` runs hundreds, CI a few; a
failure says how to repeat.

    POWER_SEED=SEED POWER_ROUNDS=N .venv/bin/python -m pytest tests/power/test_power_cut.py

gives the same dice again: whose power goes, when, what of the unsynced is lost, what is written. The scheduling of the
daemons is the machine's, so a rare failure may need several runs.
"""

import random
import threading
from typing import Final

from power_fio import Fio
from power_guest import Guest
from power_load import Stamps
from power_rig import Power, PowerRig
from undo import Undo

from forebay_core.units import BLOCK_SIZE, MIB

STAMPS_BLOCKS: Final = 1024
STAMPS_SIZE: Final = STAMPS_BLOCKS * BLOCK_SIZE
FIO_SIZE: Final = 2 * MIB
GUEST_SIZE: Final = 24 * MIB
POWERS: Final = (Power.BOTH, Power.BOTH, Power.BOTH, Power.HYPERVISOR, Power.HYPERVISOR, Power.SERVER)
FLUSH_SHARES: Final = (0.003, 0.03, 0.1)
COMPANY_SHARE: Final = 0.6
SECOND_CUT_SHARE: Final = 0.3
SECOND_CUT_CHANGES: Final = 16
ROUNDS_PER_FSCK: Final = 5
SNAPSHOTS_KEPT: Final = 2


class Rounds:
    """A rig under all three loads; `run` it, then `close` it in any case."""

    def __init__(self, rig: PowerRig, undo: Undo, seed: int) -> None:
        self._rig = rig
        self._seed = seed
        self._dice = random.Random(seed)
        self._stamps = Stamps(STAMPS_BLOCKS, seed)
        self._content = bytes(STAMPS_SIZE)
        self._snapshots: dict[str, bytes] = {}
        # Small zones and a cache that is smaller than what is written: zones are reclaimed under load.
        rig.cache_size = "12MiB"
        rig.cache_flags = ["--zone-size", "256KiB", "--cut-age-s-max", "0.3"]
        rig.start()
        for name, size in (("stamps", STAMPS_SIZE), ("fio", FIO_SIZE), ("guest", GUEST_SIZE)):
            rig.create(name, size)
        rig.attach("stamps")
        self._fio = Fio(rig.attach("fio"), FIO_SIZE, undo)
        self._guest = Guest(rig.attach("guest"), rig.folder / "guest", undo)
        self._fio.fill()
        self._guest.boot(make=True)

    def run(self, count: int) -> None:
        """Cut the power `count` times.

        Raises:
            AssertionError: something acknowledged was lost, or a daemon did not come back; says which round.
        """
        for index in range(count):
            power = self._dice.choice(POWERS)
            try:
                self._round(power, index)
            except Exception as error:
                raise AssertionError(
                    f"round {index} (power of {power.value}, {self._rig.outcomes[-2:]}): {error}\n"
                    f"repeat with: POWER_SEED={self._seed} POWER_ROUNDS={index + 1} "
                    f".venv/bin/python -m pytest tests/power/test_power_cut.py"
                ) from error

    def close(self) -> None:
        self._fio.stop()
        self._guest.cut()

    @property
    def is_harsh(self) -> bool:
        """Whether flushes were acknowledged and unflushed writes lost: else the rounds prove nothing."""
        return self._stamps.flushes > 0 and self._stamps.lost_unflushed > 0 and self._guest.acknowledged > 0

    @property
    def summary(self) -> str:
        lost = [outcome.lost + outcome.torn for outcome in self._rig.outcomes]
        return (
            f"{len(lost)} disks cut, {sum(lost)} unsynced writes lost or torn, {self._stamps.flushes} flushes, "
            f"{self._stamps.lost_unflushed} unflushed writes gone, SQLite at row {self._guest.acknowledged}"
        )

    def _round(self, power: Power, index: int) -> None:
        # Others' flushes cover these writes as well: alone, and with few of its own, more is at stake.
        if self._dice.random() < COMPANY_SHARE:
            self._fio.start(seed=index)
        if self._dice.random() < COMPANY_SHARE:
            self._guest.write()
        self._rig.run("snapshot", "create", f"stamps@r{index}")  # answered just before the power goes
        self._snapshots[f"r{index}"] = self._content
        self._load_and_cut(power)
        self._fio.stop()
        if power.hits_cache:
            self._guest.cut()
            self._restart(power)
        else:
            self._guest.shut_down()
        content = self._read()
        self._stamps.check(content)
        self._content = content
        wrong = self._fio.whole()
        assert not wrong, wrong
        self._guest.boot()
        self._guest.check()
        if index % ROUNDS_PER_FSCK == 0:
            self._rig.detach("stamps")
            assert self._rig.exported("stamps") == content, "the store shows something else than the cache did"
            self._check_snapshots()
            self._rig.check_store()
            self._rig.attach("stamps")

    def _check_snapshots(self) -> None:
        """Compare each with what was read when it was taken; delete the oldest, so that the store cleans."""
        for name, content in self._snapshots.items():
            assert self._rig.exported(f"stamps@{name}") == content, f"snapshot {name} is not what it was"
        for name in list(self._snapshots)[:-SNAPSHOTS_KEPT]:
            self._rig.run("snapshot", "delete", f"stamps@{name}")
            del self._snapshots[name]

    def _load_and_cut(self, power: Power) -> None:
        """Write until the power goes, or, if only the store's does, until a while later."""
        seed = self._dice.randrange(1 << 32)
        over = threading.Event()
        failed: list[BaseException] = []

        def cut() -> None:
            try:
                self._rig.cut(power, seed)
                if not power.hits_cache:
                    self._rig.power_on(power)
            except BaseException as error:
                failed.append(error)
            finally:
                over.set()

        with self._rig.nbd("stamps") as client:
            timer = threading.Timer(self._dice.uniform(0.05, 1.0), cut)
            timer.start()
            try:
                self._stamps.run(
                    client,
                    depth=self._dice.choice((1, 4, 16)),
                    flush_share=self._dice.choice(FLUSH_SHARES),
                    until=over.is_set,
                )
            finally:
                timer.join()
            if not failed and not power.hits_cache:
                client.flush()
        if failed:
            raise failed[0]

    def _restart(self, power: Power) -> None:
        """Start what lost its power; now and then it goes again while the daemons start."""
        if self._dice.random() < SECOND_CUT_SHARE:
            if power.hits_store:
                self._rig.start_store()
            self._rig.start_cache_until_off(self._dice.randrange(SECOND_CUT_CHANGES))
            self._rig.cut(power, self._dice.randrange(1 << 32))
        self._rig.power_on(power)

    def _read(self) -> bytes:
        with self._rig.nbd("stamps") as client:
            return b"".join(client.read(at, MIB) for at in range(0, STAMPS_SIZE, MIB))

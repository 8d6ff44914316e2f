"""Crash points: one fixed run of 200 operations, and every disk command and message of it is where a program dies.

    sim_points.py [--every] [--seed N]    all points; a line of JSON; exit 1 if a promise was broken
    sim_points.py --point N --kind KIND --who WHO  one of them, in this process

The run goes through once; at each point it forks, and the child is the world in which the crash happens there: what
died starts again, guests go on for a moment, everything heals, and the judges look. Without `--every` the power of the
host that acts is cut at each point; at every third one of a type the other ways to die take their turns, so that each
way comes up at each type of point.

Invariants:
    The parent's run is the same whether it forks or not: a point found in it is found again by its number.
    At most JOBS children live at a time; each ends by itself within CHILD_S_MAX seconds of real time.
"""

import argparse
import asyncio
import collections
import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import sim_books
from sim_cache import CacheHost
from sim_guest import COUNTS
from sim_guest import KINDS as KINDS_OF_REQUEST
from sim_judges import check_rebuilt
from sim_profiles import Profile
from sim_run import MS, Scenario
from sim_store import STORE, SimIndex, StoreHost, small_steps
from sim_world import SimLoop

OPERATIONS = 200
JOBS = 2
CHILD_S_MAX = 120
ACTING, OTHER = "acting", "other"
KINDS = ("kill", "power", "loss", "newest", "checkpoint", "full", "twice")
"""How to die: kill -9; power cut with what survives left to chance; with nothing unsynced surviving; with nothing but
the newest unsynced write; with nothing but those of a checkpoint. Or nobody dies, and the store's disk is full. Or
it dies as by "newest", and again, by kill -9, when it has written a little."""
POWER_CUTS = KINDS[1:5]
WHO = (ACTING, OTHER)
PROFILE = Profile({}, device_size=8 << 20, blocks=100)
SEED = 4


class Crash(NamedTuple):
    """What happens at a point, and to whom: who acts there, or the other end of the connection."""

    kind: str
    who: str


EVERY = tuple(Crash(kind, who) for who in WHO for kind in ("kill", *POWER_CUTS, "twice"))
IN_TURN = (Crash("kill", ACTING), Crash("kill", OTHER), Crash("power", OTHER), Crash("twice", ACTING))


class Workload(NamedTuple):
    """What guests do."""

    kinds: dict[str, int]
    counts: tuple[int, ...]
    depth: int = 4
    away: bool = False  # the store


WORKLOADS = {
    "mixed": Workload(KINDS_OF_REQUEST, COUNTS),
    # Records of one size: when zones are used again, old ones end where new ones do. Few flushes: much to lose.
    "small": Workload({"write": 60, "flush": 1}, (1,), depth=1),
    # The same with all data dirty: when the log has gone round, what is moved exists nowhere else.
    "away": Workload({"write": 60, "flush": 1}, (1,), depth=1, away=True),
}


class PointRun(Scenario):
    """The fixed run. Points are counted from its first operation on, when the log has gone round."""

    def __init__(self, seed: int, workload: str) -> None:
        super().__init__(seed, PROFILE)
        self.workload = workload
        self.number = 0
        self.died: CacheHost | StoreHost | None = None

    @property
    def crashed(self) -> bool:
        """Whether the crash is behind us."""
        return self.died is not None

    def run(self) -> None:
        """Work at one host, move one volume to the other, work on; flushes, cuts, checkpoints and reclaim included."""
        workload = WORKLOADS[self.workload]
        self.begin(depth=workload.depth, pause_ns=10 * MS)
        for guest in self.guests.values():
            guest.kinds, guest.counts = workload.kinds, workload.counts
            guest.unaligned = 0.0 if workload.away else guest.unaligned  # what must be merged would wait
        if workload.away:
            self.network.down_ns = 1 << 62
        self.world.run(self._has_gone_round, limit_s=60)
        for guest in self.guests.values():
            guest.requests = 0
        self.world.on_point = self._on_point
        self._work(OPERATIONS // 2)
        if not self.crashed:
            self.caches[0].engine.checkpoints.want()
            self._work(OPERATIONS * 3 // 4)
        if not self.crashed:
            if not workload.away:
                self._move_green()
            self._work(OPERATIONS)
        self.world.run_for(60 * MS)
        self.end()

    def _has_gone_round(self) -> bool:
        reclaim = self.caches[0].engine.reclaim
        return reclaim.dropped_blocks + reclaim.moving.moved_blocks > 0

    def _work(self, goal: int) -> None:
        while sum(guest.requests for guest in self.guests.values()) < goal and not self.crashed:
            self.world.run_for(2 * MS)

    def _move_green(self) -> None:
        self.caches[0].command(lambda: self.caches[0].shell.detach("green", leave_dirty=False))
        self.place(self.guests["green"], self.caches[1])

    def _on_point(self, text: str) -> Sequence[SimLoop]:
        self.number += 1
        return self.struck(text)

    def struck(self, text: str) -> Sequence[SimLoop]:
        """Return who dies at this point."""
        return []

    def finish(self) -> None:
        """Look at all that guests and readers see, and most closely at what died."""
        if not self.crashed:
            super().finish()
            return
        self.judge.shown(self.store.index, self.store.backend, all_of_it=True)
        if self.died is self.store:
            check_rebuilt(self.store.index, self.store.backend, SimIndex(), store=STORE)
        for host in self.caches:
            if host.running:
                sim_books.check_engine(host.engine, host.device.writes_max)
            if host is self.died:
                sim_books.check_recovers(host.disk.read)

    def crash(self, text: str, crash: Crash) -> Sequence[SimLoop]:
        """Let a program die here; once more if it dies twice."""
        self.world.on_point = None
        host = self.died = self._host_of(text, crash.who)
        self.world.note(
            f"--- point {self.number} ({text}): {crash.kind} {'store' if isinstance(host, StoreHost) else host.name}"
        )
        if crash.kind == "full":
            self.store.folder.full = True
        if crash.kind == "full" or host.loop is None:
            return []
        host.power_goes = crash.kind != "kill"
        disk = host.folder if isinstance(host, StoreHost) else host.disk
        disk.outcome = "" if crash.kind in ("kill", "power") else crash.kind
        if crash.kind == "twice":
            disk.outcome = "newest"
            self._strike_again(host, self.number % 4)
        return [host.loop]

    def _strike_again(self, host: CacheHost | StoreHost, left: int) -> None:
        dead = host.loop
        second = "store segment is durable" if isinstance(host, StoreHost) else f"{host.name} write ends"

        def on_point(text: str) -> Sequence[SimLoop]:
            nonlocal left
            if host.loop in (dead, None) or text != second:
                return []
            left -= 1
            if left >= 0 or host.loop is None:
                return []
            self.world.on_point = None
            return [host.loop]

        self.world.on_point = on_point

    def _host_of(self, text: str, who: str) -> CacheHost | StoreHost:
        """Messages act where they arrive."""
        actor = text.split(" ", 1)[0].rpartition(">")[2]
        names = [host for host in self.caches if host.name in text.split(" ", 1)[0].split(">")]
        cache = names[0] if names else self.guests["green"].host or self.caches[0]
        if (actor == "store") == (who == ACTING):
            return self.store
        return cache


class OnePoint(PointRun):
    """Crashes at the point of a number."""

    def __init__(self, seed: int, workload: str, point: int, crash: Crash) -> None:
        super().__init__(seed, workload)
        self._point = point
        self._crash = crash

    def struck(self, text: str) -> Sequence[SimLoop]:
        """See PointRun."""
        return self.crash(text, self._crash) if self.number == self._point else []


class AllPoints(PointRun):
    """Forks at each point, once for each way to die that `every` names, or for those whose turn it is."""

    def __init__(self, seed: int, workload: str, every: Sequence[Crash], only: str, *, stop_early: bool) -> None:
        super().__init__(seed, workload)
        self.types: collections.Counter[str] = collections.Counter()
        self.crashes_of: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self._every = every
        self._only = only
        self._stop_early = stop_early
        self._children: dict[int, tuple[int, str]] = {}  # pid: where its complaint comes from, and how to repeat it

    def struck(self, text: str) -> Sequence[SimLoop]:
        """See PointRun."""
        kind = type_of(text)
        self.types[kind] += 1
        if self._only not in text or (self._stop_early and self.failures):
            return []
        for crash in self._every or _turns(self.types[kind] - 1):
            self.crashes_of[f"{kind}: {crash.kind} {crash.who}"] += 1
            if self._fork(crash):
                return self.crash(text, crash)
        return []

    def _fork(self, crash: Crash) -> bool:
        """Return whether this is the child now."""
        while len(self._children) >= JOBS:
            self._reap()
        complaint, write_end = os.pipe()
        running = asyncio._get_running_loop()
        pid = os.fork()
        if pid:
            os.close(write_end)
            os.read(complaint, 1)  # until the child has its own disks: those of this process go on changing
            self._children[pid] = (
                complaint,
                f"--seed {self.world.seed} --workload {self.workload} --point {self.number} "
                f"--kind {crash.kind} --who {crash.who}",
            )
            return False
        os.close(complaint)
        asyncio._set_running_loop(running)  # asyncio forgets it in a child
        signal.alarm(CHILD_S_MAX)
        self._complain_to = write_end
        for host in self.caches:
            host.disk.part_from_parent()
        os.write(write_end, b"\n")
        return True

    def _reap(self) -> None:
        pid, status = os.wait()
        complaint, arguments = self._children.pop(pid)
        with os.fdopen(complaint) as stream:
            text = stream.read()
        if status:
            how = text or f"it ended with status {status:#x}"
            self.failures.append(f"{how}\nrun again: .venv/bin/python tests/sim/sim_points.py {arguments}")

    def collect(self) -> None:
        """Run all of it."""
        try:
            self.run()
        except BaseException:
            if not self.crashed:
                raise
            os.write(self._complain_to, traceback.format_exc()[-30_000:].encode())
            os._exit(1)
        if self.crashed:
            os._exit(0)
        while self._children:
            self._reap()


def type_of(text: str) -> str:
    """Return what kind of point it is, whichever host it is at."""
    where, _, what = text.partition(" ")
    return " ".join((">".join(name if name == "store" else "cache" for name in where.split(">")), what))


def _turns(turn: int) -> list[Crash]:
    """Return the ways to die at a point, by how many points of its type came before it."""
    ways = [Crash(POWER_CUTS[turn % len(POWER_CUTS)], ACTING)]
    if turn < len(IN_TURN):
        ways.append(IN_TURN[turn])
    elif turn % 3 == 0:
        ways.append(IN_TURN[turn // 3 % len(IN_TURN)])
    return ways


def run_points(
    every: Sequence[Crash] = (),
    *,
    seed: int = SEED,
    workload: str = "mixed",
    only: str = "",
    stop_early: bool = False,
) -> AllPoints:
    """Take each point, or those with `only` in their text; with `stop_early` until a promise is broken."""
    run = AllPoints(seed, workload, every, only, stop_early=stop_early)
    with small_steps():
        run.collect()
    return run


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="mixed")
    parser.add_argument("--every", action="store_true", help="each way to die at each point")
    parser.add_argument("--point", type=int)
    parser.add_argument("--kind", choices=KINDS, default="power")
    parser.add_argument("--who", choices=WHO, default=ACTING)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    gc.disable()
    if options.point is not None:
        one = OnePoint(options.seed, options.workload, options.point, Crash(options.kind, options.who))
        try:
            with small_steps():
                one.run()
        finally:
            print("\n".join(one.world.trail))
        return 0
    done = run_points(EVERY if options.every else (), seed=options.seed, workload=options.workload)
    counted = {"points": done.number, "crashes": done.crashes_of.total(), "ways": done.crashes_of}
    print(json.dumps(counted | {"failures": done.failures}))
    return int(bool(done.failures))


if __name__ == "__main__":
    sys.exit(main())

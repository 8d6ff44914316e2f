"""Runs of the whole system under one seed: `python tests/sim/sim_run.py SEED` repeats one, byte for byte.

    sim_run.py SEED [--profile NAME] [--trail]     one run; prints its digest
    sim_run.py --seeds FIRST:END                   many, one line of JSON for each; exit 1 if any failed

A run: two volumes, two cache hosts and a store; guests work while what may go wrong does. At the end everything heals,
and what guests wrote must be what the store shows. Profiles choose what goes wrong; without one the seed does.
"""

import argparse
import gc
import json
import logging
import sys
import traceback
from collections.abc import Callable

import sim_books
import sim_offline
import sim_pasts
from sim_cache import CacheHost
from sim_guest import Guest, LeftBehind
from sim_judges import Branch, Official, StoreJudge, check_rebuilt
from sim_net import Network
from sim_profiles import PROFILES, Profile, choose_profile
from sim_store import STORE, SimIndex, StoreHost, small_steps
from sim_world import SimLoop, Violation, World

from forebay_cache.engine.cache import EngineSettings
from forebay_cache.engine.volume import CacheVolume
from forebay_cache.format.record import RECORD_ENTRIES_MAX
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, RATE_MIN
from forebay_wire import messages

MS = 1_000_000
NAMES = ("red", "green")


class Scenario:
    """One run."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.world = World(seed)
        self.profile = profile
        self.random = self.world.rng("scenario")
        self.network = Network(self.world)
        self.judge = StoreJudge()
        self.store = StoreHost(self.world, self.network, self._shown)
        self.store.died = lambda: self._restart_later(self.store)
        settings = EngineSettings(
            cut_blocks_max=60,
            cut_age_ns_max=self.random.choice((100, 300, 1000)) * MS,
            retry_ns=300 * MS,
            sweep_step_blocks=8,
            record_blocks=self.world.rng("records").choice((RECORD_ENTRIES_MAX, 12)),  # else none has several
        )
        self.caches = [
            CacheHost(self.world, name, self.network, self.store, size=profile.device_size, settings=settings)
            for name in ("a", "b")
        ]
        for host in self.caches:
            host.died = lambda host=host: self._restart_later(host)  # type: ignore[misc]
            host.recovered = lambda volume, branch, power, host=host: self._recovered(host, volume, branch, power)  # type: ignore[misc]
            host.closing = self._closing
            host.fenced = self._fenced
        self.guests: dict[str, Guest] = {}
        self.left_behind: list[LeftBehind] = []
        self.frozen = b""  # what the snapshot of the first volume shows for ever
        self.healed = False
        self.crashes = self.snapshots = 0

    # --- the world's reactions --------------------------------------------------------------------------------

    def _shown(self) -> None:
        self.judge.shown(self.store.index, self.store.backend, damaged=bool(self.world.excuses))

    def _restart_later(self, host: CacheHost | StoreHost) -> None:
        self.crashes += 1
        self.world.at(self.random.choice((1, 30, 400, 3000)) * MS, self._restart, host)

    def _restart(self, host: CacheHost | StoreHost) -> None:
        if host.loop is None and not host.refused:
            if isinstance(host, CacheHost) and not self.world.excuses:
                sim_offline.check_offline(host)
            host.start()

    def _recovered(self, host: CacheHost, volume: CacheVolume, branch: Branch, power: bool) -> None:
        guest = self.guests.get(volume.name)
        if guest is not None:
            guest.recovered(host, volume, branch, power)

    def _fenced(self, volume: CacheVolume, text: str) -> None:
        """A device was told that it lost a volume for good."""
        if self.judge.volumes[volume.id].epoch <= volume.epoch and not self.world.excuses:
            raise Violation(f"{volume.name} was taken from its device, and nobody has it: {text}")

    async def _closing(self, name: str) -> None:
        if name in self.guests:
            await self.guests[name].closing()

    def _watch(self) -> None:
        """What an operator's supervisor does: look at the daemons from time to time, restart those that gave up."""
        for host in self.caches:
            if host.running:
                if host.device.failed:
                    self._power_off(host) if host.disk.sync_failed else host.kill()
                else:
                    sim_books.check_engine(host.engine, host.device.writes_max)
        if self.store.broken:
            self.store.cut_power()
        self.world.at(200 * MS, self._watch)

    def _power_off(self, host: CacheHost) -> None:
        host.cut_power()

    # --- the run ----------------------------------------------------------------------------------------------

    def begin(self, *, depth: int, pause_ns: int) -> None:
        """Start everything and attach both volumes at the first host."""
        self.store.start()
        names = NAMES[:1] if self.profile.family else NAMES
        for name in names:
            self._create(messages.CreateVolume(name, self.profile.blocks * BLOCK_SIZE), depth=depth, pause_ns=pause_ns)
        for host in self.caches:
            host.start()
        for guest in self.guests.values():
            self.place(guest, self.caches[0])
        if self.profile.family:
            self._create(self._clone(NAMES[1]), depth=depth, pause_ns=pause_ns)
            for guest in self.guests.values():
                self.place(guest, self.caches[0])
        self._watch()

    def _create(self, message: messages.CreateVolume | messages.CloneVolume, *, depth: int, pause_ns: int) -> None:
        """Make a volume at the store, and a guest for it."""
        created = self.store.ask(message)
        assert isinstance(created, messages.Volume)
        official = Official(created.row.id, message.name)
        official.version = created.row.version
        for guest in self.guests.values():  # there is one already if this is its clone
            official.state = dict(self.judge.volumes[guest.id].state) if self.frozen else {}
        self.judge.volumes[created.row.id] = official
        for host in self.caches:
            host.officials[created.row.id] = official
        self.guests[message.name] = Guest(
            self.world, message.name, created.row.id, created.row.size, depth=depth, pause_ns=pause_ns
        )

    def _clone(self, name: str) -> messages.CloneVolume:
        """Let the first guest write, take a snapshot of its volume while nobody holds it; return what makes a clone."""
        first = self.guests[NAMES[0]]
        self.world.run_for(self.random.randrange(200, 1500) * MS)
        host = first.host
        assert host is not None
        host.command(lambda: host.shell.detach(first.name, leave_dirty=False))
        official = self.judge.volumes[first.id]
        official.ask(official.state)
        taken = self.store.ask(messages.CreateSnapshot((first.name,), "s"))
        assert isinstance(taken, messages.SnapshotTaken), taken
        self.frozen = b"".join(official.state.get(lba, bytes(BLOCK_SIZE)) for lba in range(first.size // BLOCK_SIZE))
        return messages.CloneVolume(first.name, "s", name)

    def run(self) -> None:
        """All of it."""
        self.begin(depth=self.random.choice((1, 4, 12)), pause_ns=self.random.choice((8, 20, 40)) * MS)
        names, weights = zip(*self.profile.weights.items(), strict=True)
        for _ in range(self.profile.rounds):
            self.world.run_for(self.random.randrange(400) * MS)
            if any(host.refused for host in (*self.caches, self.store)):
                break
            action = self.random.choices(names, weights)[0]
            self.world.note(f"--- {action}")
            getattr(self, action)()
        self.end()

    def end(self) -> None:
        """Heal everything; what guests wrote must be there, and in the store."""
        self.heal()
        if self.store.refused:
            return
        self._tell_all()
        self.world.run(self._all_decided, limit_s=60)
        for host in self.caches:
            if host.refused:
                self.lose_ssd(host)
        if self.store.refused:
            return
        for guest in self.guests.values():
            self.settle(guest)
            if not self.prove(guest):  # its host had lost the volume and did not know
                self.settle(guest)
                if not self.prove(guest):
                    raise Violation(f"{guest.name} can't be drained though nothing is wrong: {guest.broken}")
        self.finish()
        for guest in self.guests.values():
            guest.unplug()

    def _all_decided(self) -> bool:
        if any(host.running and host.device.failed for host in self.caches) or self.store.broken:
            return False
        return all(host.loop is not None or host.refused for host in (self.store, *self.caches))

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.healed = True
        self.world.on_point = None
        self.network.heal()
        self.store.folder.full = self.store.index.full = self.store.folder.broken = False
        for host in self.caches:
            host.disk.slow = host.disk.fail_write = host.disk.fail_sync = False

    def settle(self, guest: Guest) -> None:
        """See to it that a guest is served and idle."""
        guest.writing = False
        self.world.run(self._all_decided, limit_s=60)  # whoever settled another guest may have killed its host
        served = guest.host is not None and guest.host.running
        if guest.broken or guest.volume is None or guest.volume.error or not served:
            self.place(guest, guest.host or self.caches[0])
        self.world.run(lambda: guest.idle or bool(guest.broken), limit_s=200)

    def prove(self, guest: Guest) -> bool:
        """Read everything, flush, drain, and compare with the store; False if the guest's host lost the volume."""
        if guest.broken and self.world.excuses:
            return True
        guest.read_all()
        guest.flush()
        self.world.run(lambda: guest.idle or bool(guest.broken), limit_s=200)
        assert guest.host is not None
        host = guest.host
        answer = host.command(lambda: host.shell.drain(guest.name))
        if guest.broken or isinstance(answer, ForebayError):
            guest.broken = guest.broken or str(answer)
            return bool(self.world.excuses)
        official = self.judge.volumes[guest.id]
        if official.state != guest.branch.live:
            raise Violation(f"{guest.name} is drained, and the store shows something else than its guest wrote")
        answered = {version for version in guest.branch.snapshots.values() if version <= official.version}
        if not answered <= {version for version, _ in official.snapshots.values()} and not self.world.excuses:
            raise Violation(f"{guest.name} is drained, and the store lacks a snapshot that was answered")
        return True

    def finish(self) -> None:
        """Look at everything once more."""
        damaged = bool(self.world.excuses)
        self.judge.shown(self.store.index, self.store.backend, all_of_it=True, damaged=damaged)
        if not damaged:
            check_rebuilt(self.store.index, self.store.backend, SimIndex(), store=STORE)
        for host in self.caches:
            if host.running:
                sim_books.check_engine(host.engine, host.device.writes_max)
            if not damaged:
                sim_books.check_recovers(host.disk.read)

    def close(self) -> None:
        """Let every program die, and give the disks back."""
        for host in (*self.caches, self.store):
            host.died = lambda: None
            host.kill()
        for cache in self.caches:
            cache.disk.close()

    # --- placing guests ---------------------------------------------------------------------------------------

    def place(self, guest: Guest, host: CacheHost) -> None:
        """Serve a guest at a host, or where it can be; at last with a new SSD."""
        guest.unplug()
        other = self.caches[1 - self.caches.index(host)]
        for one in (host, other, host, other, host, other):
            if self._attach(guest, one):
                return
            self.world.run_for(500 * MS)
        for one in (host, other):
            self.lose_ssd(one)
            for _ in range(20):
                if self._attach(guest, one):
                    return
                self.world.run_for(1000 * MS)
        if not self.world.excuses:
            raise Violation(f"{guest.name} can't be attached anywhere")
        guest.broken = "nowhere"

    def _attach(self, guest: Guest, host: CacheHost) -> bool:
        if not host.running:
            return False
        for left in self.left_behind:
            if (left.volume_name, left.host) == (guest.name, host):
                left.unplug()  # from here on the host may have the volume anew
        if guest.left is host.loop:
            host.kill()  # what the guest left behind there would change the volume under it
            return False
        volume = host.attach(guest.name, take_over=True)
        if not isinstance(volume, CacheVolume):
            self.world.note(f"{host.name} does not attach {guest.name}: {volume}")
            return False
        if volume.error or host.tap.branches.get(volume.id) is None:
            return False
        if volume.epoch < self.judge.volumes[volume.id].epoch:
            self.network.cut(host.loop)  # it was not told yet that it lost the volume; a reconnect tells it
            return False
        guest.plug(host, volume)
        return True

    # --- the family -------------------------------------------------------------------------------------------

    def read_snapshot(self) -> None:
        """Serve the snapshot at any host, beside whatever else it does, and read it."""
        host = self.random.choice(self.caches)
        if not host.running:
            return
        volume = host.attach_snapshot(f"{NAMES[0]}@s")
        if not isinstance(volume, CacheVolume):
            self.world.note(f"{host.name} does not attach the snapshot: {volume}")
            return
        for _ in range(self.random.choice((1, 5, 20))):
            offset = self.random.randrange(len(self.frozen) - 1)
            length = min(self.random.choice((1, 4096, 65536)), len(self.frozen) - offset)
            found = host.read(volume, offset, length)
            if found is None:
                return
            if found != self.frozen[offset : offset + length] and not (host.device.failed or self.world.excuses):
                raise Violation(f"{host.name}: the snapshot reads otherwise at {offset}, or not at all: {found[:9]!r}")

    def flatten(self) -> None:
        """Cut the clone's tie to the snapshot, a few blocks at a time beside whatever else happens."""
        if self.store.running:
            self.store.ask(messages.FlattenVolume(NAMES[1]))

    def leave_snapshot(self) -> None:
        """Serve the snapshot no more."""
        host = self.random.choice(self.caches)
        if host.running:
            host.command(lambda: host.shell.detach(f"{NAMES[0]}@s", leave_dirty=False))

    # --- what goes wrong --------------------------------------------------------------------------------------

    def _strike(self, host: CacheHost | StoreHost, *, power: bool) -> None:
        """Crash a program at one of the next points."""
        left = self.random.randrange(1, 150)

        def on_point(text: str) -> list[SimLoop]:
            nonlocal left
            left -= 1
            if left or host.loop is None:
                return []
            self.world.on_point = None
            host.power_goes = power
            return [host.loop]

        self.world.on_point = on_point

    def _host(self) -> CacheHost:
        served = [guest.host for guest in self.guests.values() if guest.host is not None]
        return self.random.choice(served or self.caches)

    def crash_cache(self) -> None:
        self._strike(self._host(), power=self.random.random() < 0.5)

    def power_cache(self) -> None:
        self._strike(self._host(), power=True)

    def crash_store(self) -> None:
        self._strike(self.store, power=self.random.random() < 0.5)

    def power_store(self) -> None:
        self._strike(self.store, power=True)

    def cut_network(self) -> None:
        self.network.cut(self.random.choice([None, *(host.loop for host in self.caches)]))

    def partition(self) -> None:
        self.network.down_ns = self.world.now_ns + self.random.choice((100, 1000, 6000)) * MS

    def lose_opens(self) -> None:
        """The network goes, and comes back, and goes again while a daemon opens its volumes."""
        host = self._host()
        self.network.cut(host.loop)
        for connected in (False, True):
            self.world.run(lambda now=connected: not host.running or host.session.connected == now, limit_s=20)  # type: ignore[misc]
        self.network.down_ns = self.world.now_ns + 7000 * MS

    def slow_network(self) -> None:
        self.network.slow = not self.network.slow

    def slow_disk(self) -> None:
        disk = self._host().disk
        disk.slow = not disk.slow

    def full_store(self) -> None:
        which = self.random.choice((self.store.folder, self.store.index))
        which.full = True

        def free() -> None:
            which.full = False

        self.world.at(self.random.choice((100, 1000, 4000)) * MS, free)

    def break_store(self) -> None:
        self.store.folder.broken = True

    def break_device(self) -> None:
        disk = self._host().disk
        if self.random.random() < 0.5:
            disk.fail_write = True
        else:
            disk.fail_sync = True

    def jump_clock(self) -> None:
        host = self._host()
        host.wall_skew_ns += self.random.choice((-3600, 3600, 86400)) * 1000 * MS
        host.clock_skew_ns += self.random.choice((0, 1, 120)) * 1000 * MS
        host.wall_skew_ns = max(host.wall_skew_ns, -500 * MS)

    def take_over(self) -> None:
        """Serve a guest elsewhere while its host still believes it has it."""
        guest = self.random.choice(list(self.guests.values()))
        host = self._host()
        self.place(guest, self.caches[1 - self.caches.index(guest.host or host)])

    def leave_behind(self) -> None:
        """Take over while a machine reads on, or is idle, where the volume was, cached or not."""
        guest = self.random.choice(list(self.guests.values()))
        guest.writing = False
        self.world.run(lambda: guest.idle or bool(guest.broken), limit_s=200)
        guest.writing = True
        host = guest.host
        if host is None or not host.running or guest.broken or guest.volume is None or guest.volume.error:
            return
        self.left_behind.append(LeftBehind(guest, idle=self.random.random() < 0.5))
        self.place(guest, self.caches[1 - self.caches.index(host)])
        if self.random.random() < 0.5:
            self._tell_all()

    def _tell_all(self) -> None:
        """Who was left behind is refused in the end, whatever it does."""
        self.world.run(lambda: all(left.told or not left.lost for left in self.left_behind), limit_s=60)

    def move(self) -> None:
        """Detach cleanly, perhaps grow, attach elsewhere."""
        guest = self.random.choice(list(self.guests.values()))
        host = guest.host
        if host is None or not host.running:
            return
        self.network.heal()
        host.command(lambda: host.shell.detach(guest.name, leave_dirty=False))
        if self.random.random() < 0.5 and self.store.running:
            size = min(guest.size + 8 * BLOCK_SIZE, 230 * BLOCK_SIZE)
            self.store.ask(messages.ResizeVolume(guest.name, size))
        self.place(guest, self.random.choice(self.caches))

    def leave_dirty(self) -> None:
        guest = self.random.choice(list(self.guests.values()))
        host = guest.host
        if host is None or not host.running:
            return
        host.command(lambda: host.shell.detach(guest.name, leave_dirty=True))
        self.world.run_for(self.random.choice((1, 1000)) * MS)
        self.place(guest, host)

    def clean(self) -> None:
        """The store cleans; what comes next may strike in the middle of it."""
        if self.store.running:
            self.store.ask(messages.CleanStore())
            self.world.run_for(self.random.choice((0, 1, 10, 100, 1500)) * MS)

    def roll_back(self) -> None:
        guest = self.random.choice(list(self.guests.values()))
        if guest.host is not None and guest.host.running:
            self.network.heal()
            sim_pasts.roll_back(guest, guest.host, self.store, self.judge.volumes[guest.id], self.random)
            self.place(guest, self.random.choice(self.caches))

    def delete_snapshot(self) -> None:
        guest = self.random.choice(list(self.guests.values()))
        sim_pasts.delete_snapshot(guest, self.store, self.judge.volumes[guest.id], self.random)

    def drain(self) -> None:
        guest = self.random.choice(list(self.guests.values()))
        host = guest.host
        if host is not None and host.running:
            self.network.heal()
            host.command(lambda: host.shell.drain(guest.name))

    def lose_ssd(self, host: CacheHost | None = None) -> None:
        """The SSD is gone: its volumes come back as what the store has."""
        host = host or self._host()
        moved = [guest for guest in self.guests.values() if guest.host is host]
        for guest in moved:
            guest.unplug()
        if host.loop is not None:
            host.kill()
        host.replace_disk()
        host.start()
        for guest in moved:
            self.place(guest, host)

    def damage_cache(self) -> None:
        disk = self._host().disk
        kind = self.random.randrange(3)
        text = disk.rot() if kind == 0 else disk.lose_write(misdirect=kind == 2)
        if text:
            self._damaged(f"{disk.name}: {text}")

    def unreadable(self) -> None:
        """Some blocks of an SSD can't be read any more."""
        disk = self._host().disk
        for _ in range(self.random.choice((1, 3, 20))):
            blocks = (disk.size - disk.zones_offset) // BLOCK_SIZE
            disk.unreadable.add(disk.zones_offset + self.random.randrange(blocks) * BLOCK_SIZE)
        self._damaged(f"{disk.name}: {len(disk.unreadable)} blocks can't be read")

    def snapshot(self) -> None:
        """Take some snapshots of a running volume while its guest writes on, and the next fault comes."""
        guest = self.random.choice(list(self.guests.values()))
        for _ in range(self.random.choice((1, 1, 2, 4))):
            host = guest.host
            if host is None or not host.running or guest.broken:
                return
            self.snapshots += 1
            self._take(guest, host, f"s{self.snapshots}")
            self.world.run_for(self.random.randrange(60) * MS)

    def _take(self, guest: Guest, host: CacheHost, name: str) -> None:
        branch, away = guest.branch, self.network.down_ns > self.world.now_ns or bool(self.world.excuses)
        stored = not away and self.random.random() < 0.1
        answer = host.command(lambda: host.shell.snapshot(guest.name, name, stored=stored), limit_s=300)
        if isinstance(answer, messages.SnapshotRow):
            branch.took(name, answer.version)

    def grow(self) -> None:
        """Make an attached volume larger."""
        guest = self.random.choice(list(self.guests.values()))
        host, branch = guest.host, guest.branch if guest.host is not None else None
        if host is None or branch is None or not host.running or guest.broken or guest.volume is None:
            return
        size = min(guest.volume.logged_size + 4 * BLOCK_SIZE, 230 * BLOCK_SIZE)
        answer = host.command(lambda: host.shell.resize(guest.name, size), limit_s=300)
        if isinstance(answer, messages.VolumeRow) and guest.host is host and guest.branch is branch:
            guest.grow(answer.size)

    def limit(self) -> None:
        """Limit how fast a volume, or all, is destaged; or lift it."""
        host = self._host()
        if not host.running:
            return
        name = self.random.choice((*NAMES, ""))
        average = RATE_MIN * self.random.choice((0, 1, 1, 2, 8))
        peak = average * self.random.choice((1, 2, 5))
        host.command(lambda: host.shell.limit(name, average=average, peak=peak, reset=average == 0))

    def damage_store(self) -> None:
        text = self.store.folder.rot()
        if text:
            self._damaged(f"store: {text}")

    def _damaged(self, text: str) -> None:
        self.world.note(text)
        self.world.excuses.append(text)


def run_seed(seed: int, profile: str = "") -> Scenario:
    """Run one seed; raises what it violates."""
    scenario = Scenario(seed, PROFILES[profile or choose_profile(seed)])
    try:
        with small_steps():
            scenario.run()
    except BaseException as error:
        error.add_note("what happened last:\n" + "\n".join(scenario.world.trail))
        error.add_note(
            f"run again: .venv/bin/python tests/sim/sim_run.py {seed} --profile {profile or choose_profile(seed)}"
        )
        raise
    finally:
        scenario.close()
    return scenario


def run_many(first: int, end: int, report: Callable[[str], object], profile: str = "") -> bool:
    """Run seeds, all of one profile or each its own; report each as a line of JSON."""
    failed = False
    for seed in range(first, end):
        line: dict[str, object] = {"seed": seed}
        try:
            done = run_seed(seed, profile)
            line |= {"digest": done.world.digest, "events": done.world.events, "shown": done.judge.shown_states}
            line["snapshots"] = done.judge.snapshots_compared
            line |= {"crashes": done.crashes, "simulated_s": done.world.now_ns // 1_000_000_000}
        except (Exception, Violation):
            failed = True
            line["error"] = traceback.format_exc()
        report(json.dumps(line))
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="")
    parser.add_argument("--seeds", metavar="FIRST:END")
    parser.add_argument("--trail", action="store_true", help="print what happened last")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    gc.disable()  # one run is small; between runs there is an explicit collection
    gc.freeze()  # which has nothing to look for in what was imported: that took 7 % of the time
    if options.seeds:
        first, _, end = options.seeds.partition(":")
        return int(
            run_many(int(first), int(end), lambda line: (print(line, flush=True), gc.collect()), options.profile)
        )
    done = run_seed(options.seed, options.profile)
    if options.trail:
        print("\n".join(done.world.trail))
    print(
        f"seed {options.seed}: {done.world.events} events, {done.judge.shown_states} states shown, {done.world.digest}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

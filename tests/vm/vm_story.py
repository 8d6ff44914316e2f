"""What happens to one Debian guest whose only disk is a volume; each step notes what it saw, the tests judge.

The guest keeps writing files whose names are their checksums (guest/writer) while daemons are killed under it.
"""

import itertools
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import vm_debian
from vm_host import HostCache, HostStore
from vm_image import found
from vm_machine import Machine, nbd_drive

from forebay_core.units import MIB

VOLUME: Final = "root"
OUTAGE_S: Final = 10.0
FILES: Final = "/srv/files"
LOG: Final = "/run/written"
BIG: Final = 96 * MIB
COMPLAINTS: Final = "I.O error|ext4-fs (error|warning)|remounted|aborting|blocked for more"
PROGRESS_TIMEOUT_S: Final = 60.0


@dataclass
class Check:
    """A disk that was checked: what e2fsck says after the journal was replayed, and the files on it."""

    code: int
    complaint: str
    sums: dict[str, str] = field(default_factory=dict)


@dataclass
class Story:
    """What was seen; times in seconds."""

    booted_s: float = 0.0
    fetched_blocks: int = 0
    root: str = ""
    cache_outage_s: float = 0.0
    cache_stall_s: float = 0.0
    written_without_store: int = 0
    before_snapshot: list[str] = field(default_factory=list)
    after_snapshot: list[str] = field(default_factory=list)
    snapshot: Check | None = None
    in_guest: dict[str, str] = field(default_factory=dict)
    complaints: str = ""
    log: list[str] = field(default_factory=list)
    mounted: str = ""
    data_sizes: list[int] = field(default_factory=list)
    store_sizes: list[int] = field(default_factory=list)
    end: Check | None = None


def tell(folder: Path) -> Story:
    """Boot a guest from a volume, do everything to it, shut it down."""
    story = Story()
    image = vm_debian.disk()
    with HostStore(folder / "store") as store, HostCache(folder / "cache", store) as cache:
        store.forebay("volume", "import", VOLUME, str(image))
        cache.forebay("attach", VOLUME)
        with Machine(folder / "machine", nbd_drive(cache.socket, VOLUME)) as machine:
            story.booted_s = machine.booted()
            story.fetched_blocks = cache.fetched_blocks()
            story.root = machine.run("cat /proc/self/mounts | grep ' / '")
            start_writer(machine)
            _kill_cache(story, machine, cache)
            _kill_store(story, machine, store)
            _snapshot(story, machine, cache, store, folder)
            _settle(story, machine)
            _trim(story, machine, cache, store)
            machine.shut_down()
        cache.forebay("detach", VOLUME)
        store.forebay("volume", "export", VOLUME, str(folder / "end.raw"))
        story.end = check(folder / "end.raw", folder)
    return story


def written(machine: Machine, at_least: int = 0) -> list[str]:
    """Return the writer's log, once it has so many lines."""
    until = time.monotonic() + PROGRESS_TIMEOUT_S
    while True:
        lines = machine.ask(f"cat {LOG}").text.splitlines()
        if len(lines) >= at_least:
            return lines
        assert time.monotonic() < until, f"the guest's writer does not go on after {lines[-1:]}\n{machine.tail()}"


def names(log: list[str]) -> set[str]:
    """Return the files that are there at the end of a log."""
    there: set[str] = set()
    for line in log:
        sign, name, _ = line.split()
        there.add(name) if sign == "+" else there.discard(name)
    return there


def longest_pause_s(log: list[str]) -> float:
    """Return the longest time between two lines of a log."""
    times = [float(line.split()[2]) for line in log]
    return max(after - before for before, after in itertools.pairwise(times))


def check(disk: Path, folder: Path) -> Check:
    """Replay the journal of a copy of a disk, check it, and take the writer's files out; the copy is deleted."""
    e2fsck = found("e2fsck")
    subprocess.run([e2fsck, "-E", "journal_only", "-y", disk], capture_output=True, check=False)
    done = subprocess.run([e2fsck, "-f", "-n", disk], capture_output=True, text=True, check=False)
    result = Check(done.returncode, done.stdout + done.stderr)
    out = folder / f"{disk.stem}-files"
    out.mkdir()
    subprocess.run([found("debugfs"), "-R", f"rdump {FILES} {out}", disk], capture_output=True, check=True)
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "new"]
    if files:
        sums = subprocess.run(["sha256sum", *files], capture_output=True, text=True, check=True).stdout
        result.sums = {Path(name).name: total for total, name in (line.split() for line in sums.splitlines())}
    disk.unlink()
    return result


def check_elsewhere(store: HostStore, snapshot: str, folder: Path) -> Check:
    """Check a snapshot through a cache of its own, as another host would."""
    with HostCache(folder / f"with-{snapshot}", store) as elsewhere:
        elsewhere.forebay("attach", f"{VOLUME}@{snapshot}")
        copy = folder / f"{snapshot}.raw"
        subprocess.run(["nbdcopy", elsewhere.uri(f"{VOLUME}%40{snapshot}"), copy], check=True)
        elsewhere.forebay("detach", f"{VOLUME}@{snapshot}")
    return check(copy, folder)


def assert_whole(found: Check | None) -> set[str]:
    """The file system needs nothing but its journal, and each file holds what its name says; return their names."""
    assert found is not None
    assert found.code == 0, found.complaint
    assert [name for name, total in found.sums.items() if name != total] == []
    return set(found.sums)


def start_writer(machine: Machine) -> None:
    """Have files written from now on, see `written`."""
    machine.run(f"systemd-run --quiet --unit=writer /usr/local/sbin/writer {FILES} {LOG}")


def stop_writer(machine: Machine) -> dict[str, str]:
    """Have the writer end; return the sums of the files, by name, as the disk has them."""
    machine.run(f"touch {LOG}.stop; while systemctl is-active --quiet writer; do sleep 0.2; done")
    machine.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    lines = machine.run(f"cd {FILES} && sha256sum *").splitlines()
    return {name: total for total, name in (line.split() for line in lines)}


def complaints(machine: Machine) -> str:
    """Return what the kernel of the guest has to say about its disk."""
    return machine.ask(f"dmesg | grep -i -E '{COMPLAINTS}'").text.strip()


def _kill_cache(story: Story, machine: Machine, cache: HostCache) -> None:
    written(machine, 30)
    cache.kill()
    killed = time.monotonic()
    time.sleep(OUTAGE_S)
    cache.start()
    story.cache_outage_s = time.monotonic() - killed
    log = written(machine, len(written(machine)) + 20)
    story.cache_stall_s = longest_pause_s(log)


def _kill_store(story: Story, machine: Machine, store: HostStore) -> None:
    """Writes go on while the store is away; what the guest has to read for them would wait, unless it is cached.

    So the programs have run before, and it looks at the file system's bitmaps here. What that finds is no matter:
    the guest changes them meanwhile.
    """
    machine.run("dumpe2fs /dev/vda >/dev/null 2>&1 || [ $? -ne 127 ]")
    store.kill()
    before = len(written(machine))
    story.written_without_store = len(written(machine, before + 20)) - before
    store.start()


def _snapshot(story: Story, machine: Machine, cache: HostCache, store: HostStore, folder: Path) -> None:
    """Take a snapshot under the writer, and read it through another cache, as another host would."""
    story.before_snapshot = written(machine)
    cache.forebay("snapshot", "create", f"{VOLUME}@live", "--wait")
    story.after_snapshot = written(machine)
    story.snapshot = check_elsewhere(store, "live", folder)


def _settle(story: Story, machine: Machine) -> None:
    """Have the writer end, and everything read back that it wrote."""
    story.in_guest = stop_writer(machine)
    story.log = written(machine)
    story.complaints = complaints(machine)
    story.mounted = machine.run("cat /proc/self/mounts | grep ' / '")


def _trim(story: Story, machine: Machine, cache: HostCache, store: HostStore) -> None:
    """A large file comes and goes, and fstrim tells: the store gives its space back."""
    machine.run(f"head -c {BIG} /dev/urandom >/srv/big && sync")
    for command in ("true", "rm /srv/big && sync && fstrim /"):
        machine.run(command)
        cache.forebay("drain", VOLUME)
        store.forebay("store", "clean", "--wait")
        story.data_sizes.append(store.data_size(VOLUME))
        story.store_sizes.append(store.size)

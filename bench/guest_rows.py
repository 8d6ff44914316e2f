"""Guests that boot Debian from a volume: beside a raw file on the same disk, and ten clones of one image.

Emulated machines (TCG), so a boot is mostly the processor's; what it says of disks is whether anybody has to wait for
ours. A boot is the time until systemd says that the system is running, and each guest is shut down, not cut off.
"""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from fio import BenchError
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, Store, start_both, sync_file

sys.path.append(str(Path(__file__).parents[1] / "tests" / "vm"))
import vm_debian
from vm_image import CannotError
from vm_machine import Machine, file_drive, nbd_drive

CACHE_SIZE = "2GiB"
IMAGE, SNAPSHOT = "image", "image@base"
CLONES = 10
PEER = "raw file"
BLOCK_SIZE = 4096
MIB = 1 << 20


def measure(plan: Plan) -> list[Row]:
    """Return the rows."""
    rows: list[Row] = []
    try:
        with ExitStack() as stack:
            store, cache = start_both(stack, plan.folder, CACHE_SIZE)
            store.command("volume", "import", IMAGE, str(vm_debian.disk()))
            store.command("snapshot", "create", SNAPSHOT, "--wait")
            if "clones" in plan.keys:
                rows += _clones(plan, store, cache)
            if "guest" in plan.keys:
                rows.append(_boots(plan, cache))
    except CannotError as error:
        raise BenchError(str(error)) from error
    return rows


def _boots(plan: Plan, cache: Cache) -> Row:
    note = "emulated Debian, two processors, cache.direct=on on both sides; the volume was booted from before"
    row = Row("guest-boot", "boot from a warm cache over boot from a raw file", "s", Goal(1.15, 1.05, True), note)
    file = plan.folder / "disk.raw"
    shutil.copy(vm_debian.disk(), file)
    sync_file(file)
    cache.command("attach", IMAGE)
    drives = {OURS: nbd_drive(cache.socket, IMAGE), PEER: file_drive(file)}
    _boot(plan, "warm", drives[OURS])
    for number in range(plan.rounds):
        for name in (OURS, PEER) if number % 2 else (PEER, OURS):
            row.add(name, Sample(_boot(plan, f"{number}-{name}", drives[name])))
    return row


def _clones(plan: Plan, store: Store, cache: Cache) -> list[Row]:
    note = f"blocks that came from the store while a cold clone and then {CLONES} more booted, one after another"
    goal = Goal(1.3, 1.1, True)
    whole = Row("clones-read", "read for all boots over one cold boot", "times", goal, note)
    later = Row("clones-later", "read for the later boots over one cold boot", "times", Goal(), note)
    cold = Row("clones-cold", "read for the cold boot", "MiB", Goal(), note)
    seconds = Row("clones-boot", "a later clone's boot over the cold one's", "s", Goal(), note)
    read: list[int] = []
    for number in range(CLONES + 1):
        before = _fetched_blocks(cache)
        store.command("volume", "clone", SNAPSHOT, f"clone{number}")
        seconds_taken = _boot_clone(plan, cache, f"clone{number}")
        read.append(_fetched_blocks(cache) - before)
        seconds.add(OURS if number else "cold", Sample(seconds_taken))
    cold.add(OURS, Sample(read[0] * BLOCK_SIZE / MIB))
    later.add(OURS, Sample(sum(read[1:]) / read[0]))
    whole.add(OURS, Sample(sum(read) / read[0]))
    seconds.samples["cold"] *= CLONES
    return [whole, later, cold, seconds]


def _boot_clone(plan: Plan, cache: Cache, name: str) -> float:
    cache.command("attach", name)
    taken_s = _boot(plan, name, nbd_drive(cache.socket, name))
    cache.command("detach", name)
    return taken_s


def _boot(plan: Plan, name: str, drive: str) -> float:
    with Machine(plan.folder / name.replace(" ", "-"), drive) as machine:
        taken_s = machine.booted()
        machine.shut_down()
    return taken_s


def _fetched_blocks(cache: Cache) -> int:
    found: int = json.loads(cache.command("status", "--json"))["cache"]["policy"]["fetched_blocks"]
    return found

"""The cache daemon killed under load and started again after 10 s: what users of FUSE, loop and qemu's NBD see of it.

fio writes 4 KiB blocks with checksums at random and reads them back at last; any error or difference counts. What is
measured is the longest that a request took, less the 10 s between kill and start: so our start is part of it. Kernel
NBD needs a kernel with nbd: tests/vm looks at it in a guest, where seconds are not those of a machine.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fio import GRACE_S, MIB, BenchError
from qemu_front import RECONNECT_DELAY_S, through_qemu
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import Cache, Store
from service_manager import ServiceManager

VOLUME_SIZE = 128 * MIB
LOAD_SIZE = 64 * MIB
OPERATIONS_PER_S = 1000
OUTAGE_S = 10.0
BEFORE_S = 3.0
STALL_GOAL = Goal(3.0, 1.0, less_is_better=True)
NOTE = (
    f"kill -9 of the cache daemon, start after {OUTAGE_S:g} s, 4 KiB random writes with checksums, d16, read back "
    "at last; stall: the longest request less these seconds; qemu: a qemu-storage-daemon with "
    f"reconnect-delay={RECONNECT_DELAY_S} between the load and us, whose socket is kept as systemd does for our unit"
)
FRONTS = {"fuse": "a FUSE file", "loop": "a loop device", "qemu": "qemu's NBD client"}


def measure(plan: Plan) -> list[Row]:
    """Return the rows of an outage: one daemon, a volume by each front, all under load at once."""
    stalls = {
        kind: Row(f"outage-{kind}", f"stall over a 10 s outage, {what}", "s", STALL_GOAL, NOTE)
        for kind, what in FRONTS.items()
    }
    errors = Row("outage-errors", "loads that saw an error or a difference", "", Goal(0, 0, less_is_better=True), NOTE)
    with ExitStack() as stack:
        store = Store(plan.folder / "store")
        stack.callback(store.stop)
        manager = ServiceManager(plan.folder)
        stack.callback(manager.close)
        cache = Cache(plan.folder / "cache", plan.folder, store=store.address, size="1GiB", manager=manager)
        stack.callback(cache.stop)
        targets = {kind: stack.enter_context(_attached(kind, store, cache, plan.folder)) for kind in FRONTS}
        for _ in range(plan.rounds):
            failed = 0
            for kind, stall_s in _outage(targets, cache, plan.folder).items():
                failed += stall_s is None
                if stall_s is not None:
                    stalls[kind].add(OURS, Sample(stall_s - OUTAGE_S))
            errors.add(OURS, Sample(failed))
    return [*(row for row in stalls.values() if row.samples), errors]


def _outage(targets: dict[str, list[str]], cache: Cache, folder: Path) -> dict[str, float | None]:
    """Return the longest request of each load in seconds; None where something failed."""
    children = {kind: _start_load(kind, target, folder) for kind, target in targets.items()}
    try:
        time.sleep(BEFORE_S)
        cache.kill()
        time.sleep(OUTAGE_S)
        cache.restart(lambda: None)
        for child in children.values():
            child.wait(LOAD_SIZE / 4096 / OPERATIONS_PER_S + GRACE_S)
    except subprocess.TimeoutExpired as error:
        raise BenchError("a load hangs after an outage") from error
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return {kind: _stall_s(folder / f"{kind}.json", child.returncode) for kind, child in children.items()}


def _start_load(kind: str, target: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    words = ["fio", f"--name={kind}", *target, "--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={LOAD_SIZE}"]
    words += [f"--rate_iops={OPERATIONS_PER_S}", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
    words += ["--output-format=json", f"--output={folder / kind}.json"]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _stall_s(report: Path, code: int) -> float | None:
    text = report.read_text()
    if code or "{" not in text:
        return None
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    return None if job["error"] or not job["read"]["total_ios"] else job["write"]["lat_ns"]["max"] / 1e9


@contextmanager
def _attached(kind: str, store: Store, cache: Cache, folder: Path) -> Iterator[list[str]]:
    """Attach a volume of this front; yields what fio opens it by."""
    volume = f"bench-{kind}"
    store.command("volume", "create", volume, "--size", str(VOLUME_SIZE))
    front = "nbd" if kind == "qemu" else kind
    place = json.loads(cache.command("attach", volume, "--front", front))
    try:
        if kind == "qemu":
            with through_qemu(folder, cache.socket, volume) as socket:
                yield ["--ioengine=nbd", f"--uri=nbd+unix:///{volume}?socket={socket}"]
        else:
            yield ["--ioengine=libaio", "--direct=1", f"--filename={place['path']}"]
    finally:
        cache.command("detach", volume, "--timeout", "10")

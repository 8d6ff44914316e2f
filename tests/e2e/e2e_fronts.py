"""Every way into a volume that this host has, with a verifying load on each: for tests of what all fronts promise.

Kernel NBD is the one that is missing: it needs a kernel of its own, see tests/vm.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from e2e_fuse import end_front, fuse_missing, tidy
from e2e_rig import READY_TIMEOUT_S, Rig

from forebay_cache.service import loop_device
from forebay_cache.service.device_links import FOLDER

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from qemu_front import through_qemu

NBD, QEMU, FUSE, LOOP = "nbd", "qemu", "fuse", "loop"
RECONNECTING = (QEMU, FUSE, LOOP)
"""Those that outlive the daemon; who speaks plain NBD has to connect again himself."""

LOAD_TIMEOUT_S = 170.0


def loop_missing() -> str:
    """Say why there are no loop devices here; empty if there are."""
    if fuse_missing():
        return fuse_missing()
    if os.geteuid():
        return "no loop devices: only root makes them"
    return "" if loop_device.CONTROL.exists() else f"no loop devices: there is no {loop_device.CONTROL}"


def fronts_missing() -> str:
    """Say why not all fronts can be had here; empty if they can."""
    if loop_missing():
        return loop_missing()
    return "" if shutil.which("qemu-storage-daemon") else "no qemu-storage-daemon: apt-get install qemu-utils"


class Front:
    """A volume behind one front, as fio sees it."""

    def __init__(self, rig: Rig, kind: str, size: int) -> None:
        self.kind = kind
        self.volume = f"{kind}-{os.getpid()}"
        self.target: list[str] = []
        self._rig = rig
        rig.create(self.volume, size)

    def attach(self, stack: ExitStack) -> None:
        """Attach the volume; the stack takes away what is left of that."""
        rig, stack_front = self._rig, self.kind if self.kind in (FUSE, LOOP) else NBD
        place = json.loads(rig.run("attach", self.volume, "--front", stack_front))
        if self.kind == LOOP:
            stack.callback(take_loop_away, rig, self.volume)
        if self.kind in (FUSE, LOOP):
            self.target = ["--ioengine=libaio", "--direct=1", f"--filename={place.get('link') or place['path']}"]
            return
        socket = rig.run_dir / "nbd.sock"
        if self.kind == QEMU:
            socket = stack.enter_context(through_qemu(rig.folder, socket, self.volume))
        self.target = ["--ioengine=nbd", f"--uri=nbd+unix:///{self.volume}?socket={socket}"]

    def load(self, *flags: str) -> "Load":
        """Start a verifying load."""
        return Load(self, self._rig.folder / f"{self.volume}.json", flags)


class Load:
    """A running fio: random writes of 4 KiB, 16 in flight, each with a checksum; at last everything is read back."""

    def __init__(self, front: Front, report: Path, flags: tuple[str, ...]) -> None:
        self.front = front
        self._report = report
        words = ["fio", f"--name={front.kind}", *front.target, "--bs=4k", "--iodepth=16", "--rw=randwrite"]
        words += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output-format=json"]
        self.process = subprocess.Popen(
            [*words, f"--output={report}", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def goes_on(self, seconds: float) -> bool:
        """Tell whether it still runs after so long; returns at once when it ends."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def check(self, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Wait for its end; there was no error, and all was read back as it was written."""
        said, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, f"{self.front.kind}: {said}{self._report.read_text()[:2000]}"
        text = self._report.read_text()
        jobs = json.loads(text[text.index("{") :])["jobs"]
        assert [job["error"] for job in jobs] == [0], f"{self.front.kind}: {said}"
        assert jobs[0]["read"]["total_ios"] > 0, f"{self.front.kind}: nothing was read back"

    def end(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process.wait(READY_TIMEOUT_S)


@contextmanager
def fronts_of(rig: Rig, kinds: tuple[str, ...], size: int) -> Iterator[list[Front]]:
    """Start both daemons and attach a volume by each front; nothing is left of them at the end."""
    with tidy(rig), ExitStack() as stack:
        rig.start()
        fronts = [Front(rig, kind, size) for kind in kinds]
        for front in fronts:
            front.attach(stack)
        yield fronts


@contextmanager
def loads_of(fronts: list[Front], *flags: str) -> Iterator[list[Load]]:
    """Start a load on each front; what still runs at the end is killed."""
    loads: list[Load] = []
    try:
        for front in fronts:
            loads.append(front.load(*flags))
        yield loads
    finally:
        for load in loads:
            load.end()


def take_loop_away(rig: Rig, volume: str) -> None:
    """Take away what is left of the loop device of a volume: device, link, and who waits for a dead daemon."""
    if rig.cache is not None and not rig.cache.running:
        end_front(rig, 9)
    link = FOLDER / volume
    target = link.resolve()
    if target.name.startswith("loop"):
        number = int(target.name[4:])
        if volume in loop_device.backing_of(number):
            loop_device.remove(number)
    link.unlink(missing_ok=True)

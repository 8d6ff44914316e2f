"""The only program of a guest that acts as a hypervisor: a cache daemon, kernel devices, and what may go wrong.

Everything is reported, one line each; the host judges. Runs in the guest alone, see vm_guest.py.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from forebay_cache.service.nbd_netlink import NbdNetlink
from forebay_tools.main import main

ARGUMENTS = json.loads(Path("/arguments.json").read_text())
RUN_DIR = "/run/forebay"
OUTAGE_S = 10
BIG = 48 << 20
FULL = 60 << 20
HOLD_S = 40  # longer than what the kernel's block layer gives a request, 30 s
FREE_MEMORY = 32 << 20
DAEMON = [
    *(sys.executable, "-m", "forebay_tools.main", "cache", "serve", "--device", "/dev/vda", "--run-dir", RUN_DIR),
    *("--store", ARGUMENTS["store"], "--cut-age-s-max", "2"),
]
os.environ |= {"FOREBAY_RUN_DIR": RUN_DIR, "FOREBAY_STORE": ARGUMENTS["store"]}
daemon: subprocess.Popen[str]
began = time.monotonic()


def report(name: str, value: object) -> None:
    print(f"[{time.monotonic() - began:6.1f}]", "REPORT " + json.dumps([name, value]), flush=True)


def forebay(*words: str) -> list[object]:
    """Run a command; return its exit code, output and complaint."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return [code, out.getvalue().strip(), err.getvalue().strip()]


def shell(command: str) -> list[object]:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    return [done.returncode, done.stdout.strip(), done.stderr.strip()[-2000:]]


def start(*more: str) -> None:
    global daemon
    daemon = subprocess.Popen([*DAEMON, *more], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    assert line.startswith("READY"), line


def kill(number: int = signal.SIGKILL) -> int:
    daemon.send_signal(number)
    return daemon.wait()


def size_of(number: int) -> int:
    return int(Path(f"/sys/block/nbd{number}/size").read_text()) * 512


def attach() -> None:
    start()
    report("attach", forebay("attach", "files", "--front", "kernel"))
    report("attach again", forebay("attach", "files", "--front", "kernel"))
    report("attach otherwise", forebay("attach", "files", "--front", "kernel", "--block-size", "4096"))
    report("attach 4096", forebay("attach", "load", "--front", "kernel", "--block-size", "4096"))
    report("link", os.path.realpath("/dev/forebay/files"))
    names = ("logical_block_size", "io_timeout", "write_cache", "fua")
    report(
        "queues", {n: [Path(f"/sys/block/nbd{n}/queue/{name}").read_text().strip() for name in names] for n in (0, 1)}
    )
    report("status", [[row[key] for key in ("name", "front", "path", "link")] for row in status()["volumes"]])
    report("guarded", Path(f"/proc/{daemon.pid}/oom_score_adj").read_text().strip())
    report("locked", [line for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines() if "VmLck" in line])
    report("delete", forebay("volume", "delete", "files"))


def survive_a_kill() -> None:
    """fio verifies what it wrote, while the daemon is killed and away for OUTAGE_S."""
    fio = subprocess.Popen(
        [
            *("fio", "--name=load", "--filename=/dev/nbd1", "--direct=1", "--ioengine=libaio", "--iodepth=8"),
            *("--rw=randrw", "--bs=4k", "--size=32m", "--time_based=0", "--io_size=24m", "--rate_iops=120,120"),
            *("--verify=crc32c", "--verify_fatal=1", "--output-format=json", "--output=/tmp/fio.json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(4)
    killed = time.monotonic()
    kill()
    before = size_of(1)
    time.sleep(OUTAGE_S)
    start()
    ready = time.monotonic()
    output, _ = fio.communicate()
    result = json.loads(Path("/tmp/fio.json").read_text()) if Path("/tmp/fio.json").stat().st_size else {"jobs": []}
    stalls = [job[kind]["clat_ns"]["max"] / 1e9 for job in result["jobs"] for kind in ("read", "write")]
    report(
        "kill under load",
        {
            "code": fio.returncode,
            "output": output[-1000:],
            "errors": [job["error"] for job in result["jobs"]],
            "stall_s": max(stalls, default=0),
            "outage_s": ready - killed,
            "size while away": before,
        },
    )


def files() -> None:
    """A file system: data written while memory is short, trim, growth, and who keeps a volume from being detached."""
    report("mkfs", shell("mkfs.ext4 -q -F /dev/forebay/files && mount -t ext4 /dev/forebay/files /mnt"))
    rows = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(row.split()[1]) << 10 for row in rows if row.startswith("MemAvailable"))
    hog = bytearray(max(0, available - FREE_MEMORY))
    hog[::4096] = bytes(len(hog[::4096]))[:-1] + b"x"
    report("dd", shell(f"yes forebay | head -c {BIG} | dd of=/mnt/big bs=1M iflag=fullblock conv=fsync")[0])
    del hog
    shell("echo 3 >/proc/sys/vm/drop_caches")
    report("compare", shell(f"yes forebay | head -c {BIG} | cmp - /mnt/big"))
    report("detach busy", forebay("detach", "files"))
    forebay("drain", "files")
    report("data before", info("files")["data_size"])
    report("fstrim", shell("rm /mnt/big && sync && fstrim /mnt"))
    forebay("drain", "files")
    report("data after", info("files")["data_size"])
    report("resize", forebay("volume", "resize", "files", "1GiB"))
    until = time.monotonic() + 5
    while size_of(0) != 1 << 30 and time.monotonic() < until:
        time.sleep(0.05)
    report("size", size_of(0))
    opened = subprocess.Popen("sleep 2 </dev/nbd0", shell=True)
    report("umount", shell("umount /mnt"))
    report("detach waits", forebay("detach", "files", "--timeout", "20"))
    opened.wait()
    report("gone", [size_of(0), os.path.lexists("/dev/forebay/files"), connected()])


def come_back() -> None:
    """The host is booted again: no device, no run directory; then the daemon is stopped and started again."""
    first = read(1)
    kill()
    NbdNetlink().disconnect(1)
    shutil.rmtree(RUN_DIR)
    report("booted", connected())
    start()
    report("back", [connected(), size_of(1), os.path.realpath("/dev/forebay/load"), read(1) == first])
    report("stopped", [kill(signal.SIGTERM), connected()])
    start()
    report("started", [connected(), read(1) == first])
    with open("/dev/nbd1", "rb"):
        report("stopped in use", [kill(signal.SIGTERM), connected()])
        start()
        report("served in use", read(1) == first)


def full_buffer() -> None:
    """The store is out of reach and the buffer full: writes wait for as long as that lasts."""
    kill(signal.SIGTERM)
    start("--dirty-share-max", "0.05")
    shell("ip route add unreachable 10.0.2.2/32")
    content = f"yes full buffer | head -c {FULL}"
    writer = subprocess.Popen(f"{content} | dd of=/dev/nbd1 bs=256k iflag=fullblock oflag=direct", shell=True)
    written, before = -1, -2
    until = time.monotonic() + 90
    while written != before and writer.poll() is None and time.monotonic() < until:
        before = written
        time.sleep(8)
        written = int(Path("/sys/block/nbd1/stat").read_text().split()[6])
    time.sleep(HOLD_S)
    after = int(Path("/sys/block/nbd1/stat").read_text().split()[6])
    report("full", [writer.poll(), written * 512, after == written])
    shell("ip route del unreachable 10.0.2.2/32")
    report("full no more", writer.wait())
    report("full compare", shell(f"{content} | cmp -n {FULL} - /dev/nbd1"))
    report("connections", [row["connections"] for row in status()["volumes"]])


def snapshot() -> None:
    """A snapshot is a device that can't be written."""
    report("snapshot", done := forebay("snapshot", "create", "load@now", "--wait"))
    assert done[0] == 0, [done, forebay("status"), forebay("volume", "info", "load")]
    report("snapshot attach", done := forebay("attach", "load@now", "--front", "kernel"))
    assert done[0] == 0, [done, forebay("status"), forebay("snapshot", "list", "load")]
    number = int(os.path.realpath("/dev/forebay/load@now").removeprefix("/dev/nbd"))
    report("snapshot device", [Path(f"/sys/block/nbd{number}/ro").read_text().strip(), read(number) == read(1)])
    report("snapshot detach", forebay("detach", "load@now", "--timeout", "5"))


def udev() -> None:
    """Where udev runs, it makes the name; and takes it away."""
    forebay("detach", "load", "--timeout", "5")
    udevd = subprocess.Popen(["/sbin/systemd-udevd"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while not os.path.exists("/run/udev/control") and time.monotonic() < until:
        time.sleep(0.05)
    report("udev attach", forebay("attach", "load", "--front", "kernel"))
    report("udev link", shell("readlink /dev/forebay/load"))
    report("udev detach", forebay("detach", "load", "--timeout", "5"))
    until = time.monotonic() + 20
    while os.path.lexists("/dev/forebay/load") and time.monotonic() < until:
        time.sleep(0.05)
    report("udev gone", os.path.lexists("/dev/forebay/load"))
    udevd.kill()
    udevd.wait()
    os.unlink("/run/udev/control")


def without_a_kernel() -> None:
    """No nbd in the kernel: a line that says so, and nothing is left attached."""
    report("rmmod", shell("rmmod nbd"))
    report("no nbd", forebay("attach", "load", "--front", "kernel"))
    report("left", [row["name"] for row in status()["volumes"]])


def info(name: str) -> dict[str, object]:
    return json.loads(str(forebay("volume", "info", name, "--json")[1]))


def status() -> dict[str, list[dict[str, object]]]:
    return json.loads(str(forebay("status", "--json")[1]))["cache"]


def connected() -> list[int]:
    return [found.number for found in NbdNetlink().devices() if found.connected]


def read(number: int) -> bytes:
    with open(f"/dev/nbd{number}", "rb") as file:
        return file.read(1 << 20)


def run() -> None:
    attach()
    survive_a_kill()
    files()
    come_back()
    full_buffer()
    snapshot()
    udev()
    without_a_kernel()


try:
    run()
    report("end", "reached")
except BaseException as error:
    report("failed", f"{type(error).__name__}: {error}")
    raise
finally:
    print(shell("dmesg | tail -30")[1], flush=True)

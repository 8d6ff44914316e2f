"""Runs one guest under QEMU's own emulation until it ends, and hands back what it reported."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import vm_image
from vm_image import CannotError

MEMORY_MIB: Final = 1024
TIMEOUT_S: Final = 480
_MARK: Final = "REPORT "


def run_guest(job: Path, *, arguments: dict[str, object], disk_size: int, folder: Path) -> dict[str, object]:
    """Run `job` in a guest with an empty disk /dev/vda; return what it reported, by name.

    Raises:
        CannotError: this host can't run guests.
    """
    emulator = shutil.which("qemu-system-x86_64")
    if emulator is None:
        raise CannotError("qemu-system-x86_64 is not installed (package qemu-system-x86)")
    kernel = next(vm_image.kernel().glob("boot/vmlinuz-*"))
    archive = vm_image.image(job, json.dumps(arguments), folder)
    disk, log = folder / "disk.raw", folder / "console.log"
    with disk.open("wb") as file:
        file.truncate(disk_size)
    command = [
        *(emulator, "-M", "pc", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-smp", "2"),
        *("-m", str(MEMORY_MIB), "-display", "none", "-nodefaults", "-no-reboot", "-serial", f"file:{log}"),
        *("-kernel", str(kernel), "-initrd", str(archive)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr printk.devkmsg=on"),
        *("-drive", f"file={disk},format=raw,if=none,id=d,cache=unsafe", "-device", "virtio-blk-pci,drive=d"),
        *("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="),
    ]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=True, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the guest did not end in {TIMEOUT_S} s:\n{_tail(log)}") from error
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{emulator}: {error.stderr}\n{_tail(log)}") from error
    finally:
        os.unlink(archive)
        disk.unlink()
    return _reports(log)


def _reports(log: Path) -> dict[str, object]:
    found: dict[str, object] = {"console": _tail(log)}
    for line in log.read_text(errors="replace").splitlines():
        _, mark, text = line.partition(_MARK)
        if mark:
            name, value = json.loads(text)
            found[name] = value
    return found


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-20000:] if log.exists() else ""

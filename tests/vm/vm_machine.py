"""A whole guest: an emulated machine that boots Debian from a disk, and is asked over a port of it what to do.

Emulation only (TCG), whatever the host has: Debian's kernels die under nested KVM of some of the project's machines.
"""

import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final

import vm_debian
from vm_agent import BOOT_TIMEOUT_S, Agent
from vm_image import CannotError

MEMORY_MIB: Final = 384
RECONNECT_S: Final = 60


def nbd_drive(socket_path: Path, export: str) -> str:
    """Return the drive that docs/guests.md recommends, over NBD."""
    return (
        f"driver=nbd,server.type=unix,server.path={socket_path},export={export},reconnect-delay={RECONNECT_S},"
        "discard=unmap,detect-zeroes=unmap,cache.direct=on"
    )


def file_drive(path: Path) -> str:
    """Return the same on a raw file of this host."""
    return f"file={path},format=raw,discard=unmap,detect-zeroes=unmap,cache.direct=on"


class Machine(Agent):
    """A running guest; leaving the context ends it at once, as a power cut would."""

    def __init__(self, folder: Path, drive: str, *, second: Path | None = None, processors: int = 2) -> None:
        """Start it, with a raw file as second disk if one is given; `folder` gets its socket and its console.

        Raises:
            CannotError: this host can't run guests.
        """
        emulator = shutil.which("qemu-system-x86_64")
        if emulator is None:
            raise CannotError("qemu-system-x86_64 is not installed (package qemu-system-x86)")
        kernel, first = vm_debian.boot_files()
        folder.mkdir(parents=True, exist_ok=True)
        self.console = folder / "console.log"
        port = folder / "agent.sock"
        command = [
            *(emulator, "-M", "pc", "-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max"),
            *("-smp", str(processors), "-m", str(MEMORY_MIB), "-display", "none", "-nodefaults", "-no-reboot"),
            *("-serial", f"file:{self.console}", "-kernel", str(kernel), "-initrd", str(first)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"),
            *("-drive", f"{drive},if=none,id=d", "-device", "virtio-blk-pci,drive=d"),
            *("-chardev", f"socket,id=a,path={port},server=on,wait=off", "-device", "virtio-serial-pci"),
            *("-device", f"virtserialport,chardev=a,name={vm_debian.PORT}"),
        ]
        if second is not None:
            command += ["-drive", f"file={second},format=raw,if=none,id=e", "-device", "virtio-blk-pci,drive=e"]
        with (folder / "qemu.log").open("wb") as log:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._complaints = folder / "qemu.log"
        super().__init__(port, self._ended, self.tail)

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._child.kill()
        self._child.wait()

    def shut_down(self) -> None:
        """Have the guest end itself, and wait for that."""
        self.send("systemctl --no-block poweroff")
        assert self._child.wait(BOOT_TIMEOUT_S) == 0, self.tail()

    def tail(self) -> str:
        """Return the end of the console, and what the emulator complained of."""
        console = self.console.read_text(errors="replace") if self.console.exists() else ""
        return f"{console[-8000:]}\n{self._complaints.read_text(errors='replace')}"

    def _ended(self) -> str:
        return "" if self._child.poll() is None else f"exit code {self._child.returncode}"

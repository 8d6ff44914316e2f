"""A whole guest: an emulated machine that boots Debian from a disk, and is asked over a port of it what to do.

Emulation only (TCG), whatever the host has: Debian's kernels die under nested KVM of some of the project's machines.
"""

import base64
import select
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

import vm_debian
from vm_image import CannotError

MEMORY_MIB: Final = 384
BOOT_TIMEOUT_S: Final = 240.0
ASK_TIMEOUT_S: Final = 120.0
RECONNECT_S: Final = 60
_PIECE: Final = 1 << 16


class Answer(NamedTuple):
    """What a command in the guest ended with and printed."""

    code: int
    text: str


def nbd_drive(socket_path: Path, export: str) -> str:
    """Return the drive that docs/guests.md recommends, over NBD."""
    return (
        f"driver=nbd,server.type=unix,server.path={socket_path},export={export},reconnect-delay={RECONNECT_S},"
        "discard=unmap,detect-zeroes=unmap,cache.direct=on"
    )


def file_drive(path: Path) -> str:
    """Return the same on a raw file of this host."""
    return f"file={path},format=raw,discard=unmap,detect-zeroes=unmap,cache.direct=on"


class Machine:
    """A running guest; leaving the context ends it at once, as a power cut would."""

    def __init__(self, folder: Path, drive: str, *, processors: int = 2) -> None:
        """Start it; `folder` gets its socket and its console.

        Raises:
            CannotError: this host can't run guests.
        """
        emulator = shutil.which("qemu-system-x86_64")
        if emulator is None:
            raise CannotError("qemu-system-x86_64 is not installed (package qemu-system-x86)")
        kernel, first = vm_debian.boot_files()
        folder.mkdir(parents=True, exist_ok=True)
        self.console = folder / "console.log"
        self._agent_path = folder / "agent.sock"
        self._rest = b""
        command = [
            *(emulator, "-M", "pc", "-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max"),
            *("-smp", str(processors), "-m", str(MEMORY_MIB), "-display", "none", "-nodefaults", "-no-reboot"),
            *("-serial", f"file:{self.console}", "-kernel", str(kernel), "-initrd", str(first)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr root=/dev/vda"),
            *("-drive", f"{drive},if=none,id=d", "-device", "virtio-blk-pci,drive=d"),
            *("-chardev", f"socket,id=a,path={self._agent_path},server=on,wait=off", "-device", "virtio-serial-pci"),
            *("-device", f"virtserialport,chardev=a,name={vm_debian.PORT}"),
        ]
        with (folder / "qemu.log").open("wb") as log:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._complaints = folder / "qemu.log"
        self._agent = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._agent.close()
        self._child.kill()
        self._child.wait()

    @property
    def pid(self) -> int:
        """The emulator's process."""
        return self._child.pid

    def booted(self) -> float:
        """Wait until the system has started; return the seconds since this call.

        Connect the agent first: the guest reads what was asked as soon as it can.
        """
        began = time.monotonic()
        while True:
            try:
                self._agent.connect(str(self._agent_path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._alive(began, BOOT_TIMEOUT_S)
                time.sleep(0.01)
        state = self.ask("systemctl is-system-running --wait", timeout_s=BOOT_TIMEOUT_S)
        assert state.text.strip() in ("running", "degraded"), f"{state}\n{self.tail()}"
        return time.monotonic() - began

    def ask(self, command: str, *, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
        """Have a command run in the guest, and wait for its end."""
        self._send(command)
        began = time.monotonic()
        while b"\n" not in self._rest:
            self._alive(began, timeout_s, command)
            if select.select([self._agent], [], [], 0.5)[0]:
                self._rest += self._agent.recv(_PIECE)
        line, _, self._rest = self._rest.partition(b"\n")
        code, _, text = line.partition(b" ")
        return Answer(int(code), base64.b64decode(text).decode(errors="replace"))

    def run(self, command: str, *, timeout_s: float = ASK_TIMEOUT_S) -> str:
        """Have a command run that must succeed; return what it printed."""
        answer = self.ask(command, timeout_s=timeout_s)
        assert answer.code == 0, f"{command}: {answer.code}, {answer.text}\n{self.tail()}"
        return answer.text

    def shut_down(self) -> None:
        """Have the guest end itself, and wait for that."""
        self._send("systemctl --no-block poweroff")
        assert self._child.wait(BOOT_TIMEOUT_S) == 0, self.tail()

    def tail(self) -> str:
        """Return the end of the console, and what the emulator complained of."""
        console = self.console.read_text(errors="replace") if self.console.exists() else ""
        return f"{console[-8000:]}\n{self._complaints.read_text(errors='replace')}"

    def _send(self, command: str) -> None:
        self._agent.sendall(base64.b64encode(command.encode()) + b"\n")

    def _alive(self, began: float, timeout_s: float, command: str = "boot") -> None:
        assert self._child.poll() is None, f"the guest ended with {self._child.returncode}:\n{self.tail()}"
        assert time.monotonic() - began < timeout_s, f"{command}: no answer in {timeout_s} s:\n{self.tail()}"

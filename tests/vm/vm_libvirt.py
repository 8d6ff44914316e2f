"""A libvirt of its own: a daemon of the session of a user without rights, in a folder of its own.

That is libvirtd, its QEMU driver and its checks as everywhere, and a qemu that is not root; nothing of the host's
libvirt is touched.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from vm_image import CannotError, found

USER: Final = "nobody"
GROUP: Final = "daemon"
START_TIMEOUT_S: Final = 60.0
SETTINGS: Final = 'stdio_handler = "file"\n'


def check() -> None:
    """See whether this host can run it.

    Raises:
        CannotError: it can't, the text says why.
    """
    if os.geteuid() != 0:
        raise CannotError("only root can be the user of libvirt's guests")
    for name in ("libvirtd", "virsh", "virt-xml-validate", "qemu-system-x86_64"):
        found(name)


def complaint(domain: str) -> str:
    """Return what libvirt's schema has against a domain, nothing if that is fine."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(domain)
        file.flush()
        done = subprocess.run(["virt-xml-validate", file.name, "domain"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


class Libvirt:
    """A running libvirtd; leaving the context ends it and its guests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._guests: list[str] = []
        names = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
        self._environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LANG": "C"}
        self._environment |= {name: str(folder / place) for name, place in names.items()}
        for place in names.values():
            (folder / place).mkdir(mode=0o700, parents=True)
        settings = folder / "config" / "libvirt" / "qemu.conf"
        settings.parent.mkdir()
        settings.write_text(SETTINGS)
        for path in folder.rglob("*"):
            self.own(path)
        self.own(folder)

    def __enter__(self) -> "Libvirt":
        self._log = (self.folder / "libvirtd.log").open("wb")
        self._child = subprocess.Popen(
            [found("libvirtd")],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            user=USER,
            group=GROUP,
            extra_groups=[],
            cwd="/",
        )
        until = time.monotonic() + START_TIMEOUT_S
        while self._virsh("version").returncode:
            assert self._child.poll() is None and time.monotonic() < until, self.said
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy_all()
        self._child.terminate()
        self._child.wait()
        self._log.close()

    @property
    def said(self) -> str:
        """What it logged."""
        return (self.folder / "libvirtd.log").read_text(errors="replace")

    @property
    def version(self) -> tuple[int, int]:
        """Of the daemon."""
        match = re.search(r"libvirt (\d+)\.(\d+)", self._virsh("version").stdout)
        assert match is not None
        return int(match[1]), int(match[2])

    def own(self, path: Path) -> None:
        """Give a file to the user of the guests."""
        shutil.chown(path, USER, GROUP)

    def start(self, name: str, domain: str) -> None:
        """Start a guest of this description."""
        path = self.folder / f"{name}.xml"
        path.write_text(domain)
        self._guests.append(name)
        done = self._virsh("create", "--validate", str(path))
        assert done.returncode == 0, f"{done.stderr}\n{self.said[-3000:]}"

    def destroy_all(self) -> None:
        """End all guests at once."""
        while self._guests:
            self._virsh("destroy", self._guests.pop())

    def state(self, name: str) -> str:
        """Return whether a guest runs, as virsh says it."""
        return self._virsh("domstate", name).stdout.strip()

    def _virsh(self, *words: str) -> "subprocess.CompletedProcess[str]":
        user = pwd.getpwnam(USER).pw_uid
        return subprocess.run(
            ["virsh", "--connect", "qemu:///session", *words],
            env=self._environment,
            user=user,
            group=GROUP,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

"""A Debian that guests boot from: packages of the distribution, and an agent that does what the host asks for.

The disk is one file system without partitions; the kernel and a small first file system in memory come from outside
(`-kernel`, `-initrd`), everything else is read from the disk. Both are made once and kept in the cache of the rig.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vm_image import CACHE, Archive, CannotError, found, kernel, modules_for, run, static_busybox

SUITE: Final = "bookworm"
PACKAGES: Final = ("systemd-sysv", "udev", "e2fsprogs")
SIZE: Final = 1 << 30
LABEL: Final = "guest"
"""By which it finds its disk among others."""

LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
PORT: Final = "forebay.agent"
"""Name of the machine's port over which the agent is asked."""

_MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "crc32c_generic", "libcrc32c")
_FILES: Final = Path(__file__).with_name("guest")
_PLACES: Final = {
    "agent": "usr/local/sbin/agent",
    "writer": "usr/local/sbin/writer",
    "agent.service": "etc/systemd/system/agent.service",
}


def disk() -> Path:
    """Return a raw image to boot from, to be copied, not written."""
    return _made("debian", ".raw", _make_disk)


def boot_files() -> tuple[Path, Path]:
    """Return the kernel and the first file system."""
    (image,) = kernel().glob("boot/vmlinuz-*")
    return image, _made("first", ".cpio", _make_first)


def _made(name: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """Return what `make` made of the present sources; older ones are removed."""
    sources = [Path(__file__), *sorted(_FILES.iterdir())]
    key = hashlib.sha256(b"\0".join([str(kernel()).encode(), *(path.read_bytes() for path in sources)])).hexdigest()
    path = CACHE / f"{name}-{key[:16]}{suffix}"
    if not path.exists():
        fresh = CACHE / f"{name}.{os.getpid()}"
        try:
            make(fresh)
            for older in CACHE.glob(f"{name}-*{suffix}"):
                older.unlink()
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


def _make_disk(path: Path) -> None:
    if os.geteuid() != 0:
        raise CannotError("only root can make the file system of a guest")
    root = path.with_suffix(".root")
    try:
        options = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
        include = f"--include={','.join(PACKAGES)}"
        run([str(found("mmdebstrap")), "--quiet", "--variant=essential", include, *options, SUITE, str(root)])
        _settle(root)
        with path.open("wb") as file:
            file.truncate(SIZE)
        run([str(found("mkfs.ext4")), "-q", "-F", "-L", LABEL, "-d", str(root), str(path)])
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _settle(root: Path) -> None:
    """Give the system its agent and a name, so that no boot is the first one."""
    for name, place in _PLACES.items():
        target = root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_FILES / name, target)
        target.chmod(0o755 if "sbin" in place else 0o644)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / "agent.service").symlink_to("/etc/systemd/system/agent.service")
    (root / "etc/machine-id").write_text("f0" * 16 + "\n")
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/fstab").write_text(f"LABEL={LABEL} / ext4 defaults 0 1\n")


def _make_first(path: Path) -> None:
    modules = list(modules_for(kernel(), _MODULES))
    with path.open("wb") as out:
        archive = Archive(out)
        archive.add(static_busybox(), "/bin/busybox")
        for module in modules:
            archive.add(module, f"/modules/{module.name}")
        archive.add_text("/init", _init(modules), 0o755)
        archive.end()


def _init(modules: Sequence[Path]) -> str:
    loads = "\n".join(f"insmod /modules/{path.name}" for path in modules)
    return f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
{loads}
mount -t ext4 -o ro "$(findfs LABEL={LABEL})" /root
for name in proc sys dev; do mount --move /$name /root/$name; done
exec switch_root /root /sbin/init
"""

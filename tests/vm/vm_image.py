"""What a guest boots from: Debian's kernel, and a file system in memory made of this host's own files.

No distribution is installed for it: the programs that a guest runs, the libraries that `ldd` names, this Python and
the packages of this virtual environment are copied to where they are here. The archive is uncompressed: unpacking
costs an emulated processor more than reading.
"""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

CACHE: Final = Path(os.environ.get("FOREBAY_VM_CACHE") or Path.home() / ".cache" / "forebay-vm")
KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"
PROGRAMS: Final = ("fio", "mkfs.ext4", "e2fsck")
MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_net", "nbd", "ext4", "loop", "crc32c_generic", "libcrc32c")
PACKAGES: Final = ("lmdb", "msgspec", "numpy", "pyroute2", "sortedcontainers", "xxhash", "zstandard")
SITE: Final = "/opt/site"
UDEV: Final = "/sbin/systemd-udevd"
_PATH: Final = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_SKIPPED: Final = {
    *("test", "tests", "idlelib", "ensurepip", "tkinter", "turtledemo", "lib2to3", "pydoc_data"),
    "site-packages",
}
_SKIPPED_FILES: Final = ("_tkinter.", "_cffi.", ".opt-")  # with what they drag along, a third of all
_SUFFIXES: Final = {".a", ".c", ".h"}
_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_SOURCE_ROOTS: Final = ("storeserver", "cache", "tools")


class CannotError(Exception):
    """This host can't run guests; the text says why."""


def kernel() -> Path:
    """Return the folder with an unpacked kernel package."""
    return _unpacked("kernel", _kernel_name)


def image(job: Path, arguments: str, folder: Path) -> Path:
    """Return an archive that runs `job`, a Python file, as the guest's only program; it finds /arguments.json."""
    modules = list(modules_for(kernel(), MODULES))
    made_of = (sys.version, sorted(_versions()), [str(path) for path in modules], Path(__file__).read_text())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()
    base = CACHE / f"base-{key[:16]}.cpio"
    if not base.exists():
        files = list(_base_files(modules))
        fresh = CACHE / f"base.{os.getpid()}"
        with fresh.open("wb") as out:
            archive = Archive(out)
            for path, place in files:
                archive.add(path, place)
            archive.end()
        for older in CACHE.glob("base-*.cpio"):
            older.unlink()
        fresh.rename(base)
    whole = folder / "guest.cpio"
    shutil.copy(base, whole)
    with whole.open("ab") as out:
        archive = Archive(out)
        for path, place in _own_files(job):
            archive.add(path, place)
        archive.add_text("/arguments.json", arguments, 0o644)
        archive.add_text("/init", _init(modules), 0o755)
        archive.end()
    return whole


def programs() -> Iterator[tuple[Path, str]]:
    """Yield what a guest with a system of its own needs to run our commands: files of this host, and their places.

    That is Python, its libraries, our sources under SITE and the tools of an installation; no root file system.
    """
    yield from _base_files(modules_for(kernel(), MODULES))
    yield from _own_sources()
    yield from ((path, f"/system/{path.name}") for path in _tree(_REPOSITORY / "tools" / "system"))


class Archive:
    """Writes a cpio archive as the kernel unpacks it (format newc)."""

    def __init__(self, out) -> None:
        self._out = out
        self._made: set[str] = set()
        self._serial = 0

    def add(self, path: Path, place: str) -> None:
        """Add a file, following links; once."""
        if place not in self._made:
            self._parents(place)
            mode = stat.S_IFREG | (0o755 if os.access(path, os.X_OK) else 0o644)
            # With its time, or Python would compile everything anew.
            self._entry(place, mode, path.read_bytes(), int(path.stat().st_mtime))

    def add_text(self, place: str, text: str, mode: int) -> None:
        """Add a file of this content."""
        self._parents(place)
        self._entry(place, stat.S_IFREG | mode, text.encode())

    def end(self) -> None:
        """Write the last entry."""
        self._entry("/TRAILER!!!", 0, b"")
        self._out.write(bytes(-self._out.tell() % 512))

    def _parents(self, place: str) -> None:
        for parent in reversed(Path(place).parents):
            if str(parent) not in self._made and str(parent) != "/":
                self._entry(str(parent), stat.S_IFDIR | 0o755, b"")

    def _entry(self, place: str, mode: int, content: bytes, mtime: int = 0) -> None:
        self._made.add(place)
        self._serial += 1
        name = place.lstrip("/").encode() + b"\0"
        fields = (self._serial, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        self._out.write(header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4))


def _unpacked(name: str, package: Callable[[], str]) -> Path:
    """Return a folder with what a Debian package holds, which is downloaded, not installed."""
    folder = CACHE / name
    if not folder.exists():
        fresh = CACHE / f"{name}.{os.getpid()}"
        fresh.mkdir(parents=True)
        try:
            run(["apt-get", "download", package()], cwd=fresh)
            (archive,) = fresh.glob("*.deb")
            run(["dpkg-deb", "-x", str(archive), str(fresh)])
            archive.unlink()
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _kernel_name() -> str:
    shown = run(["apt-cache", "depends", KERNEL_PACKAGE])
    names = [line.split()[1] for line in shown.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise CannotError(f"apt knows no {KERNEL_PACKAGE}; run apt-get update")
    return names[0]


def modules_for(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield these modules of an unpacked kernel, each behind those that it needs itself."""
    (root,) = folder.glob("lib/modules/*")
    files = {path.name.removesuffix(".ko").replace("-", "_"): path for path in root.rglob("*.ko")}
    done: set[str] = set()

    def walk(name: str) -> Iterator[Path]:
        if name not in done and name in files:
            done.add(name)
            for needed in _needed(files[name]):
                yield from walk(needed)
            yield files[name]

    for name in names:
        yield from walk(name)


def _needed(module: Path) -> list[str]:
    """Return the names in a module's own `depends=`."""
    content = module.read_bytes()
    at = content.find(b"\0depends=")
    text = content[at + 9 : content.index(b"\0", at + 9)].decode() if at >= 0 else ""
    return [name.replace("-", "_") for name in text.split(",") if name]


def _base_files(modules: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    yield static_busybox(), "/bin/busybox"
    programs = [found(name) for name in PROGRAMS]
    udev = _unpacked("udev", lambda: "udev") / "bin" / "udevadm"
    yield udev, UDEV
    python = Path(os.path.realpath(sys._base_executable))
    yield python, str(python)
    for program in programs:
        yield Path(os.path.realpath(program)), str(program)
    yield from ((path, f"/modules/{path.name}") for path in modules)
    library = Path(sysconfig.get_path("stdlib"))
    files = [*_tree(library), *(file for name in _folders() for file in _tree(name))]
    site = _site()
    for path in files:
        yield path, f"{SITE}/{path.relative_to(site)}" if path.is_relative_to(site) else str(path)
    binaries = [python, udev, *programs, *(path for path in files if path.suffix == ".so" or ".so." in path.name)]
    yield from ((path, str(path)) for path in _libraries(binaries))


def _own_sources() -> Iterator[tuple[Path, str]]:
    for root in _SOURCE_ROOTS:
        for path in _tree(_REPOSITORY / root):
            yield path, f"{SITE}/{path.relative_to(_REPOSITORY / root)}"


def _own_files(job: Path) -> Iterator[tuple[Path, str]]:
    yield from _own_sources()
    yield job, "/job.py"
    yield _REPOSITORY / "tools" / "system" / "90-forebay.rules", "/etc/udev/rules.d/90-forebay.rules"


def _folders() -> Iterator[Path]:
    """Yield what the packages that the daemon needs consist of."""
    site = _site()
    for name in (*PACKAGES, *(f"{name}.libs" for name in PACKAGES)):
        if (site / name).is_dir():
            yield site / name
    yield from (
        path for path in site.iterdir() if path.suffix in (".py", ".so") and path.stem.split(".")[0] in PACKAGES
    )


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _versions() -> Iterator[str]:
    for path in _site().glob("*.dist-info"):
        if path.name.split("-")[0] in PACKAGES:
            yield path.name


def _tree(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_file() and path.suffix not in _SUFFIXES and not any(part in name for part in _SKIPPED_FILES):
                yield path


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    """Return the shared libraries that these need, by the paths by which they ask for them."""
    found: set[Path] = set()
    for binary in binaries:
        listed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False).stdout
        for line in listed.splitlines():
            words = line.replace("=>", " ").split()
            found.update(Path(word) for word in words if word.startswith("/"))
    return {path for path in found if path.is_file() and not path.is_relative_to(_site())}


def _init(modules: Iterable[Path]) -> str:
    loads = "\n".join(f"insmod /modules/{path.name}" for path in modules)
    python = os.path.realpath(sys._base_executable)
    return f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /sbin /mnt /usr/bin
/bin/busybox --install -s /bin
ln -s /bin/busybox /usr/bin/basename
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
{loads}
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
PYTHONPATH={SITE} {python} /job.py
sync
echo b >/proc/sysrq-trigger
"""


def static_busybox() -> Path:
    """Return the busybox that needs no libraries.

    Raises:
        CannotError: there is none.
    """
    busybox = found("busybox")
    if _libraries([busybox]):
        raise CannotError("busybox is not the static one; install busybox-static")
    return busybox


def found(name: str) -> Path:
    """Return where a program is.

    Raises:
        CannotError: it is not installed.
    """
    path = shutil.which(name, path=_PATH)
    if path is None:
        raise CannotError(f"{name} is not installed")
    return Path(path)


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a command and return what it printed.

    Raises:
        CannotError: it failed.
    """
    environment = os.environ | {"PATH": _PATH}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise CannotError(f"{' '.join(command[:3])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout

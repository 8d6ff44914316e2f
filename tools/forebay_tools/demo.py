"""`make run`: a store, a cache and two volumes in the folder `demo`, and proof that nothing is lost.

Everything is done with the commands and NBD clients that a user has; each is shown as it runs. Environment: IMAGE=FILE
imports that file instead of a file system made here, KEEP=1 stays up at the end. The folder is removed at the end
unless something failed or it was interrupted, and only if this program made it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, GIB, MIB, format_size
from forebay_tools.demo_daemon import DemoDaemon
from forebay_tools.printing import say
from forebay_tools.qcow2 import open_qcow2
from forebay_tools.source import detect_format

FOLDER: Final = Path("demo")
MARKER: Final = "made-by-forebay-demo"
IMAGE_SIZE: Final = 192 * MIB
SCRATCH_SIZE: Final = 48 * MIB
CACHE_SIZE_MIN: Final = 512 * MIB
CACHE_SIZE_MAX: Final = 8 * GIB
RUN_DIR_SIZE_MAX: Final = 80
"""Bytes of the run directory's path; a Unix socket's path has little room."""
OVERWRITTEN: Final = 7
COLD_SHARE_MAX: Final = 0.1
HELD_S_MAX: Final = 12.0
"""Blocks that were read lately wait in memory for up to 10 s until it is decided whether they are worth a write."""
"""Fills of the last moment may be lost in a crash; more is not."""

TOOLS: Final = {"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "nbdcopy": "libnbd-bin", "mkfs.ext4": "e2fsprogs"}
NOT_COPIED: Final = ("__pycache__", "site-packages", "dist-packages", "test", "lib-dynload", "config-*", "*.a", "*.so")
FOREBAY: Final = (sys.executable, "-m", "forebay_tools.main")


def main() -> int:
    """Run the demonstration; return the exit code."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    try:
        image = _image()
        _check_tools()
        with _demo_folder() as folder, Demo(folder, image) as demo:
            demo.run()
            if os.environ.get("KEEP") == "1":
                demo.stay()
    except (ForebayError, OSError) as error:
        sys.stderr.write(f"forebay demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class Demo:
    """The demonstration's daemons and what its volumes should hold."""

    def __init__(self, folder: Path, image: Path | None) -> None:
        self._folder = folder
        self._image = image
        self._run_dir = folder / "run"
        self._remove_run_dir = False
        if len(os.fsencode(self._run_dir)) > RUN_DIR_SIZE_MAX:
            self._run_dir = Path(tempfile.mkdtemp(prefix="forebay-demo-"))
            self._remove_run_dir = True
        self._expected = {"demo": folder / "demo.raw", "scratch": folder / "scratch.raw"}
        self._uris: dict[str, str] = {}
        self._store: DemoDaemon | None = None
        self._cache: DemoDaemon | None = None
        self._address = ""
        self._read_blocks = 0  # by the last comparison

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *_error: object) -> None:
        for daemon in (self._cache, self._store):
            if daemon is not None:
                daemon.stop()
        if self._remove_run_dir:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def run(self) -> None:
        """Do all steps; raises ForebayError at the first that fails."""
        _title("An image with real files")
        image = self._make_images()
        _title("A store and a cache daemon")
        self._start_store()
        self._start_cache()
        _title("Import the image, attach it, read it back through NBD")
        self._forebay("volume", "import", "demo", str(image))
        self._attach("demo")
        self._compare("demo")
        self._compare("demo")
        _title("Write another file system through NBD")
        self._forebay("volume", "create", "scratch", "--size", str(SCRATCH_SIZE))
        self._attach("scratch")
        self._run("nbdcopy", str(self._expected["scratch"]), self._uris["scratch"])
        self._crash()
        self._snapshot()
        _title("Send everything to the store and take it out again")
        for name in self._expected:
            self._forebay("drain", name)
            self._export(name)
        self._summary()

    def stay(self) -> None:
        """Serve until interrupted."""
        say("\nStaying up; end with Ctrl-C.")
        assert self._cache is not None
        self._cache.wait()
        raise ForebayError(f"the cache daemon ended; see {self._cache.log}")

    def _make_images(self) -> Path:
        _make_file_system(self._folder / "files2", self._expected["scratch"], SCRATCH_SIZE, "asyncio")
        expected = self._expected["demo"]
        if self._image is None:
            _make_file_system(self._folder / "files", expected, IMAGE_SIZE, "")
            say(f"{expected}: ext4 with Python's library in it, {format_size(IMAGE_SIZE)}")
            return expected
        return self._image

    def _start_store(self) -> None:
        words = ["store", "serve", "--data", str(self._folder / "store"), "--listen", "127.0.0.1:0"]
        self._store = DemoDaemon([*FOREBAY, *words], self._folder / "store.log", "store listening on ")
        _show(["forebay", *words])
        self._address = self._store.ready
        say(f"store listening on {self._address}")
        os.environ["FOREBAY_STORE"] = self._address
        os.environ["FOREBAY_RUN_DIR"] = str(self._run_dir)

    def _start_cache(self) -> None:
        wanted = (self._image or self._expected["demo"]).stat().st_size * 2
        size = min(max(wanted, CACHE_SIZE_MIN), CACHE_SIZE_MAX) // MIB
        words = ["cache", "serve", "--device", str(self._folder / "cache.img"), "--size", f"{size}MiB"]
        words += ["--store", self._address, "--run-dir", str(self._run_dir)]
        _show(["forebay", *words])
        started = time.monotonic()
        self._cache = DemoDaemon([*FOREBAY, *words], self._folder / "cache.log", "READY")
        say(f"cache ready after {time.monotonic() - started:.1f} s")

    def _attach(self, name: str) -> None:
        answer = json.loads(self._forebay("attach", name))
        self._uris[name] = answer["uri"]

    def _compare(self, name: str) -> None:
        expected = self._expected[name]
        if not expected.exists():
            # The import has found the image harmless, so a copy of it may be made by the usual means.
            assert self._image is not None
            image_format = detect_format(self._image)
            self._run("qemu-img", "convert", "-f", image_format, "-O", "raw", str(self._image), str(expected))
            os.truncate(expected, -(-expected.stat().st_size // BLOCK_SIZE) * BLOCK_SIZE)
        before = self._status()
        self._run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(expected), self._uris[name])
        after = self._status()
        hits = after["hit_blocks"] - before["hit_blocks"]
        misses = after["miss_blocks"] - before["miss_blocks"]
        say(f"{hits} blocks came from the cache, {misses} from the store")
        self._read_blocks = hits + misses

    def _wait_for_ssd(self) -> None:
        """Wait until what was read last lies on the SSD: what is in memory alone is fetched again after a crash."""
        until = time.monotonic() + HELD_S_MAX
        while time.monotonic() < until and self._status()["cached_bytes"] < self._read_blocks * BLOCK_SIZE:
            time.sleep(0.2)

    def _crash(self) -> None:
        assert self._cache is not None
        _title("Kill the cache daemon with -9 and start it again")
        if self._image is None:
            self._wait_for_ssd()
        say(f"dirty bytes before: {format_size(self._status()['dirty_bytes'])}")
        say(f"$ kill -9 {self._cache.number}")
        self._cache.kill()
        self._start_cache()
        for name in self._expected:
            self._attach(name)
            self._compare(name)
        status = self._status()
        if self._image is None and status["miss_blocks"] > COLD_SHARE_MAX * status["hit_blocks"]:
            raise ForebayError("the cache came back cold; this is a bug")

    def _snapshot(self) -> None:
        _title("Take a snapshot, overwrite the volume, and look at a clone of the snapshot")
        before = self._expected["scratch"]
        self._forebay("snapshot", "create", "scratch@before", "--wait")
        after = self._folder / "after.raw"
        shutil.copyfile(before, after)
        with after.open("r+b") as file:
            file.write(bytes([OVERWRITTEN]) * MIB)
        self._run("qemu-io", "-f", "raw", "-c", f"write -P {OVERWRITTEN} 0 1M", self._uris["scratch"])
        self._forebay("volume", "clone", "scratch@before", "clone")
        self._attach("clone")
        self._expected |= {"scratch": after, "clone": before}
        for name in ("clone", "scratch"):
            self._compare(name)

    def _export(self, name: str) -> None:
        target = self._folder / f"{name}.exported"
        self._forebay("volume", "export", name, str(target))
        self._run("cmp", str(self._expected[name]), str(target))
        say("the same bytes")
        target.unlink()

    def _summary(self) -> None:
        status = self._status()
        _title("In all")
        say(f"hit ratio since the restart: {status['hit_ratio'] or 0:.1%}")
        rows = json.loads(self._forebay("volume", "list", "--json", show=False))
        for row in rows:
            say(f"volume {row['name']}: {format_size(row['data_size'])} stored as {format_size(row['stored_size'])}")
        say(f"dirty bytes: {status['dirty_bytes']}")
        say("\nBoot or read it with qemu while the daemons run (KEEP=1):")
        say(f"  qemu-system-x86_64 -m 1G -drive file='{self._uris['demo']}',format=raw,if=virtio,discard=unmap")
        say(f"  qemu-img info '{self._uris['demo']}'")
        say(f"  export FOREBAY_STORE={self._address} FOREBAY_RUN_DIR={self._run_dir}; forebay status")

    def _status(self) -> dict[str, int]:
        status: dict[str, int] = json.loads(self._forebay("status", "--json", show=False))["cache"]
        return status

    def _forebay(self, *words: str, show: bool = True) -> str:
        if show:
            _show(["forebay", *words])
        return _output([*FOREBAY, *words], show=show)

    def _run(self, *words: str) -> None:
        _show(words)
        _output(words, show=True)


def _output(words: "list[str] | tuple[str, ...]", *, show: bool) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if show and done.stdout:
        say(done.stdout.rstrip())
    if done.returncode:
        raise ForebayError(f"{Path(words[0]).name} failed with exit code {done.returncode}")
    return done.stdout


def _make_file_system(files: Path, image: Path, size: int, package: str) -> None:
    library = Path(sysconfig.get_path("stdlib")) / package
    shutil.copytree(library, files, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    words = ["mkfs.ext4", "-q", "-F", "-d", str(files), str(image), f"{size // 1024}k"]
    _show(words)
    _output(words, show=True)


@contextlib.contextmanager
def _demo_folder() -> Iterator[Path]:
    """Make the folder anew and lock it; remove it at the end of a demonstration that went well."""
    folder = FOLDER.absolute()
    marker = folder / MARKER
    if folder.exists() and not marker.exists():
        raise ForebayError(f"{folder}: exists and is not from a demonstration; move it away")
    folder.mkdir(exist_ok=True)
    with marker.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForebayError(f"{folder}: another demonstration runs there; end it first") from None
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        yield folder
        shutil.rmtree(folder)


def _image() -> Path | None:
    """Return the image that IMAGE names, if it does; one that can't be imported is told before anything is started."""
    text = os.environ.get("IMAGE")
    if not text:
        return None
    image = Path(text)
    try:
        if detect_format(image) == "qcow2":
            with open_qcow2(image):
                pass  # it was found harmless and whole
    except OSError as error:
        raise ForebayError(f"IMAGE={text}: {error.strerror}; name a raw or qcow2 image") from error
    return image


def _check_tools() -> None:
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise ForebayError(f"needs packages that are missing; as root: apt-get install {' '.join(missing)}")


def _title(text: str) -> None:
    say(f"\n== {text}")


def _show(words: "list[str] | tuple[str, ...]") -> None:
    say("$ " + " ".join(words))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

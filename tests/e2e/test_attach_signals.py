"""A daemon that is told to end, or is killed, at each stage of an attach: the next one puts everything right."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from e2e_fronts import LOOP, fronts_missing

from forebay_cache.service import fuse_mount, loop_device
from forebay_cache.service.device_links import FOLDER
from forebay_core.units import MIB

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from fio import BenchError
from servers import Cache, Store

pytestmark = [pytest.mark.skipif(bool(fronts_missing()), reason=fronts_missing()), pytest.mark.slow]
VOLUME = f"signals-{os.getpid()}"
MAKING = {"losetup": "--find", "fusermount3": "-o"}
"""The word by which a call of each program is known as one that makes something."""

WRAPPER = """#!/bin/sh
at() {{
    if [ "$(cat {folder}/stage 2>/dev/null)" = "{name} $1" ]; then
        rm {folder}/stage
        kill -$(cat {folder}/signal) $(cat {folder}/target)
    fi
}}
case " $* " in *" {word} "*) ;; *) exec {program} "$@";; esac
at before
# What dies with the daemon is the process that it started: that must be the program, or what it does goes on without.
[ "$(cat {folder}/stage 2>/dev/null)" = "{name} behind" ] || exec {program} "$@"
{program} "$@"
code=$?
at behind
exit $code
"""


class Trap:
    """Programs in front of the real ones that send the daemon a signal once, at one stage of an attach."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, word in MAKING.items():
            wrapper = folder / name
            wrapper.write_text(WRAPPER.format(folder=folder, name=name, word=word, program=shutil.which(name)))
            wrapper.chmod(0o755)

    def set(self, stage: str, number: signal.Signals, cache: Cache) -> None:
        for name, text in (("signal", int(number)), ("target", cache.pid), ("stage", stage)):
            (self._folder / name).write_text(f"{text}\n")

    @property
    def sprung(self) -> bool:
        return not (self._folder / "stage").exists()


@pytest.fixture
def daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cache, Trap]]:
    """A cache with a volume to attach, and the trap; nothing is left of them at the end."""
    folder = tmp_path / "bin"
    folder.mkdir()
    trap = Trap(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    with ExitStack() as stack:
        store = Store(tmp_path / "store")
        stack.callback(store.stop)
        cache = Cache(tmp_path / "cache", tmp_path, store=store.address, size="80MiB")
        stack.callback(fuse_mount.unmount, cache.run_dir / "volumes")
        stack.callback(take_away, cache)
        stack.callback(cache.stop)
        store.command("volume", "create", VOLUME, "--size", "16MiB")
        yield cache, trap


def file_of(cache: Cache) -> Path:
    return cache.run_dir / "volumes" / VOLUME


def take_away(cache: Cache) -> None:
    for number in loop_device.devices_of(file_of(cache)):
        loop_device.remove(number)
    (FOLDER / VOLUME).unlink(missing_ok=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_at_any_stage_of_an_attach_leaves_nothing_that_the_next_start_does_not_mend(
    daemons: tuple[Cache, Trap], number: signal.Signals
) -> None:
    cache, trap = daemons
    for stage in (f"{name} {when}" for name in ("fusermount3", "losetup") for when in ("before", "behind")):
        trap.set(stage, number, cache)
        with suppress(BenchError):  # or it was done before the daemon was
            cache.command("attach", VOLUME, "--front", LOOP)
        assert trap.sprung, stage
        assert cache.wait() == (-9 if number is signal.SIGKILL else 0), stage
        cache.restart(lambda: None)
        path = json.loads(cache.command("attach", VOLUME, "--front", LOOP))["path"]
        content = stage.encode().ljust(4096)
        subprocess.run(["dd", f"of={path}", "bs=1M", "oflag=direct"], input=content * 256, check=True, stderr=-3)
        assert Path(path).read_bytes()[:MIB] == content * 256, stage
        assert len(loop_device.devices_of(file_of(cache))) == 1, stage
        cache.command("detach", VOLUME, "--timeout", "20")
        assert loop_device.devices_of(file_of(cache)) == [], stage
        assert not os.path.lexists(FOLDER / VOLUME), stage
        assert not fuse_mount.is_mounted(cache.run_dir / "volumes"), stage

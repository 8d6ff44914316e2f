"""Incremental backup with real daemons: a base and what changed since give back every snapshot, byte for byte."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, KIB, MIB

SIZE = 16 * MIB
INCREMENTS = 3
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


class Guest:
    """Writes and trims a volume through NBD, and knows what it holds."""

    def __init__(self, rig: Rig, name: str, size: int = SIZE) -> None:
        self._rig = rig
        self._name = name
        self.content = bytearray(size)
        self.touched: set[int] = set()

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        size = len(self.content)
        with self._rig.nbd(self._name) as client:
            for _ in range(40):
                length = chance.choice([512, BLOCK_SIZE, 12 * KIB, 256 * KIB])
                at = chance.randrange(0, size - length) // 512 * 512
                kind = chance.choice(["write", "write", "trim", "zero"])
                if kind == "write":
                    plain = chance.randbytes(length)
                    client.write(at, plain)
                elif kind == "zero":
                    plain = bytes(length)
                    client.write_zeroes(at, length)
                else:
                    at, length = at // BLOCK_SIZE * BLOCK_SIZE, -(-length // BLOCK_SIZE) * BLOCK_SIZE
                    length = min(length, size - at)
                    plain = bytes(length)
                    client.trim(at, length)
                self.content[at : at + length] = plain
                self.touched.update(range(at // BLOCK_SIZE, -(-(at + length) // BLOCK_SIZE)))


def exported(rig: Rig, name: str) -> bytes:
    target = rig.folder / "whole"
    rig.run("volume", "export", name, str(target), "--force")
    return target.read_bytes()


def back_up(rig: Rig, guest: Guest) -> tuple[list[bytes], list[Path]]:
    """Take a base and increments of the volume `v` while it is written; return what each snapshot held, and files."""
    states, files = [], []
    for number in range(INCREMENTS + 1):
        guest.touched.clear()
        guest.work(number)
        rig.run("snapshot", "create", f"v@s{number}", "--wait")
        states.append(bytes(guest.content))
        touched = len(guest.touched)
        guest.work(100 + number)  # what follows a snapshot is in none of its files
        files.append(rig.folder / f"file{number}")
        since = ("--since", f"s{number - 1}") if number else ()
        rig.run("volume", "export", f"v@s{number}", *since, str(files[-1]))
        if number:
            allowed = len(guest.touched) * BLOCK_SIZE
            assert touched and files[-1].stat().st_size <= 2 * allowed + MIB
    return states, files


@needs_qemu_img
def test_a_base_and_increments_restore_every_snapshot(rig: Rig) -> None:
    rig.start()
    rig.create("v", SIZE)
    rig.attach("v")
    states, files = back_up(rig, Guest(rig, "v"))
    for number, state in enumerate(states):
        assert exported(rig, f"v@s{number}") == state
    rig.run("volume", "import", "restored", str(files[0]), "--format", "raw")
    for number, file in enumerate(files):
        if number:
            rig.run("volume", "import", "--onto", "restored", str(file))
        assert exported(rig, "restored") == states[number], f"after increment {number}"


@needs_qemu_img
def test_qemu_reads_a_chain_of_increments(rig: Rig) -> None:
    rig.start()
    rig.create("v", SIZE)
    rig.attach("v")
    states, files = back_up(rig, Guest(rig, "v"))
    below, kind = files[0], "raw"
    for state, file in zip(states[1:], files[1:], strict=True):
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", file], check=True)
        words = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(below), "-F", kind, str(file)]
        subprocess.run(words, check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", file, rig.folder / "out"], check=True)
        assert (rig.folder / "out").read_bytes() == state
        below, kind = file, "qcow2"


@needs_qemu_img
def test_an_increment_crosses_a_resize_a_rollback_and_a_clone(rig: Rig) -> None:
    rig.start()
    rig.create("base", SIZE)
    rig.attach("base")
    Guest(rig, "base").work(1)
    rig.detach("base")
    rig.run("snapshot", "create", "base@gold")
    rig.run("volume", "clone", "base@gold", "v")
    start = exported(rig, "v")
    rig.run("snapshot", "create", "v@s0")
    rig.attach("v")
    guest = Guest(rig, "v")
    guest.content[:] = start
    guest.work(2)
    rig.run("volume", "resize", "v", str(SIZE + MIB))
    rig.run("snapshot", "create", "v@s1", "--wait")
    grown = bytes(guest.content) + bytes(MIB)
    guest.work(3)
    rig.detach("v")
    rig.run("snapshot", "rollback", "v@s0")
    files = [rig.folder / name for name in ("s0", "s1", "head")]
    rig.run("volume", "export", "v@s0", str(files[0]))
    rig.run("volume", "export", "v@s1", "--since", "s0", str(files[1]))
    rig.run("volume", "export", "v", "--since", "s1", str(files[2]))
    rig.run("volume", "import", "restored", str(files[0]), "--format", "raw")
    assert exported(rig, "restored") == start
    rig.run("volume", "import", "--onto", "restored", str(files[1]))
    assert exported(rig, "restored") == exported(rig, "v@s1") == grown
    head = exported(rig, "v")
    assert head[:SIZE] == start
    force = ("--force",) if len(head) < len(grown) else ()
    rig.run("volume", "import", "--onto", "restored", *force, str(files[2]))
    assert exported(rig, "restored") == head


def test_wrong_pairs_of_snapshots_are_one_line(rig: Rig) -> None:
    rig.start_store()
    rig.create("v", MIB)
    for name in ("a", "b"):
        rig.run("snapshot", "create", f"v@{name}")
    out = str(rig.folder / "out")
    assert "is newer than v@a" in rig.run("volume", "export", "v@a", "--since", "b", out, code=1)
    for words in (["v", "--since", "none"], ["v@none"], ["none@a"], ["v@none", "--since", "a"]):
        assert "none" in rig.run("volume", "export", *words, out, code=1)
    rig.run("volume", "export", "v", "--since", "b", out)
    assert not list(rig.folder.glob("*.part"))

"""fio's nbd engine over a volume, with a checksum and the place in each block it writes.

The volume is first written as a whole and flushed. From then on, whatever part of later writes is lost, each block
holds an older or a newer write of its own: fio, told to read and verify, finds a torn, foreign or lost one.
"""

import subprocess

from undo import Undo

BLOCK = "4k"
TIMEOUT_S = 60.0


class Fio:
    """Load on one volume."""

    def __init__(self, uri: str, size: int, undo: Undo) -> None:
        self._undo = undo
        self._key = 0
        self._words = ("fio", "--name=power", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", f"--bs={BLOCK}")
        self._words += ("--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
        self._load: subprocess.Popen[bytes] | None = None

    def fill(self) -> None:
        """Write all of it and flush."""
        done = self._run("--rw=write", "--do_verify=0", "--end_fsync=1")
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, seed: int) -> None:
        """Overwrite blocks at random with a flush every few writes, until it is stopped."""
        flags = ("--rw=randwrite", "--do_verify=0", "--fsync=12", "--time_based", "--runtime=600", "--norandommap")
        self._load = subprocess.Popen(
            [*self._words, *flags, f"--randseed={seed}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._key = self._undo.note("kill", "-9", str(self._load.pid))

    def stop(self) -> None:
        if self._load is not None:
            self._load.kill()
            self._load.wait(TIMEOUT_S)
            self._load = None
            self._undo.forget(self._key)

    def whole(self) -> str:
        """Read all of it; return what is wrong."""
        done = self._run("--rw=read")
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def _run(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*self._words, *flags], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

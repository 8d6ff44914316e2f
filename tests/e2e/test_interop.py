"""The stock clients over the real stack."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from e2e_rig import Rig

from forebay_core.units import MIB


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_an_image_copied_in_compares_equal_by_nbd_and_in_the_store(rig: Rig, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
        for offset in (0, 5 * MIB + 512, 20 * MIB):
            file.seek(offset)
            file.write(os.urandom(MIB + 1024))
    rig.start()
    rig.create("disk", 24 * MIB)
    uri = rig.attach("disk")
    tool("nbdcopy", str(image), uri)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri)
    tool("qemu-io", "-f", "raw", "-c", "discard 20M 1M", "-c", "write -z 0 64k", "-c", "flush", uri)
    tool("qemu-io", "-f", "raw", "-c", "read -P 0 20M 1M", "-c", "read -P 0 0 64k", uri)
    with image.open("r+b") as file:
        for offset, size in ((0, 65536), (20 * MIB, MIB)):
            file.seek(offset)
            file.write(bytes(size))
    rig.detach("disk")
    assert rig.exported("disk") == image.read_bytes()


def test_fio_verifies_what_it_wrote(rig: Rig) -> None:
    rig.start()
    rig.create("disk", 16 * MIB)
    uri = rig.attach("disk")
    tool(
        *(
            "fio",
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={uri}",
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--iodepth=16",
        ),
        *("--size=16M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7"),
    )

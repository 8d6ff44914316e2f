"""Hours of a real store on a small disk under kill -9, a full disk and a lost index; `make soak`."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_torture import Torture

SEEDS = range(100, 200)
ROUNDS = 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
def test_volumes_and_snapshots_outlive_kills_full_disks_and_lost_indexes(seed: int, small_disk: Path) -> None:
    torture = Torture(seed, small_disk)
    torture.run(ROUNDS)
    assert min(cache.requests for cache in torture.caches) > 100


@pytest.mark.slow
def test_volumes_and_snapshots_outlive_a_kill_a_full_disk_and_a_lost_index(small_disk: Path) -> None:
    Torture(1, small_disk).run(2)

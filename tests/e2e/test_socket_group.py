"""Who may open a daemon's sockets: its owner, and of the NBD socket the members of a group it was told."""

import grp
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Rig

NOBODY = 65534
OPEN_TO_ALL = 0o711


@pytest.fixture
def open_rig(rig: Rig) -> Iterator[Rig]:
    """A run directory whose parents anybody may pass, unlike pytest's."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    parent = Path(tempfile.mkdtemp())
    parent.chmod(OPEN_TO_ALL)
    rig.run_dir = parent / "run"
    yield rig
    rig.stop()
    shutil.rmtree(parent)


def reaches(path: Path, *groups: int) -> bool:
    """Tell whether a user without rights, in these groups, can connect."""
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    command = ["/usr/bin/python3", "-c", connect, str(path)]
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=groups, cwd="/", capture_output=True, check=False
    )
    assert done.returncode == 0 or b"PermissionError" in done.stderr, done.stderr
    return done.returncode == 0


def test_members_of_the_group_open_volumes_but_give_no_orders(open_rig: Rig) -> None:
    group = grp.getgrnam("daemon")
    open_rig.start_cache("--nbd-group", group.gr_name)
    nbd, control = open_rig.run_dir / "nbd.sock", open_rig.run_dir / "control.sock"
    assert reaches(nbd, group.gr_gid) and not reaches(nbd)
    assert not reaches(control, group.gr_gid)
    others = [path for path in open_rig.run_dir.iterdir() if path != nbd and path.stat().st_mode & 0o077]
    assert others == []
    open_rig.kill_cache()
    open_rig.start_cache("--nbd-group", group.gr_name)
    assert reaches(nbd, group.gr_gid)


def test_without_a_group_the_sockets_are_the_owners(open_rig: Rig) -> None:
    open_rig.start_cache()
    assert stat.S_IMODE(open_rig.run_dir.stat().st_mode) == 0o700
    assert not reaches(open_rig.run_dir / "nbd.sock", grp.getgrnam("daemon").gr_gid)


def test_a_group_that_is_not_there_is_refused_before_anything_is_made(rig: Rig) -> None:
    rig.start_cache("--nbd-group", "no-such-group", wait=False)
    assert rig.cache is not None and rig.cache.wait() == 2
    assert "cache.nbd_group = no-such-group: no such group; make it" in rig.cache.output
    assert not rig.device.exists() and not rig.run_dir.exists()

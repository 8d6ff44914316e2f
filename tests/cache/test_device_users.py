"""Who uses a block device is told by name, on a loop device of this host."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay_cache.service.device_links import make_link, remove_link
from forebay_cache.service.device_users import SHOWN_MAX, users_of
from forebay_cache.service.nbd_netlink import _claim


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device over a file of ours."""
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(16 << 20)
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no losetup here (package mount)")
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    name = made.stdout.strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


def test_nobody_uses_a_fresh_device(device: str) -> None:
    assert users_of(device) == [] and _claim(device) == []


def test_a_process_that_has_it_open_is_named(device: str) -> None:
    command = f"import sys; file = open({device!r}, 'rb'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        comm = Path(f"/proc/{child.pid}/comm").read_text().strip()
        assert users_of(device) == [f"open in {comm} (process {child.pid})"]
        child.stdin.close()
    assert users_of(device) == []


def test_many_users_are_counted(device: str) -> None:
    command = f"import os, sys; file = open({device!r}, 'rb'); print(flush=True); sys.stdin.read()"
    children = [
        subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(SHOWN_MAX + 2)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    users = users_of(device)
    for child in children:
        child.communicate()
    assert len(users) == SHOWN_MAX + 1 and users[-1] == "2 more"


def test_a_mount_is_named(device: str, tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    subprocess.run(["mount", device, str(place)], check=True)
    try:
        assert users_of(device) == [f"mounted at {place}"]
        assert _claim(device) == ["claimed by the kernel"]
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert users_of(device) == []


def test_what_a_device_is_part_of_is_named(device: str) -> None:
    made = subprocess.run(["losetup", "--find", "--show", device], capture_output=True, text=True, check=True)
    above = made.stdout.strip()
    try:
        assert f"part of {Path(above).name}" in users_of(device)
    finally:
        subprocess.run(["losetup", "--detach", above], check=True)


def test_a_link_is_left_to_the_device_of_that_name_and_taken_from_any_other(device: str, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for name in ("backing", "vm1"):  # the loop device serves a file called backing
        (links / name).symlink_to(device)
    assert make_link("backing", "/dev/nbd9998", links) == ""
    assert os.readlink(links / "backing") == device
    assert make_link("vm1", "/dev/nbd9998", links) == str(links / "vm1")
    assert os.readlink(links / "vm1") == "/dev/nbd9998"
    remove_link("vm1", device, links)
    remove_link("backing", device, links)
    assert os.listdir(links) == ["vm1"]


def test_memory_is_locked_and_the_oom_killer_kept_off_where_that_is_permitted() -> None:
    if os.geteuid():
        pytest.skip("only root may")
    code = (
        "from forebay_cache.service.memory_guard import guard_allocations, guard_memory\n"
        "guard_allocations(); guard_memory()\n"
        "print(open('/proc/self/oom_score_adj').read().strip())\n"
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmLck')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    score, locked = done.stdout.split()
    assert (score == "-900" and int(locked) > 0) or "without protection" in done.stderr

"""`--front kernel` for real: a guest plays the hypervisor, its cache daemon serves /dev/nbdN from a store on this host.

The kernel of this machine may have no nbd, and is nobody's to experiment with. One guest does all of it, because a
boot under emulation takes its time; each test is a claim about what it reported. Correctness only, never speed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm_guest import run_guest
from vm_host import HostStore
from vm_image import CannotError

from forebay_core.units import GIB, MIB

JOB = Path(__file__).with_name("kernel_job.py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What the guest reported, by name."""
    folder = tmp_path_factory.mktemp("vm")
    with HostStore(folder / "store") as store:
        store.forebay("volume", "create", "files", "--size", "768MiB")
        store.forebay("volume", "create", "load", "--size", "64MiB")
        try:
            found = run_guest(JOB, arguments={"store": store.from_guest}, disk_size=512 * MIB, folder=folder)
        except CannotError as error:
            pytest.skip(f"no guest can run here: {error}")
        if found.get("end") != "reached":
            pytest.fail(f"{found.get('failed', 'the guest ended early')}\n{found['console']}", pytrace=False)
        yield found


def test_a_volume_becomes_a_block_device_with_a_stable_name(guest: dict[str, object]) -> None:
    printed = json.dumps({"path": "/dev/nbd0", "link": "/dev/forebay/files"})
    assert guest["attach"] == guest["attach again"] == [0, printed, ""]
    assert guest["link"] == "/dev/nbd0"
    assert guest["status"] == [
        ["files", "kernel", "/dev/nbd0", "/dev/forebay/files"],
        ["load", "kernel", "/dev/nbd1", "/dev/forebay/load"],
    ]


def test_the_device_has_the_sectors_that_were_asked_for_and_can_flush(guest: dict[str, object]) -> None:
    assert guest["queues"] == {"0": ["512", "900", "write back", "1"], "1": ["4096", "900", "write back", "1"]}
    code, _, complaint = guest["attach otherwise"]
    assert code == 1 and "attached otherwise" in complaint


def test_an_attached_volume_can_not_be_deleted(guest: dict[str, object]) -> None:
    code, _, complaint = guest["delete"]
    assert code == 1 and "detach it first" in complaint


def test_the_daemon_of_a_device_is_kept_in_memory_and_from_the_oom_killer(guest: dict[str, object]) -> None:
    assert guest["guarded"] == "-900"
    assert int(guest["locked"][0].split()[1]) > 0


def test_a_killed_daemon_is_a_pause_without_a_single_error(guest: dict[str, object]) -> None:
    """The bound is wide: in an emulated machine on a busy host a second of the guest is not one of ours."""
    found = guest["kill under load"]
    assert (found["code"], found["errors"], found["output"]) == (0, [0], "")
    assert found["size while away"] == 64 * MIB
    assert found["stall_s"] >= 10  # the daemon was away under load, or this proves nothing
    assert found["stall_s"] - found["outage_s"] < 20


def test_writes_through_a_full_page_cache_with_hardly_any_memory_come_back(guest: dict[str, object]) -> None:
    assert (guest["mkfs"], guest["dd"], guest["compare"]) == ([0, "", ""], 0, [0, "", ""])


def test_a_mounted_device_is_not_detached_and_the_mount_is_named(guest: dict[str, object]) -> None:
    code, _, complaint = guest["detach busy"]
    assert code == 1 and "mounted at /mnt" in complaint


def test_trim_of_a_file_system_reaches_the_store(guest: dict[str, object]) -> None:
    assert guest["fstrim"][0] == 0
    assert guest["data after"] < guest["data before"] - 40 * MIB


def test_growth_is_seen_by_the_device(guest: dict[str, object]) -> None:
    assert guest["resize"][0] == 0 and guest["size"] == GIB


def test_detach_waits_for_whoever_has_the_device_open(guest: dict[str, object]) -> None:
    assert guest["umount"] == [0, "", ""] and guest["detach waits"] == [0, "", ""]
    assert guest["gone"] == [0, False, [1]]


def test_after_a_reboot_the_device_is_there_again_with_its_number_and_data(guest: dict[str, object]) -> None:
    assert guest["booted"] == []
    assert guest["back"] == [[1], 64 * MIB, "/dev/nbd1", True]


def test_a_stopped_daemon_takes_unused_devices_along_and_used_ones_wait_for_the_next(guest: dict[str, object]) -> None:
    assert guest["stopped"] == [0, []] and guest["started"] == [[1], True]
    assert guest["stopped in use"] == [0, [1]] and guest["served in use"] is True


def test_a_full_buffer_is_a_wait_and_takes_no_socket_away(guest: dict[str, object]) -> None:
    code, written, waited = guest["full"]
    assert code is None and waited
    assert 0 < written < 60 * MIB
    assert guest["full no more"] == 0 and guest["connections"] == [1]
    assert guest["full compare"] == [0, "", ""]


def test_a_snapshot_is_a_device_that_can_not_be_written(guest: dict[str, object]) -> None:
    assert guest["snapshot"][0] == 0 and guest["snapshot attach"][0] == 0
    assert guest["snapshot device"] == ["1", True] and guest["snapshot detach"] == [0, "", ""]


def test_where_udev_runs_it_makes_the_name_of_the_device(guest: dict[str, object]) -> None:
    code, printed, _ = guest["udev attach"]
    place = json.loads(printed)
    assert code == 0 and place["link"] == "/dev/forebay/load"
    # udev's links are relative, those of the daemon are not.
    assert guest["udev link"] == [0, "../" + place["path"].removeprefix("/dev/"), ""]
    assert guest["udev detach"] == [0, "", ""] and guest["udev gone"] is False


def test_without_nbd_in_the_kernel_attach_says_so_and_leaves_nothing(guest: dict[str, object]) -> None:
    assert guest["rmmod"] == [0, "", ""]
    assert guest["no nbd"] == [1, "", "forebay: attach: this kernel has no nbd; load it: modprobe nbd"]
    assert guest["left"] == []

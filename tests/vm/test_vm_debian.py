"""A Debian whose root file system is a volume: qemu is the NBD client, with the settings of docs/guests.md.

One guest does all of it; each test is a claim about what was seen. Correctness only: an emulated guest tells no speed.
"""

from collections.abc import Iterator

import pytest
import vm_story
from vm_image import CannotError
from vm_story import BIG, OUTAGE_S, Story, assert_whole, names

from forebay_core.units import MIB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """What was seen."""
    try:
        yield vm_story.tell(tmp_path_factory.mktemp("debian"))
    except CannotError as error:
        pytest.skip(f"no guest can run here: {error}")


def test_a_guest_boots_from_a_volume_that_only_the_store_has(story: Story) -> None:
    assert story.root.startswith("/dev/vda / ext4 rw")
    assert story.fetched_blocks * 4096 > 16 * MIB


def test_a_killed_cache_daemon_is_a_pause_of_the_guest(story: Story) -> None:
    assert story.cache_stall_s > OUTAGE_S - 1  # it wrote all the time, or this proves nothing
    assert story.complaints == ""
    assert story.cache_stall_s - story.cache_outage_s < 4  # qemu would try again after 5 if nobody held the socket
    assert story.mounted == story.root


def test_writes_go_on_while_the_store_is_away(story: Story) -> None:
    assert story.written_without_store >= 20


def test_all_that_the_guest_wrote_is_there_after_the_kills(story: Story) -> None:
    assert [name for name, total in story.in_guest.items() if name != total] == []
    assert story.in_guest.keys() == names(story.log)
    assert len(story.log) > 60


def test_a_snapshot_of_the_running_guest_is_one_moment_of_its_file_system(story: Story) -> None:
    """Files that were durable before the snapshot and still there after it are in it, and no file of later times."""
    there = assert_whole(story.snapshot)
    before, after = names(story.before_snapshot), names(story.after_snapshot)
    assert before & after <= there
    assert there <= {line.split()[1] for line in story.log if line.startswith("+")}
    assert names(story.log) - {line.split()[1] for line in story.after_snapshot} - there


def test_fstrim_in_the_guest_frees_space_in_the_store(story: Story) -> None:
    for sizes in (story.data_sizes, story.store_sizes):
        assert sizes[0] - sizes[1] > BIG * 0.9, sizes


def test_after_a_shutdown_the_store_has_the_disk_as_the_guest_left_it(story: Story) -> None:
    assert assert_whole(story.end) == names(story.log)

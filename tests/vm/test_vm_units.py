"""The units that `make install-system` installs, under a real systemd: crash, restart, shutdown and the next boot."""

from collections.abc import Iterator

import pytest
import vm_units
from vm_image import CannotError
from vm_units import CONTENT, Story

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """What was seen."""
    try:
        yield vm_units.tell(tmp_path_factory.mktemp("units"))
    except CannotError as error:
        pytest.skip(f"no guest can run here: {error}")


def test_both_daemons_start_and_say_so(story: Story) -> None:
    assert story.states == ["active", "active", "running", "running"]


def test_a_killed_daemon_is_started_again_and_who_connects_meanwhile_waits(story: Story) -> None:
    assert (story.kept, story.greeted) == ("1", "NBDMAGIC")
    assert story.after_kill == ["1", CONTENT]


def test_a_restart_keeps_the_device(story: Story) -> None:
    assert story.restarted == ["active", CONTENT]


def test_devices_are_there_before_guests_start_and_until_they_have_stopped(story: Story) -> None:
    """The first start found no volume yet; the last one is that of the second boot."""
    states = [f"{what} active {CONTENT}" for what in ("start", "stop", "start")]
    assert story.notes[-3:] == states


def test_after_a_boot_the_device_is_back_and_nothing_has_failed(story: Story) -> None:
    assert story.device == "/dev/nbd0" and story.failed == ""

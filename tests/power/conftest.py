"""Fixtures of the power-cut tests; they say loudly when power can't be cut here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from e2e_template import Template
from power_disk import PowerDisk, why_not
from power_guest import why_no_guest
from power_rig import PowerRig
from undo import Undo

_missing: set[str] = set()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason in sorted(_missing):
        terminalreporter.write_line(f"POWER CUTS WERE NOT TESTED: {reason}", red=True)


def skip_if(reason: str) -> None:
    if reason:
        _missing.add(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def template() -> Iterator[Template]:
    """The process that all daemons of the session are forked from."""
    template = Template()
    yield template
    template.close()


@pytest.fixture(scope="session")
def undo() -> Iterator[Undo]:
    """Undoes mounts and loop devices, also when the run is killed."""
    undo = Undo()
    yield undo
    undo.close()


@pytest.fixture
def needs_guest() -> None:
    """For tests with SQLite on ext4 on a loop device."""
    skip_if(why_no_guest())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerDisk]:
    """A file system that can lose its power."""
    skip_if(why_not())
    folder = tmp_path / "disk"
    folder.mkdir()
    with PowerDisk(folder) as disk:
        yield disk


@pytest.fixture
def rig(tmp_path: Path, template: Template) -> Iterator[PowerRig]:
    """Store and cache, each on such a file system; nothing runs yet."""
    skip_if(why_not())
    rig = PowerRig(tmp_path, template)
    yield rig
    rig.close()

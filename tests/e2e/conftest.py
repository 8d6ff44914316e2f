"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Rig
from e2e_template import Template


@pytest.fixture(scope="session")
def template() -> Iterator[Template]:
    """The process that all daemons of the session are forked from."""
    template = Template()
    yield template
    template.close()


@pytest.fixture
def rig(tmp_path: Path, template: Template) -> Iterator[Rig]:
    """A store and a cache folder; nothing runs yet. What still runs at the end is killed."""
    rig = Rig(tmp_path, template)
    yield rig
    rig.stop()

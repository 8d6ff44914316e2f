"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A store and a cache folder; nothing runs yet. What still runs at the end is killed."""
    rig = Rig(tmp_path)
    yield rig
    rig.stop()

"""A soak that was ended goes on behind what has passed; one that is over begins anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SOAK = """
import pytest
from pathlib import Path

def test_one(): Path("ran").open("a").write("one ")
def test_two(): Path("ran").open("a").write("two "); assert Path("mended").exists()

@pytest.fixture
def leaking():
    yield
    assert Path("mended").exists()

def test_three(leaking): Path("ran").open("a").write("three ")
def test_four(): pytest.skip("not here")
"""


@pytest.fixture
def soak(tmp_path: Path) -> Path:
    (tmp_path / "test_soak.py").write_text(SOAK)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run(soak: Path) -> str:
    """Run the soak; return which tests ran."""
    (soak / "ran").write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "soak_progress", "-p", "no:cacheprovider"]
    subprocess.run(
        command, cwd=soak, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, check=False, timeout=60
    )
    return (soak / "ran").read_text()


def test_a_soak_goes_on_behind_what_has_passed_and_then_begins_anew(soak: Path) -> None:
    assert run(soak) == "one two three "
    assert run(soak) == "two three ", "what failed, or left something behind, is run again"
    (soak / "mended").touch()
    assert run(soak) == "two three "
    assert run(soak) == "one two three "

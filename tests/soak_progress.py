"""Lets `make soak` go on where it was ended: hours of tests seldom run in one go.

What has passed is noted in `build/soak-passed`, a line for each test, and left out from then on. When all of it has
passed the file goes, so the next soak begins anew; whoever wants that earlier deletes it.
"""

from pathlib import Path

import pytest

NAME = Path("build") / "soak-passed"


class Progress:
    """One session's part of a soak."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._troubled: set[str] = set()  # tests of which a step failed or was skipped

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has passed."""
        passed = set(self._path.read_text().splitlines()) if self._path.exists() else set()
        done = [item for item in items if item.nodeid in passed]
        items[:] = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that passed with all its steps."""
        if not report.passed:
            self._troubled.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._troubled:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Begin anew when nothing is left."""
        over = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if over and not session.config.option.collectonly:
            self._path.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    """Called because of `-p soak_progress`."""
    config.pluginmanager.register(Progress(config.rootpath / NAME))

"""Progress is short, true, and silent where nobody watches a short transfer."""

import io

from forebay_core.units import GIB, MIB
from forebay_tools.progress import Progress, progress_line, show_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_share_rate_and_time_left() -> None:
    line = progress_line("importing", GIB, 4 * GIB, 5.0)
    assert line == "importing: 25%, 1 GiB of 4 GiB, 204.8 MiB/s, 15 s left"


def test_nothing_done_and_nothing_to_do_are_no_division_by_zero() -> None:
    assert "time left unknown" in progress_line("x", 0, MIB, 0.0)
    assert progress_line("x", 0, 0, 1.0).startswith("x: 100%")


def test_seconds_are_shown_in_two_units_at_most() -> None:
    assert [show_seconds(s) for s in (0.4, 59.6, 61, 3599, 7500)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


def test_a_short_transfer_writes_nothing_to_a_file() -> None:
    stream = io.StringIO()
    progress = Progress("importing", MIB, stream)
    progress.reach(MIB)
    progress.close()
    assert stream.getvalue() == ""


def test_a_terminal_is_left_clean(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("forebay_tools.progress.TERMINAL_INTERVAL_S", 0.0)
    stream = Terminal()
    progress = Progress("importing", MIB, stream)
    progress.reach(MIB)
    progress.close()
    assert "100%" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")

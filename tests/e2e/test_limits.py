"""`forebay limit` on a running daemon: it holds at once, is shown, and is kept over kill -9."""

import json
import os
import time

from e2e_rig import Rig

from forebay_core.units import MIB


def shown(rig: Rig, *words: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(rig.run("limit", *words, "--json"))
    return rows


def test_a_limit_holds_live_is_shown_and_outlives_the_daemon(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    assert shown(rig) == [
        {"volume": name, "average": None, "peak": None, "allowed": None, "own": False} for name in (None, "disk")
    ]
    rig.run("limit", "disk", "--average", "2MiB/s", "--peak", "4MiB/s")
    rig.run("limit", "--all", "--peak", "8MiB/s")
    with rig.nbd("disk") as client:
        client.write(0, os.urandom(8 * MIB))
        client.flush()
    began_s = time.monotonic()
    rig.drain("disk")
    assert time.monotonic() - began_s > 8 / 4.2 - 0.1, "a drain goes at the peak, not faster"
    assert rig.cache is not None
    rig.kill_cache()
    rig.start_cache()
    together, disk = shown(rig)
    assert (together["average"], together["peak"], together["own"]) == (8 * MIB, 8 * MIB, True)
    assert (disk["average"], disk["peak"], disk["own"]) == (2 * MIB, 4 * MIB, True)
    text = rig.run("limit")
    assert "2 MiB/s" in text
    assert "all volumes" in text
    assert "2 MiB/s on average" in rig.run("status")
    rig.run("limit", "disk", "--unlimited")
    assert shown(rig, "disk")[0]["own"] is True
    rig.run("limit", "disk", "--default")
    rig.run("limit", "--all", "--default")
    assert [row["own"] for row in shown(rig)] == [False, False]


def test_wrong_limits_are_refused_with_one_line(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    rig.run("limit", "disk", "--average", "2MiB/s", "--peak", "4MiB/s")
    for words, code in (
        (("disk", "--average", "1KiB/s"), 2),
        (("disk", "--average", "fast"), 2),
        (("disk", "--average", "3MiB/s", "--peak", "2MiB/s"), 2),
        (("disk", "--peak", "3MiB/s", "--unlimited"), 2),
        (("disk", "--all", "--peak", "3MiB/s"), 2),
        (("--peak", "3MiB/s"), 2),
        (("disk", "--average", "5MiB/s"), 1),
        (("other", "--average", "5MiB/s"), 1),
        (("other",), 1),
    ):
        text = rig.run("limit", *words, code=code)
        assert len(text.strip().splitlines()) == 1, text
    assert shown(rig, "disk")[0]["average"] == 2 * MIB

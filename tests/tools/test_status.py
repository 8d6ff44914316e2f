"""`forebay status`: all that answers is shown, what is away is named in one line."""

import json
from pathlib import Path

import pytest
from fake_peer import Serve
from store_rig import Forebay

from forebay_core.units import GIB, MIB
from forebay_wire.messages import CacheStatus, GetCacheStatus, GetStoreStatus, PolicyStatus, StoreStatus, VolumeStatus

POLICY = PolicyStatus(1000, 900, 400, 350, 3, 8000, 5000, 1200, 3800, 2000, 70, 26_214)
NOBODY = "127.0.0.1:1"


def volume(name: str, hits: int, misses: int) -> VolumeStatus:
    return VolumeStatus(name, GIB, "nbd://", False, 1, 2, 3, 4, 5, hits, misses, 0)


@pytest.fixture
def here(tmp_path: Path, serve: Serve) -> Path:
    """The run directory of a cache daemon with two volumes."""
    volumes = (volume("a", 30, 10), volume("b", 90, 10))
    status = CacheStatus("d", GIB, 8 * MIB, 3, 4, 5, 120, 20, 8, 9, 3, 11, "s:1", True, volumes, policy=POLICY)
    serve(lambda message: status if isinstance(message, GetCacheStatus) else None, run_dir=tmp_path)
    return tmp_path


@pytest.fixture
def far(serve: Serve) -> str:
    """The address of a store."""
    status = StoreStatus(1, 2, 3, 4, 5, 6, 7)
    return serve(lambda message: status if isinstance(message, GetStoreStatus) else None).address


def test_the_policy_is_told_with_shares_and_memory(here: Path, forebay: Forebay) -> None:
    told = json.loads(forebay("status", "--json", "--run-dir", here).out)["cache"]["policy"]
    assert (told["window_share"], told["margin_from"], told["window_blocks"]) == (0.4, 3, 350)
    assert (told["fetched_blocks"], told["admitted_blocks"], told["refused_blocks"]) == (5000, 1200, 3800)
    assert (told["ssd_writes_per_access"], told["memory_bytes_per_block"]) == (0.25, 12.7998)
    text = forebay("status", "--run-dir", here).out
    assert "900 of 1000 blocks worth keeping; window 40%, 350 of 400 blocks; margin from 3 uses on; 12.8 bytes" in text
    assert "5000 blocks fetched, 1200 of them kept, 3800 not; 0.250 blocks written to the SSD per access" in text


def test_a_daemon_that_did_nothing_yet_has_no_shares(tmp_path: Path, serve: Serve, forebay: Forebay) -> None:
    status = CacheStatus("d", GIB, 8 * MIB, 0, 0, 5, 0, 0, 0, 0, 0, 0, "s:1", True, (volume("a", 0, 0),))
    serve(lambda _: status, run_dir=tmp_path)
    told = json.loads(forebay("status", "--json", "--run-dir", tmp_path).out)["cache"]
    assert (told["policy"]["ssd_writes_per_access"], told["volumes"][0]["hit_share"]) == (None, None)
    assert "- blocks written to the SSD per access" in forebay("status", "--run-dir", tmp_path).out


def test_each_volume_shows_its_share_of_all_hits(here: Path, forebay: Forebay) -> None:
    rows = json.loads(forebay("status", "--json", "--run-dir", here).out)["cache"]["volumes"]
    assert [(row["hit_ratio"], row["hit_share"]) for row in rows] == [(0.75, 0.25), (0.9, 0.75)]
    lines = forebay("status", "--run-dir", here).out.splitlines()
    assert [[cell for cell in line.split() if "%" in cell] for line in lines[-2:]] == [
        ["75.0%", "25.0%"],
        ["90.0%", "75.0%"],
    ]


def test_both_are_shown(here: Path, far: str, forebay: Forebay) -> None:
    done = forebay("status", "--run-dir", here, "--store", far)
    assert (done.code, done.err) == (0, "")
    assert "worth keeping" in done.out and "incarnation" in done.out


def test_a_store_that_is_away_hides_no_cache(here: Path, forebay: Forebay) -> None:
    told = forebay("status", "--json", "--run-dir", here, "--store", NOBODY)
    assert (told.code, told.err.count("\n")) == (1, 1)
    assert "no store answers" in told.err and NOBODY in told.err
    assert json.loads(told.out)["cache"]["device"] == "d"
    assert json.loads(told.out)["store"] is None


def test_a_cache_that_is_away_hides_no_store(tmp_path: Path, far: str, forebay: Forebay) -> None:
    told = forebay("status", "--run-dir", tmp_path, "--store", far)
    assert (told.code, told.err.count("\n")) == (1, 1)
    assert "no cache daemon serves" in told.err
    assert "incarnation" in told.out


def test_when_all_are_away_one_line_names_them(tmp_path: Path, forebay: Forebay) -> None:
    told = forebay("status", "--json", "--run-dir", tmp_path, "--store", NOBODY)
    assert (told.code, told.out, told.err.count("\n")) == (1, "", 1)
    assert "no cache daemon serves" in told.err and "no store answers" in told.err

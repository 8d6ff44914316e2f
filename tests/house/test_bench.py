"""The bench measures what it says: full devices are full, ratios are of the same round, tables say what is below."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from forebay_cache.engine.blockmap import make_key
from forebay_cache.engine.recovery import recover
from forebay_cache.format.checkpoint import CHUNK_PLACES
from forebay_cache.format.superblock import choose
from forebay_core.units import BLOCK_SIZE, MIB

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

from destage_rows import Seen, highest_rate  # noqa: E402
from fio import BenchError, Load, parse  # noqa: E402
from full_device import make_full_device  # noqa: E402
from results import OURS, Goal, Row, Sample, render, save  # noqa: E402


def row_of(ours: list[float], peers: dict[str, list[float]], goal: Goal) -> Row:
    row = Row("key", "what", "op/s", goal, "note")
    for name, values in {OURS: ours, **peers}.items():
        for value in values:
            row.add(name, Sample(value, 1.5))
    return row


@pytest.mark.parametrize("dirty_size", [0, 16 * MIB])
def test_a_full_device_recovers_to_its_blocks_in_all_zones_but_those_that_are_kept_free(
    tmp_path: Path, dirty_size: int
) -> None:
    path = tmp_path / "device"
    made = make_full_device(path, 128 * MIB, dirty_size=dirty_size)
    content = path.read_bytes()
    superblock = choose(content[:BLOCK_SIZE], content[BLOCK_SIZE : 2 * BLOCK_SIZE])
    recovered = recover(lambda offset, size: content[offset : offset + size], superblock, whole=True)
    assert not recovered.findings
    assert recovered.map.linked_count == made.block_count
    free_count = superblock.zone_count // 2 + 1
    assert made.block_count == superblock.geometry.place_count - free_count * superblock.zone_blocks
    volume, versions = recovered.volumes[1], recovered.map.version_array
    assert volume.version == int(versions.max())
    assert np.count_nonzero(versions > volume.acknowledged) == made.dirty_count == dirty_size // BLOCK_SIZE
    place = recovered.map.find(make_key(1, made.lba_of(made.block_count - 1)))
    assert place == recovered.map.place_count - 1
    lazily = recover(lambda offset, size: content[offset : offset + size], superblock)
    assert lazily.map.linked_count in range(made.dirty_count, made.dirty_count + 2 * CHUNK_PLACES)
    assert list(recovered.zones.full) == list(range(free_count, superblock.zone_count))


def test_a_full_device_takes_no_room_for_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "device"
    make_full_device(path, 128 * MIB)
    assert path.stat().st_blocks * 512 < 4 * MIB


def test_the_ratio_is_of_the_same_round_and_the_better_peer() -> None:
    row = row_of([10, 100, 10], {"slow": [5, 50, 5], "fast": [20, 200, 20]}, Goal(0.4, 1.0))
    assert row.peer == "fast"
    assert row.ratios == [0.5, 0.5, 0.5]
    assert row.verdict == "ok"


@pytest.mark.parametrize(
    ("value", "goal", "verdict"),
    [
        (0.3, Goal(0.4, 1.0), "BELOW"),
        (0.4, Goal(0.4, 1.0), "ok"),
        (1.0, Goal(0.4, 1.0), "aim"),
        (13, Goal(12, 8, less_is_better=True), "BELOW"),
        (9, Goal(12, 8, less_is_better=True), "ok"),
        (8, Goal(12, 8, less_is_better=True), "aim"),
        (1, Goal(), "reported"),
    ],
)
def test_a_figure_below_its_goal_is_marked(value: float, goal: Goal, verdict: str) -> None:
    assert row_of([value], {}, goal).verdict == verdict


def test_the_table_and_the_file_say_the_same(tmp_path: Path) -> None:
    row = row_of([3, 1, 2], {"nbdkit": [10, 10, 10]}, Goal(0.4, 1.0))
    line = next(line for line in render([row]).splitlines() if line.startswith("key"))
    assert "0.20 (0.10..0.30)" in line and "BELOW" in line and "nbdkit 10.0" in line
    save([row], tmp_path / "new" / "bench.json", {"cores": 2})
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert found["cores"] == 2
    assert found["rows"][0]["figure"] == pytest.approx(0.2)
    assert found["rows"][0]["samples"] == {OURS: [3, 1, 2], "nbdkit": [10, 10, 10]}


@pytest.mark.parametrize("job", [{"error": 5}, {"error": 0, "read": {"total_ios": 0, "runtime": 0, "io_bytes": 0}}])
def test_a_load_that_failed_or_did_nothing_is_no_figure(job: dict[str, object]) -> None:
    with pytest.raises(BenchError):
        parse(json.dumps({"jobs": [job]}), Load("randread", 4096, 1, 1, 4096))


def test_the_highest_second_is_found_wherever_it_begins() -> None:
    sent = [0] * 30 + [100] * 10 + [0] * 30  # bytes per tenth of a second
    seen = [Seen(10 + i / 10, sum(sent[:i]), 0) for i in range(len(sent) + 1)]
    assert highest_rate(seen) == pytest.approx(1000, rel=0.1)
    assert highest_rate(seen[:31]) == 0
    with pytest.raises(BenchError, match="less than a second"):
        highest_rate(seen[:5])


def test_the_bench_knows_its_rows_and_refuses_others() -> None:
    words = [sys.executable, str(ROOT / "bench" / "run.py"), "--only", "nothing"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    for key in ("read", "write", "flush", "sequential", "import", "miss", "memory", "destage", "analysis", "micro"):
        assert key in done.stderr

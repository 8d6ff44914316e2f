"""`forebay analyze` and `forebay trace convert`: formats are found by content, damage is one line, figures agree."""

import argparse
import asyncio
import gzip
import json
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from fake_peer import fake_peer

from forebay_cache.engine.policy import PolicySettings, make_replay
from forebay_cache.engine.policy_core import MISS_GROUPS
from forebay_core.errors import ForebayError
from forebay_tools.analysis.accesses import BATCH_REQUESTS, Batch
from forebay_tools.analysis.calibration import Calibration, Uses
from forebay_tools.analysis.curve import Curve, Point
from forebay_tools.analysis.hashing import HASHES, groups, sample_hashes
from forebay_tools.analysis.survey import Survey
from forebay_tools.analysis.trace_record import HEADER, MAGIC, RECORD, encode_batch, encode_name
from forebay_tools.analysis.traces import BLKTRACE, BLKTRACE_MAGIC, read_trace
from forebay_tools.connect import ask_cache
from forebay_tools.main import main
from forebay_wire.messages import Message, Sample, SampledVolume

BLKTRACE_Q = 1 | 1 << 16


def as_requests(path: Path) -> list[tuple[int, int, bool]]:
    batches: list[Batch] = [part.batch for part in read_trace(path)]
    return [
        (key & (1 << 40) - 1, count, write)
        for batch in batches
        for key, count, write in zip(batch.keys.tolist(), batch.counts.tolist(), batch.writes.tolist(), strict=True)
    ]


def blktrace(*requests: tuple[int, int]) -> bytes:
    rows = [
        (BLKTRACE_MAGIC | 7, i, i * 1000, sector, size, BLKTRACE_Q, 1, 8 << 20, 0, 0, 0)
        for i, (sector, size) in enumerate(requests)
    ]
    return b"".join(BLKTRACE.pack(*row) for row in rows)


SAMPLES = {
    "csv": b"timestamp_us,op,offset_bytes,length_bytes\n0,R,8192,4096\n5,W,0,512\n",
    "msr": b"128166372003061629,usr,0,Read,8192,4096,100\n128166372003061639,usr,0,Write,0,512,100\n",
    "alibaba": b"419,R,8192,4096,1577808000000046\n419,W,0,512,1577808000000047\n",
    "tencent": b"1538323200,16,8,0,1283\n1538323200,0,1,1,1283\n",
    "blkparse": b"  8,0 1 1 0.000000000 3 Q R 16 + 8 [fio]\n  8,0 1 2 0.1 3 D R 16 + 8 [fio]\n"
    b"  8,0 1 3 0.2 3 Q W 0 + 1 [fio]\n",
    "iolog": b"fio version 2 iolog\n/dev/sda add\n/dev/sda open\n/dev/sda read 8192 4096\n/dev/sda write 0 512\n",
    "blktrace": blktrace((16, 4096))
    + BLKTRACE.pack(BLKTRACE_MAGIC | 7, 9, 9, 0, 512, 1 | 1 << 17, 1, 8 << 20, 0, 0, 0),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_found_by_its_content(kind: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(SAMPLES[kind]) if packed else SAMPLES[kind])
    assert as_requests(path) == [(2, 1, False), (0, 1, True)]
    converted = tmp_path / "own"
    assert main(["trace", "convert", str(path), str(converted)]) == 0
    assert as_requests(converted) == [(2, 1, False), (0, 1, True)]


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (SAMPLES["csv"] + b"1,R,zero,4096\n", 4),
        (SAMPLES["csv"] + b"1,R,-4096,4096\n", 4),
        (SAMPLES["blktrace"] + b"1234", 3),
        (SAMPLES["blktrace"] + bytes(48), 3),
        (b"FBTRACE1" + bytes(8) + struct.pack("<IIQ", 0, 0, 1), 1),
        (b"FBTRACE1" + bytes(8) + bytes(5), 1),
        (bytes(range(256)), 1),
    ],
)
def test_damage_is_one_line_that_names_file_and_record(
    content: bytes, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    assert main(["analyze", str(path)]) == 1
    complaint = capsys.readouterr().err.strip().splitlines()
    assert len(complaint) == 1
    assert f"{path}: record {number}: " in complaint[0]


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(b"FBTRACE1" + bytes(8))
    with pytest.raises(ForebayError, match="holds no request"):
        as_requests(path)


def loop(path: Path, blocks: int, times: int) -> Path:
    path.write_text("".join(f"{i},R,{i % blocks * 4096},4096\n" for i in range(blocks * times)))
    return path


def test_a_sample_that_holds_all_blocks_agrees_with_the_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = loop(tmp_path / "loop", 1000, 12)
    assert main(["analyze", "--json", str(path)]) == 0
    curve = {point["size_blocks"]: point for point in json.loads(capsys.readouterr().out)["curve"]}
    assert main(["analyze", "--replay", "--json", "--sizes", "0.5,1.0,400KiB", str(path)]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert [row["size_blocks"] for row in replayed] == [500, 1000, 100]
    for row in replayed:
        assert row["hit_ratio"] == pytest.approx(curve[row["size_blocks"]]["hit_ratio"], abs=0.06)
    assert curve[500]["lru_hit_ratio"] == 0.0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / f"curve{suffix}"
    assert main(["analyze", "--plot", str(picture), str(loop(tmp_path / "loop", 300, 5))]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<svg")
    out = capsys.readouterr()
    assert "recommended" in out.out
    assert "thin evidence" in out.err


@pytest.mark.parametrize(
    "words",
    [
        ["--sizes", "0.5"],
        ["--ssd-price", "1"],
        ["--samples", "1"],
        ["--plot", "x.gif"],
        ["--vms", "-1"],
        ["--run-dir", "."],
    ],
)
def test_flags_that_make_no_sense_are_refused(words: list[str], tmp_path: Path) -> None:
    assert main(["analyze", str(loop(tmp_path / "loop", 10, 2)), *words]) == 2


# --- bands and figures ------------------------------------------------------------------------------------------


def zipf_keys(seed: int, *, blocks: int, count: int, skew: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, blocks + 1) ** skew
    names = rng.permutation(blocks).astype(np.uint64) + np.uint64(1 << 40)
    return names[rng.choice(blocks, count, p=weights / weights.sum())]


def batches(keys: np.ndarray) -> list[Batch]:
    ones = np.ones(keys.size, np.uint64)
    return [Batch(keys, ones, np.zeros(keys.size, np.bool_), ones)]


def sampled_points(keys: np.ndarray, samples: int) -> list[Point]:
    survey = Survey()
    for batch in batches(keys):
        survey.add(batch)
    uses = survey.uses()
    rate = min(uses.rate, samples / survey.distinct_blocks)
    curve = Curve(survey.distinct_blocks, rate, PolicySettings(), uses)
    kept = keys[sample_hashes(keys) < np.uint64(int(rate * HASHES) - 1)]
    curve.show(kept, accesses=keys.size)
    return curve.points()


def true_hit_ratio(keys: np.ndarray, size: int) -> float:
    replay = make_replay(size)
    replay.feed(keys)
    return replay.figures()["hits"] / keys.size


@pytest.mark.parametrize("skew", [0.6, 0.9, 1.1])
def test_the_truth_is_near_and_nine_times_in_ten_within_the_band(skew: float) -> None:
    inside, errors = [], []
    for seed in range(3):
        keys = zipf_keys(seed, blocks=30_000, count=300_000, skew=skew)
        for point in sampled_points(keys, 3000)[2::4]:
            error = abs(point.hit_ratio - true_hit_ratio(keys, point.size_blocks))
            inside.append(error <= point.band)
            errors.append(error)
            assert point.band < 0.05
    assert sum(inside) >= 0.85 * len(inside)
    assert sum(errors) / len(errors) < 0.01


def test_a_sample_of_other_use_than_the_whole_is_set_right() -> None:
    keys = zipf_keys(5, blocks=30_000, count=200_000, skew=0.8)
    blocks, counts = np.unique(keys, return_counts=True)
    rate = 3000 / blocks.size
    sampled = blocks[sample_hashes(blocks) < np.uint64(int(rate * HASHES))]
    misses = np.bincount(groups(sampled), minlength=MISS_GROUPS)
    found = Calibration(Uses(blocks, counts, 1.0), rate).misses(misses)
    assert found.misses == pytest.approx(blocks.size, rel=1e-6)  # each block missed once, however many are sampled
    assert found.error < 1


# --- our own format ---------------------------------------------------------------------------------------------


def test_names_of_volumes_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, own = tmp_path / "source", tmp_path / "own"
    rows = [f"1,src{i % 3},{i % 2},Read,{4096 * (i % 50)},4096,1\n" for i in range(40_000)]
    source.write_text("".join(rows))
    assert main(["trace", "convert", str(source), str(own)]) == 0
    assert as_requests(own) == as_requests(source)
    assert main(["analyze", "--json", str(own)]) == 0
    names = {volume["name"] for volume in json.loads(capsys.readouterr().out)["volumes"]}
    assert names == {f"src{i}.{k}" for i in range(3) for k in range(2)}


@pytest.mark.parametrize("before", [0, BATCH_REQUESTS - 2, BATCH_REQUESTS - 1, BATCH_REQUESTS])
def test_a_name_may_lie_across_what_is_read_at_a_time(before: int, tmp_path: Path) -> None:
    path = tmp_path / "own"
    row = RECORD.pack(0, 1, 1 << 40)
    path.write_bytes(HEADER.pack(MAGIC, 0) + row * before + encode_name(7, "ü" * 40) + row)
    parts = list(read_trace(path))
    assert parts[-1].volumes == {7: "ü" * 40}
    assert sum(part.batch.keys.size for part in parts) == before + 1


# --- nothing crashes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SAMPLES, "own"])
def test_whatever_is_in_a_file_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    whole = SAMPLES.get(kind, HEADER.pack(MAGIC, 0) + encode_name(3, "disk") + RECORD.pack(0, 1, 3 << 40) * 3)
    rng = random.Random(kind)
    path = tmp_path / "trace"
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            content[rng.randrange(len(content))] = rng.choice(b"\0\n,9- \xff\x80R" + bytes([rng.randrange(256)]))
        cut = content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content
        path.write_bytes(gzip.compress(cut)[: rng.randrange(1, 200)] if rng.random() < 0.1 else cut)
        try:
            as_requests(path)
        except ForebayError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# --- the running host -------------------------------------------------------------------------------------------


def test_a_host_without_accesses_and_one_without_a_daemon_are_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = Sample((1 << 64) - 1, 0, 0, 1 << 30, 25_000, 800_000, ())
    assert main(["analyze", "--run-dir", str(tmp_path)]) == 1
    with fake_peer(lambda _: empty, run_dir=tmp_path):
        assert main(["analyze", "--run-dir", str(tmp_path)]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 2
    assert "no cache daemon serves" in complaints[0] and "no access yet" in complaints[1]


def test_a_daemon_that_is_too_old_is_a_line(tmp_path: Path) -> None:
    with fake_peer(lambda _: None, run_dir=tmp_path), pytest.raises(ForebayError, match="older than this command"):
        asyncio.run(ask_cache(argparse.Namespace(run_dir=tmp_path), Unknown(), Sample))


class Unknown(Message, frozen=True, array_like=True, tag=9999):
    """A message that nobody knows."""


def test_the_answer_of_a_sample_is_that_of_the_trace_it_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = zipf_keys(3, blocks=20_000, count=150_000, skew=0.9)
    own = tmp_path / "own"
    own.write_bytes(HEADER.pack(MAGIC, 0) + encode_name(1, "disk") + encode_batch(batches(keys)[0]))
    limit = 1 << 63
    kept = keys[sample_hashes(keys) < np.uint64(limit)]
    volumes = (SampledVolume(1, "disk", True),)
    sample = Sample(limit, keys.size, 10**12, 4096 * 5000, 25_000, 800_000, volumes)
    with fake_peer(lambda _: (sample, [kept.tobytes()]), run_dir=tmp_path):
        assert main(["analyze", "--json", "--run-dir", str(tmp_path)]) == 0
    assert main(["analyze", "--json", str(own)]) == 0
    host, trace = map(json.loads, capsys.readouterr().out.splitlines())
    assert host["accesses"] == trace["accesses"] == keys.size
    assert host["distinct_blocks"] == pytest.approx(trace["distinct_blocks"], rel=0.03)
    for mine, theirs in zip(host["curve"], trace["curve"], strict=True):
        assert mine["hit_ratio"] == pytest.approx(theirs["hit_ratio"], abs=0.03)
    assert host["today"]["size_blocks"] == 5000 and trace["today"] is None
    assert host["volumes"][0]["name"] == trace["volumes"][0]["name"] == "disk"
    assert host["volumes"][0]["hit_share"] == 1.0


def test_the_documented_fields_are_those_of_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cache-size.md").read_text().split("## JSON")[1]
    told = set(re.findall(r"`(\w+)`", page))
    assert main(["analyze", "--json", "--vms", "2", str(loop(tmp_path / "loop", 300, 5))]) == 0
    answer = json.loads(capsys.readouterr().out)
    fields = {*answer, *answer["curve"][0], *answer["volumes"][0], *answer["more_vms"]}
    assert main(["analyze", "--replay", "--json", str(loop(tmp_path / "loop", 300, 5))]) == 0
    fields |= set(json.loads(capsys.readouterr().out)[0])
    assert told == fields

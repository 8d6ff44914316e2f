"""`forebay analyze` and `forebay trace convert`: formats are found by content, damage is one line, figures agree."""

import gzip
import json
import struct
from pathlib import Path

import pytest

from forebay_core.errors import ForebayError
from forebay_tools.analysis.accesses import Batch
from forebay_tools.analysis.traces import BLKTRACE, BLKTRACE_MAGIC, read_trace
from forebay_tools.main import main

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
    "words", [["--sizes", "0.5"], ["--ssd-price", "1"], ["--samples", "1"], ["--plot", "x.gif"], ["--vms", "-1"]]
)
def test_flags_that_make_no_sense_are_refused(words: list[str], tmp_path: Path) -> None:
    assert main(["analyze", str(loop(tmp_path / "loop", 10, 2)), *words]) == 2

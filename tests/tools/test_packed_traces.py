"""Packed traces: whole ones are read to their end, and one that was cut or damaged is a line, never a short answer."""

import gzip
import random
from pathlib import Path

import pytest
import zstandard

from forebay_core.errors import ForebayError
from forebay_tools.analysis.trace_record import HEADER, MAGIC, RECORD
from forebay_tools.analysis.traces import read_trace

COUNT = 40_000
PLAIN = HEADER.pack(MAGIC, 0) + b"".join(
    RECORD.pack(at, 1, 1 << 40 | random.Random(at).getrandbits(30)) for at in range(COUNT)
)


def requests(path: Path) -> int:
    return sum(part.batch.keys.size for part in read_trace(path))


def zstd(content: bytes, *, checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(content)


SKIPPABLE = (0x184D2A53).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"something"
PACKED = {
    "gzip": gzip.compress(PLAIN, 1),
    "two gzips": gzip.compress(PLAIN[:9000], 1) + gzip.compress(PLAIN[9000:], 1),
    "zstd": zstd(PLAIN),
    "zstd with a sum": zstd(PLAIN, checksum=True),
    "two frames": zstd(PLAIN[:9000]) + zstd(PLAIN[9000:], checksum=True),
    "a frame to skip": zstd(PLAIN[:9000]) + SKIPPABLE + zstd(PLAIN[9000:]),
}


@pytest.mark.parametrize("kind", PACKED)
def test_all_of_it_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(PACKED[kind])
    assert requests(path) == COUNT


@pytest.mark.parametrize("kind", PACKED)
def test_one_that_was_cut_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    whole = PACKED[kind]
    rng = random.Random(kind)
    for size in [*range(len(whole) - 12, len(whole)), *(rng.randrange(20, len(whole)) for _ in range(8))]:
        path.write_bytes(whole[:size])
        try:
            # What is cut between two of several parts is whole to anybody.
            assert requests(path) == 562, size
        except ForebayError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["gzip", "zstd with a sum"])
def test_a_flipped_bit_is_a_line_that_names_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    rng = random.Random(kind)
    for _ in range(20):
        content = bytearray(PACKED[kind])
        content[rng.randrange(20, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ForebayError, match=str(path)):
            requests(path)


def test_damage_tells_how_many_requests_were_read_before(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(PACKED["gzip"][:-200])
    with pytest.raises(ForebayError, match="behind request 32768: the compressed trace is damaged"):
        requests(path)


@pytest.mark.parametrize("content", [b"", gzip.compress(b""), zstd(b"")])
def test_an_empty_file_is_called_so(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ForebayError, match="the file is empty"):
        requests(path)

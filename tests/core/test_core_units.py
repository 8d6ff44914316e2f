"""Units: versions compare as (epoch, sequence), sizes are read and shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_core.units import (
    EPOCH_MAX,
    GIB,
    MIB,
    RATE_UNLIMITED,
    SEQUENCE_MAX,
    TIB,
    epoch_of,
    format_rate,
    format_size,
    make_version,
    parse_rate,
    parse_size,
    sequence_of,
)

PAIRS = st.tuples(st.integers(0, EPOCH_MAX), st.integers(0, SEQUENCE_MAX))


@given(PAIRS, PAIRS)
def test_versions_compare_as_epoch_then_sequence(left: tuple[int, int], right: tuple[int, int]) -> None:
    one, other = make_version(*left), make_version(*right)
    assert (one < other, one == other) == (left < right, left == right)
    assert (epoch_of(one), sequence_of(one)) == left
    assert one < 1 << 64


@pytest.mark.parametrize("pair", [(-1, 0), (EPOCH_MAX + 1, 0), (0, -1), (0, SEQUENCE_MAX + 1)])
def test_a_version_out_of_bounds_is_our_bug(pair: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        make_version(*pair)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("10GiB", 10 * GIB),
        ("10 GiB", 10 * GIB),
        (" 512M ", 512 * MIB),
        ("512mb", 512 * MIB),
        ("1.5T", TIB * 3 // 2),
        ("0.5KiB", 512),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "+1",
        "1e3",
        "1.",
        ".5G",
        "0.3",
        "1.0001K",
        "10  GiB",
        "10GiB/s",
        "١",
        "1\u212a",
        "1P",
        "0x10",
        "9" * 21,
        "1.0000000000001",
        "1_000",
        "nan",
        "1\n2",
    ],
)
def test_what_is_no_size_is_refused_and_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="10GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 * GIB, "10 GiB"),
        (5000 * TIB, "5000 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_a_size_is_shown(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_a_shown_size_is_close_to_the_truth(size: int) -> None:
    assert abs(parse_size_loosely(format_size(size)) - size) <= size * 0.051 + 1


def parse_size_loosely(text: str) -> float:
    number, unit = text.split()
    return float(number) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)


@pytest.mark.parametrize(("text", "rate"), [("20MiB/s", 20 << 20), ("1.5 GiB/s", 3 << 29), ("4096", 4096)])
def test_a_rate_is_a_size_per_second(text: str, rate: int) -> None:
    assert parse_rate(text) == rate
    assert format_rate(20 << 20) == "20 MiB/s"
    assert format_rate(0) == format_rate(RATE_UNLIMITED) == "no limit"


@pytest.mark.parametrize("text", ["", "/s", "20MiB/h", "20 MiB/s/s", "fast"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate(text)

"""Traces that are text, line by line. Each parser takes a line and returns a request, or None for what is none.

csv       timestamp_us,op,offset_bytes,length_bytes
msr       timestamp(100 ns),host,disk,Read|Write,offset,size,response
alibaba   device,R|W,offset,length,timestamp_us
tencent   timestamp_s,offset_sectors,size_sectors,0 read|1 write,volume
blkparse  maj,min cpu sequence time pid action rwbs sector + sectors [process]
iolog     fio version 2 or 3: [time] file read|write offset length
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from forebay_tools.analysis.accesses import Batch, Gathering, TraceError

SECTOR_SIZE: Final = 512


class Request(NamedTuple):
    """One line that is a request."""

    volume: str
    offset: int
    length: int
    write: bool
    time_ms: int


Parse = Callable[[str], Request | None]


def parse_csv(line: str) -> Request | None:
    """Read the format of the traces that come with the project."""
    time_us, op, offset, length = line.split(",")
    if time_us.startswith("timestamp"):
        return None
    return Request("", int(offset), int(length), _is_write(op), int(float(time_us)) // 1000)


def parse_msr(line: str) -> Request | None:
    """Read a trace of Microsoft Research Cambridge."""
    time, host, disk, op, offset, size, _ = line.split(",")
    return Request(f"{host}.{disk}", int(offset), int(size), _is_write(op), int(time) // 10_000)


def parse_alibaba(line: str) -> Request | None:
    """Read a trace of Alibaba's block storage."""
    device, op, offset, length, time_us = line.split(",")
    if device == "device_id":
        return None
    return Request(device, int(offset), int(length), _is_write(op), int(time_us) // 1000)


def parse_tencent(line: str) -> Request | None:
    """Read a trace of Tencent's block storage."""
    time_s, offset, size, op, volume = line.split(",")
    if op not in ("0", "1"):
        raise ValueError(op)
    return Request(volume, int(offset) * SECTOR_SIZE, int(size) * SECTOR_SIZE, op == "1", int(time_s) * 1000)


def parse_blkparse(line: str) -> Request | None:
    """Read a line of blkparse's own format; only requests that were queued count."""
    words = line.split()
    if len(words) < 10 or words[5] != "Q" or words[8] != "+":
        if words and words[0][0].isdigit() and "," in words[0] and len(words) < 6:
            raise ValueError(line)
        return None  # other events, and the summary at the end
    if not set("RW") & set(words[6]) or "D" in words[6]:
        return None
    return Request(
        words[0], int(words[7]) * SECTOR_SIZE, int(words[9]) * SECTOR_SIZE, "W" in words[6], int(float(words[3]) * 1000)
    )


def parse_iolog(line: str) -> Request | None:
    """Read a line of fio's log of I/O, version 2 or 3."""
    words = line.split()
    if line.startswith("fio version"):
        return None
    time_ms = int(words.pop(0)) if len(words) in (3, 5) and words[0].isdigit() else 0
    if len(words) == 2:
        if words[1] not in ("add", "open", "close"):
            raise ValueError(line)
        return None
    file, op, offset, length = words
    if op not in ("read", "write"):
        if op not in ("trim", "sync", "datasync", "wait"):
            raise ValueError(line)
        return None
    return Request(file, int(offset), int(length), op == "write", time_ms)


PARSERS: Final[dict[str, Parse]] = {
    "iolog": parse_iolog,
    "csv": parse_csv,
    "msr": parse_msr,
    "alibaba": parse_alibaba,
    "tencent": parse_tencent,
    "blkparse": parse_blkparse,
}
"""In the order in which they are tried."""


def detect_text(head: str) -> str | None:
    """Return the name of the format whose parser finds a request in the first lines, or None."""
    lines = [line for line in head.splitlines()[:50] if line.strip()]
    if lines and lines[0].startswith("fio version"):
        return "iolog"
    return next((name for name, parse in PARSERS.items() if name != "iolog" and _finds(parse, lines)), None)


def _finds(parse: Parse, lines: list[str]) -> bool:
    """Tell whether the parser finds a request before a line that it refuses."""
    try:
        return any(parse(line) is not None for line in lines)
    except (ValueError, IndexError):
        return False


def read_text(file: str, lines: Iterator[str], kind: str) -> Iterator[tuple[Batch, dict[int, str]]]:
    """Yield batches, with the names of the volumes so far.

    Raises:
        TraceError: a line is not of this format.
    """
    parse, gathering = PARSERS[kind], Gathering(file)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = parse(line)
        except (ValueError, IndexError, OverflowError) as error:
            raise TraceError(file, number, f"is no line of a {kind} trace: {line.strip()[:60]!r}") from error
        if request is not None:
            gathering.add(number, *request)
            if gathering.is_full:
                yield gathering.take(), gathering.volumes()
    yield gathering.take(), gathering.volumes()


def _is_write(op: str) -> bool:
    kind = op.strip().lower()
    if kind not in ("r", "read", "w", "write"):
        raise ValueError(op)
    return kind.startswith("w")

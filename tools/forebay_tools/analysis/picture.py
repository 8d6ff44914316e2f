"""The curve as a picture: SVG as text, PNG with a small raster of our own. Both show the same lines and labels."""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.analysis.curve import Point

WIDTH: Final = 800
HEIGHT: Final = 480
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 40, 60
OURS: Final = (20, 90, 180)
LRU: Final = (150, 150, 150)
BAND: Final = (205, 220, 240)
GRID: Final = (230, 230, 230)
INK: Final = (40, 40, 40)
MARK: Final = (200, 60, 30)
Colour = tuple[int, int, int]
Place = tuple[float, float]


class Line(NamedTuple):
    """Connected places of one colour."""

    places: list[Place]
    colour: Colour
    width: int = 1


class Label(NamedTuple):
    """A text whose left lower corner, or with `middle` its middle, is at a place."""

    place: Place
    text: str
    middle: bool = True


class Picture(NamedTuple):
    """All that is drawn, in order."""

    band: list[Place]
    lines: list[Line]
    labels: list[Label]


def compose(points: Sequence[Point], marks: Sequence[tuple[str, int]]) -> Picture:
    """Lay the curve out; `marks` are texts and sizes in blocks."""
    low, high = math.log(points[0].size_blocks), math.log(max(points[-1].size_blocks, points[0].size_blocks + 1))

    def at(size: int, ratio: float) -> Place:
        share = (math.log(max(1, size)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - ratio * (HEIGHT - TOP - BOTTOM)

    band = [at(p.size_blocks, min(1, p.hit_ratio + p.band)) for p in points]
    band += [at(p.size_blocks, max(0, p.hit_ratio - p.band)) for p in reversed(points)]
    lines, labels = [], []
    for tenth in range(0, 11, 2):
        left, y = at(points[0].size_blocks, tenth / 10)
        lines.append(Line([(left, y), (WIDTH - RIGHT, y)], GRID))
        labels.append(Label((LEFT - 30, y + 4), f"{tenth * 10} %"))
    for point in points[:: max(1, len(points) // 6)]:
        x, _ = at(point.size_blocks, 0)
        labels.append(Label((x, HEIGHT - BOTTOM + 18), format_size(_rounded(point.size_blocks * BLOCK_SIZE))))
    for text, size in marks:
        if points[0].size_blocks <= size <= points[-1].size_blocks:
            lines.append(Line([at(size, 0), at(size, 1)], MARK))
            labels.append(Label((at(size, 0)[0], TOP - 8), text))
    lines.append(Line([at(p.size_blocks, p.lru_hit_ratio) for p in points], LRU, 2))
    lines.append(Line([at(p.size_blocks, p.hit_ratio) for p in points], OURS, 2))
    labels.append(Label((WIDTH / 2, HEIGHT - 14), "hit ratio by size: forebay blue, LRU grey"))
    return Picture(band, lines, labels)


def svg(picture: Picture) -> str:
    """Return the picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif"'
        f' font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<polygon fill="{_hex(BAND)}" points="{_path(picture.band)}"/>',
    ]
    for line in picture.lines:
        parts.append(
            f'<polyline fill="none" stroke="{_hex(line.colour)}" stroke-width="{line.width}"'
            f' points="{_path(line.places)}"/>'
        )
    for (x, y), text, middle in picture.labels:
        anchor = ' text-anchor="middle"' if middle else ""
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{_hex(INK)}"{anchor}>{text}</text>')
    return "\n".join([*parts, "</svg>\n"])


def png(picture: Picture) -> bytes:
    """Return the picture as PNG."""
    raster = _Raster()
    half = len(picture.band) // 2
    for (x0, top0), (x1, top1), (_, low1), (_, low0) in zip(
        picture.band[: half - 1], picture.band[1:half], picture.band[::-1][1:half], picture.band[::-1], strict=False
    ):
        for column in range(round(x0), round(x1) + 1):
            share = (column - x0) / max(1e-9, x1 - x0)
            raster.line((column, top0 + (top1 - top0) * share), (column, low0 + (low1 - low0) * share), BAND)
    for line in picture.lines:
        for i in range(line.width):
            for (x0, y0), (x1, y1) in zip(line.places, line.places[1:], strict=False):
                raster.line((x0, y0 + i), (x1, y1 + i), line.colour)
    for (x, y), text, middle in picture.labels:
        raster.text(x - (len(text) * 6 // 2 if middle else 0), y - 8, text)
    return raster.png()


class _Raster:
    def __init__(self) -> None:
        self._rows = [bytearray(b"\xff" * 3 * WIDTH) for _ in range(HEIGHT)]

    def dot(self, x: int, y: int, colour: Colour) -> None:
        if 0 <= x < WIDTH and 0 <= y < HEIGHT:
            self._rows[y][3 * x : 3 * x + 3] = bytes(colour)

    def line(self, start: Place, end: Place, colour: Colour) -> None:
        steps = max(1, round(max(abs(end[0] - start[0]), abs(end[1] - start[1]))))
        for step in range(steps + 1):
            x = start[0] + (end[0] - start[0]) * step / steps
            y = start[1] + (end[1] - start[1]) * step / steps
            self.dot(round(x), round(y), colour)

    def text(self, left: float, top: float, text: str) -> None:
        for i, letter in enumerate(text.upper()):
            for y, bits in enumerate(FONT.get(letter, FONT[" "])):
                for x in range(3):
                    if bits >> (2 - x) & 1:
                        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)) if len(text) < 12 else ((0, 0), (0, 1)):
                            self.dot(
                                round(left) + 6 * i + (2 * x if len(text) < 12 else x) + dx,
                                round(top) + 2 * y + dy,
                                INK,
                            )

    def png(self) -> bytes:
        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
        rows = zlib.compress(b"".join(b"\0" + bytes(row) for row in self._rows), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _glyphs(text: str) -> dict[str, tuple[int, ...]]:
    return {part[0]: tuple(int(digit) for digit in part[1:]) for part in text.split()}


FONT: Final[dict[str, tuple[int, ...]]] = {
    " ": (0, 0, 0, 0, 0),
    **_glyphs("075557 126227 271747 371717 455711 574717 674757 771122 875757 975717 .00002 %51245 :02020 ,00024"),
    **_glyphs("A25755 B65656 C34443 D65556 E74647 F74644 G34553 H55755 I72227 J11152 K55655 L44447 M57755 N65555"),
    **_glyphs("O25552 P65644 Q25563 R65655 S34216 T72222 U55557 V55552 W55775 X55255 Y55222 Z71247"),
}
"""Letters of 3 by 5 dots: a letter, then its rows from above as octal digits."""


def _path(places: Sequence[Place]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _hex(colour: Colour) -> str:
    return "#" + bytes(colour).hex()


def _rounded(size: int) -> int:
    """Return a size that is short to write."""
    unit = 1 << max(0, size.bit_length() - 1) // 10 * 10
    return max(1, round(size / unit)) * unit

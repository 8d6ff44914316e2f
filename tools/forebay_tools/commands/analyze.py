"""`forebay analyze`: the best cache size for traces."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from forebay_cache.engine.policy import PolicySettings
from forebay_core.errors import ForebayError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, format_size, parse_size
from forebay_tools.analysis import advice, replaying
from forebay_tools.analysis.accesses import Batch
from forebay_tools.analysis.curve import SAMPLES_DEFAULT, Curve, Point
from forebay_tools.analysis.picture import compose, png, svg
from forebay_tools.analysis.survey import Survey
from forebay_tools.analysis.text_plot import draw_text
from forebay_tools.analysis.traces import read_trace
from forebay_tools.arguments import Commands, add_command, add_json
from forebay_tools.printing import Json, note, say, say_json, say_table
from forebay_tools.progress import Progress

SAMPLES_MIN = 256
SAMPLES_MAX = 1 << 17


class Looks(Protocol):
    """Whatever a trace is shown to."""

    def add(self, batch: Batch) -> None:
        """Look at a batch."""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "analyze", run, "tell the best cache size for what traces show")
    parser.add_argument(
        "traces", metavar="TRACE", type=Path, nargs="+", help="trace of block accesses, any known format"
    )
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the curve to FILE.svg or FILE.png as well")
    parser.add_argument("--size", metavar="SIZE", type=_size, help="mark this size, say that of today's cache")
    parser.add_argument("--replay", action="store_true", help="replay the whole traces instead of a sample")
    parser.add_argument("--sizes", metavar="LIST", type=_sizes, help="with --replay: shares (0.05) or sizes (10GiB)")
    parser.add_argument("--samples", metavar="COUNT", type=int, default=SAMPLES_DEFAULT, help="blocks of the sample")
    parser.add_argument("--vms", metavar="COUNT", type=int, default=0, help="what so many more volumes would need")
    parser.add_argument("--ssd-price", metavar="PRICE", type=_price, help="of a GiB of SSD")
    parser.add_argument("--miss-cost", metavar="PRICE", type=_price, help="of a million misses")


def run(arguments: argparse.Namespace) -> int:
    """Read the traces and print."""
    _check(arguments)
    if arguments.replay:
        return _replay(arguments)
    survey = Survey()
    names = _show(arguments.traces, survey, "looking")
    curve = Curve(survey.distinct_blocks, arguments.samples, PolicySettings())
    _show(arguments.traces, curve, "analyzing")
    load = advice.Load(survey.accesses, survey.distinct_blocks, survey.last_ms, len(survey.volume_accesses))
    points = curve.points()
    prices = None
    if arguments.ssd_price is not None:
        prices = advice.Prices(arguments.ssd_price, arguments.miss_cost)
        if load.duration_ms < 1000:
            raise ForebayError("the traces tell no times, so nothing can be said of costs; leave --ssd-price out")
    best = advice.recommend(points, load, prices)
    marks = [("recommended", best.size_blocks)]
    if arguments.size is not None:
        marks.append(("today", arguments.size // BLOCK_SIZE))
    if arguments.plot is not None:
        picture = compose(points, marks)
        arguments.plot.write_bytes(png(picture) if arguments.plot.suffix == ".png" else svg(picture).encode())
    doubts = advice.doubts(load, round(survey.distinct_blocks * curve.rate))
    volumes = _volumes(survey, names)
    if arguments.json:
        say_json(_json(arguments, points, best, load, curve.rate, doubts, volumes))
    else:
        _print(arguments, points, best, load, doubts, volumes)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.sizes is not None and not arguments.replay:
        raise WrongUsageError("--sizes goes with --replay only; see forebay analyze --help")
    if (arguments.ssd_price is None) != (arguments.miss_cost is None):
        raise WrongUsageError("--ssd-price and --miss-cost go together; see forebay analyze --help")
    if not SAMPLES_MIN <= arguments.samples <= SAMPLES_MAX:
        raise WrongUsageError(f"--samples {arguments.samples}: allowed is a number from {SAMPLES_MIN} to {SAMPLES_MAX}")
    if arguments.vms < 0:
        raise WrongUsageError(f"--vms {arguments.vms}: allowed is 0 or more")
    if arguments.plot is not None and arguments.plot.suffix not in (".svg", ".png"):
        raise WrongUsageError(f"--plot {arguments.plot}: allowed are names that end in .svg or .png")


def _show(traces: list[Path], looks: Looks, label: str) -> list[str]:
    """Show all traces; return the names of the volumes. Several traces are read one after the other."""
    names: list[str] = []
    total = sum(path.stat().st_size for path in traces)
    progress = Progress(label, total, sys.stderr)
    before = 0
    try:
        for path in traces:
            for part in read_trace(path):
                looks.add(part.batch)
                names = part.volumes if len(part.volumes) > len(names) else names
                progress.reach(min(total, before + part.done))
            before += path.stat().st_size
    finally:
        progress.close()
    return names


def _replay(arguments: argparse.Namespace) -> int:
    distinct = replaying.DistinctBlocks()
    _show(arguments.traces, distinct, "counting")
    sizes = replaying.in_blocks(arguments.sizes or [0.01, 0.05, 0.1, 0.2, 0.4], distinct.count)
    whole = replaying.WholeReplay(sizes, PolicySettings())
    _show(arguments.traces, whole, "replaying")
    results = whole.results()
    if arguments.json:
        say_json([result._asdict() for result in results])
        return 0
    rows = [
        (
            format_size(r.size_blocks * BLOCK_SIZE),
            str(r.size_blocks),
            f"{r.hit_ratio:.4f}",
            f"{r.ssd_writes_per_access:.4f}",
        )
        for r in results
    ]
    say_table(("SIZE", "BLOCKS", "HIT RATIO", "SSD WRITES PER ACCESS"), rows)
    return 0


def _volumes(survey: Survey, names: list[str]) -> list[dict[str, Json]]:
    sets = survey.working_sets()
    rows: list[dict[str, Json]] = []
    for i, (key, accesses) in enumerate(sorted(survey.volume_accesses.items())):
        name = names[i] if i < len(names) and names[i] else f"volume {key}"
        share = accesses / max(1, survey.accesses)
        rows.append({"name": name, "working_set_blocks": sets.get(key, 0), "access_share": share})
    return rows


def _json(
    arguments: argparse.Namespace,
    points: list[Point],
    best: Point,
    load: advice.Load,
    rate: float,
    doubts: list[str],
    volumes: list[dict[str, Json]],
) -> dict[str, Json]:
    at: Callable[[float], Json] = lambda size: _point_json(advice.interpolate(points, size))  # noqa: E731
    return {
        "accesses": load.accesses,
        "distinct_blocks": load.distinct_blocks,
        "duration_ms": load.duration_ms,
        "sample_rate": rate,
        "curve": [_point_json(point) for point in points],
        "recommended": _point_json(best),
        "half": at(best.size_blocks / 2),
        "double": at(best.size_blocks * 2),
        "today": None if arguments.size is None else at(arguments.size // BLOCK_SIZE),
        "written_bytes_per_day": advice.written_per_day(best, load),
        "more_vms": None
        if not arguments.vms
        else {"vms": arguments.vms, "size_blocks": advice.with_more(best, load, arguments.vms)},
        "volumes": volumes,
        "doubts": doubts,
    }


def _point_json(point: Point) -> Json:
    return {**point._asdict(), "size_bytes": point.size_blocks * BLOCK_SIZE}


def _print(
    arguments: argparse.Namespace,
    points: list[Point],
    best: Point,
    load: advice.Load,
    doubts: list[str],
    volumes: list[dict[str, Json]],
) -> None:
    marks = [("R", best.size_blocks)]
    rows = [("half", best.size_blocks / 2), ("recommended", best.size_blocks), ("double", best.size_blocks * 2)]
    if arguments.size is not None:
        marks.append(("T", arguments.size // BLOCK_SIZE))
        rows.append(("today", arguments.size / BLOCK_SIZE))
    for line in draw_text(points, marks):
        say(line)
    say(
        f"{load.accesses} accesses to {format_size(load.distinct_blocks * BLOCK_SIZE)}; * forebay, . LRU, R recommended"
    )
    say("")
    table = []
    for label, size in rows:
        point = advice.interpolate(points, size)
        day = advice.written_per_day(point, load)
        table.append(
            (
                label,
                format_size(round(size) * BLOCK_SIZE),
                f"{point.hit_ratio:.3f} +- {point.band:.3f}",
                f"{point.lru_hit_ratio:.3f}",
                "-" if day is None else f"{format_size(int(day))}, {day / max(1, size * BLOCK_SIZE):.2f} fills",
            )
        )
    say_table(("", "SIZE", "HIT RATIO", "LRU", "WRITTEN PER DAY"), table)
    say("")
    say_table(
        ("VOLUME", "WORKING SET", "SHARE OF ACCESSES"),
        [
            (str(v["name"]), format_size(int(str(v["working_set_blocks"])) * BLOCK_SIZE), f"{v['access_share']:.1%}")
            for v in volumes
        ],
    )
    if arguments.vms:
        size = advice.with_more(best, load, arguments.vms) * BLOCK_SIZE
        say(f"\n{arguments.vms} more volumes like these: {format_size(size)}")
    for doubt in doubts:
        note(f"thin evidence: {doubt}")


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size < BLOCK_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a block of {BLOCK_SIZE} bytes")
    return size


def _sizes(text: str) -> list[float]:
    try:
        return replaying.parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 < price < 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price above 0")
    return price

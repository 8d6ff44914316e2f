"""`forebay analyze`: the best cache size for a running host, or for traces."""

import argparse
from pathlib import Path

from forebay_cache.engine.policy import PolicySettings
from forebay_core.errors import ForebayError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, format_size, parse_size
from forebay_tools.analysis import advice, evidence, replaying
from forebay_tools.analysis.curve import SAMPLES_DEFAULT
from forebay_tools.analysis.evidence import Evidence
from forebay_tools.analysis.picture import compose, png, svg
from forebay_tools.analysis.report import Answer, answer_json, say_answer
from forebay_tools.arguments import (
    RUN_DIR_VARIABLE,
    Commands,
    above_zero,
    add_command,
    add_json,
    add_run_dir,
    names_run_dir,
)
from forebay_tools.printing import say_json, say_table

SAMPLES_MIN = 256
SAMPLES_MAX = 1 << 16
SIZES_DEFAULT = (0.01, 0.05, 0.1, 0.2, 0.4)


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "analyze", run, "tell the best cache size for this host, or for what traces show")
    parser.add_argument(
        "traces", metavar="TRACE", type=Path, nargs="*", help="trace of block accesses, any known format"
    )
    add_run_dir(parser)
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the curve to FILE.svg or FILE.png as well")
    parser.add_argument("--size", metavar="SIZE", type=_size, help="mark this size instead of that of today's cache")
    parser.add_argument("--replay", action="store_true", help="replay the whole traces instead of a sample")
    parser.add_argument("--sizes", metavar="LIST", type=_sizes, help="with --replay: shares (0.05) or sizes (10GiB)")
    parser.add_argument("--samples", metavar="COUNT", type=int, help="blocks of the sample that is taken of traces")
    parser.add_argument("--vms", metavar="COUNT", type=int, default=0, help="what so many more volumes would need")
    price = above_zero("price", 1e12)
    parser.add_argument("--ssd-price", metavar="PRICE", type=price, help="of a GiB of SSD")
    parser.add_argument("--miss-cost", metavar="PRICE", type=price, help="of a million misses")


def run(arguments: argparse.Namespace) -> int:
    """Ask the daemon or read the traces, and print."""
    _check(arguments)
    if arguments.replay:
        return _replay(arguments)
    if arguments.traces:
        found = evidence.of_traces(arguments.traces, arguments.samples or SAMPLES_DEFAULT)
    else:
        from forebay_tools.analysis.running import ask_sample  # what talks to a daemon takes 9 MiB

        found = evidence.of_sample(*ask_sample(arguments))
    answer = _answer(arguments, found)
    if arguments.plot is not None:
        picture = compose(answer.points, answer.marks())
        arguments.plot.write_bytes(png(picture) if arguments.plot.suffix == ".png" else svg(picture).encode())
    if arguments.json:
        say_json(answer_json(answer))
    else:
        say_answer(answer)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.traces and arguments.run_dir is not None:
        raise WrongUsageError("traces, or the host of --run-dir? name one of them; see forebay analyze --help")
    if not arguments.traces and not names_run_dir(arguments):
        raise WrongUsageError(
            f"analyze what? name traces, use --run-dir DIR or set {RUN_DIR_VARIABLE}; see forebay analyze --help"
        )
    if not arguments.traces and (arguments.replay or arguments.samples is not None):
        raise WrongUsageError("--replay and --samples go with traces only; see forebay analyze --help")
    if arguments.sizes is not None and not arguments.replay:
        raise WrongUsageError("--sizes goes with --replay only; see forebay analyze --help")
    if (arguments.ssd_price is None) != (arguments.miss_cost is None):
        raise WrongUsageError("--ssd-price and --miss-cost go together; see forebay analyze --help")
    if arguments.samples is not None and not SAMPLES_MIN <= arguments.samples <= SAMPLES_MAX:
        raise WrongUsageError(f"--samples {arguments.samples}: allowed is a number from {SAMPLES_MIN} to {SAMPLES_MAX}")
    if arguments.vms < 0:
        raise WrongUsageError(f"--vms {arguments.vms}: allowed is 0 or more")
    if arguments.plot is not None and arguments.plot.suffix not in (".svg", ".png"):
        raise WrongUsageError(f"--plot {arguments.plot}: allowed are names that end in .svg or .png")


def _answer(arguments: argparse.Namespace, found: Evidence) -> Answer:
    points = found.curve.points()
    prices = None
    if arguments.ssd_price is not None:
        prices = advice.Prices(arguments.ssd_price, arguments.miss_cost)
        if found.load.duration_ms < 1000:
            raise ForebayError("nothing is known of times, so nothing can be said of costs; leave --ssd-price out")
    best = advice.recommend(points, found.load, prices)
    today = found.today_blocks or 0 if arguments.size is None else arguments.size // BLOCK_SIZE
    return Answer(found, points, best, today, arguments.vms)


def _replay(arguments: argparse.Namespace) -> int:
    distinct = replaying.DistinctBlocks()
    evidence.show_traces(arguments.traces, distinct, "counting")
    sizes = replaying.in_blocks(arguments.sizes or SIZES_DEFAULT, distinct.count)
    whole = replaying.WholeReplay(sizes, PolicySettings())
    evidence.show_traces(arguments.traces, whole, "replaying")
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

"""`forebay limit`: how fast volumes may be destaged, each and all together."""

import argparse
import asyncio

from forebay_core.errors import ForebayError, WrongUsageError
from forebay_core.names import check_name
from forebay_core.units import RATE_UNLIMITED, format_rate
from forebay_tools.arguments import Commands, add_command, add_json, add_run_dir, transfer_rate
from forebay_tools.connect import cache_client
from forebay_tools.printing import Json, say_json, say_table
from forebay_wire.messages import CacheStatus, Done, GetCacheStatus, LimitStatus, SetLimit

HEAD = ("LIMIT OF", "AVERAGE", "PEAK", "NOW", "SET BY")
ALL = "all volumes"


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "limit how fast volumes are destaged, or show it; draining goes at the peak"
    parser = add_command(commands, "limit", run, text)
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of the volume; without it all are shown")
    parser.add_argument("--all", action="store_true", help="limit all volumes together")
    parser.add_argument(
        "--average", metavar="RATE", type=transfer_rate, help="usual bytes a second, for example 20MiB/s"
    )
    parser.add_argument(
        "--peak", metavar="RATE", type=transfer_rate, help="what it rises to as the buffer fills or ages"
    )
    parser.add_argument("--unlimited", action="store_true", help="no limit")
    parser.add_argument("--default", action="store_true", help="what the daemon's settings say")
    add_json(parser)
    add_run_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Change what is asked for, then print what holds."""
    rates = arguments.average is not None or arguments.peak is not None
    changes = rates + arguments.unlimited + arguments.default
    if changes > 1:
        raise WrongUsageError("give either --average and --peak, or --unlimited, or --default")
    if arguments.name is not None and arguments.all:
        raise WrongUsageError("give either the name of a volume or --all")
    if changes and arguments.name is None and not arguments.all:
        raise WrongUsageError("limit what? give the name of a volume or --all")
    if arguments.name is not None:
        check_name(arguments.name)
    if None not in (arguments.average, arguments.peak) and arguments.average > arguments.peak:
        raise WrongUsageError(
            f"--average {format_rate(arguments.average)} is more than --peak {format_rate(arguments.peak)}"
        )
    return asyncio.run(_run(arguments, change=changes > 0))


async def _run(arguments: argparse.Namespace, *, change: bool) -> int:
    async with cache_client(arguments) as client:
        if change:
            none = RATE_UNLIMITED if arguments.unlimited else 0
            message = SetLimit(
                arguments.name or "", arguments.average or none, arguments.peak or none, arguments.default
            )
            await client.ask(message, Done)
        status, _ = await client.ask(GetCacheStatus(), CacheStatus)
    limits = _limits(status, name=arguments.name, only_all=arguments.all)
    if arguments.json:
        say_json([_json(name, limit) for name, limit in limits])
    else:
        say_table(HEAD, [_cells(name, limit) for name, limit in limits])
    return 0


def _limits(status: CacheStatus, *, name: str | None, only_all: bool) -> list[tuple[str | None, LimitStatus]]:
    if only_all:
        return [(None, status.limit)]
    found: list[tuple[str | None, LimitStatus]] = [
        (volume.name, volume.limit) for volume in status.volumes if name in (None, volume.name)
    ]
    if name is not None and not found:
        raise ForebayError(f"volume {name} is not attached here; forebay status lists them")
    return found if name is not None else [(None, status.limit), *found]


def _json(name: str | None, limit: LimitStatus) -> dict[str, Json]:
    return {"volume": name, **limit_json(limit)}


def limit_json(limit: LimitStatus) -> dict[str, Json]:
    """Return what --json prints of a limit: bytes per second, null for none."""
    return {
        "average": limit.average or None,
        "peak": limit.peak or None,
        "allowed": limit.allowed or None,
        "own": limit.own,
    }


def _cells(name: str | None, limit: LimitStatus) -> tuple[str, ...]:
    rates = (limit.average, limit.peak, limit.allowed)
    return (name or ALL, *map(format_rate, rates), "forebay limit" if limit.own else "settings")

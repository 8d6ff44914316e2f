"""`forebay detach`: stop serving a volume and give it back."""

import argparse
import asyncio

from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_run_dir, add_store, add_volume_or_snapshot
from forebay_tools.holder import ask_daemon, attached_here
from forebay_tools.printing import note
from forebay_wire.messages import Detach, Done

TIMEOUT_S_MAX = 86400


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "detach", run, "destage all at the peak of its limit, stop serving a volume and release it"
    )
    add_volume_or_snapshot(parser)
    parser.add_argument(
        "--leave-dirty", action="store_true", help="destage nothing: dirty blocks stay here and so does the epoch"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="wait so long for those who use its block device; else they are named at once",
    )
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the daemon; returns when the volume is released."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    request = Detach(arguments.name, arguments.leave_dirty, int(arguments.timeout * 1000))
    before = await attached_here(arguments, arguments.name) if arguments.leave_dirty else None
    await ask_daemon(arguments, arguments.name, request, Done)
    if before is not None and before.dirty_bytes:
        note(
            f"up to {format_size(before.dirty_bytes)} of changes of volume {arguments.name} are not in the store yet; "
            "they are kept in this cache; attach it here again, or restart the cache daemon, to have them sent"
        )
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= TIMEOUT_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {TIMEOUT_S_MAX}")
    return seconds

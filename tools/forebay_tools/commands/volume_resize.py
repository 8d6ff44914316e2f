"""`forebay volume resize`: grow a volume, attached or not; shrink one that nobody holds."""

import argparse
import asyncio

from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_run_dir, add_store, add_volume, volume_size
from forebay_tools.holder import ask_holder
from forebay_tools.printing import say
from forebay_wire.messages import ResizeVolume, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "grow a volume, while it is attached or not; or shrink one that is not attached"
    parser = add_command(commands, "resize", run, text)
    add_volume(parser)
    parser.add_argument("size", metavar="SIZE", type=volume_size, help="the new size, for example 20GiB")
    parser.add_argument("--force", action="store_true", help="shrink; what lies behind the new end is gone")
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Resize the volume."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    message = ResizeVolume(arguments.name, arguments.size, arguments.force)
    answer, daemon = await ask_holder(arguments, arguments.name, message, Volume)
    reconnect = "; NBD clients that are connected see it after they reconnect" if daemon is not None else ""
    say(f"volume {answer.row.name} has {format_size(answer.row.size)} now{reconnect}")
    return 0

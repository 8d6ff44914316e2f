"""`forebay volume resize`: grow a volume that nobody holds."""

import argparse
import asyncio

from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_store, add_volume, volume_size
from forebay_tools.connect import store_client
from forebay_tools.printing import say
from forebay_wire.messages import ResizeVolume, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "resize", run, "grow a volume that is not attached")
    add_volume(parser)
    parser.add_argument("size", metavar="SIZE", type=volume_size, help="the new size, for example 20GiB")
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Grow the volume."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        answer, _ = await client.ask(ResizeVolume(arguments.name, arguments.size), Volume)
    say(f"volume {answer.row.name} has {format_size(answer.row.size)} now")
    return 0

"""`forebay volume create`: make an empty volume."""

import argparse
import asyncio

from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_store, add_volume, volume_size
from forebay_tools.connect import store_client
from forebay_tools.printing import say
from forebay_wire.messages import CreateVolume, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "create", run, "make an empty volume")
    add_volume(parser)
    parser.add_argument("--size", metavar="SIZE", type=volume_size, required=True, help="for example 10GiB")
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the volume."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        answer, _ = await client.ask(CreateVolume(arguments.name, arguments.size), Volume)
    say(f"volume {answer.row.name} of {format_size(answer.row.size)} made")
    return 0

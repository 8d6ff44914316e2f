"""`forebay volume clone`: make a writable volume of a snapshot."""

import argparse
import asyncio

from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_snapshot, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.printing import say
from forebay_wire.messages import CloneVolume, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "make a volume whose blocks are those of a snapshot until they are written"
    parser = add_command(commands, "clone", run, text)
    add_snapshot(parser)
    add_volume(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the clone."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    volume, snapshot = arguments.snapshot
    async with store_client(arguments) as client:
        answer, _ = await client.ask(CloneVolume(volume, snapshot, arguments.name), Volume)
    say(f"volume {answer.row.name} of {format_size(answer.row.size)} made, a clone of {arguments.snapshot}")
    return 0

"""`forebay volume delete`: delete a volume and all it holds."""

import argparse
import asyncio
import os

from forebay_core.units import ID_SIZE
from forebay_tools.arguments import Commands, add_command, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.printing import say
from forebay_wire.messages import DeleteVolume, Done, Opened, OpenVolume, ReleaseVolume


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "delete", run, "delete a volume that is not attached, with all it holds")
    add_volume(parser)
    parser.add_argument("--take-over", action="store_true", help="take it from its writer first, if that is gone")
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Delete the volume."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        if arguments.take_over:
            opened, _ = await client.ask(OpenVolume(arguments.name, os.urandom(ID_SIZE), take_over=True), Opened)
            await client.ask(ReleaseVolume(opened.row.id, opened.epoch, opened.session), Done)
        await client.ask(DeleteVolume(arguments.name), Done)
    say(f"volume {arguments.name} deleted")
    return 0

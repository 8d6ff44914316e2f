"""`forebay snapshot delete`: delete a snapshot that has no clones."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_snapshot, add_store
from forebay_tools.connect import store_client
from forebay_tools.printing import say
from forebay_wire.messages import DeleteSnapshot, Done


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "delete a snapshot that has no clones; its space comes back in the background"
    parser = add_command(commands, "delete", run, text)
    add_snapshot(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Delete the snapshot."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        await client.ask(DeleteSnapshot(*arguments.snapshot), Done)
    say(f"snapshot {arguments.snapshot} deleted")
    return 0

"""`forebay snapshot rollback`: make a volume again what it was when a snapshot was taken."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_snapshot, add_store
from forebay_tools.connect import store_client
from forebay_tools.printing import say
from forebay_wire.messages import RollbackVolume, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "make a volume that is not attached what it was when a snapshot was taken; newer snapshots stay"
    parser = add_command(commands, "rollback", run, text)
    add_snapshot(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Roll the volume back."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        answer, _ = await client.ask(RollbackVolume(*arguments.snapshot), Volume)
    say(f"volume {answer.row.name} is again as in snapshot {arguments.snapshot}")
    return 0

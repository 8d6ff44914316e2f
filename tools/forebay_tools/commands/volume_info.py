"""`forebay volume info`: what the store knows of one volume."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_json, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.printing import say_fields, say_json
from forebay_tools.rows import held_fields, held_json, row_fields, row_json
from forebay_wire.messages import GetHeld, GetVolume, Held, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "info", run, "tell what the store knows of a volume")
    add_volume(parser)
    add_json(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask and print."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        answer, _ = await client.ask(GetVolume(arguments.name), Volume)
        held, _ = await client.ask(GetHeld(arguments.name), Held)
    if arguments.json:
        say_json(
            {
                **row_json(answer.row),
                "held": held_json(held.report, answer.row.version),
                "lost": held_json(held.lost, held.lost_from),
            }
        )
    else:
        say_fields({**row_fields(answer.row), **held_fields(answer.row, held)})
    return 0

"""`forebay volume info`: what the store knows of one volume."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_json, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.printing import say_fields, say_json
from forebay_tools.rows import family_fields, family_json, held_fields, held_json, row_fields, row_json
from forebay_tools.snapshots import all_snapshots
from forebay_wire.messages import GetHeld, GetVolume, Held, Volume


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "info", run, "tell what the store knows of a volume and its family")
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
        snapshots = await all_snapshots(client, arguments.name) if answer.row.snapshots else []
    if arguments.json:
        say_json(
            {
                **row_json(answer.row),
                **family_json(snapshots),
                "held": held_json(held.report, answer.row.version),
                "lost": held_json(held.lost, held.lost_from),
            }
        )
    else:
        family = family_fields(answer.row, snapshots)
        say_fields({**row_fields(answer.row), **family, **held_fields(answer.row, held)})
    return 0

"""`forebay snapshot list`: the snapshots of a volume."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_json, add_run_dir, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.holder import attached_here
from forebay_tools.printing import say_json, say_table
from forebay_tools.snapshots import HEAD, all_snapshots, pending_cells, pending_json, snapshot_cells, snapshot_json


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "list the snapshots of a volume, with the space that deleting each would free"
    parser = add_command(commands, "list", run, text)
    add_volume(parser)
    add_json(parser)
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the store, and the daemon of the run directory for those on their way, and print."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    # The daemon first: what it sends to the store meanwhile is then in both lists, not in neither.
    volume = await attached_here(arguments, arguments.name)
    async with store_client(arguments) as client:
        rows = await all_snapshots(client, arguments.name)
    stored = {row.name for row in rows}
    pending = [name for name in volume.pending_snapshots if name not in stored] if volume is not None else []
    if arguments.json:
        say_json([*map(snapshot_json, rows), *pending_json(arguments.name, pending)])
    else:
        say_table(HEAD, [*map(snapshot_cells, rows), *map(pending_cells, pending)])
    return 0

"""`forebay volume export`: write a volume or snapshot as a sparse raw image, or what changed in it as qcow2."""

import argparse
from pathlib import Path

from forebay_tools.arguments import Commands, add_command, add_store, add_volume_or_snapshot, snapshot_name
from forebay_tools.connect import store_client
from forebay_tools.exporter import export_view
from forebay_tools.increment import export_increment
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import say


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "write what the store has of a volume or snapshot as a sparse raw image, or what changed in it as qcow2"
    parser = add_command(commands, "export", run, text)
    add_volume_or_snapshot(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="file to make, or block device to overwrite")
    parser.add_argument(
        "--since", metavar="SNAP", type=snapshot_name, help="only what changed since this snapshot of it, as qcow2"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export the volume; when it fails or is interrupted, no half file is left."""
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    name, path, force = arguments.name, arguments.file, arguments.force
    async with store_client(arguments) as client:
        if arguments.since is None:
            summary = await export_view(client, name, path, force=force)
        else:
            summary = await export_increment(client, name, arguments.since, path, force=force)
    say(f"{path}: {summary}")
    return 0

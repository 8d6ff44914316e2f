"""`forebay volume export`: write a volume as a sparse raw image."""

import argparse
from pathlib import Path

from forebay_tools.arguments import Commands, add_command, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.exporter import export_volume
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import say


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "export", run, "write what the store has of a volume as a sparse raw image")
    add_volume(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="file to make, or block device to overwrite")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export the volume; when it fails or is interrupted, no half file is left."""
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        summary = await export_volume(client, arguments.name, arguments.file, force=arguments.force)
    say(f"{arguments.file}: {summary}")
    return 0

"""`forebay volume import`: make a volume of a raw or qcow2 image."""

import argparse
from pathlib import Path

from forebay_tools.arguments import Commands, add_command, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.importer import import_image
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import say
from forebay_tools.source import FORMATS


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "import", run, "make a volume of a raw or qcow2 image")
    add_volume(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="image file or block device")
    parser.add_argument("--format", choices=FORMATS, help="what FILE is; else its first bytes tell")
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Import the image; when it fails or is interrupted, no volume is left."""
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        summary = await import_image(client, arguments.name, arguments.file, arguments.format)
    say(f"volume {arguments.name}: {summary}")
    return 0
